// micro_direct.h - part of micro_code.h, many tokens of K types where byte products are added in 16 bits. The
// numbers q of such a type are unsigned and small, so that a few products fit into 16 bits before their
// group's scale, an integer too, takes them to 32. Nothing is rounded but the activations:
//   y = x_scale (d sum_g scale_g (q . x)_g  +  low sum_g low_g sum(x)_g)
// q4_k, q5_k: 8 groups of 32, low_g the constants of the groups and low = -min; q6_k: 16 groups of 16,
// low_g = scale_g and low = -32 d.
#pragma once

#if defined(DIRECT)

#define DIRECT_TOKENS 4                   // of a tile

typedef struct direct_panel {
    uint8_t q[BLOCK / 4][ROWS][4];
    int16_t scales[16][ROWS][2];          // of the groups, each twice; 8 for q4_k and q5_k
    int16_t lows[8][ROWS][2];             // of pairs of groups; 4 for q4_k and q5_k
    float   d[ROWS], low[ROWS];
} direct_panel;

INLINE void unpack_row_4(const block_q4_k * w, char * to) {
    for (int g = 0; g < 8; g += 2) {
        const b32 q = b32_load(w->q + 16 * g);
        b32_store(to + 32 * g, b32_low(q));
        b32_store(to + 32 * g + 32, b32_high(q));
    }
}

INLINE void unpack_row_5(const block_q5_k * w, char * to) {
    const b32 high = b32_load(w->high);
    for (int g = 0; g < 8; g++) {
        const b32 q = b32_load(w->q + 16 * (g & ~1));
        b32_store(to + 32 * g, b32_or(g & 1 ? b32_high(q) : b32_low(q), b32_bits(high, g, 1)));
    }
}

INLINE void unpack_row_6(const block_q6_k * w, char * to) {
    for (int g = 0; g < 8; g++) b32_store(to + 32 * g, q6_k_part(w, g / 4, g % 4));
}

INLINE void scales_direct(enum ggml_type type, const char * block, int r, direct_panel * p) {
    if (type == GGML_TYPE_Q6_K) {
        const block_q6_k * w = (const void *) block;
        for (int g = 0; g < 16; g++) {
            p->scales[g][r][0] = p->scales[g][r][1] = w->scales[g];
            p->lows[g / 2][r][g % 2] = w->scales[g];
        }
        p->d[r] = half(w->d);
        p->low[r] = -32.0f * p->d[r];
        return;
    }
    const block_q4_k * w = (const void *) block;                         // q5_k begins alike
    const bytes_k bytes = bytes_of(w->scales);
    for (int g = 0; g < 8; g++) {
        p->scales[g][r][0] = p->scales[g][r][1] = bytes.scale[g];
        p->lows[g / 2][r][g % 2] = bytes.min[g];
    }
    p->d[r] = half(w->d);
    p->low[r] = -half(w->min);
}

static void pack_direct(enum ggml_type type, const char * w, size_t row_size, int n_rows, char * panel) {
    _Alignas(64) char rows[ROWS * BLOCK];
    direct_panel * p = (direct_panel *) (void *) panel;
    for (int i = 0; i < ROWS; i++) {
        const char * row = w + (i < n_rows ? (size_t) i * row_size : 0);
        switch (type) {
        case GGML_TYPE_Q4_K: unpack_row_4((const void *) row, rows + i * BLOCK); break;
        case GGML_TYPE_Q5_K: unpack_row_5((const void *) row, rows + i * BLOCK); break;
        default: unpack_row_6((const void *) row, rows + i * BLOCK);
        }
        scales_direct(type, row, i, p);
    }
    transpose(rows, BLOCK, BLOCK / 4, (char *) p->q);
}

