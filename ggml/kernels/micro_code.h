// micro_code.h - the loops of a micro table over the vector operations of one simd_*.h. A file that includes
// both names its table with MICRO and is compiled for its instruction set. Functions are static: the same
// names exist once per set.
#pragma once

#include "micro.h"

#include <math.h>
#include <string.h>

#define ROUND8_TOP  127.0f
#define ROUND16_TOP 2000.0f // times the largest weight (q6_k: 32 * 127) times 256 inputs: below 2^31
#define PANEL16_TOP 4190.0f               // likewise

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));

// What the file has in a block.
typedef struct block_q4_0 { uint16_t d; uint8_t q[16]; } block_q4_0;
typedef struct block_q8_0 { uint16_t d; int8_t q[32]; } block_q8_0;
typedef struct block_q4_k { uint16_t d, min; uint8_t scales[12], q[128]; } block_q4_k;
typedef struct block_q5_k { uint16_t d, min; uint8_t scales[12], high[32], q[128]; } block_q5_k;
typedef struct block_q6_k { uint8_t low[128], high[64]; int8_t scales[16]; uint16_t d; } block_q6_k;

INLINE float half(uint16_t h) {
#if defined(HAS_F16C)
    return _cvtsh_ss(h);
#else
    return ggml_fp16_to_fp32(h);
#endif
}

// The 8 scales and 8 minima of 6 bits each in 12 bytes.
typedef struct bytes_k { uint8_t scale[8], min[8]; } bytes_k;

INLINE bytes_k bytes_of(const uint8_t * p) {
    uint32_t w[3], out[4];
    memcpy(w, p, 12);
    out[0] = w[0] & 0x3F3F3F3Fu;
    out[1] = (w[2] & 0x0F0F0F0Fu) | ((w[0] >> 2) & 0x30303030u);
    out[2] = w[1] & 0x3F3F3F3Fu;
    out[3] = ((w[2] >> 4) & 0x0F0F0F0Fu) | ((w[1] >> 2) & 0x30303030u);
    bytes_k s;
    memcpy(&s, out, 16);
    return s;
}

// 32 numbers of q6_k: part j (0..3) of half h.
INLINE b32 q6_k_part(const block_q6_k * b, int h, int j) {
    b32 low = b32_load(b->low + 64 * h + 32 * (j & 1));
    return b32_or(j < 2 ? b32_low(low) : b32_high(low), b32_bits(b32_load(b->high + 32 * h), 2 * j, 3));
}

// d numbers of a type as f32; a pointer to them where they are f32 already.
INLINE const float * floats_of(const char * from, enum ggml_type type, int d, float * to) {
    if (type == GGML_TYPE_F32) return (const float *) (const void *) from;
    if (type == GGML_TYPE_F16 && d % LANES == 0) {
        for (int k = 0; k < d; k += LANES) vf_store(to + k, vf_of_f16(from + 2 * k));
        return to;
    }
    if (type == GGML_TYPE_Q8_0) {
        for (int g = 0; g < d / GROUP; g++) {
            const block_q8_0 * b = (const block_q8_0 *) (const void *) from + g;
            const vf scale = vf_set(half(b->d));
            for (int k = 0; k < GROUP; k += LANES)
                vf_store(to + g * GROUP + k, vf_mul(vf_of_i8(b->q + k), scale));
        }
        return to;
    }
    ggml_get_type_traits(type)->to_float(from, to, d);
    return to;
}

// -------------------------------------------------------------------------------------- activations

// NaN where a number of the block is not finite (their difference is), so that the result is, too.
INLINE float top_of(const float * x, int n) {
    vf top = vf_set(0.0f), wrong = vf_set(0.0f);
    for (int k = 0; k < n; k += LANES) {
        top = vf_max_abs(top, vf_load(x + k));
        wrong = vf_fma(vf_load(x + k), vf_set(0.0f), wrong);
    }
    return vf_top(top) + vf_sum(wrong);
}

static void round8(const float * x, int64_t n_in, char * out) {
    const rounded8 at = rounded8_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const int n = (int) (n_in - k0 < BLOCK ? n_in - k0 : BLOCK);
        const float top = top_of(x + k0, n), inverse = top > 0.0f ? ROUND8_TOP / top : 0.0f;
        const float scale = top / ROUND8_TOP;
        int32_t total = 0;
        for (int part = 0; part < n; part += 16) {
            vi sum = vi_zero();
            for (int k = part; k < part + 16; k += LANES) {
                vi q = vi_round(vf_mul(vf_load(x + k0 + k), vf_set(inverse)));
                vi_store8(out + k0 + k, q);
                sum = vi_add(sum, q);
            }
            const int32_t n_here = vi_sum(sum);
            const float scaled = (float) n_here * scale;
            memcpy(out + at.parts + (k0 + part) / 16 * 4, &scaled, 4);
            total += n_here;
        }
        memcpy(out + at.scales + k0 / BLOCK * 4, &scale, 4);
        memcpy(out + at.sums + k0 / BLOCK * 4, &total, 4);
    }
}

// As round8 for whole blocks, in the order of K types' dots (dot_k_n): of each 64, 8 from here, 8 from there.
static const uint8_t DEALT[4][2] = { { 0, 40 }, { 8, 32 }, { 16, 56 }, { 24, 48 } };

static void round_k(const float * x, int64_t n_in, char * out) {
    round8(x, n_in, out);
    for (int64_t b = 0; b < n_in / BLOCK; b++) {
        char natural[BLOCK];
        memcpy(natural, out + b * BLOCK, BLOCK);
        for (int i = 0; i < 32; i++)
            memcpy(out + b * BLOCK + 8 * i, natural + 64 * (i / 2 % 4) + DEALT[i / 8][i % 2], 8);
    }
}

static void round16(const float * x, int64_t n_in, char * out) {
    const rounded16 at = rounded16_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const int n = (int) (n_in - k0 < BLOCK ? n_in - k0 : BLOCK);
        const float top = top_of(x + k0, n), inverse = top > 0.0f ? ROUND16_TOP / top : 0.0f;
        const float scale = top / ROUND16_TOP;
        for (int g = 0; g < n; g += GROUP) {
            vi sum = vi_zero();
            for (int k = g; k < g + GROUP; k += LANES) {
                vi q = vi_round(vf_mul(vf_load(x + k0 + k), vf_set(inverse)));
                vi_store16(out + 2 * (k0 + k), q);
                sum = vi_add(sum, q);
            }
            const float total = (float) vi_sum(sum) * scale;
            memcpy(out + at.sums + (k0 + g) / GROUP * 4, &total, 4);
        }
        memcpy(out + at.scales + k0 / BLOCK * 4, &scale, 4);
    }
}

