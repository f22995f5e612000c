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

// K types: a block's numbers q times the scale of their group, both integers, fit into 16 bits, so that a
// block's products are added before they are scaled:
//   w . x = x_scale d sum_g scale_g q_g . x  -  sum_g low_g sum(x)_g
// q6_k's q are taken with their sign, without a constant.
INLINE void unpack_45(const char * w, const int bits, h32 * out, float * d, float * lows) {
    const block_q4_k * b4 = (const void *) w;
    const bytes_k bytes = bytes_of(b4->scales);
    int16_t scales[8];
    for (int g = 0; g < 8; g++) scales[g] = bytes.scale[g];
    *d = half(b4->d);
    v16_store(lows, each_twice(bytes.min, half(b4->min)));
#pragma GCC unroll 8
    for (int g = 0; g < 8; g += 2) {
        const b32 q = b32_load(b4->q + 16 * g);
        out[g] = h32_of(bits == 5 ? q5_k_part((const void *) w, g) : b32_low(q));
        out[g + 1] = h32_of(bits == 5 ? q5_k_part((const void *) w, g + 1) : b32_high(q));
        out[g] = h32_times(out[g], scales[g], scales[g]);
        out[g + 1] = h32_times(out[g + 1], scales[g + 1], scales[g + 1]);
    }
}

INLINE void unpack_6(const char * w, h32 * out, float * d) {
    const block_q6_k * b = (const void *) w;
    *d = half(b->d);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++)
        out[g] = h32_times(h32_minus(h32_of(q6_k_part(b, g / 4, g % 4)), 32), b->scales[2 * g],
                           b->scales[2 * g + 1]);
}

#define PREFETCH 2048                     // bytes ahead: hardware stops at each page

INLINE void dot_k_n(const int n, int64_t n_in, const char * w, const char * x, size_t stride, float * out,
                    const int bits, const size_t size) {
    const rounded at = rounded16_of(n_in);
    vf acc[FEW_TOKENS] = { vf_set(0.0f) };
    for (int64_t b = 0; b < n_in / BLOCK; b++, w += size) {
        h32 q[8];
        float d, lows[16];
        for (size_t line = 0; line < size; line += 64) __builtin_prefetch(w + PREFETCH + line);
        if (bits == 6) unpack_6(w, q, &d);
        else unpack_45(w, bits, q, &d, lows);
        EACH(i) {
            const char * xi = x + i * stride;
            const int16_t * numbers = numbers16(x, stride, i, b * BLOCK);
            vi sum = vi_zero();
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++) sum = dot2(sum, q[g], numbers + GROUP * g);
            acc[i] = vf_fma(vf_of(sum), vf_set(d * float_at(xi + at.scales + 4 * b)), acc[i]);
            if (bits == 6) continue;
#pragma GCC unroll 4
            for (int p = 0; p < 16; p += LANES) {
                const float * sums = (const float *) (const void *) (xi + at.sums + 64 * b) + p;
                acc[i] = vf_fnma(vf_load(lows + p), vf_load(sums), acc[i]);
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
    const rounded at = rounded16_of(n_in);
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
