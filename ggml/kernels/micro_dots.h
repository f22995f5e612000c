// micro_dots.h - part of micro_code.h, few tokens: dot products with weights as the file has them.
#pragma once

// BY_COUNT makes a table's function of a loop for a constant number of rows and tokens. Inputs pass in chunks
// that stay in the first cache while a few rows use them, two at a time where tokens are more than two, so
// that each load serves both. A row's sums lie in memory meanwhile: their order is that of one token alone.
// The last are the loop's own arguments.
#define SOME_ROWS 8
#define PREFETCH  2048                    // bytes ahead: hardware stops at each page
#define ROWS_OF(loop, count, ...)                                                                            \
    for (int r0 = 0; r0 < n_rows; r0 += SOME_ROWS) {                                                         \
        const int n_here = n_rows - r0 < SOME_ROWS ? n_rows - r0 : SOME_ROWS;                                \
        const int64_t chunk = (count) < 3 ? n_in : X_CHUNK;                                                  \
        vf acc[SOME_ROWS][FEW_TOKENS] = { 0 };                                                               \
        for (int64_t k = 0; k < n_in; k += chunk) {                                                          \
            const size_t ahead = (count) < 3                        ? PREFETCH                               \
                                 : r0 + n_here + SOME_ROWS <= n_rows ? SOME_ROWS * row_size                  \
                                                                     : 0;                                    \
            const dots_part p = { k, n_in - k < chunk ? n_in : k + chunk, n_in, row_size, x, stride, ahead }; \
            const char * row = w + (size_t)r0 * row_size;                                                    \
            int r = 0;                                                                                       \
            for (; (count) > 2 && r + 2 <= n_here; r += 2, row += 2 * row_size)                              \
                loop(2, count, &p, row, acc + r, __VA_ARGS__);                                               \
            for (; r < n_here; r++, row += row_size) loop(1, count, &p, row, acc + r, __VA_ARGS__);          \
        }                                                                                                    \
        for (int r = 0; r < n_here; r++)                                                                     \
            for (int i = 0; i < (count); i++) out[(r0 + r) * FEW_TOKENS + i] = vf_sum(acc[r][i]);            \
    }
#define X_CHUNK 1024                      // a multiple of BLOCK

#if defined(COMPACT) // one loop for any number of tokens: small and quickly compiled
#define BY_COUNT(name, loop, ...)                                                                            \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        ROWS_OF(loop, n, __VA_ARGS__)                                                                        \
    }
#else
#define CASE_OF(loop, count, ...)                                                                            \
    case count: ROWS_OF(loop, count, __VA_ARGS__) break;
#define BY_COUNT(name, loop, ...)                                                                            \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        switch (n) {                                                                                         \
            CASE_OF(loop, 1, __VA_ARGS__)                                                                    \
            CASE_OF(loop, 2, __VA_ARGS__)                                                                    \
            CASE_OF(loop, 3, __VA_ARGS__)                                                                    \
            CASE_OF(loop, 4, __VA_ARGS__)                                                                    \
            CASE_OF(loop, 5, __VA_ARGS__)                                                                    \
            CASE_OF(loop, 6, __VA_ARGS__)                                                                    \
            CASE_OF(loop, 7, __VA_ARGS__)                                                                    \
            CASE_OF(loop, 8, __VA_ARGS__)                                                                    \
        }                                                                                                    \
    }
#endif
// The sums of two rows are more than there are registers: compilers would hold them in others' places.
#define LEAVE_IN_MEMORY(n_rows)                                                                              \
    if (n_rows > 1) __asm__ volatile("" ::: "memory")
#define EACH_ROW(r) _Pragma("GCC unroll 2") for (int r = 0; r < n_rows; r++)
#define EACH(i) _Pragma("GCC unroll 8") for (int i = 0; i < n && i < FEW_TOKENS; i++)

typedef struct dots_part {                // inputs first to end - 1 of n_in, tokens of stride bytes
    int64_t      first, end, n_in;
    size_t       row_size;
    const char * x;
    size_t       stride, ahead;           // ahead: bytes to what will be needed
} dots_part;

// Weights of a few bits lie two to a byte: their even ones are taken from the low bytes of words, their odd
// ones from the high bytes, and activations are dealt likewise (round_dots): of each 64 the even ones of the
// first 32, the even ones of the last 32, the odd ones of the first, the odd ones of the last.
INLINE const int16_t * numbers16(const char * x, size_t stride, int i, int64_t k) {
    return (const int16_t *) (const void *) (x + i * stride) + k;
}