// ------------------------------------------------------------------------------------------- norms

static void rms_norm(const float * x, const float * w, float eps, int64_t n, float * out) {
    vf squares = vf_set(0.0f);
    for (int64_t k = 0; k < n; k += LANES) squares = vf_fma(vf_load(x + k), vf_load(x + k), squares);
    const vf scale = vf_set(1.0f / sqrtf(vf_sum(squares) / (float) n + eps));
    for (int64_t k = 0; k < n; k += LANES)
        vf_store(out + k, vf_mul(vf_mul(vf_load(x + k), scale), vf_load(w + k)));
}

static void layer_norm(const float * x, const float * w, const float * b, float eps, int64_t n, float * out) {
    const vf one = vf_set(1.0f);
    vf sum = vf_set(0.0f), squares = sum;
    for (int64_t k = 0; k < n; k += LANES) sum = vf_fma(vf_load(x + k), one, sum);
    const vf mean = vf_set(vf_sum(sum) / (float) n);
    for (int64_t k = 0; k < n; k += LANES) {
        const vf centred = vf_fnma(mean, one, vf_load(x + k));
        squares = vf_fma(centred, centred, squares);
        vf_store(out + k, centred);
    }
    const vf scale = vf_set(1.0f / sqrtf(vf_sum(squares) / (float) n + eps));
    for (int64_t k = 0; k < n; k += LANES)
        vf_store(out + k, vf_fma(vf_mul(vf_load(out + k), scale), vf_load(w + k), vf_load(b + k)));
}

// ------------------------------------------------------------------------------- panels of weights

// How a row's block becomes int8: number q of its 16 inputs p (p = 0 .. 15) becomes a_p (q - minus) + b_p,
// rounded. These ranges are found for all rows first, so that one row's divisions wait beside another's.
typedef struct range {
    float   a[16], b[16];
    int16_t fixed_a[16], fixed_b[16];     // for put_fixed
} range;

INLINE float scale_of_top(float top, float * inverse) {
    *inverse = top > 0.0f ? ROUND8_TOP / top : 0.0f;
    return top / ROUND8_TOP;
}

// |q - minus| <= 2^bits. The product keeps 6 binary places: it is off by less than 1 / 100.
INLINE void fix(range * r, int bits) {
    const vf one = vf_set((float) (64 << bits)), places = vf_set(64.0f), half_place = vf_set(32.0f);
    for (int p = 0; p < 16; p += LANES) {
        vi_store16(r->fixed_a + p, vi_round(vf_mul(vf_load(r->a + p), one)));
        vi_store16(r->fixed_b + p, vi_round(vf_fma(vf_load(r->b + p), places, half_place)));
    }
}

INLINE v8 v8_most(v8 a, v8 b) {
    typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));
    const i8 first = a > b;
    return (v8) ((first & (i8) a) | (~first & (i8) b));
}

INLINE v8 v8_abs(v8 x) { return v8_most(x, -x); }

INLINE v16 each_twice(v8 x) {
    return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}

// q4_k and q5_k, whose numbers go up to `most`: bounded by the scales of the groups, without a look at the
// weights themselves.
INLINE float range_45(const void * block, int most, range * r) {
    const block_q4_k * w = block;
    const bytes_k bytes = bytes_of(w->scales);
    float steps[16], lows[16], inverse;
    for (int g = 0; g < 16; g += LANES) {
        const vf numbers = vf_of_i8(bytes.scale + g);                    // scales, then minima
        vf_store(steps + g, vf_mul(numbers, vf_set(half(w->d))));
        vf_store(lows + g, vf_mul(numbers, vf_set(-half(w->min))));
    }
    v8 step, low;
    memcpy(&step, steps, sizeof step);
    memcpy(&low, lows + 8, sizeof low);
    const v8 tops = v8_most(v8_abs(low), v8_abs(low + (float) most * step));
    float top = 0.0f;
    for (int g = 0; g < 8; g++) top = tops[g] > top ? tops[g] : top;
    const float scale = scale_of_top(top, &inverse);
    v16_store(r->a, each_twice(step * inverse));
    v16_store(r->b, each_twice(low * inverse + (float) W_OFFSET));
    return scale;
}

INLINE float range_6(const block_q6_k * w, range * r) {
    vf most = vf_set(0.0f);
    float inverse;
    for (int p = 0; p < 16; p += LANES) most = vf_max_abs(most, vf_of_i8(w->scales + p));
    const float d = half(w->d), scale = scale_of_top(__builtin_fabsf(d) * 32.0f * vf_top(most), &inverse);
    for (int p = 0; p < 16; p += LANES) {
        vf_store(r->a + p, vf_mul(vf_of_i8(w->scales + p), vf_set(d * inverse)));
        vf_store(r->b + p, vf_set(W_OFFSET));
    }
    return scale;
}

// n / 32 blocks of q8_0 or q4_0, which begin alike, with numbers up to `most`. (-128 does not occur in what
// ggml writes; it would become -128 of 127.)
INLINE float range_0(const char * w, size_t size, int n, int most, range * r) {
    float d[16] = { 0 }, inverse, top = 0.0f;
    for (int p = 0; p < n / 16; p++) {
        uint16_t bits;
        memcpy(&bits, w + (size_t) (p / 2) * size, 2);
        d[p] = half(bits);
        top = __builtin_fabsf(d[p]) > top ? __builtin_fabsf(d[p]) : top;
    }
    const float scale = scale_of_top(top * (float) most, &inverse);
    for (int p = 0; p < 16; p++) r->a[p] = d[p] * inverse, r->b[p] = W_OFFSET;
    return scale;
}

INLINE void put_q4_k(const block_q4_k * w, const range * r, char * out) {
    for (int g = 0; g < 8; g += 2) {
        const b32 q = b32_load(w->q + 16 * g);
        b32_store(out + 32 * g, b32_table(b32_low(q), r->a[2 * g], r->b[2 * g]));
        b32_store(out + 32 * g + 32, b32_table(b32_high(q), r->a[2 * g + 2], r->b[2 * g + 2]));
    }
}

