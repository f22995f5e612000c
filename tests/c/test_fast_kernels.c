// test_fast_kernels.c - the fast mode's kernels against double precision: every instruction set that this
// machine runs, every type, odd sizes, a few and many tokens, attention over shuffled cells and shared heads.
#include "micro.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TOKENS           29
#define GATE_INT8            2.5e-4
#define GATE_INT16           1e-6
#define GATE_FLOAT           1e-11
#define GATE_ATTENTION_INT16 2e-6
#define GATE_ATTENTION       1e-9

static long n_checks;
static atomic_int not_cancelled;

static void fail(const char * format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "test-fast-kernels: FAILED: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static void * take(size_t size) {
    void * p = aligned_alloc(64, (size + 127) / 64 * 64);
    if (!p) fail("out of memory");
    memset(p, 0xFF, (size + 127) / 64 * 64); // NaN, where it is not written
    return p;
}

static uint64_t random_state = 1;

static double uniform(void) { // SplitMix64, [0, 1)
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double) ((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static float * normals(size_t n) {
    float * x = take(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = (float) (sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()));
    return x;
}

static void check(const double * expected, const float * found, size_t n, double gate, const char * set,
                  const char * what) {
    double error = 0, power = 1e-300;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(found[i])) fail("%s: %s: result %zu is not finite", set, what, i);
        error += (found[i] - expected[i]) * (found[i] - expected[i]);
        power += expected[i] * expected[i];
    }
    if (!(error / power <= gate)) fail("%s: %s: NMSE %.3g, need at most %g", set, what, error / power, gate);
    n_checks++;
}

static struct ggml_tensor rows_of(enum ggml_type type, void * data, int64_t n_rows, int64_t n) {
    struct ggml_tensor t = { .type = type, .data = data, .ne = { n, n_rows, 1, 1 } };
    t.nb[0] = ggml_type_size(type);
    t.nb[1] = ggml_row_size(type, n);
    t.nb[2] = t.nb[3] = t.nb[1] * (size_t) n_rows;
    return t;
}

static kernel_env env_of(const micro * m) {
    size_t size = fast_linear_scratch_size() > fast_attention_scratch_size() ? fast_linear_scratch_size()
                                                                             : fast_attention_scratch_size();
    size = (size > linear_scratch_size() ? size : linear_scratch_size()) + (1 << 20);
    return (kernel_env) { &not_cancelled, take(size), size, m };
}

// ------------------------------------------------------------------------------------------ linear

// Rows of weights that use up what integers hold, or none of it: larger and larger groups, single ones far
// larger than the rest, all alike, alternating ones, one alone, none.
static void make_odd(float * w, int64_t n_in, int64_t n_out) {
    for (int64_t i = 0; i < n_in * n_out; i++) {
        const int64_t row = i / n_in, k = i % n_in;
        switch (row % 6) {
            case 0:  w[i] *= (float) (1 << k / GROUP % 8); break;
            case 1:  w[i] *= k % 41 ? 1.0f : 50.0f; break;
            case 2:  w[i] = row % 12 == 2 ? 1.5f : -2.0f; break;
            case 3:  w[i] = __builtin_parityll((uint64_t) k / 4) ? -3.0f : 3.0f; break;
            case 4:  w[i] = k % BLOCK == 7 ? 3.0f : 0.0f; break;
            default: w[i] = 0.0f;
        }
    }
}

