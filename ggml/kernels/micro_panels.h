// micro_panels.h - part of micro_code.h, many tokens: weights become panels of int8 or int16, tiles of tokens
// are multiplied with them, and the epilogue is applied to the sums.
#pragma once

// ------------------------------------------------------------------------------- panels of weights

// A block as vectors of floats. 32 numbers q of a type become q step + low; the first 16 and the last have
// their own.
INLINE void put32(b32 q, const float * steps, const float * lows, vf * out) {
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / LANES; i++)
        out[i] = vf_fma(vf_of_part(q, i), vf_set(steps[i * LANES / 16]), vf_set(lows[i * LANES / 16]));
}

#define GROUP_OF(x, g) ((x)->v + (g) * (GROUP / LANES))

// Of q4_k and q5_k: of each group, twice.
INLINE void steps_45(const void * block, float * steps, float * lows) {
    const block_q4_k * w = block;
    const bytes_k bytes = bytes_of(w);
    bytes_times(bytes.scale, half(w->d), steps);
    bytes_times(bytes.min, -half(w->min), lows);
}

INLINE void floats_q4_k(const block_q4_k * w, block_vf * out) {
    float steps[16], lows[16];
    steps_45(w, steps, lows);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g += 2) {
        const b32 q = b32_load(w->q + 16 * g);
        put32(b32_low(q), steps + 2 * g, lows + 2 * g, GROUP_OF(out, g));
        put32(b32_high(q), steps + 2 * g + 2, lows + 2 * g + 2, GROUP_OF(out, g + 1));
    }
}

INLINE void floats_q5_k(const block_q5_k * w, block_vf * out) {
    float steps[16], lows[16];
    steps_45(w, steps, lows);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) put32(q5_k_part(w, g), steps + 2 * g, lows + 2 * g, GROUP_OF(out, g));
}

INLINE void floats_q6_k(const block_q6_k * w, block_vf * out) {
    float steps[16], lows[16];
    for (int p = 0; p < 16; p += LANES) {
        const vf step = vf_mul(vf_of_i8(w->scales + p), vf_set(half(w->d)));
        vf_store(steps + p, step);
        vf_store(lows + p, vf_mul(step, vf_set(-32.0f)));
    }
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++)
        put32(q6_k_part(w, g / 4, g % 4), steps + 2 * g, lows + 2 * g, GROUP_OF(out, g));
}

INLINE void floats_q4_0(const block_q4_0 * w, block_vf * out) {
#pragma GCC unroll 8
    for (int g = 0; g < BLOCK / GROUP; g++) {
        const b32 q = b32_two(w[g].q);
        const float d = half(w[g].d), steps[] = { d, d }, lows[] = { -8.0f * d, -8.0f * d };
        put32(b32_halves(b32_low(q), b32_high(q)), steps, lows, GROUP_OF(out, g));
    }
}

INLINE void floats_q8_0(const block_q8_0 * w, block_vf * out) {
#pragma GCC unroll 8
    for (int g = 0; g < BLOCK / GROUP; g++) {
        const float d = half(w[g].d), steps[] = { d, d }, lows[] = { 0.0f, 0.0f };
        put32(b32_load(w[g].q), steps, lows, GROUP_OF(out, g));
    }
}

// n numbers of any type, those of the block beyond them 0.
INLINE void block_floats(enum ggml_type type, const char * w, int n, block_vf * out) {
    switch (n == BLOCK ? type : GGML_TYPE_COUNT) {
        case GGML_TYPE_Q4_K: floats_q4_k((const void *) w, out); return;
        case GGML_TYPE_Q5_K: floats_q5_k((const void *) w, out); return;
        case GGML_TYPE_Q6_K: floats_q6_k((const void *) w, out); return;
        case GGML_TYPE_Q4_0: floats_q4_0((const void *) w, out); return;
        case GGML_TYPE_Q8_0: floats_q8_0((const void *) w, out); return;
        case GGML_TYPE_F16:
#pragma GCC unroll 16
            for (int i = 0; i < BLOCK / LANES; i++) out->v[i] = vf_of_f16(w + 2 * LANES * i);
            return;
        default: {
            float x[BLOCK];
            const float * from = floats_of(w, type, n, x);
            *out = (block_vf) { 0 };
            memcpy(out, from, (size_t) n * sizeof *from);
        }
    }
}

#if !defined(TRANSPOSE8) // the order of multiply8's panels
#define TRANSPOSE8 transpose
#endif

// Blocks of a few rows are rotated together, to hide the latency of each.
#define TOGETHER 4
typedef struct some_rows {
    block_vf x[TOGETHER];
    range ranges[TOGETHER];
} some_rows;