INLINE void put32(b32 q, int minus, int bits, const range * r, int p, char * out) {
    put_fixed(q, minus, 15 - bits, r->fixed_a + p, r->fixed_b + p, out + 16 * p);
}

INLINE void put_q5_k(const block_q5_k * w, const range * r, char * out) {
    const b32 high = b32_load(w->high);
    for (int g = 0; g < 8; g++) {
        const b32 q = b32_load(w->q + 16 * (g & ~1));
        put32(b32_or(g & 1 ? b32_high(q) : b32_low(q), b32_bits(high, g, 1)), 0, 5, r, 2 * g, out);
    }
}

INLINE void put_q6_k(const block_q6_k * w, const range * r, char * out) {
    for (int g = 0; g < 8; g++) put32(q6_k_part(w, g / 4, g % 4), 32, 5, r, 2 * g, out);
}

INLINE void put_q8_0(const block_q8_0 * w, int n, const range * r, char * out) {
    for (int g = 0; g < n / GROUP; g++) put32(b32_load(w[g].q), 0, 7, r, 2 * g, out);
}

INLINE void put_q4_0(const block_q4_0 * w, int n, const range * r, char * out) {
    for (int g = 0; g < n / GROUP; g++) {
        const b32 q = b32_two(w[g].q);
        put32(b32_halves(b32_low(q), b32_high(q)), 8, 3, r, 2 * g, out);
    }
}

// Any type, through f32.
static float put_any(enum ggml_type type, const char * w, int n, char * out) {
    float x[BLOCK], inverse;
    if (type == GGML_TYPE_F32) memcpy(x, w, (size_t) n * sizeof *x);
    else ggml_get_type_traits(type)->to_float(w, x, n);
    const float scale = scale_of_top(top_of(x, n), &inverse);
    for (int k = 0; k < n; k += LANES)
        vi_store8(out + k, vi_round(vf_fma(vf_load(x + k), vf_set(inverse), vf_set(W_OFFSET))));
    return scale;
}

// The ranges of all rows and their scales.
INLINE void find_ranges(enum ggml_type type, const char * w, size_t row_size, int n_rows, int n_k, range * r,
                        float * scales) {
    for (int i = 0; i < ROWS; i++, r++) {
        const char * row = w + (i < n_rows ? (size_t) i * row_size : 0);
        switch (type) {
        case GGML_TYPE_Q4_K: scales[i] = range_45(row, 15, r); break;
        case GGML_TYPE_Q5_K: scales[i] = range_45(row, 31, r), fix(r, 5); break;
        case GGML_TYPE_Q6_K: scales[i] = range_6((const void *) row, r), fix(r, 5); break;
        case GGML_TYPE_Q8_0: scales[i] = range_0(row, sizeof(block_q8_0), n_k, 127, r), fix(r, 7); break;
        case GGML_TYPE_Q4_0: scales[i] = range_0(row, sizeof(block_q4_0), n_k, 8, r), fix(r, 3); break;
        default: break;
        }
    }
}

static void pack8(enum ggml_type type, const char * w, size_t row_size, int n_rows, int n_k, char * panel,
                  float * scales) {
    _Alignas(64) char rows[ROWS * BLOCK];
    range ranges[ROWS];
    find_ranges(type, w, row_size, n_rows, n_k, ranges, scales);
    for (int i = 0; i < ROWS; i++) {
        const char * row = w + (i < n_rows ? (size_t) i * row_size : 0);
        char * to = rows + i * BLOCK;
        switch (type) {
        case GGML_TYPE_Q4_K: put_q4_k((const void *) row, &ranges[i], to); break;
        case GGML_TYPE_Q5_K: put_q5_k((const void *) row, &ranges[i], to); break;
        case GGML_TYPE_Q6_K: put_q6_k((const void *) row, &ranges[i], to); break;
        case GGML_TYPE_Q8_0: put_q8_0((const void *) row, n_k, &ranges[i], to); break;
        case GGML_TYPE_Q4_0: put_q4_0((const void *) row, n_k, &ranges[i], to); break;
        default: scales[i] = put_any(type, row, n_k, to);
        }
    }
    transpose(rows, BLOCK, (int) round_up((size_t) n_k / 4, 16), panel);
}

// A row's block as int16; its scale.
static float put16(enum ggml_type type, const char * w, int n, char * out) {
    float x[BLOCK];
    const float * from = floats_of(w, type, n, x);
    const float top = top_of(from, n), inverse = top > 0.0f ? PANEL16_TOP / top : 0.0f;
    for (int k = 0; k < n; k += LANES)
        vi_store16(out + 2 * k, vi_round(vf_mul(vf_load(from + k), vf_set(inverse))));
    return top / PANEL16_TOP;
}

static void pack16(enum ggml_type type, const char * w, size_t row_size, int n_rows, int n_k, char * panel,
                   float * scales) {
    _Alignas(64) char rows[2 * ROWS * BLOCK];
    for (int r = 0; r < ROWS; r++)
        scales[r] = put16(type, w + (r < n_rows ? (size_t) r * row_size : 0), n_k, rows + 2 * r * BLOCK);
    transpose(rows, 2 * BLOCK, n_k / 2, panel);
}

// ------------------------------------------------------------------------------------ many tokens