static void test_linear(const micro * m, enum ggml_type type, int64_t n_in, int64_t n_out, int64_t n_tokens,
                        row_kind rows, bool odd) {
    float *w = normals((size_t) (n_in * n_out)), *x = normals((size_t) (n_in * n_tokens)),
          *b = normals((size_t) n_out);
    if (odd) make_odd(w, n_in, n_out);
    struct ggml_tensor wt = rows_of(type, take(ggml_row_size(type, n_in) * (size_t) n_out), n_out, n_in);
    if (type == GGML_TYPE_F32) memcpy(wt.data, w, wt.nb[2]);
    else ggml_quantize_chunk(type, w, wt.data, 0, n_out, n_in, NULL);
    for (int64_t r = 0; r < n_out && type != GGML_TYPE_F32; r++)
        ggml_get_type_traits(type)->to_float((char *) wt.data + r * wt.nb[1], w + r * n_in, n_in);
    double * expected = take((size_t) (n_out * n_tokens) * sizeof *expected);
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t r = 0; r < n_out; r++) {
            double sum = b[r];
            for (int64_t k = 0; k < n_in; k++) sum += (double) w[r * n_in + k] * x[t * n_in + k];
            expected[t * n_out + r] = sum;
        }
    }
    kernel_env env = env_of(m);
    const linear_plan plan = fast_linear_plan(m, &wt, rows, false);
    const char * names[] = { [LINEAR_INT8] = "int8",
                             [LINEAR_DIRECT] = "they are",
                             [LINEAR_INT16] = "int16",
                             [LINEAR_DOTS_K] = "dots of 14 bits",
                             [LINEAR_DOTS16] = "dots of int16",
                             [LINEAR_FLOAT_DOTS] = "float dots" };
    const double gates[] = {
        [LINEAR_INT8] = GATE_INT8,    [LINEAR_DIRECT] = GATE_INT8,  [LINEAR_INT16] = GATE_INT16,
        [LINEAR_DOTS_K] = GATE_INT16, [LINEAR_DOTS16] = GATE_INT16, [LINEAR_FLOAT_DOTS] = GATE_FLOAT
    };
    if (plan != LINEAR_EXACT && plan != LINEAR_ENGINE) {
        struct ggml_tensor xt = rows_of(GGML_TYPE_F32, x, n_tokens, n_in),
                           bt = rows_of(GGML_TYPE_F32, b, 1, n_out);
        const int64_t size = fast_linear_rounded_size(plan, n_in);
        struct ggml_tensor rt =
            rows_of(GGML_TYPE_I8, size ? take((size_t) (size * n_tokens)) : NULL, n_tokens, size);
        rt.src[0] = &xt;
        kernel_job round = { .env = &env, .plan = plan }, job = { .env = &env, .plan = plan, .bias = 2 };
        if (size) kernel_round(&rt, 0, 1, &round);
        struct ggml_tensor y = rows_of(GGML_TYPE_F32, take((size_t) (n_out * n_tokens) * 4), n_tokens, n_out);
        y.src[0] = &wt, y.src[1] = size ? &rt : &xt, y.src[2] = &bt;
        kernel_fast_linear(&y, 0, 1, &job);
        char what[128];
        snprintf(what, sizeof what, "%s%s [%d, %d] x %d tokens as %s", odd ? "odd " : "",
                 ggml_type_name(type), (int) n_out, (int) n_in, (int) n_tokens, names[plan]);
        check(expected, y.data, (size_t) (n_out * n_tokens), gates[plan], m->name, what);
        free(y.data);
        free(rt.data);
    }
    free(env.scratch);
    free(expected);
    free(wt.data);
    free(w);
    free(x);
    free(b);
}