// K types: a block's numbers q times the scale of their group, both integers, fit into 16 bits, so that a
// block's products are added before they are scaled:
//   w . x = x_scale d sum_g scale_g q_g . x  -  sum_g low_g sum(x)_g
// q6_k: low_g = 32 d scale_g.
typedef struct weights_k {
    h32   even[4], odd[4];                // of each 64, times their scales
    float d;
    _Alignas(64) float low[16];           // of each 16
} weights_k;

INLINE void unpack_45(const char * w, const int bits, weights_k * out) {
    const block_q4_k * b4 = (const void *) w;
    const block_q5_k * b5 = (const void *) w;
    const bytes_k bytes = bytes_of(w);
    typedef int16_t i16x8 __attribute__((vector_size(16)));
    const i16x8 wide = (i16x8) bytes.scale & 255;
    int16_t scales[8];
    memcpy(scales, &wide, sizeof wide);
    out->d = half(b4->d);
    bytes_times(bytes.min, half(b4->min), out->low);
    const h32 high = bits == 5 ? h32_two(b32_load(b5->high), b32_load(b5->high)) : h32_each(0, 0);
    const h32 fifth = h32_up(high, 4);
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
        const b32 bytes_u = b32_load((bits == 4 ? b4->q : b5->q) + 32 * u);
        const h32 q = h32_two(bytes_u, bytes_u), scale = h32_spread(scales + 2 * u, 2);
        h32 even = h32_and(h32_down(q, h32_each(0, 4)), 15), odd = h32_and(h32_down(q, h32_each(8, 12)), 15);
        if (bits == 5) {
            even = h32_or(even, h32_and(h32_down(fifth, h32_each(2 * u, 2 * u + 1)), 16));
            odd = h32_or(odd, h32_and(h32_down(high, h32_each(2 * u + 4, 2 * u + 5)), 16));
        }
        out->even[u] = h32_times(even, scale);
        out->odd[u] = h32_times(odd, scale);
    }
}

INLINE void unpack_6(const char * w, weights_k * out) {
    const block_q6_k * b = (const void *) w;
    int16_t scales[16];
    for (int g = 0; g < 16; g++) scales[g] = b->scales[g];
    out->d = half(b->d);
    for (int g = 0; g < 16; g += LANES)
        vf_store(out->low + g, vf_mul(vf_of_i8(b->scales + g), vf_set(32.0f * out->d)));
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
        const int part = u % 2 * 4;                                      // the low or the high 4 bits
        const uint8_t * low = b->low + 64 * (u / 2);
        const h32 q = h32_two(b32_load(low), b32_load(low + 32)), scale = h32_spread(scales + 4 * u, 4);
        const b32 bytes_u = b32_load(b->high + 32 * (u / 2));
        const h32 high = h32_two(bytes_u, bytes_u), up = h32_up(high, 4);
        const h32 even = h32_or(h32_and(h32_down(q, h32_each(part, part)), 15),
                                h32_and(h32_down(up, h32_each(part, part + 2)), 48));
        const h32 odd = h32_or(h32_and(h32_down(q, h32_each(part + 8, part + 8)), 15),
                               h32_and(h32_down(high, h32_each(part + 4, part + 6)), 48));
        out->even[u] = h32_times(even, scale);
        out->odd[u] = h32_times(odd, scale);
    }
}

INLINE void dot_k_n(const int n_rows, const int n, const dots_part * p, const char * w,
                    vf (*sums)[FEW_TOKENS], const int bits, const size_t size) {
    const rounded at = rounded16_of(p->n_in);
    w += p->first / BLOCK * (int64_t) size;
    for (int64_t b = p->first / BLOCK; b < p->end / BLOCK; b++, w += size) {
        weights_k k[2];
        LEAVE_IN_MEMORY(n_rows);
        EACH_ROW(r) {
            const char * row = w + (size_t) r * p->row_size;
            for (size_t line = 0; line < size; line += 64) __builtin_prefetch(row + p->ahead + line);
            if (bits == 6) unpack_6(row, &k[r]);
            else unpack_45(row, bits, &k[r]);
        }
        EACH(i) {
            const char * x = p->x + i * p->stride;
            const int16_t * numbers = numbers16(p->x, p->stride, i, b * BLOCK);
            const float scale = float_at(x + at.scales + 4 * b);
            vi dots[2] = { vi_zero(), vi_zero() };
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) {
                const x64 v = x64_load(numbers + 64 * u, n_rows);
                EACH_ROW(r) dots[r] = dot64(dots[r], k[r].even[u], k[r].odd[u], v);
            }
            EACH_ROW(r) {
                vf acc = vf_fma(vf_of(dots[r]), vf_set(k[r].d * scale), sums[r][i]);
#pragma GCC unroll 4
                for (int q = 0; q < 16; q += LANES) {
                    const float * parts = (const float *) (const void *) (x + at.sums + 64 * b) + q;
                    acc = vf_fnma(vf_load(k[r].low + q), vf_load(parts), acc);
                }
                sums[r][i] = acc;
            }
        }
    }
}