INLINE int32_t int_at(const char * p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

INLINE float float_at(const char * p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}

// A full tile of TOKENS tokens, two vectors of rows each. Named accumulators: as an array, compilers spill
// them.
#define START(j, i)     vi a##i = vi_set(-OFFSET * (OFFSET ? int_at(x_sums + i * stride) : 0)), b##i = a##i;
#define STEP(j, i)                                                                                           \
    {                                                                                                        \
        const vi v = vi_set(int_at(base##j + (i - 3 * j) * stride));                                         \
        DOT(a##i, w0, v);                                                                                    \
        DOT(b##i, w1, v);                                                                                    \
    }
#define END(j, i)                                                                                            \
    {                                                                                                        \
        const vf s = vf_set(float_at(x_scales + i * stride));                                                \
        float * out = y + i * ROWS;                                                                          \
        vf_store(out, vf_fma(vf_of(a##i), vf_mul(s0, s), vf_load(out)));                                     \
        vf_store(out + LANES, vf_fma(vf_of(b##i), vf_mul(s1, s), vf_load(out + LANES)));                     \
    }

// n_dwords: groups of 4 bytes (int8: 4 numbers, int16: 2).
#define DEFINE_MULTIPLY(name)                                                                                \
    static __attribute__((noinline)) void name##_tile(                                                       \
        int n_dwords, const char * panel, const float * w_scales, const char * x, const char * x_scales,     \
        const char * x_sums, size_t stride, float * y) {                                                     \
        const char *base0 = x, *base1 = x + 3 * stride, *base2 = x + 6 * stride, *base3 = x + 9 * stride;    \
        (void)base2, (void)base3, (void)x_sums;                                                              \
        EACH_TOKEN(START)                                                                                    \
        for (int k = 0; k < n_dwords; k++) {                                                                 \
            const vi w0 = vi_load(panel), w1 = vi_load(panel + 2 * ROWS);                                    \
            panel += 4 * ROWS;                                                                               \
            EACH_TOKEN(STEP)                                                                                 \
            base0 += 4, base1 += 4, base2 += 4, base3 += 4;                                                  \
        }                                                                                                    \
        const vf s0 = vf_load(w_scales), s1 = vf_load(w_scales + LANES);                                     \
        EACH_TOKEN(END)                                                                                      \
    }                                                                                                        \
    INLINE void name##_tail(const int n, int n_dwords, const char * panel, const float * w_scales,           \
                            const char * x, const char * x_scales, const char * x_sums, size_t stride,       \
                            float * y) {                                                                     \
        vi a[4], b[4];                                                                                       \
        (void)x_sums;                                                                                        \
        _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) a[i] = b[i] =                                    \
            vi_set(-OFFSET * (OFFSET ? int_at(x_sums + i * stride) : 0));                                    \
        for (int k = 0; k < n_dwords; k++) {                                                                 \
            const vi w0 = vi_load(panel + 4 * k * ROWS), w1 = vi_load(panel + 4 * k * ROWS + 2 * ROWS);      \
            _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) {                                            \
                const vi v = vi_set(int_at(x + i * stride + 4 * k));                                         \
                DOT(a[i], w0, v);                                                                            \
                DOT(b[i], w1, v);                                                                            \
            }                                                                                                \
        }                                                                                                    \
        const vf s0 = vf_load(w_scales), s1 = vf_load(w_scales + LANES);                                     \
        _Pragma("GCC unroll 4") for (int i = 0; i < n; i++) {                                                \
            const vf s = vf_set(float_at(x_scales + i * stride));                                            \
            float * out = y + i * ROWS;                                                                      \
            vf_store(out, vf_fma(vf_of(a[i]), vf_mul(s0, s), vf_load(out)));                                 \
            vf_store(out + LANES, vf_fma(vf_of(b[i]), vf_mul(s1, s), vf_load(out + LANES)));                 \
        }                                                                                                    \
    }                                                                                                        \
    static void name(int n, int n_k, const char * panel, const float * w_scales, const char * x,             \
                     const char * x_scales, const char * x_sums, size_t stride, float * y) {                 \
        const int n_dwords = n_k * NUMBER_SIZE / 4;                                                          \
        int i = 0;                                                                                           \
        size_t at = 0;                                                                                       \
        for (; i + TOKENS <= n; i += TOKENS, at = (size_t)i * stride)                                        \
            name##_tile(n_dwords, panel, w_scales, x + at, x_scales + at, x_sums + at, stride,               \
                        y + i * ROWS);                                                                       \
        for (; i + 4 <= n; i += 4, at = (size_t)i * stride)                                                  \
            name##_tail(4, n_dwords, panel, w_scales, x + at, x_scales + at, x_sums + at, stride,            \
                        y + i * ROWS);                                                                       \
        for (; i < n; i++, at = (size_t)i * stride)                                                          \
            name##_tail(1, n_dwords, panel, w_scales, x + at, x_scales + at, x_sums + at, stride,            \
                        y + i * ROWS);                                                                       \
    }

#define OFFSET      W_OFFSET
#define NUMBER_SIZE 1
#define DOT         DOT4
DEFINE_MULTIPLY(multiply8)
#undef OFFSET
#undef NUMBER_SIZE
#undef DOT
#define OFFSET      0
#define NUMBER_SIZE 2
#define DOT         DOT2
DEFINE_MULTIPLY(multiply16)

#if defined(HAS_BF16)

static void round_bf16(const float * x, int64_t n, uint16_t * out) {
    for (int64_t k = 0; k < n; k += 32) store_bf16(out + k, vf_load(x + k), vf_load(x + k + 16));
}

static __attribute__((noinline)) void tile_bf16(int n_k, const char * panel, const char * x, size_t stride,
                                                float * y) {
    const char * base0 = x, * base1 = x + 3 * stride, * base2 = x + 6 * stride, * base3 = x + 9 * stride;
#define START_BF16(j, i) vf a##i = vf_load(y + i * ROWS), b##i = vf_load(y + i * ROWS + LANES);
    EACH_TOKEN(START_BF16)
    for (int k = 0; k < n_k; k += 2) {
        const vi w0 = vi_load(panel), w1 = vi_load(panel + 2 * ROWS);
        panel += 4 * ROWS;
#define STEP_BF16(j, i)                                                                                      \
    {                                                                                                        \
        const vi v = vi_set(int_at(base##j + (i - 3 * j) * stride));                                         \
        DOT_BF16(a##i, w0, v);                                                                               \
        DOT_BF16(b##i, w1, v);                                                                               \
    }
        EACH_TOKEN(STEP_BF16)
        base0 += 4, base1 += 4, base2 += 4, base3 += 4;
    }
#define END_BF16(j, i) vf_store(y + i * ROWS, a##i), vf_store(y + i * ROWS + LANES, b##i);
    EACH_TOKEN(END_BF16)
}

INLINE void tail_bf16(const int n, int n_k, const char * panel, const char * x, size_t stride, float * y) {
    vf a[4], b[4];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) a[i] = vf_load(y + i * ROWS), b[i] = vf_load(y + i * ROWS + LANES);
    for (int k = 0; k < n_k; k += 2) {
        const vi w0 = vi_load(panel + 2 * k * ROWS), w1 = vi_load(panel + 2 * k * ROWS + 2 * ROWS);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const vi v = vi_set(int_at(x + i * stride + 2 * k));
            DOT_BF16(a[i], w0, v);
            DOT_BF16(b[i], w1, v);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) vf_store(y + i * ROWS, a[i]), vf_store(y + i * ROWS + LANES, b[i]);
}

static void multiply_bf16(int n, int n_k, const char * panel, const char * x, size_t stride, float * y) {
    int i = 0;
    for (; i + TOKENS <= n; i += TOKENS) tile_bf16(n_k, panel, x + i * stride, stride, y + i * ROWS);
    for (; i + 4 <= n; i += 4) tail_bf16(4, n_k, panel, x + i * stride, stride, y + i * ROWS);
    for (; i < n; i++) tail_bf16(1, n_k, panel, x + i * stride, stride, y + i * ROWS);
}

#endif

// ---------------------------------------------------------------------------------- ends of tiles

INLINE v16 sigmoid(v16 x) { // 1 / (1 + e^-x)
    const v16 most = v16_set(88.0f), y = -x;
    return 1.0f / (1.0f + v16_exp((v16) (((vi16) y & (y < most)) | ((vi16) most & ~(y < most)))));
}

INLINE v16 ended(linear_end end, v16 y, v16 up) {
    switch (end) {
    case END_SILU: return y * sigmoid(y);
    case END_QUICK_GELU: return y * sigmoid(1.702f * y);
    case END_SWIGLU: return y * sigmoid(y) * up;
    default: return y;
    }
}

INLINE void end_row(const tile_end * e, const linear_end end, int n_rows, const float * y, const float * up,
                    size_t at) {
    for (int r = 0; r < n_rows; r += 16) {
        const int n = n_rows - r < 16 ? n_rows - r : 16;
        v16 v = v16_load(y + r);
        if (e->bias && n == 16) v += v16_load(e->bias + r);
        else if (e->bias) {
            for (int i = 0; i < n; i++) v[i] += e->bias[r + i];
        }
        v16 other = v;
        if (up) other = v16_load(up + r);
        v = ended(end, v, other);
        if (n == 16) {
            if (e->residual) v += v16_load(e->residual + at + r);
            if (e->stream) v16_stream(e->to + at + r, v);
            else v16_store(e->to + at + r, v);
            continue;
        }
        for (int i = 0; i < n; i++) e->to[at + r + i] = v[i] + (e->residual ? e->residual[at + r + i] : 0.0f);
    }
}

static void end_tile(const tile_end * e, int n, int n_rows, const float * y, const float * up,
                     size_t y_stride) {
    for (int t = 0; t < n; t++) {
        const float * sums = y + t * y_stride, * others = up ? up + t * y_stride : NULL;
        switch (e->end) {
        case END_SILU: end_row(e, END_SILU, n_rows, sums, NULL, t * e->stride); break;
        case END_QUICK_GELU: end_row(e, END_QUICK_GELU, n_rows, sums, NULL, t * e->stride); break;
        case END_SWIGLU: end_row(e, END_SWIGLU, n_rows, sums, others, t * e->stride); break;
        default: end_row(e, END_PLAIN, n_rows, sums, NULL, t * e->stride);
        }
    }
}

// ------------------------------------------------------------------------------------- few tokens

#if defined(COMPACT) // one loop for any number of tokens: small and quickly compiled
#define BY_COUNT(name)                                                                                       \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        for (int r = 0; r < n_rows; r++)                                                                     \
            name##_n(n, n_in, w + (size_t)r * row_size, x, stride, out + r * FEW_TOKENS);                    \
    }
#else
// Each dot_* takes a constant n; BY_COUNT makes one loop over rows for every count and chooses.
#define BY_COUNT(name)                                                                                       \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        switch (n) {                                                                                         \
            ROWS_OF(name, 1)                                                                                 \
            ROWS_OF(name, 2)                                                                                 \
            ROWS_OF(name, 3)                                                                                 \
            ROWS_OF(name, 4)                                                                                 \
            ROWS_OF(name, 5)                                                                                 \
            ROWS_OF(name, 6)                                                                                 \
            ROWS_OF(name, 7)                                                                                 \
            ROWS_OF(name, 8)                                                                                 \
        }                                                                                                    \
    }
#define ROWS_OF(name, count)                                                                                 \
    case count:                                                                                              \
        for (int r = 0; r < n_rows; r++)                                                                     \
            name##_n(count, n_in, w + (size_t)r * row_size, x, stride, out + r * FEW_TOKENS);                \
        break;
#endif
#define EACH(i) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

INLINE const int16_t * numbers16(const char * x, size_t stride, int i, int64_t k) {
    return (const int16_t *) (const void *) (x + i * stride) + k;
}

INLINE void finish(const int n, const vf * acc, float * out) { EACH(i) out[i] = vf_sum(acc[i]); }

// K types: a block's 256 weights q of at most 6 bits as four vectors of 64 bytes, dealt so that the lanes of
// vectors 0 and 1 belong to the same groups of 16, and those of 2 and 3, so that their products can be added
// before they are scaled. In each 16 bytes i of a vector lie 8 weights from 64 i + first and 8 from 64 i +
// second (DEALT), as the rounded activations do. With low_p the constant of group p,
//   w . x = x_scale sum_p scale_p (q . x)_p - sum_p low_p sum(x)_p .
// q4_k and q5_k have one scale and constant for two groups of 16: all four vectors share theirs.
#define PARTS (16 / LANES)                // vectors that 64 bytes take

typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef struct weights_k {
    vi q[4][PARTS];
    scales_k s;
} weights_k;

static const uint32_t NIBBLE_45[16] = { 0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4 };
static const uint32_t NIBBLE_6[16]  = { 0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4 };
static const uint32_t BIT_5[16]     = { 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7 };
static const uint32_t BITS_6[16]    = { 0, 0, 2, 2, 4, 4, 6, 6, 0, 0, 2, 2, 4, 4, 6, 6 };

INLINE vu vu_load(const void * p) { return *(const vu *) p; }
INLINE vu each_byte(vu x, uint32_t mask) { return x & (mask * 0x01010101u); }

INLINE void unpack_45(const char * w, const int bits, weights_k * out) {
    const block_q4_k * b4 = (const void *) w;
    const block_q5_k * b5 = (const void *) w;
    scales_of_45(w, &out->s);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const vu nibble = vu_load(NIBBLE_45 + LANES * p), bit = vu_load(BIT_5 + LANES * p);
        vi dealt[2];
        deal((bits == 4 ? b4->q : b5->q) + 8 * LANES * p, &dealt[0], &dealt[1]);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vu a = each_byte((vu) dealt[j] >> nibble, 15), b = each_byte((vu) swap(dealt[j]) >> nibble, 15);
            if (bits == 5) {
                const vi fifth = to_all(b5->high + 16 * j);
                a |= each_byte((vu) fifth >> bit, 1) << 4;
                b |= each_byte((vu) swap(fifth) >> bit, 1) << 4;
            }
            out->q[2 * j][p] = (vi) a;
            out->q[2 * j + 1][p] = (vi) b;
        }
    }
}

INLINE void unpack_6(const char * w, weights_k * out) {
    const block_q6_k * b = (const void *) w;
    scales_of_6(b->scales, b->d, &out->s);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const vu nibble = vu_load(NIBBLE_6 + LANES * p), bits = vu_load(BITS_6 + LANES * p);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const vi top = twice(b->high + 16 * j, 32, p);
            const vi low = twice(b->low + 16 * j, 64, p), high = twice(b->low + 32 + 16 * j, 64, p);
            out->q[2 * j][p] = (vi) (each_byte((vu) outer(low, high) >> nibble, 15) |
                                     each_byte((vu) top >> bits, 3) << 4);
            out->q[2 * j + 1][p] = (vi) (each_byte((vu) inner(low, high) >> nibble, 15) |
                                         each_byte((vu) swap(top) >> bits, 3) << 4);
        }
    }
}