// norm(x) through two matrices with every end, bias and residual, for few and many tokens.
static void test_ends(const micro * m, enum ggml_type type, round_norm norm, linear_end end, int64_t n_in,
                      int64_t n_out, int64_t n_tokens, row_kind rows) {
    const size_t n_w = (size_t) (n_in * n_out), n_x = (size_t) (n_in * n_tokens),
                 n_y = (size_t) (n_out * n_tokens);
    float *w[2], *x = normals(n_x), *b = normals((size_t) n_out), *residual = normals(n_y);
    float *scale = normals((size_t) n_in), *shift = normals((size_t) n_in);
    struct ggml_tensor wt[2];
    for (int i = 0; i < 2; i++) {
        w[i] = normals(n_w);
        for (size_t k = 0; k < n_w; k++) w[i][k] *= 0.1f;
        // SwiGLU's matrices may be of two types
        const enum ggml_type kind =
            i == 1 && end == END_SWIGLU && type == GGML_TYPE_Q4_K ? GGML_TYPE_Q6_K : type;
        wt[i] = rows_of(kind, take(ggml_row_size(kind, n_in) * (size_t) n_out), n_out, n_in);
        ggml_quantize_chunk(kind, w[i], wt[i].data, 0, n_out, n_in, NULL);
        for (int64_t r = 0; r < n_out; r++)
            ggml_get_type_traits(kind)->to_float((char *) wt[i].data + r * wt[i].nb[1], w[i] + r * n_in,
                                                 n_in);
    }
    double *expected = take(n_y * sizeof *expected), *row = take((size_t) n_in * sizeof *row);
    for (int64_t t = 0; t < n_tokens; t++) {
        double mean = 0, var = 0;
        for (int64_t k = 0; k < n_in && norm == NORM_LAYER; k++) mean += x[t * n_in + k] / (double) n_in;
        for (int64_t k = 0; k < n_in; k++) var += pow(x[t * n_in + k] - mean, 2) / (double) n_in;
        for (int64_t k = 0; k < n_in; k++) {
            row[k] = (x[t * n_in + k] - mean) / sqrt(var + 1e-5) * scale[k];
            if (norm == NORM_LAYER) row[k] += shift[k];
            if (norm == NORM_NONE) row[k] = x[t * n_in + k];
        }
        for (int64_t r = 0; r < n_out; r++) {
            double sum[2] = { b[r], 0 };
            for (int i = 0; i < 2; i++) {
                for (int64_t k = 0; k < n_in; k++) sum[i] += w[i][r * n_in + k] * row[k];
            }
            const double y = sum[0], factor = end == END_QUICK_GELU ? 1.702 : 1.0;
            expected[t * n_out + r] =
                residual[t * n_out + r] +
                (end == END_PLAIN       ? y
                 : end == END_GELU      ? y / 2 * erfc(-y / sqrt(2))
                 : end == END_GELU_TANH ? y / 2 * (1 + tanh(sqrt(2 / acos(-1)) * (y + 0.044715 * y * y * y)))
                                        : y / (1 + exp(-factor * y)) * (end == END_SWIGLU ? sum[1] : 1.0));
        }
    }
    kernel_env env = env_of(m);
    const linear_plan plan = fast_linear_plan(m, &wt[0], rows, false);
    struct ggml_tensor xt = rows_of(GGML_TYPE_F32, x, n_tokens, n_in),
                       bt = rows_of(GGML_TYPE_F32, b, 1, n_out), st = rows_of(GGML_TYPE_F32, scale, 1, n_in),
                       ht = rows_of(GGML_TYPE_F32, shift, 1, n_in),
                       zt = rows_of(GGML_TYPE_F32, residual, n_tokens, n_out);
    const int64_t size = fast_linear_rounded_size(plan, n_in);
    struct ggml_tensor rt = rows_of(GGML_TYPE_I8, take((size_t) (size * n_tokens)), n_tokens, size);
    struct ggml_tensor y = rows_of(GGML_TYPE_F32, take(n_y * 4), n_tokens, n_out);
    rt.src[0] = &xt, rt.src[1] = &st, rt.src[2] = &ht;
    kernel_job round = { .env = &env, .plan = plan, .norm = norm, .eps = 1e-5f };
    kernel_round(&rt, 0, 1, &round);
    y.src[0] = &wt[0], y.src[1] = &rt, y.src[2] = &bt, y.src[3] = &zt, y.src[4] = &wt[1];
    kernel_job job = { .env = &env, .plan = plan, .end = end, .bias = 2, .residual = 3 };
    if (end == END_SWIGLU) job.up = 4;
    kernel_fast_linear(&y, 0, 1, &job);
    char what[128];
    snprintf(what, sizeof what, "%s, norm %d, end %d, [%d, %d] x %d tokens", ggml_type_name(type), (int) norm,
             (int) end, (int) n_out, (int) n_in, (int) n_tokens);
    const double factors = end == END_SWIGLU ? 3 : 2; // errors of both matrices, of the ends
    check(expected, y.data, n_y, GATE_INT8 * factors, m->name, what);
    float * own[] = { w[0], w[1], wt[0].data, wt[1].data, x, b, residual, scale, shift, rt.data, y.data };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) free(own[i]);
    free(expected);
    free(row);
    free(env.scratch);
}