INLINE b32 group_of_0(const char * block, const int bits) {
    if (bits == 8) return b32_load(((const block_q8_0 *) (const void *) block)->q);
    const b32 two = b32_two(((const block_q4_0 *) (const void *) block)->q);
    return b32_less(b32_halves(b32_low(two), b32_high(two)), 8);
}

// q8_0 and q4_0: blocks of a group begin with their scale.
INLINE void dot_0_n(const int n_rows, const int n, const dots_part * p, const char * w,
                    vf (*sums)[FEW_TOKENS], const int bits, const size_t size) {
    const rounded at = rounded16_of(p->n_in);
    w += p->first / GROUP * (int64_t) size;
    for (int64_t k0 = p->first; k0 < p->end; k0 += BLOCK) {
        const int64_t last = p->end - k0 < BLOCK ? p->end : k0 + BLOCK;
        vf parts[2][FEW_TOKENS] = { 0 };
        for (int64_t k = k0; k < last; k += 2 * GROUP, w += 2 * size) {
            h32 even[2], odd[2];
            float d[2][2];
            EACH_ROW(r) {
                const char * row = w + (size_t) r * p->row_size;
                const char * other = last - k > GROUP ? row + size : row;            // or none
                const h32 q = h32_two(group_of_0(row, bits), group_of_0(other, bits));
                even[r] = h32_down_signed(h32_up(q, 8), 8), odd[r] = h32_down_signed(q, 8);
                d[r][0] = half(((const block_q8_0 *) (const void *) row)->d);
                d[r][1] = half(((const block_q8_0 *) (const void *) other)->d);
                __builtin_prefetch(row + p->ahead);
                __builtin_prefetch(row + p->ahead + size);
            }
            EACH(i) {
                const x64 v = x64_load(numbers16(p->x, p->stride, i, k), n_rows);
                EACH_ROW(r) parts[r][i] = dot64_scaled(parts[r][i], even[r], odd[r], v, d[r][0], d[r][1]);
            }
        }
        EACH(i) {
            const vf scale = vf_set(float_at(p->x + i * p->stride + at.scales + k0 / BLOCK * 4));
            EACH_ROW(r) sums[r][i] = vf_fma(parts[r][i], scale, sums[r][i]);
        }
    }
}

INLINE vf load_number(const char * w, int64_t k, const int bits) {       // LANES of them
    return bits == 32   ? vf_load((const float *) (const void *) w + k)
           : bits == 16 ? vf_of_f16(w + 2 * k)
                        : vf_of_bf16(w + 2 * k);
}

// Floats: bits 32, 16 (f16) or 0 (bf16). What is left of a row ends in zeros.
INLINE void dot_floats_n(const int n_rows, const int n, const dots_part * p, const char * w,
                         vf (*sums)[FEW_TOKENS], const int bits) {
    const int64_t size = bits == 32 ? 4 : 2, whole = p->first + (p->end - p->first) / LANES * LANES;
    for (int64_t k = p->first; k < whole; k += LANES) {
        vf v[2];
        EACH_ROW(r) v[r] = load_number(w + (size_t) r * p->row_size, k, bits);
        EACH(i) {
            const vf x = vf_load((const float *) (const void *) (p->x + i * p->stride) + k);
            EACH_ROW(r) sums[r][i] = vf_fma(v[r], x, sums[r][i]);
        }
    }
    if (whole == p->end) return;
    EACH_ROW(r) {
        char left[4 * LANES] = { 0 };
        memcpy(left, w + (size_t) r * p->row_size + whole * size, (size_t) ((p->end - whole) * size));
        const vf v = load_number(left, 0, bits);
        EACH(i) {
            float y[LANES] = { 0.0f };
            memcpy(y, p->x + i * p->stride + 4 * whole, (size_t) (4 * (p->end - whole)));
            sums[r][i] = vf_fma(v, vf_load(y), sums[r][i]);
        }
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
