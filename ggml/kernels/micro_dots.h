// micro_dots.h - part of micro_code.h, few tokens: dot products with weights as the file has them.
#pragma once

// BY_COUNT makes a table's function of a loop for one row that takes a constant number of tokens: a loop over
// rows for every number, and the choice. The last are that loop's own arguments.
#if defined(COMPACT) // one loop for any number of tokens: small and quickly compiled
#define BY_COUNT(name, loop, ...)                                                                            \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        for (int r = 0; r < n_rows; r++)                                                                     \
            loop(n, n_in, w + (size_t)r * row_size, x, stride, out + r * FEW_TOKENS, __VA_ARGS__);           \
    }
#else
#define BY_COUNT(name, loop, ...)                                                                            \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        switch (n) {                                                                                         \
            ROWS_OF(loop, 1, __VA_ARGS__)                                                                    \
            ROWS_OF(loop, 2, __VA_ARGS__)                                                                    \
            ROWS_OF(loop, 3, __VA_ARGS__)                                                                    \
            ROWS_OF(loop, 4, __VA_ARGS__)                                                                    \
            ROWS_OF(loop, 5, __VA_ARGS__)                                                                    \
            ROWS_OF(loop, 6, __VA_ARGS__)                                                                    \
            ROWS_OF(loop, 7, __VA_ARGS__)                                                                    \
            ROWS_OF(loop, 8, __VA_ARGS__)                                                                    \
        }                                                                                                    \
    }
#define ROWS_OF(loop, count, ...)                                                                            \
    case count:                                                                                              \
        for (int r = 0; r < n_rows; r++)                                                                     \
            loop(count, n_in, w + (size_t)r * row_size, x, stride, out + r * FEW_TOKENS, __VA_ARGS__);       \
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

// sum_p scale_p (q . x)_p of a block, spread over lanes.
#if defined(DIRECT) // in integers up to the block's own scale: see micro_direct.h

INLINE vf scaled_products(const weights_k * k, const char * x, const int bits) {
    vi sum = vi_zero();
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const char * from = x + 4 * LANES * p;
        vi a = pairs(k->q[0][p], vi_load(from));
        ADD_PAIRS(a, k->q[1][p], vi_load(from + 64));
        if (bits == 6) {                                                 // more would not fit into 16 bits
            sum = dot_pairs(sum, a, k->s.scale[0][p]);
            a = pairs(k->q[2][p], vi_load(from + 128));
        } else {
            ADD_PAIRS(a, k->q[2][p], vi_load(from + 128));
        }
        ADD_PAIRS(a, k->q[3][p], vi_load(from + 192));
        sum = dot_pairs(sum, a, k->s.scale[1][p]);
    }
    return vf_mul(vf_of(sum), vf_set(k->s.d));
}

#else

INLINE vf scaled_products(const weights_k * k, const char * x, const int bits) {
    vf sum = vf_set(0.0f);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const char * from = x + 4 * LANES * p;
        vi dots = vi_zero();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            dots = dot_small(dots, k->q[j][p], vi_load(from + 64 * j));
            if (j == 3 || (j == 1 && bits == 6)) {
                sum = vf_fma(vf_of(dots), k->s.scale[j / 2][p], sum);
                dots = vi_zero();
            }
        }
    }
    return sum;
}

#endif

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
            const vf sum = scaled_products(&k, xi + b * BLOCK, bits);
            acc[i] = vf_fma(sum, vf_set(float_at(xi + at.scales + 4 * b)), acc[i]);
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                const float * sums = (const float *) (const void *) (xi + at.parts + 64 * b) + LANES * p;
                acc[i] = vf_fnma(k.s.low[p], vf_load(sums), acc[i]);
            }
        }
    }
    finish(n, acc, out);
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
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const int64_t end = n_in - k0 < BLOCK ? n_in : k0 + BLOCK;
        vf sums[FEW_TOKENS] = { vf_set(0.0f) };
        for (int64_t k = k0; k < end; k += GROUP, w += size) {
            const h32 q = bits == 8 ? group_of_8_0(w) : group_of_4_0(w);
            const vf d = vf_set(half(((const block_q8_0 *) (const void *) w)->d));
            __builtin_prefetch(w + PREFETCH);
            EACH(i) sums[i] = vf_fma(vf_of(dot2(vi_zero(), q, numbers16(x, stride, i, k))), d, sums[i]);
        }
        EACH(i) {
            const vf scale = vf_set(float_at(x + i * stride + at.scales + k0 / BLOCK * 4));
            acc[i] = vf_fma(sums[i], scale, acc[i]);
        }
    }
    finish(n, acc, out);
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

BY_COUNT(dot_q4_k, dot_k_n, 4, sizeof(block_q4_k))
BY_COUNT(dot_q5_k, dot_k_n, 5, sizeof(block_q5_k))
BY_COUNT(dot_q6_k, dot_k_n, 6, sizeof(block_q6_k))
BY_COUNT(dot_q8_0, dot_0_n, 8, sizeof(block_q8_0))
BY_COUNT(dot_q4_0, dot_0_n, 4, sizeof(block_q4_0))
BY_COUNT(dot_f32, dot_floats_n, 32)
BY_COUNT(dot_f16, dot_floats_n, 16)
BY_COUNT(dot_bf16, dot_floats_n, 0)