// Adds scale_g (q . x)_g of one group to the sums [token][2 vectors] of n tokens. At most `chain` products
// are added in 16 bits.
INLINE void direct_group(const int n, const int n_dwords, const int chain, const uint8_t * q,
                         const int16_t * scales, const char * x, size_t stride, vi * sums) {
    const vi s0 = vi_load(scales), s1 = vi_load(scales + 2 * LANES);
#pragma GCC unroll 4
    for (int first = 0; first < n_dwords; first += chain) {
        vi a[DIRECT_TOKENS], b[DIRECT_TOKENS];
#pragma GCC unroll 8
        for (int k = first; k < first + chain; k++) {
            const vi w0 = vi_load(q + 4 * k * ROWS), w1 = vi_load(q + 4 * k * ROWS + 4 * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < n; i++) {
                const vi v = vi_set(int_at(x + i * stride + 4 * k));
                if (k == first) {
                    a[i] = pairs(w0, v);
                    b[i] = pairs(w1, v);
                    continue;
                }
                ADD_PAIRS(a[i], w0, v);
                ADD_PAIRS(b[i], w1, v);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            vi_store(sums + 2 * i, dot_pairs(vi_load(sums + 2 * i), a[i], s0));
            vi_store(sums + 2 * i + 1, dot_pairs(vi_load(sums + 2 * i + 1), b[i], s1));
        }
    }
}

INLINE void direct_tile(const int n, const int bits, const direct_panel * p, const char * x,
                        const char * x_scales, const char * x_sums, size_t stride, float * y) {
    const int n_groups = bits == 6 ? 16 : 8, chain = bits == 6 ? 2 : bits == 5 ? 4 : 8;
    const int first_sum = bits == 6 ? 0 : 16;                            // see round_bytes
    vi sums[2 * DIRECT_TOKENS];
    for (int i = 0; i < 2 * n; i++) sums[i] = vi_zero();
    for (int g = 0; g < n_groups; g++) {
        const int n_dwords = BLOCK / 4 / n_groups;
        direct_group(n, n_dwords, chain, p->q[g * n_dwords][0], p->scales[g][0], x + 4 * n_dwords * g, stride,
                     sums);
    }
    vi a[DIRECT_TOKENS], b[DIRECT_TOKENS];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) a[i] = b[i] = vi_zero();
    for (int g = 0; g < n_groups / 2; g++) {
        const vi l0 = vi_load(p->lows[g][0]), l1 = vi_load(p->lows[g][LANES]);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const vi v = vi_set(int_at(x_sums + i * stride + 2 * first_sum + 4 * g));
            a[i] = dot_pairs(a[i], l0, v);
            b[i] = dot_pairs(b[i], l1, v);
        }
    }
    const vf d0 = vf_load(p->d), d1 = vf_load(p->d + LANES), m0 = vf_load(p->low),
             m1 = vf_load(p->low + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        const vf s = vf_set(float_at(x_scales + i * stride));
        float * out = y + i * ROWS;
        const vf u = vf_fma(vf_of(a[i]), m0, vf_mul(vf_of(vi_load(sums + 2 * i)), d0));
        const vf v = vf_fma(vf_of(b[i]), m1, vf_mul(vf_of(vi_load(sums + 2 * i + 1)), d1));
        vf_store(out, vf_fma(u, s, vf_load(out)));
        vf_store(out + LANES, vf_fma(v, s, vf_load(out + LANES)));
    }
}

#define DEFINE_DIRECT_TILE(bits, name, n)                                                                    \
    static __attribute__((noinline)) void direct_##bits##_##name(                                            \
        const direct_panel * p, const char * x, const char * x_scales, const char * x_sums, size_t stride,   \
        float * y) {                                                                                         \
        direct_tile(n, bits, p, x, x_scales, x_sums, stride, y);                                             \
    }
#define DEFINE_MULTIPLY_DIRECT(bits)                                                                         \
    DEFINE_DIRECT_TILE(bits, tile, DIRECT_TOKENS)                                                            \
    DEFINE_DIRECT_TILE(bits, one, 1)                                                                         \
    static void multiply_direct_##bits(int n, const direct_panel * p, const char * x, const char * x_scales, \
                                       const char * x_sums, size_t stride, float * y) {                      \
        int i = 0;                                                                                           \
        size_t at = 0;                                                                                       \
        for (; i + DIRECT_TOKENS <= n; i += DIRECT_TOKENS, at = (size_t)i * stride)                          \
            direct_##bits##_tile(p, x + at, x_scales + at, x_sums + at, stride, y + i * ROWS);               \
        for (; i < n; i++, at = (size_t)i * stride)                                                          \
            direct_##bits##_one(p, x + at, x_scales + at, x_sums + at, stride, y + i * ROWS);                \
    }
DEFINE_MULTIPLY_DIRECT(4)
DEFINE_MULTIPLY_DIRECT(5)
DEFINE_MULTIPLY_DIRECT(6)

static void multiply_direct(enum ggml_type type, int n, const char * panel, const char * x,
                            const char * x_scales, const char * x_sums, size_t stride, float * y) {
    const direct_panel * p = (const void *) panel;
    switch (type) {
    case GGML_TYPE_Q4_K: multiply_direct_4(n, p, x, x_scales, x_sums, stride, y); break;
    case GGML_TYPE_Q5_K: multiply_direct_5(n, p, x, x_scales, x_sums, stride, y); break;
    default: multiply_direct_6(n, p, x, x_scales, x_sums, stride, y);
    }
}

#endif