// Rows first to first + TOGETHER - 1; those beyond n_rows repeat row 0.
INLINE void rotate_rows(enum ggml_type type, const char * w, size_t row_size, int first, int n_rows, int n_k,
                        some_rows * out) {
    for (int j = 0; j < TOGETHER; j++) {
        block_vf row;
        block_floats(type, w + (first + j < n_rows ? (size_t) (first + j) * row_size : 0), n_k, &row);
        out->ranges[j] = rotate(&row);
        out->x[j] = row;
    }
}

static void pack8(enum ggml_type type, const char * w, size_t row_size, int n_rows, int n_k, char * panel,
                  float * scales) {
    if (n_k == BLOCK && has_columns(type)) {
        pack_columns(type, w, row_size, n_rows, panel, scales);
        return;
    }
    _Alignas(64) char rows[ROWS * BLOCK];
    some_rows some;
    for (int i = 0; i < ROWS; i += TOGETHER) {
        rotate_rows(type, w, row_size, i, n_rows, n_k, &some);
        for (int j = 0; j < TOGETHER; j++) {
            const range r = some.ranges[j];
            const float top = top_lane(r.top), bottom = -vf_top(vf_set(0.0f) - r.bottom);
            const float inverse = inverse_of(top - bottom, 255.0f), scale = (top - bottom) / 255.0f;
            scales[i + j] = scale / ROTATION_GAIN; // from bottom to top: -128 to 127
            scales[ROWS + i + j] = (bottom + (128.0f - W_OFFSET) * scale) / ROTATION_GAIN;
            put_bytes(&some.x[j], inverse, -128.0f - bottom * inverse, W_OFFSET, rows + (i + j) * BLOCK);
        }
    }
    TRANSPOSE8(rows, BLOCK, BLOCK / 4, panel);
}

static void pack16(enum ggml_type type, const char * w, size_t row_size, int n_rows, int n_k, char * panel,
                   float * scales) {
    _Alignas(64) char rows[2 * ROWS * BLOCK];
    some_rows some;
    for (int i = 0; i < ROWS; i += TOGETHER) {
        rotate_rows(type, w, row_size, i, n_rows, n_k, &some);
        for (int j = 0; j < TOGETHER; j++) {
            const float top = size_of(some.ranges[j]);
            scales[i + j] = top / (PANEL16_TOP * ROTATION_GAIN);
            put_words(&some.x[j], top, PANEL16_TOP, rows + 2 * (i + j) * BLOCK);
        }
    }
    transpose(rows, 2 * BLOCK, BLOCK / 2, panel);
}

// ------------------------------------------------------------------------------------ many tokens

// A product says what happens to the accumulators of token i, a##i and b##i, its sums with two vectors of
// rows: START, STEP (w0 and w1: what the panel's step begins with; base##j: the step's bytes of token 3 j)
// and END. They have names since compilers spill an array.
INLINE void add_sums(vi sums, vf w_scale, const char * x_scale, float * y) {
    vf_store(y, vf_fma(vf_of(sums), vf_mul(w_scale, vf_set(float_at(x_scale))), vf_load(y)));
}

INLINE void add_lows(const float * lows, const char * x_sum, float * y) {
    const vf sum = vf_set(float_at(x_sum));
    for (int r = 0; r < ROWS; r += LANES) vf_store(y + r, vf_fma(vf_load(lows + r), sum, vf_load(y + r)));
}

#define BYTES_START(j, i) vi a##i = vi_zero(), b##i = a##i;
#define BYTES_STEP(j, i)  DOTS(DOT4, a##i, b##i, w0, w1, base##j + (i - 3 * j) * stride)
#define BYTES_END(j, i)                                                                                      \
    add_lows(w_scales + ROWS, x_sums + i * stride, y + i * ROWS);                                            \
    WORDS_END(j, i)