#define PREFETCH 2048                     // bytes ahead: hardware stops at each page

INLINE void dot_k_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride, float * out,
                    const int bits, const size_t size) {
    const rounded8 at = rounded8_of(n_in);
    vf acc[FEW_TOKENS] = { vf_set(0.0f) };
    for (int64_t b = 0; b < n_in / BLOCK; b++, w += size) {
        weights_k k;
        for (size_t line = 0; line < size; line += 64) __builtin_prefetch(w + PREFETCH + line);
        if (bits == 6) unpack_6(w, &k);
        else unpack_45(w, bits, &k);
        EACH(i) {
            const char * xi = x + i * stride;
            vf sum = vf_set(0.0f);
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                const char * from = xi + b * BLOCK + 4 * LANES * p;
                vi dots = vi_zero();
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    dots = dot_small(dots, k.q[j][p], vi_load(from + 64 * j));
                    if (j == 3 || (j == 1 && bits == 6)) {
                        sum = vf_fma(vf_of(dots), k.s.scale[j / 2][p], sum);
                        dots = vi_zero();
                    }
                }
            }
            acc[i] = vf_fma(sum, vf_set(float_at(xi + at.scales + 4 * b)), acc[i]);
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++)
            {
                const float * sums = (const float *) (const void *) (xi + at.parts + 64 * b) + LANES * p;
                acc[i] = vf_fnma(k.s.low[p], vf_load(sums), acc[i]);
            }
        }
    }
    finish(n, acc, out);
}

