// rope.c - rotary positions (Su et al., "RoFormer"), and the store of keys and values into the cache. The
// rope table (cosine and sine of each angle of a token) is computed once and used by all heads of all layers.
// Each thread takes consecutive rows.
#include "tile.h"

#include <math.h>

typedef struct run {
    int64_t first, end;
} run;

static run rows_of(const struct ggml_tensor * x, int ith, int nth) {
    return (run) { x->ne[1] * ith / nth, x->ne[1] * (ith + 1) / nth };
}

static char * row_of(const struct ggml_tensor * x, int64_t row) {
    return (char *) x->data + (size_t) row * x->nb[1];
}

void KERNEL(rope_table)(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    const int32_t * positions = dst->src[0]->data;
    const float * divisors = dst->src[1]->data;
    const run rows = rows_of(dst, ith, nth);
    for (int64_t t = rows.first; t < rows.end; t++) {
        float * entry = (float *) (void *) row_of(dst, t);
        for (int64_t i = 0; i < dst->ne[0] / 2; i++) {
            const float angle = (float) positions[t] / divisors[i];
            entry[2 * i] = cosf(angle);
            entry[2 * i + 1] = sinf(angle);
        }
    }
}

// The entries of pair i of a head are step * i and step * i + apart.
INLINE void rotate_pairs(struct ggml_tensor * dst, int ith, int nth, const int64_t step,
                         const int64_t apart) {
    const struct ggml_tensor *x = dst->src[0], *table = dst->src[1];
    const int64_t head_dim = table->ne[0];
    const run rows = rows_of(dst, ith, nth);
    for (int64_t t = rows.first; t < rows.end; t++) {
        const float * from = (const float *) (void *) row_of(x, t);
        const float * angle = (const float *) (void *) row_of(table, t); // cosine and sine
        float * to = (float *) (void *) row_of(dst, t);
        for (int64_t head = 0; head < dst->ne[0]; head += head_dim) {
            for (int64_t i = 0; i < head_dim / 2; i++) {
                const int64_t at = head + step * i;
                const float a = from[at], b = from[at + apart];
                to[at] = a * angle[2 * i] - b * angle[2 * i + 1];
                to[at + apart] = a * angle[2 * i + 1] + b * angle[2 * i];
            }
        }
    }
}

void KERNEL(rope)(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    rotate_pairs(dst, ith, nth, 2, 1);
}

void KERNEL(rope_neox)(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    rotate_pairs(dst, ith, nth, 1, dst->src[1]->ne[0] / 2);
}

// Rounded to the nearest, ties to even, denormals included, without a branch: adding a power of two that
// depends on the exponent shifts the bits that f16 lacks out of the sum. ggml's own row function is scalar.
static void to_f16(const float * from, uint16_t * to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits, twice, shift, sum;
        memcpy(&bits, &from[i], 4);
        twice = bits + bits;
        shift = twice & 0xFF000000u;
        shift = ((shift < 0x71000000u ? 0x71000000u : shift) >> 1) + 0x07800000u;
        float power, base = fabsf(from[i]) * 0x1p112f * 0x1p-110f; // too large for f16: infinite
        memcpy(&power, &shift, 4);
        power += base;
        memcpy(&sum, &power, 4);
        const uint32_t finite = (sum >> 13 & 0x7C00u) + (sum & 0x0FFFu);
        to[i] = (uint16_t) ((bits >> 16 & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : finite));
    }
}

static bool is_finite(const float * x, int64_t n) {
    float wrong = 0.0f; // NaN as soon as one is not
    for (int64_t i = 0; i < n; i++) wrong += x[i] * 0.0f;
    return wrong == 0.0f;
}

void KERNEL(store)(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    const struct ggml_tensor * x = dst->src[1];
    const int64_t * cells = dst->src[2]->data;
    const int64_t n = x->ne[0];
    const ggml_from_float_t from_float = ggml_get_type_traits(dst->type)->from_float_ref;
    const run rows = rows_of(x, ith, nth);
    for (int64_t t = rows.first; t < rows.end; t++) {
        const float * from = (const float *) (void *) row_of(x, t);
        void * to = row_of(dst, cells[t]);
        if (dst->type == GGML_TYPE_F32) memcpy(to, from, (size_t) n * sizeof *from);
        else if (dst->type == GGML_TYPE_F16) to_f16(from, to, n);
        else if (is_finite(from, n)) from_float(from, to, n);
        else memset(to, 0xFF, ggml_row_size(dst->type, n)); // scales of NaN: quantising would hide the NaN
    }
}
