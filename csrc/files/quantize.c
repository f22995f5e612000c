// quantize.c - see quantize.h. Nothing reaches ggml that its assertions could reject: the type has a
// quantiser that needs no importance matrix, rows are whole blocks, numbers are finite and not huge.
#include "quantize.h"

#include "memory.h"

#include <float.h>
#include <ggml.h>
#include <math.h>
#include <string.h>

// More than any quantised type can hold (q6_K: 65504 * 127 * 32), less than what overflows ggml's sums of
// cubes, where a row would silently become zeros.
#define LARGEST 1e9f

static bool has_quantizer(enum ggml_type type) {
    static const enum ggml_type quantizers[] = {
        GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0,   GGML_TYPE_Q4_1,
        GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_Q2_K,   GGML_TYPE_Q3_K,
        GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL,
    };
    for (size_t i = 0; i < sizeof quantizers / sizeof *quantizers; i++) {
        if (quantizers[i] == type) return true;
    }
    return false;
}

static bool same_name(const char * a, const char * b) {
    for (; *a && *b; a++, b++) {
        char x = *a >= 'A' && *a <= 'Z' ? (char) (*a + 32) : *a;
        char y = *b >= 'A' && *b <= 'Z' ? (char) (*b + 32) : *b;
        if (x != y) return false;
    }
    return *a == *b;
}

pyllava_status tensor_type_find(const char * name, pyllava_tensor_type * out) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        enum ggml_type type = (enum ggml_type) i;
        if (ggml_blck_size(type) <= 0 || ggml_type_size(type) == 0) continue; // a removed type
        if (!same_name(name, ggml_type_name(type))) continue;
        *out = (pyllava_tensor_type) {
            .name = ggml_type_name(type),
            .id = i,
            .block = ggml_blck_size(type),
            .block_size = ggml_type_size(type),
            .can_quantize = has_quantizer(type),
            .can_dequantize = type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != NULL,
        };
        return PYLLAVA_OK;
    }
    FAIL(PYLLAVA_ERR_ARGUMENT, "type %.40s is unknown to ggml %s", name, ggml_version());
}

static pyllava_status check_rows(const pyllava_rows * r, const pyllava_tensor_type * t) {
    if (r->n < 1 || r->n_per_row < 1 || r->n_per_row > INT64_MAX / 4 / r->n) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "rows: found [%lld, %lld]", (long long) r->n, (long long) r->n_per_row);
    }
    if (r->n_per_row % t->block) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "rows of %lld, %s needs a multiple of %lld", (long long) r->n_per_row,
             t->name, (long long) t->block);
    }
    uint64_t n_blocks = (uint64_t) r->n * (uint64_t) (r->n_per_row / t->block);
    if (r->size % t->block_size || r->size / t->block_size != n_blocks) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "found %llu bytes, need %llu blocks of %llu", (unsigned long long) r->size,
             (unsigned long long) n_blocks, (unsigned long long) t->block_size);
    }
    return PYLLAVA_OK;
}

static pyllava_status check_finite(const pyllava_rows * r, int64_t row, const float * x, float limit) {
    for (int64_t i = 0; i < r->n_per_row; i++) {
        if (fabsf(x[i]) <= limit) continue; // false for NaN
        const char * what = isnan(x[i])   ? "NaN"
                            : isinf(x[i]) ? "infinity"
                                          : "a number too large for the type";
        FAIL(PYLLAVA_ERR_NUMERIC, "row %lld, column %lld: %s", (long long) (r->first + row), (long long) i,
             what);
    }
    return PYLLAVA_OK;
}

static void to_f32(const pyllava_tensor_type * t, const void * from, float * out, int64_t n) {
    if (t->id == GGML_TYPE_F32) {
        memcpy(out, from, (size_t) n * sizeof *out);
    } else {
        ggml_get_type_traits((enum ggml_type) t->id)->to_float(from, out, n);
    }
}

// Whether a type can hold the numbers is known only afterwards: f16, and f16 scales, may have overflowed.
static pyllava_status check_quantized(const pyllava_rows * r, const pyllava_tensor_type * t,
                                      const uint8_t * quantized) {
    if (t->id == GGML_TYPE_F32) return PYLLAVA_OK;
    float * x = aligned_new((size_t) r->n_per_row * sizeof *x);
    TRY_ALLOC(x, (size_t) r->n_per_row * sizeof *x);
    size_t row_size = (size_t) (r->size / (uint64_t) r->n);
    pyllava_status status = PYLLAVA_OK;
    for (int64_t i = 0; i < r->n && status == PYLLAVA_OK; i++) {
        to_f32(t, quantized + (size_t) i * row_size, x, r->n_per_row);
        if (check_finite(r, i, x, FLT_MAX) == PYLLAVA_OK) continue;
        status = error_set(PYLLAVA_ERR_NUMERIC, "row %lld: numbers too large for %s",
                           (long long) (r->first + i), t->name);
    }
    aligned_free(x);
    return status;
}

pyllava_status quantize_rows(const pyllava_rows * r, const float * from, void * out) {
    pyllava_tensor_type t = { 0 };
    TRY(tensor_type_find(r->type, &t));
    if (!t.can_quantize) FAIL(PYLLAVA_ERR_ARGUMENT, "type %s: no quantiser for it", t.name);
    TRY(check_rows(r, &t));
    float limit = t.block > 1 ? LARGEST : FLT_MAX;
    for (int64_t i = 0; i < r->n; i++) TRY(check_finite(r, i, from + i * r->n_per_row, limit));
    ggml_quantize_chunk((enum ggml_type) t.id, from, out, 0, r->n, r->n_per_row, NULL);
    return check_quantized(r, &t, out);
}

pyllava_status dequantize_rows(const pyllava_rows * r, const void * from, float * out) {
    pyllava_tensor_type t = { 0 };
    TRY(tensor_type_find(r->type, &t));
    if (!t.can_dequantize) FAIL(PYLLAVA_ERR_ARGUMENT, "type %s holds no weights", t.name);
    TRY(check_rows(r, &t));
    to_f32(&t, from, out, r->n * r->n_per_row);
    for (int64_t i = 0; i < r->n; i++) TRY(check_finite(r, i, out + i * r->n_per_row, FLT_MAX));
    return PYLLAVA_OK;
}
