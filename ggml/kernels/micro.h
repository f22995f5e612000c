// micro.h - the innermost loops of the fast mode, one table of functions per instruction set. The loops are
// written once (micro_code.h) over a few vector operations (simd_*.h) and compiled once per set, each file
// with its own flags, so that one library runs everywhere.
//
// Numbers are quantised per BLOCK of 256 inputs, products are exact in int32. Rows of prompts and pictures:
// weights and activations in a rotated basis (micro_round.h), as int8, or, where that would lose too much
// (weights that are floats, the vision tower), with about 12 bits as int16. Rows of an answer: weights stay
// as the file has them and activations have 12 to 14 bits, so that reading the weights takes most of the
// time.
#pragma once

#include "kernels.h"

#include <stdint.h>

#define BLOCK          256 // inputs that share one scale
#define GROUP          32  // every quantised type has groups of 32 or divides them
#define MAX_ROWS       32  // weight rows of a panel, at most
#define MAX_QUERIES    288 // rows of queries that attend_many takes
#define TILE_KEYS      64
#define MAX_HEAD       256         // head_dim of the fast attention, at most
#define ATTEND_SCRATCH (704 << 10) // bytes
#define FEW_TOKENS     8           // tokens that one pass over a weight row serves

// Quantised activations of a token: the layouts, and the byte offsets of what follows the numbers.
//   rounded8:  int8 [blocks * 256], rotated; scales f32 [blocks]; sums f32 [blocks], times the scale
//   rounded16: int16 [blocks * 256], rotated but for dots; scales f32 [blocks]
//   rounded_k: int8 [blocks][2][256]; scales f32 [blocks]; sums f32 [n / 16], times the scale
//   rounded_direct: int8 [n]; scales f32 [n / 32]; sums f32 [blocks][DIRECT_SUMS]: of 16 numbers, from
//   DIRECT_PAIRS on of 32, times the scale
#define DIRECT_PAIRS (BLOCK / 16)
#define DIRECT_SUMS  (DIRECT_PAIRS + BLOCK / GROUP)
typedef struct rounded {
    size_t scales, sums, size;
} rounded;

static inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static inline size_t blocks_of(int64_t n) { return (size_t) ((n + BLOCK - 1) / BLOCK); }

static inline rounded rounded_of(size_t numbers, size_t n_scales, size_t n_sums) {
    const size_t scales = round_up(numbers, 64), sums = scales + 4 * n_scales;
    return (rounded) { scales, sums, round_up(sums + 4 * n_sums, 64) };
}

static inline rounded rounded8_of(int64_t n) {
    return rounded_of(BLOCK * blocks_of(n), blocks_of(n), blocks_of(n));
}
static inline rounded rounded16_of(int64_t n) {
    return rounded_of(2 * BLOCK * blocks_of(n), blocks_of(n), 0);
}
static inline rounded rounded_k_of(int64_t n) {
    return rounded_of(2 * (size_t) n, blocks_of(n), (size_t) n / 16);
}
static inline rounded rounded_direct_of(int64_t n) {
    return rounded_of((size_t) n, (size_t) n / GROUP, DIRECT_SUMS * blocks_of(n));
}

// Attention of one key/value head for n consecutive query tokens; `group` query heads share it.
typedef struct attention_work {
    const float * q; // [n][group][d], tokens q_stride floats apart
    float * y;
    size_t q_stride;
    int n, group, d;
    int heads;                 // attend_few: so many after each other in q, y, k and v
    const int32_t * n_visible; // [n]
    const char *k, *v;         // row 0 of the head
    size_t k_stride, v_stride;
    enum ggml_type k_type, v_type;
    const int32_t * cells; // row of each position; NULL: first_row on
    int32_t first_row;
    char * scratch;
} attention_work;