// What is not finite is not rounded away: its block's scale is NaN.
static void test_not_finite(const micro * m) {
    const float wrong[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < 3; i++) {
        float *x = normals(BLOCK * (size_t) m->rows), scale[2 * MAX_ROWS];
        char * out = take(4 * BLOCK * (size_t) m->rows);
        x[77] = wrong[i];
        m->round8(x, BLOCK, out);
        memcpy(scale, out + rounded8_of(BLOCK).scales, 4);
        if (!isnan(scale[0])) fail("%s: round8 of %g: scale %g", m->name, wrong[i], scale[0]);
        m->round16(x, BLOCK, out);
        memcpy(scale, out + rounded16_of(BLOCK).scales, 4);
        if (!isnan(scale[0])) fail("%s: round16 of %g: scale %g", m->name, wrong[i], scale[0]);
        m->pack8(GGML_TYPE_F32, (const char *) x, 4 * BLOCK, m->rows, BLOCK, out, scale);
        if (!isnan(scale[0])) fail("%s: pack8 of %g: scale %g", m->name, wrong[i], scale[0]);
        m->pack16(GGML_TYPE_F32, (const char *) x, 4 * BLOCK, m->rows, BLOCK, out, scale);
        if (!isnan(scale[0])) fail("%s: pack16 of %g: scale %g", m->name, wrong[i], scale[0]);
        n_checks += 4;
        free(out);
        free(x);
    }
}

// Nor is the scale of a block in the file.
static void test_scales_not_finite(const micro * m) {
    const enum ggml_type types[] = { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                                     GGML_TYPE_Q6_K };
    const uint16_t wrong[] = { 0x7E00, 0x7C00, 0xFC00 }; // NaN, infinity, -infinity
    for (int i = 0; i < 15; i++) {
        const enum ggml_type type = types[i / 3];
        const size_t size = ggml_row_size(type, BLOCK);
        float *x = normals(BLOCK), scale[2 * MAX_ROWS];
        char *w = take(size), *out = take(BLOCK * (size_t) m->rows);
        ggml_quantize_chunk(type, x, w, 0, 1, BLOCK, NULL);
        memcpy(w + (type == GGML_TYPE_Q6_K ? size - 2 : 0), &wrong[i % 3], 2);
        m->pack8(type, w, size, 1, BLOCK, out, scale);
        if (isfinite(scale[0]))
            fail("%s: pack8 of %s of a scale %x: %g", m->name, ggml_type_name(type), wrong[i % 3], scale[0]);
        n_checks++;
        free(out);
        free(w);
        free(x);
    }
}

static void test_all_ends(const micro * m) {
    const int tokens[] = { 1, 3, 14 }, rows[] = { 64, 37, 300 };
    for (int end = END_PLAIN; end <= END_SWIGLU; end++) {
        for (int norm = NORM_NONE; norm <= NORM_LAYER; norm++) {
            for (int i = 0; i < 3; i++)
                for (int kind = ROWS_PROMPT; kind <= ROWS_ANSWER; kind++)
                    test_ends(m, i == 1 ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_K, (round_norm) norm,
                              (linear_end) end, 512, rows[i], tokens[i], (row_kind) kind);
        }
    }
}