#define WORDS_START      BYTES_START
#define WORDS_STEP(j, i) DOTS2(a##i, b##i, w0, w1, base##j + (i - 3 * j) * stride)
#define WORDS_END(j, i)                                                                                      \
    add_sums(a##i, s0, x_scales + i * stride, y + i * ROWS);                                                 \
    add_sums(b##i, s1, x_scales + i * stride, y + i * ROWS + LANES);

#define DOTS(DOT, a, b, w0, w1, p)                                                                           \
    {                                                                                                        \
        const vi v = vi_set(int_at(p));                                                                      \
        DOT(a, w0, v);                                                                                       \
        DOT(b, w1, v);                                                                                       \
    }
#if !defined(DOTS2)
#define DOTS2(a, b, w0, w1, p) DOTS(DOT2, a, b, w0, w1, p)
#endif

#define FOUR_TOKENS(F) F(0, 0) F(0, 1) F(0, 2) F(1, 3)
#define ONE_TOKEN(F)   F(0, 0)

// A step takes step_size bytes of every row and token.
#define DEFINE_TILE(name, EACH, product, step_size)                                                          \
    static __attribute__((noinline)) void name(int n_steps, const char * panel, const float * w_scales,      \
                                               const char * x, const char * x_scales, const char * x_sums,   \
                                               size_t stride, float * y) {                                   \
        const char *base0 = x, *base1 = x + 3 * stride, *base2 = x + 6 * stride, *base3 = x + 9 * stride;    \
        (void) base1, (void) base2, (void) base3, (void) x_sums, (void) x_scales;                            \
        EACH(product##_START)                                                                                \
        for (int k = 0; k < n_steps; k++) {                                                                  \
            const vi w0 = vi_load(panel), w1 = vi_load(panel + 4 * LANES);                                   \
            (void) w0, (void) w1;                                                                            \
            EACH(product##_STEP)                                                                             \
            panel += step_size * ROWS;                                                                       \
            base0 += step_size, base1 += step_size, base2 += step_size, base3 += step_size;                  \
        }                                                                                                    \
        const vf s0 = vf_load(w_scales), s1 = vf_load(w_scales + LANES);                                     \
        (void) s0, (void) s1;                                                                                \
        EACH(product##_END)                                                                                  \
    }

// alone: the product for a token without others.
#define DEFINE_MULTIPLY(name, product, alone, step_size, number_size)                                        \
    DEFINE_TILE(name##_tile, EACH_TOKEN, product, step_size)                                                 \
    DEFINE_TILE(name##_four, FOUR_TOKENS, product, step_size)                                                \
    DEFINE_TILE(name##_one, ONE_TOKEN, alone, step_size)                                                     \
    static void name(int n, int n_k, const char * panel, const float * w_scales, const char * x,             \
                     const char * x_scales, const char * x_sums, size_t stride, float * y) {                 \
        const int n_steps = n_k * number_size / step_size;                                                   \
        int i = 0;                                                                                           \
        size_t at = 0;                                                                                       \
        for (; i + TOKENS <= n; i += TOKENS, at = (size_t) i * stride)                                       \
            name##_tile(n_steps, panel, w_scales, x + at, x_scales + at, x_sums + at, stride, y + i * ROWS); \
        for (; i + 4 <= n; i += 4, at = (size_t) i * stride)                                                 \
            name##_four(n_steps, panel, w_scales, x + at, x_scales + at, x_sums + at, stride, y + i * ROWS); \
        for (; i < n; i++, at = (size_t) i * stride)                                                         \
            name##_one(n_steps, panel, w_scales, x + at, x_scales + at, x_sums + at, stride, y + i * ROWS);  \
    }

#if defined(HAS_PAIRS) // products of two tokens with two rows, 8 bytes of each

// Of a pair of tokens the first one's accumulators are both tokens' sums with the first vector of rows, the
// second one's those with the second.
INLINE void add_pair(vi a, vi b, vf w_scale, const char * x_scale, size_t stride, float * y) {
    add_sums(first_halves(a, b), w_scale, x_scale, y);
    add_sums(second_halves(a, b), w_scale, x_scale + stride, y + ROWS);
}

#define PAIRS_START WORDS_START
#define PAIRS_STEP(j, i)                                                                                     \
    {                                                                                                        \
        const char *from = base0 + i / 2 * 2 * stride, *rows = panel + i % 2 * 8 * LANES;                    \
        const vi v = two_eights(from, from + stride);                                                        \
        a##i = dots_2x2(a##i, v, vi_load(rows));                                                             \
        b##i = dots_2x2(b##i, v, vi_load(rows + 4 * LANES));                                                 \
    }
#define PAIRS_END(j, i)                                                                                      \
    for (int t = i; i % 2 == 0 && t < i + 2; t++) /* of both, before their sums: as of a token alone */      \
        add_lows(w_scales + ROWS, x_sums + t * stride, y + t * ROWS);                                        \
    add_pair(a##i, b##i, i % 2 ? s1 : s0, x_scales + i / 2 * 2 * stride, stride,                             \
             y + i / 2 * 2 * ROWS + i % 2 * LANES);

// A token alone beside zeros, as the first of a pair for two rows, then as the second for the next two.
#define ALONE_START WORDS_START
#define ALONE_STEP(j, i)                                                                                     \
    {                                                                                                        \
        const vi v = one_eight(base0), u = swap(v);                                                          \
        a##i = dots_2x2(dots_2x2(a##i, v, w0), u, w1);                                                       \
        b##i = dots_2x2(dots_2x2(b##i, v, vi_load(panel + 8 * LANES)), u, vi_load(panel + 12 * LANES));      \
    }
#define ALONE_END BYTES_END

DEFINE_MULTIPLY(multiply8, PAIRS, ALONE, 8, 1)

#else

DEFINE_MULTIPLY(multiply8, BYTES, BYTES, 4, 1)

#endif

DEFINE_MULTIPLY(multiply16, WORDS, WORDS, 4, 2)

// ------------------------------------------------------------------------------------------------- epilogues

INLINE vf sigmoid(vf x) { // 1 / (1 + e^-x)
    const vf one = vf_set(1.0f), most = vf_set(88.0f), y = vf_set(0.0f) - x;
    return one / (one + vf_exp(vf_choose((vl) (y < most), y, most)));
}

// The distribution function of the normal distribution, off by 1e-7 at most: Abramowitz and Stegun, 7.1.26.
INLINE vf normal_cdf(vf x) {
    const vf one = vf_set(1.0f), size = vf_choose((vl) (x < 0.0f), vf_set(0.0f) - x, x);
    const vf t = one / (one + vf_set(0.3275911f * 0.70710678f) * size);
    vf p = vf_set(1.061405429f) * t + vf_set(-1.453152027f);
    p = p * t + vf_set(1.421413741f);
    p = p * t + vf_set(-0.284496736f);
    p = p * t + vf_set(0.254829592f);
    const vf tail = vf_set(0.5f) * p * t * vf_exp(vf_set(-0.5f) * x * x);
    return vf_choose((vl) (x < 0.0f), tail, one - tail);
}

// x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
INLINE vf gelu_tanh(vf x) { return x * sigmoid(x * (vf_set(1.5957691216f) + vf_set(0.0713548163f) * x * x)); }

INLINE vf ended(linear_end end, vf y, vf up) {
    switch (end) {
        case END_SILU:       return y * sigmoid(y);
        case END_GELU:       return y * normal_cdf(y);
        case END_QUICK_GELU: return y * sigmoid(vf_set(1.702f) * y);
        case END_GELU_TANH:  return gelu_tanh(y);
        case END_SWIGLU:     return y * sigmoid(y) * up;
        default:             return y;
    }
}

// n numbers, whole vectors of them or fewer.
INLINE vf load_some(const float * from, int n) {
    float x[LANES] = { 0.0f };
    if (n == LANES) return vf_load(from);
    memcpy(x, from, (size_t) n * sizeof *x);
    return vf_load(x);
}

INLINE void end_row(const tile_end * e, const linear_end end, int n_rows, const float * y, const float * up,
                    size_t at) {
    for (int r = 0; r < n_rows; r += LANES) {
        const int n = n_rows - r < LANES ? n_rows - r : LANES;
        float * to = e->to + at + r;
        vf v = vf_load(y + r);
        if (e->bias) v = v + load_some(e->bias + r, n);
        v = ended(end, v, up ? vf_load(up + r) : v);
        if (e->residual) v = v + load_some(e->residual + at + r, n);
        if (e->stream) {
            vf_stream(to, v);
        } else if (n == LANES) {
            vf_store(to, v);
        } else {
            float some[LANES];
            vf_store(some, v);
            memcpy(to, some, (size_t) n * sizeof *to);
        }
    }
}

static void end_tile(const tile_end * e, int n, int n_rows, const float * y, const float * up,
                     size_t y_stride) {
    for (int t = 0; t < n; t++) {
        const float *sums = y + t * y_stride, *others = up ? up + t * y_stride : NULL;
        switch (e->end) {
            case END_SILU:       end_row(e, END_SILU, n_rows, sums, NULL, t * e->stride); break;
            case END_GELU:       end_row(e, END_GELU, n_rows, sums, NULL, t * e->stride); break;
            case END_QUICK_GELU: end_row(e, END_QUICK_GELU, n_rows, sums, NULL, t * e->stride); break;
            case END_GELU_TANH:  end_row(e, END_GELU_TANH, n_rows, sums, NULL, t * e->stride); break;
            case END_SWIGLU:     end_row(e, END_SWIGLU, n_rows, sums, others, t * e->stride); break;
            default:             end_row(e, END_PLAIN, n_rows, sums, NULL, t * e->stride);
        }
    }
}