// The epilogue of a tile, sums of some rows and n tokens: what is applied to them (linear_end) and where they
// go. Pointers are to the first row of the first token; bias, residual and up may be NULL.
typedef struct tile_end {
    linear_end end;
    const float * bias;
    const float * residual; // [n] like to
    float * to;
    size_t stride; // floats from token to token, of to and residual
    bool stream;   // stores bypass the caches; to and stride are multiples of 64 bytes
} tile_end;

typedef struct micro {
    const char * name;
    int rows, tokens; // of a tile of multiply8 and multiply16

    void (*round8)(const float * x, int64_t n, char * out);
    void (*round16)(const float * x, int64_t n, char * out);
    void (*round_dots)(const float * x, int64_t n, char * out); // round16 in the order of dots
    void (*round_k)(const float * x, int64_t n, char * out);    // for dots of K types

    // x / sqrt(mean(x^2) + eps) * w;   (x - mean) / sqrt(var + eps) * w + b.   n: a multiple of GROUP
    void (*rms_norm)(const float * x, const float * w, float eps, int64_t n, float * out);
    void (*layer_norm)(const float * x, const float * w, const float * b, float eps, int64_t n, float * out);

    // Applies the epilogue to n_rows sums of each token, [n][y_stride]; up: the sums of the second matrix.
    void (*end_tile)(const tile_end * e, int n, int n_rows, const float * y, const float * up,
                     size_t y_stride);

    // One block (n_k <= BLOCK inputs) of `rows` weight rows as a panel; rows beyond n_rows repeat the first.
    // Always BLOCK inputs, those beyond n_k zero.
    void (*pack8)(enum ggml_type type, const char * w, size_t row_size, int n_rows, int n_k, char * panel,
                  float * scales);
    void (*pack16)(enum ggml_type type, const char * w, size_t row_size, int n_rows, int n_k, char * panel,
                   float * scales);
    // y [n][rows] += W x for n tokens whose block starts at x (stride bytes apart).
    // Of pack8 there are 2 [rows] of scales: weight q is scales[0] q + scales[1].
    void (*multiply8)(int n, int n_k, const char * panel, const float * w_scales, const char * x,
                      const char * x_scales, const char * x_sums, size_t stride, float * y);
    void (*multiply16)(int n, int n_k, const char * panel, const float * w_scales, const char * x,
                       const char * x_scales, const char * x_sums, size_t stride, float * y);

    // For K types whose weights are not quantised again, where that is faster (NULL elsewhere): panels of
    // direct_size bytes, one block of `rows` weight rows each, for activations from round_direct.
    size_t direct_size;
    void (*round_direct)(const float * x, int64_t n, char * out);
    void (*pack_direct)(enum ggml_type type, const char * w, size_t row_size, int n_rows, char * panel);
    void (*multiply_direct)(enum ggml_type type, int n, const char * panel, const char * x,
                            const char * x_scales, const char * x_sums, size_t stride, float * y);

    void (*attend_few)(const attention_work * work);  // n 1, heads * group <= FEW_TOKENS, d <= MAX_HEAD
    void (*attend_many)(const attention_work * work); // d <= MAX_HEAD
    // out[r * FEW_TOKENS + t] = w[r] . x[t] for n <= FEW_TOKENS tokens: what round_k gives for K types,
    // round_dots for other quantised ones, f32 for floats. NULL: no such loop.
    void (*dot[GGML_TYPE_COUNT])(int n_rows, int n, int64_t n_in, const char * w, size_t row_size,
                                 const char * x, size_t stride, float * out);
} micro;

extern const micro micro_plain;
#if defined(__x86_64__)
extern const micro micro_avx2, micro_avxvnni, micro_avx512, micro_avx512vnni;
#elif defined(__aarch64__)
extern const micro micro_neon, micro_neondot, micro_neoni8mm;
#endif

// The table that `wanted` names, or the best for this machine if it is NULL. Returns NULL if there is no such
// table or the machine cannot run it.
const micro * micro_choose(const char * wanted);
