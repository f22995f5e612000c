// micro_direct.h - part of micro_code.h, many tokens of K types where byte products are added in 16 bits. The
// numbers q of such a type are unsigned and small, so that a few products fit into 16 bits before their
// group's scale, an integer too, takes them to 32. Only the activations are quantised, with a scale for each
// 32:
//   y = d sum_j x_scale_j sum_(g in j) scale_g (q . x)_g  +  sum_g low_g sum(x)_g
// q4_k, q5_k: 8 groups of 32, low_g = -min times the constants of the groups; q6_k: 16 groups of 16, low_g =
// -32 d scale_g.
#pragma once

#if defined(DIRECT)

#define DIRECT_TOKENS 4 // of a tile

typedef struct direct_panel {
    uint8_t q[BLOCK / 4][ROWS][4];
    int16_t scales[16][ROWS][2]; // of the groups, each twice; 8 for q4_k and q5_k
    float lows[16][ROWS];        // likewise
    float d[ROWS];
} direct_panel;

INLINE void unpack_row_4(const block_q4_k * w, char * to) {
    for (int g = 0; g < 8; g += 2) {
        const b32 q = b32_load(w->q + 16 * g);
        b32_store(to + 32 * g, b32_low(q));
        b32_store(to + 32 * g + 32, b32_high(q));
    }
}

INLINE void unpack_row_5(const block_q5_k * w, char * to) {
    for (int g = 0; g < 8; g++) b32_store(to + 32 * g, q5_k_part(w, g));
}

INLINE void unpack_row_6(const block_q6_k * w, char * to) {
    for (int g = 0; g < 8; g++) b32_store(to + 32 * g, q6_k_part(w, g / 4, g % 4));
}

INLINE void scales_direct(enum ggml_type type, const char * block, int r, direct_panel * p) {
    if (type == GGML_TYPE_Q6_K) {
        const block_q6_k * w = (const void *) block;
        p->d[r] = half(w->d);
        for (int g = 0; g < 16; g++) {
            p->scales[g][r][0] = p->scales[g][r][1] = w->scales[g];
            p->lows[g][r] = -32.0f * p->d[r] * (float) w->scales[g];
        }
        return;
    }
    const block_q4_k * w = (const void *) block; // q5_k begins alike
    const bytes_k bytes = bytes_of(w);
    const float min = -half(w->min);
    p->d[r] = half(w->d);
    for (int g = 0; g < 8; g++) {
        p->scales[g][r][0] = p->scales[g][r][1] = bytes.scale[2 * g];
        p->lows[g][r] = min * (float) bytes.min[2 * g];
    }
}

static void pack_direct(enum ggml_type type, const char * w, size_t row_size, int n_rows, char * panel) {
    _Alignas(64) char rows[ROWS * BLOCK];
    direct_panel * p = (direct_panel *) (void *) panel;
    for (int i = 0; i < ROWS; i++) {
        const char * row = w + (i < n_rows ? (size_t) i * row_size : 0);
        switch (type) {
            case GGML_TYPE_Q4_K: unpack_row_4((const void *) row, rows + i * BLOCK); break;
            case GGML_TYPE_Q5_K: unpack_row_5((const void *) row, rows + i * BLOCK); break;
            default:             unpack_row_6((const void *) row, rows + i * BLOCK);
        }
        scales_direct(type, row, i, p);
    }
    transpose(rows, BLOCK, BLOCK / 4, (char *) p->q);
}

// Adds x_scale_j sum_g scale_g (q . x)_g of the groups of 32 numbers to the sums [token][2 vectors] of n
// tokens. At most `chain` products are added in 16 bits.
INLINE void direct_group(const int n, const int bits, const uint8_t * q, const int16_t * scales,
                         const char * x, const char * x_scale, size_t stride, vf * sums) {
    const int chain = bits == 6 ? 2 : bits == 5 ? 4 : 8, own_scale = bits == 6 ? 4 : 8;
    vi t[2 * DIRECT_TOKENS];
#pragma GCC unroll 4
    for (int first = 0; first < 8; first += chain) {
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
        const int16_t * s = scales + first / own_scale * 2 * ROWS;
        const vi s0 = vi_load(s), s1 = vi_load(s + 2 * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            t[2 * i] = dot_pairs(first ? t[2 * i] : vi_zero(), a[i], s0);
            t[2 * i + 1] = dot_pairs(first ? t[2 * i + 1] : vi_zero(), b[i], s1);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        const vf s = vf_set(float_at(x_scale + i * stride));
        sums[2 * i] = vf_fma(vf_of(t[2 * i]), s, sums[2 * i]);
        sums[2 * i + 1] = vf_fma(vf_of(t[2 * i + 1]), s, sums[2 * i + 1]);
    }
}

INLINE void direct_tile(const int n, const int bits, const direct_panel * p, const char * x,
                        const char * x_scales, const char * x_sums, size_t stride, float * y) {
    const int n_groups = bits == 6 ? 16 : 8;
    vf sums[2 * DIRECT_TOKENS];
    for (int i = 0; i < 2 * n; i++) sums[i] = vf_set(0.0f);
    for (int j = 0; j < BLOCK / GROUP; j++)
        direct_group(n, bits, p->q[8 * j][0], p->scales[j * n_groups / 8][0], x + GROUP * j, x_scales + 4 * j,
                     stride, sums);
    const vf d0 = vf_load(p->d), d1 = vf_load(p->d + LANES);
    vf a[DIRECT_TOKENS], b[DIRECT_TOKENS];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        a[i] = vf_fma(sums[2 * i], d0, vf_load(y + i * ROWS));
        b[i] = vf_fma(sums[2 * i + 1], d1, vf_load(y + i * ROWS + LANES));
    }
    if (bits != 6) x_sums += 4 * DIRECT_PAIRS;
    for (int g = 0; g < n_groups; g++) {
        const vf l0 = vf_load(p->lows[g]), l1 = vf_load(p->lows[g] + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const vf v = vf_set(float_at(x_sums + i * stride + 4 * g));
            a[i] = vf_fma(l0, v, a[i]);
            b[i] = vf_fma(l1, v, b[i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        vf_store(y + i * ROWS, a[i]);
        vf_store(y + i * ROWS + LANES, b[i]);
    }
}

#define DEFINE_DIRECT_TILE(bits, name, n)                                                                    \
    static __attribute__((noinline)) void direct_##bits##_##name(const direct_panel * p, const char * x,     \
                                                                 const char * x_scales, const char * x_sums, \
                                                                 size_t stride, float * y) {                 \
        direct_tile(n, bits, p, x, x_scales, x_sums, stride, y);                                             \
    }
#define DEFINE_MULTIPLY_DIRECT(bits)                                                                         \
    DEFINE_DIRECT_TILE(bits, tile, DIRECT_TOKENS)                                                            \
    DEFINE_DIRECT_TILE(bits, one, 1)                                                                         \
    static void multiply_direct_##bits(int n, const direct_panel * p, const char * x, const char * x_scales, \
                                       const char * x_sums, size_t stride, float * y) {                      \
        int i = 0;                                                                                           \
        size_t at = 0;                                                                                       \
        for (; i + DIRECT_TOKENS <= n; i += DIRECT_TOKENS, at = (size_t) i * stride)                         \
            direct_##bits##_tile(p, x + at, x_scales + at, x_sums + at, stride, y + i * ROWS);               \
        for (; i < n; i++, at = (size_t) i * stride)                                                         \
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
        default:             multiply_direct_6(n, p, x, x_scales, x_sums, stride, y);
    }
}

#endif