static void test_linears(const micro * m) {
    const enum ggml_type types[] = { GGML_TYPE_F32,   GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0,
                                     GGML_TYPE_Q4_1,  GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, GGML_TYPE_Q2_K,
                                     GGML_TYPE_Q3_K,  GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
                                     GGML_TYPE_IQ4_NL };
    const int tokens[] = { 1, 2, 3, 7, 8, 9, 12, 13, 24, 29 };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        for (size_t j = 0; j < sizeof tokens / sizeof *tokens; j++) {
            for (int rows = ROWS_PROMPT; rows <= ROWS_VIEW; rows++) {
                test_linear(m, types[i], 512, 67, tokens[j], (row_kind) rows, false);
                if (ggml_blck_size(types[i]) <= 32)
                    test_linear(m, types[i], 288, 33, tokens[j], (row_kind) rows, false);
            }
        }
        test_linear(m, types[i], 512, 67, 5, ROWS_PROMPT, true);
    }
    for (int rows = ROWS_PROMPT; rows <= ROWS_VIEW; rows++) { // no multiple of 32, as 4304 of SigLIP's fc2
        test_linear(m, GGML_TYPE_F16, 75, 5, 3, (row_kind) rows, false);
        test_linear(m, GGML_TYPE_F32, 592, 33, 13, (row_kind) rows, false);
    }
}

// --------------------------------------------------------------------------------------- attention

typedef struct attention_case {
    int n_tokens, n_past, n_head, n_head_kv, d;
    enum ggml_type type;
} attention_case;

static void test_attention(const micro * m, attention_case c, row_kind rows) {
    const int n_keys = c.n_past + c.n_tokens, group = c.n_head / c.n_head_kv, kv = c.n_head_kv * c.d;
    float * q = normals((size_t) (c.n_tokens * c.n_head * c.d));
    struct ggml_tensor cache[2];
    float * values[2];
    int32_t *cells = take((size_t) n_keys * 4), *visible = take((size_t) c.n_tokens * 4);
    for (int i = 0; i < n_keys; i++) cells[i] = i;
    for (int i = n_keys - 1; i > 0; i--) { // a sequence's cells lie anywhere
        const int j = (int) (uniform() * (i + 1)), t = cells[i];
        cells[i] = cells[j], cells[j] = t;
    }
    for (int i = 0; i < 2; i++) {
        values[i] = normals((size_t) (n_keys * kv));
        cache[i] = rows_of(c.type, take(ggml_row_size(c.type, kv) * (size_t) n_keys), n_keys, kv);
        if (c.type == GGML_TYPE_F32) memcpy(cache[i].data, values[i], cache[i].nb[2]);
        else ggml_quantize_chunk(c.type, values[i], cache[i].data, 0, n_keys, kv, NULL);
        for (int r = 0; r < n_keys && c.type != GGML_TYPE_F32; r++)
            ggml_get_type_traits(c.type)->to_float((char *) cache[i].data + r * cache[i].nb[1],
                                                   values[i] + r * kv, kv);
    }
    double * expected = take((size_t) (c.n_tokens * c.n_head * c.d) * sizeof *expected);
    double * p = take((size_t) n_keys * sizeof *p);
    for (int t = 0; t < c.n_tokens; t++) {
        visible[t] = c.n_past + t + 1;
        for (int h = 0; h < c.n_head; h++) {
            double sum = 0;
            for (int j = 0; j < visible[t]; j++) {
                double s = 0;
                for (int k = 0; k < c.d; k++)
                    s += (double) q[(t * c.n_head + h) * c.d + k] *
                         values[0][cells[j] * kv + h / group * c.d + k];
                sum += p[j] = exp(s / sqrt(c.d));
            }
            for (int k = 0; k < c.d; k++) {
                double y = 0;
                for (int j = 0; j < visible[t]; j++)
                    y += p[j] / sum * values[1][cells[j] * kv + h / group * c.d + k];
                expected[(t * c.n_head + h) * c.d + k] = y;
            }
        }
    }
    attention_block blocks[64];
    attention_env env = { .env = env_of(m),
                          .n_head = c.n_head,
                          .n_head_kv = c.n_head_kv,
                          .head_dim = c.d,
                          .blocks = blocks,
                          .n_visible = visible,
                          .rows = rows };
    const int most = fast_attention_queries(c.d), step = most / group > 1 ? most / group : 1;
    for (int i = 0; i < c.n_tokens; i += step)
        blocks[env.n_blocks++] =
            (attention_block) { i, c.n_tokens - i < step ? c.n_tokens - i : step, cells, 0 };
    struct ggml_tensor qt = rows_of(GGML_TYPE_F32, q, c.n_tokens, c.n_head * c.d);
    struct ggml_tensor y = rows_of(GGML_TYPE_F32, take(qt.nb[2]), c.n_tokens, c.n_head * c.d);
    y.src[0] = &qt, y.src[1] = &cache[0], y.src[2] = &cache[1];
    kernel_job job = { .env = &env.env, .attention = &env };
    kernel_fast_attention(&y, 0, 1, &job);
    char what[128];
    snprintf(what, sizeof what, "attention of %d tokens after %d, heads %d/%d of %d, %s", c.n_tokens,
             c.n_past, c.n_head, c.n_head_kv, c.d, ggml_type_name(c.type));
    const bool rounds = rows != ROWS_ANSWER && fast_attention_queries(c.d) == MAX_QUERIES;
    check(expected, y.data, (size_t) (c.n_tokens * c.n_head * c.d),
          rounds ? GATE_ATTENTION_INT16 : GATE_ATTENTION, m->name, what);
    free(env.env.scratch);
    free(y.data);
    free(q);
    free(p);
    free(expected);
    free(cells);
    free(visible);
    for (int i = 0; i < 2; i++) free(values[i]), free(cache[i].data);
}