INLINE void dot_q4_k_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride,
                       float * out) {
    dot_k_n(n, n_in, w, x, stride, out, 4, sizeof(block_q4_k));
}

INLINE void dot_q5_k_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride,
                       float * out) {
    dot_k_n(n, n_in, w, x, stride, out, 5, sizeof(block_q5_k));
}

INLINE void dot_q6_k_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride,
                       float * out) {
    dot_k_n(n, n_in, w, x, stride, out, 6, sizeof(block_q6_k));
}

INLINE h32 group_of_8_0(const char * block) {
    return h32_of(b32_load(((const block_q8_0 *) (const void *) block)->q));
}

INLINE h32 group_of_4_0(const char * block) {
    const b32 two = b32_two(((const block_q4_0 *) (const void *) block)->q);
    return h32_minus(h32_of(b32_halves(b32_low(two), b32_high(two))), 8);
}

// q8_0 and q4_0: blocks of a group begin with their scale.
INLINE void dot_0_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride, float * out,
                    const int bits, const size_t size) {
    const rounded16 at = rounded16_of(n_in);
    vf acc[FEW_TOKENS] = { vf_set(0.0f) };
    for (int64_t g = 0; g < n_in / GROUP; g++, w += size) {
        const h32 q = bits == 8 ? group_of_8_0(w) : group_of_4_0(w);
        const float d = half(((const block_q8_0 *) (const void *) w)->d);
        EACH(i) {
            const vi sum = dot2(vi_zero(), q, numbers16(x, stride, i, g * GROUP));
            acc[i] = vf_fma(vf_of(sum), vf_set(d * float_at(x + i * stride + at.scales + g / 8 * 4)), acc[i]);
        }
    }
    finish(n, acc, out);
}

INLINE void dot_q8_0_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride,
                       float * out) {
    dot_0_n(n, n_in, w, x, stride, out, 8, sizeof(block_q8_0));
}

INLINE void dot_q4_0_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride,
                       float * out) {
    dot_0_n(n, n_in, w, x, stride, out, 4, sizeof(block_q4_0));
}

INLINE float number(const char * w, int64_t k, int bits) {
    uint16_t h;
    if (bits == 32) return float_at(w + 4 * k);
    memcpy(&h, w + 2 * k, 2);
    if (bits == 16) return half(h);
    const uint32_t f = (uint32_t) h << 16;
    float x;
    memcpy(&x, &f, 4);
    return x;
}

// Floats: bits 32, 16 (f16) or 0 (bf16).
INLINE void dot_floats_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride,
                         float * out, const int bits) {
    vf acc[FEW_TOKENS] = { vf_set(0.0f) };
    int64_t k = 0;
    for (; k + LANES <= n_in; k += LANES) {
        const vf v = bits == 32   ? vf_load((const float *) (const void *) w + k)
                     : bits == 16 ? vf_of_f16(w + 2 * k)
                                  : vf_of_bf16(w + 2 * k);
        EACH(i) acc[i] = vf_fma(v, vf_load((const float *) (const void *) (x + i * stride) + k), acc[i]);
    }
    finish(n, acc, out);
    for (; k < n_in; k++) {
        EACH(i) out[i] += number(w, k, bits) * float_at(x + i * stride + 4 * k);
    }
}

INLINE void dot_f32_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride, float * out) {
    dot_floats_n(n, n_in, w, x, stride, out, 32);
}

INLINE void dot_f16_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride, float * out) {
    dot_floats_n(n, n_in, w, x, stride, out, 16);
}

INLINE void dot_bf16_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride,
                       float * out) {
    dot_floats_n(n, n_in, w, x, stride, out, 0);
}

// -------------------------------------------------------------------------------------- attention

INLINE const char * key_row(const attention_work * a, const char * rows, size_t stride, int position) {
    return rows + (size_t) (a->cells ? a->cells[position] : a->first_row + position) * stride;
}

INLINE float sum_of_16(const float * x) {
    vf sum = vf_set(0.0f);
    for (int i = 0; i < 16; i += LANES) sum = vf_fma(vf_load(x + i), vf_set(1.0f), sum);
    return vf_sum(sum);
}

INLINE v16 v16_most(v16 a, v16 b) {
    const vi16 first = a > b;
    return (v16) ((first & (vi16) a) | (~first & (vi16) b));
}

INLINE float most_of_16(v16 x) {
    x = v16_most(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = v16_most(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
    float m = x[0];
    for (int i = 1; i < 4; i++) m = x[i] > m ? x[i] : m;
    return m;
}

// Scores to weights with the running maximum and sum; gives the factor for what was added up so far.
INLINE float fold(float * s, int n_seen, int n_keys, float * max, float * sum) {
    for (int j = n_seen; j < n_keys; j++) s[j] = -INFINITY;
    v16 top = v16_load(s);
    for (int j = 16; j < n_keys; j += 16) top = v16_most(top, v16_load(s + j));
    const float here = most_of_16(top), m = here > *max ? here : *max;
    const float rescale = *max == m ? 1.0f : *sum > 0.0f ? expf(*max - m) : 0.0f;
    v16 total = v16_set(0.0f);
    for (int j = 0; j < n_keys; j += 16) {
        const v16 p = v16_exp(v16_load(s + j) - m);
        v16_store(s + j, p);
        total += p;
    }
    float totals[16];
    v16_store(totals, total);
    *sum = *sum * rescale + sum_of_16(totals);
    *max = m;
    return rescale;
}

INLINE int seen_by(const attention_work * a, int row, int p0, int n_keys) {
    const int n = a->n_visible[row / a->group] - p0;
    return n < 0 ? 0 : n < n_keys ? n : n_keys;
}

INLINE const float * query_row(const attention_work * a, int row) {
    return a->q + (size_t) (row / a->group) * a->q_stride + (size_t) (row % a->group * a->d);
}

INLINE void write_row(const attention_work * a, int row, const float * out, int at, int n, float sum) {
    float * y = a->y + (size_t) (row / a->group) * a->q_stride + (size_t) (row % a->group * a->d) + at;
    for (int c = 0; c < n; c++) y[c] = out[c] / sum;
}

INLINE int most_visible(const attention_work * a) {
    int most = 0;
    for (int t = 0; t < a->n; t++) most = a->n_visible[t] > most ? a->n_visible[t] : most;
    return most;
}

// Few rows of queries: each key and value is read once, as the cache has it.
INLINE void attend_few_n(const int n, const attention_work * a) {
    const int d = a->d, n_keys = most_visible(a);
    const float scale = 1.0f / sqrtf((float) d);
    _Alignas(64) float q[FEW_TOKENS][MAX_HEAD], out[FEW_TOKENS][MAX_HEAD], row[MAX_HEAD],
        s[FEW_TOKENS][GROUP];
    float max[FEW_TOKENS], sum[FEW_TOKENS], dots[FEW_TOKENS] = { 0 };
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < d; c++) q[i][c] = query_row(a, i)[c] * scale;
        memset(out[i], 0, (size_t) d * sizeof(float));
        max[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    for (int p0 = 0; p0 < n_keys; p0 += GROUP) {
        const int n_here = n_keys - p0 < GROUP ? n_keys - p0 : GROUP;
        for (int j = 0; j < n_here; j++) {
            const float * k = floats_of(key_row(a, a->k, a->k_stride, p0 + j), a->k_type, d, row);
            dot_floats_n(n, d, (const char *) k, (const char *) q, sizeof q[0], dots, 32);
            EACH(i) s[i][j] = dots[i];
        }
        EACH(i) {
            const int n_seen = seen_by(a, i, p0, n_here);
            if (n_seen == 0) {
                memset(s[i], 0, sizeof s[i]);
                continue;
            }
            const float rescale = fold(s[i], n_seen, GROUP, &max[i], &sum[i]);
            if (rescale != 1.0f) {
                for (int c = 0; c < d; c++) out[i][c] *= rescale;
            }
        }
        for (int j = 0; j < n_here; j++) {
            const float * v = floats_of(key_row(a, a->v, a->v_stride, p0 + j), a->v_type, d, row);
            EACH(i) {
                int c = 0;
                for (; c + LANES <= d; c += LANES)
                    vf_store(out[i] + c, vf_fma(vf_set(s[i][j]), vf_load(v + c), vf_load(out[i] + c)));
                for (; c < d; c++) out[i][c] += s[i][j] * v[c];
            }
        }
    }
    for (int i = 0; i < n; i++) write_row(a, i, out[i], 0, d, sum[i]);
}

static void attend_few(const attention_work * a) {
#if defined(COMPACT)
    attend_few_n(a->n * a->group, a);
#else
    switch (a->n * a->group) {
    case 1: attend_few_n(1, a); break;
    case 2: attend_few_n(2, a); break;
    case 3: attend_few_n(3, a); break;
    case 4: attend_few_n(4, a); break;
    case 5: attend_few_n(5, a); break;
    case 6: attend_few_n(6, a); break;
    case 7: attend_few_n(7, a); break;
    default: attend_few_n(8, a);
    }
#endif
}

#if defined(HAS_BF16)

typedef struct many_scratch {
    _Alignas(64) uint16_t q[MAX_QUERIES * MAX_HEAD], weights[MAX_QUERIES * TILE_KEYS];
    uint16_t rows[TILE_KEYS * MAX_HEAD];
    char     panel[2 * TILE_KEYS * MAX_ROWS > 2 * MAX_HEAD * MAX_ROWS ? 2 * TILE_KEYS * MAX_ROWS
                                                                      : 2 * MAX_HEAD * MAX_ROWS];
    float s[TILE_KEYS / MAX_ROWS][MAX_QUERIES * MAX_ROWS], out[MAX_HEAD / MAX_ROWS][MAX_QUERIES * MAX_ROWS];
    float    row[TILE_KEYS], unpacked[MAX_HEAD], max[MAX_QUERIES], sum[MAX_QUERIES];
} many_scratch;

_Static_assert(sizeof(many_scratch) <= ATTEND_SCRATCH, "scratch of attend_many");

// TILE_KEYS rows of the cache in bfloat16; rows beyond n_keys are zero.
INLINE void load_rows(const attention_work * a, const char * from, size_t stride, enum ggml_type type, int p0,
                      int n_keys, many_scratch * s) {
    for (int j = 0; j < TILE_KEYS; j++) {
        uint16_t * to = s->rows + j * a->d;
        if (j >= n_keys) memset(to, 0, 2 * (size_t) a->d);
        else round_bf16(floats_of(key_row(a, from, stride, p0 + j), type, a->d, s->unpacked), a->d, to);
    }
}

INLINE void fold_rows(const attention_work * a, int first, int n_rows, int p0, int n_keys, many_scratch * s) {
    for (int r = first; r < n_rows; r++) {
        uint16_t * weights = s->weights + r * TILE_KEYS;
        const int n_seen = seen_by(a, r, p0, n_keys);
        if (n_seen == 0) {
            memset(weights, 0, 2 * TILE_KEYS);
            continue;
        }
        for (int h = 0; h < TILE_KEYS / ROWS; h++)
            memcpy(s->row + h * ROWS, s->s[h] + r * ROWS, ROWS * sizeof(float));
        const float rescale = fold(s->row, n_seen, TILE_KEYS, &s->max[r], &s->sum[r]);
        round_bf16(s->row, TILE_KEYS, weights);
        for (int c = 0; rescale != 1.0f && c < a->d / ROWS; c++) {
            float * out = s->out[c] + r * ROWS;
            for (int j = 0; j < ROWS; j += LANES)
                vf_store(out + j, vf_mul(vf_load(out + j), vf_set(rescale)));
        }
    }
}

// panel[k / 2][ROWS][2] of columns c .. c + ROWS - 1 of TILE_KEYS rows: neighbouring rows interleaved.
INLINE void value_panel(const many_scratch * s, int d, int c, char * panel) {
    for (int k = 0; k < TILE_KEYS; k += 2) {
        const uint16_t * a = s->rows + k * d + c, * b = a + d;
        uint16_t * out = (uint16_t *) (void *) panel + k * ROWS;
        for (int j = 0; j < ROWS; j++) out[2 * j] = a[j], out[2 * j + 1] = b[j];
    }
}

static void attend_many(const attention_work * a) {
    many_scratch * s = (many_scratch *) (void *) a->scratch;
    const int d = a->d, n_rows = a->n * a->group, n_keys = most_visible(a);
    const float scale = 1.0f / sqrtf((float) d);
    for (int r = 0; r < n_rows; r++) {
        for (int c = 0; c < d; c++) s->unpacked[c] = query_row(a, r)[c] * scale;
        round_bf16(s->unpacked, d, s->q + r * d);
        s->max[r] = -INFINITY;
        s->sum[r] = 0.0f;
    }
    for (int c = 0; c < d / ROWS; c++) memset(s->out[c], 0, (size_t) n_rows * ROWS * sizeof(float));
    for (int p0 = 0; p0 < n_keys; p0 += TILE_KEYS) {
        const int n_here = n_keys - p0 < TILE_KEYS ? n_keys - p0 : TILE_KEYS;
        int first = 0;                                                   // rows before it see nothing here
        while (first < n_rows && seen_by(a, first, p0, n_here) == 0) first++;
        const int n = n_rows - first;
        load_rows(a, a->k, a->k_stride, a->k_type, p0, n_here, s);
        for (int h = 0; h < TILE_KEYS / ROWS; h++) {
            transpose((const char *) (s->rows + h * ROWS * d), 2 * (size_t) d, d / 2, s->panel);
            memset(s->s[h] + first * ROWS, 0, (size_t) n * ROWS * sizeof(float));
            multiply_bf16(n, d, s->panel, (const char *) (s->q + first * d), 2 * (size_t) d,
                          s->s[h] + first * ROWS);
        }
        fold_rows(a, first, n_rows, p0, n_here, s);
        load_rows(a, a->v, a->v_stride, a->v_type, p0, n_here, s);
        for (int c = 0; c < d / ROWS; c++) {
            value_panel(s, d, c * ROWS, s->panel);
            multiply_bf16(n, TILE_KEYS, s->panel, (const char *) (s->weights + first * TILE_KEYS),
                          2 * TILE_KEYS, s->out[c] + first * ROWS);
        }
    }
    for (int r = 0; r < n_rows; r++) {
        for (int c = 0; c < d / ROWS; c++) write_row(a, r, s->out[c] + r * ROWS, c * ROWS, ROWS, s->sum[r]);
    }
}

#endif

BY_COUNT(dot_q4_k)
BY_COUNT(dot_q5_k)
BY_COUNT(dot_q6_k)
BY_COUNT(dot_q8_0)
BY_COUNT(dot_q4_0)
BY_COUNT(dot_f32)
BY_COUNT(dot_f16)
BY_COUNT(dot_bf16)


const micro MICRO = {
    .name = MICRO_NAME,
    .rows = ROWS,
    .tokens = TOKENS,
    .round8 = round8,
    .round_k = round_k,
    .round16 = round16,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .end_tile = end_tile,
    .pack8 = pack8,
    .multiply8 = multiply8,
    .pack16 = pack16,
    .multiply16 = multiply16,
    .attend_few = attend_few,
#if defined(HAS_BF16)
    .attend_many = attend_many,
#endif
    .dot = { [GGML_TYPE_Q4_K] = dot_q4_k,
             [GGML_TYPE_Q5_K] = dot_q5_k,
             [GGML_TYPE_Q6_K] = dot_q6_k,
             [GGML_TYPE_Q8_0] = dot_q8_0,
             [GGML_TYPE_Q4_0] = dot_q4_0,
             [GGML_TYPE_F32] = dot_f32,
             [GGML_TYPE_F16] = dot_f16,
             [GGML_TYPE_BF16] = dot_bf16 },
};