static void test_attentions(const micro * m) {
    const attention_case cases[] = {
        { 1, 0, 2, 2, 64, GGML_TYPE_F32 },    { 1, 300, 8, 2, 128, GGML_TYPE_F16 },
        { 1, 77, 7, 1, 96, GGML_TYPE_Q8_0 },  { 2, 130, 8, 2, 64, GGML_TYPE_F16 },
        { 40, 0, 4, 4, 64, GGML_TYPE_F16 },   { 130, 65, 4, 2, 64, GGML_TYPE_F32 },
        { 50, 14, 8, 1, 128, GGML_TYPE_F16 }, { 33, 3, 2, 2, 20, GGML_TYPE_F32 },
        { 97, 0, 3, 3, 256, GGML_TYPE_Q8_0 }, { 3, 20, 2, 2, 288, GGML_TYPE_F16 },
        { 70, 1, 6, 2, 32, GGML_TYPE_BF16 },  { 65, 5, 3, 3, 72, GGML_TYPE_F32 },
        { 37, 0, 2, 1, 80, GGML_TYPE_F16 },   { 9, 60, 4, 2, 49, GGML_TYPE_F32 },
        { 1, 10, 16, 1, 64, GGML_TYPE_F32 },  { 5, 200, 100, 1, 32, GGML_TYPE_F32 },
        { 1, 75, 18, 18, 64, GGML_TYPE_F16 }, { 2, 40, 34, 17, 96, GGML_TYPE_Q8_0 },
        { 1, 9, 17, 17, 288, GGML_TYPE_F16 }, // several heads in a task of an answer's row
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_attention(m, cases[i], ROWS_PROMPT);
        test_attention(m, cases[i], ROWS_ANSWER);
    }
}

int main(int argc, char ** argv) { // arguments: the sets to test, which have to be there
    char * all[] = { "plain", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondot", "neoni8mm" };
    char ** names = argc > 1 ? argv + 1 : all;
    const size_t n_names = argc > 1 ? (size_t) argc - 1 : sizeof all / sizeof *all;
    for (size_t i = 0; i < n_names; i++) {
        const micro * m = micro_choose(names[i]);
        if (!m && argc > 1) fail("%s: not on this machine", names[i]);
        if (!m) {
            printf("test-fast-kernels: %s: not on this machine\n", names[i]);
            continue;
        }
        if (strcmp(m->name, names[i])) fail("%s: the table is called %s", names[i], m->name);
        random_state = 1; // all sets get the same numbers
        test_linears(m);
        test_all_ends(m);
        test_not_finite(m);
        test_scales_not_finite(m);
        test_attentions(m);
    }
    if (micro_choose("no such set")) fail("a set that does not exist was chosen");
    if (!micro_choose(NULL)) fail("nothing to run on this machine");
    printf("test-fast-kernels: %ld checks passed\n", n_checks);
    return 0;
}
