// test_kernels.c - our CPU kernels against double precision in the same program: every type, every small
// shape, strided rows, addresses aligned to one number only, 1 to 3 threads with the same bytes. Weights and
// caches are what ggml quantises random numbers to, and what its own to_float makes of them is the truth.
// Argument: every how many shapes of each type one is tested, for emulators, which take minutes for them all.
#include "tile.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_THREADS 3
#define MAX_TOKENS  20
#define MAX_OUT     70
#define NMSE_GATE   1e-10
#define MAX_RESULT  (MAX_TOKENS * 16 * 128)
#define GUARD       16 // floats behind every result that must stay as they are

static long n_checks;
static double worst_nmse;
static int every_nth = 1;

static bool left_out(void) { // the next shape
    static int n;
    return n++ % every_nth != 0;
}

static void fail(const char * format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "test-kernels: FAILED: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

// ------------------------------------------------------------------------------------------ numbers

static uint64_t random_state = 1;

static double uniform(void) { // SplitMix64, [0, 1)
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double) ((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static float normal(void) {
    return (float) (sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()));
}

static void * take(size_t size) {
    void * p = aligned_alloc(64, (size + 64 + 63) / 64 * 64);
    if (!p) fail("out of memory");
    return p;
}

static float * normals(size_t n, float scale) {
    float * x = take(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = normal() * scale;
    return x;
}

// powers: of each result before cancellation, or NULL for its own square.
static void check_nmse(const double * expected, const double * powers, const float * found, size_t n,
                       double gate, const char * what) {
    double error = 0, power = 0;
    for (size_t i = 0; i < n; i++) {
        error += (found[i] - expected[i]) * (found[i] - expected[i]);
        power += powers ? powers[i] : expected[i] * expected[i];
    }
    double nmse = error / (power > 0 ? power : 1);
    if (!(nmse <= gate)) fail("%s: NMSE %.3g, need at most %g", what, nmse, gate);
    if (gate == NMSE_GATE && nmse > worst_nmse) worst_nmse = nmse;
    n_checks++;
}

// Rows of a type: n_rows of n numbers, and what they are as f32. Where the type cannot hold them: false.
typedef struct packed {
    enum ggml_type type;
    char * data;
    size_t row_size;
    float * values; // [n_rows][n]
} packed;

// Types that ggml would sort tables for many seconds to quantise to: any bytes will do whose scale, an f16
// number of which high is the upper byte, is finite.
static bool random_blocks(const packed * p, size_t size) {
    size_t high = 1;
    switch (p->type) {
        case GGML_TYPE_IQ1_M:   high = ggml_type_size(p->type) - 1; break; // its upper 4 bits
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:   break;
        default:                return false;
    }
    for (size_t i = 0; i < size; i++) {
        p->data[i] = (char) (uniform() * 256);
        if (i % ggml_type_size(p->type) == high) p->data[i] = (char) ((p->data[i] & 0x0F) | 0x20);
    }
    return true;
}

static bool pack_rows(packed * out, enum ggml_type type, int64_t n_rows, int64_t n) {
    const struct ggml_type_traits * traits = ggml_get_type_traits(type);
    if (type != GGML_TYPE_F32 && !traits->to_float) return false;
    if (n % ggml_blck_size(type)) return false;
    *out = (packed) { type, NULL, ggml_row_size(type, n), take((size_t) (n_rows * n) * sizeof(float)) };
    out->data = take(out->row_size * (size_t) n_rows);
    float *from = normals((size_t) (n_rows * n), 1.0f), *importance = take((size_t) n * sizeof(float));
    for (int64_t i = 0; i < n; i++) importance[i] = 1.0f;
    if (!random_blocks(out, out->row_size * (size_t) n_rows))
        ggml_quantize_chunk(type, from, out->data, 0, n_rows, n, importance);
    for (int64_t r = 0; r < n_rows; r++) {
        const char * row = out->data + (size_t) r * out->row_size;
        if (type == GGML_TYPE_F32) memcpy(out->values + r * n, row, out->row_size);
        else traits->to_float(row, out->values + r * n, n);
    }
    free(from);
    free(importance);
    return true;
}

static void packed_free(packed * p) {
    free(p->data);
    free(p->values);
}

// ------------------------------------------------------------------------------------------ running a node

typedef void (*kernel_fn)(struct ggml_tensor * dst, int ith, int nth, void * env);

static char * fresh_scratch(size_t size) {
    static char * scratch;
    static size_t have;
    if (have < size * MAX_THREADS) {
        free(scratch);
        have = size * MAX_THREADS;
        scratch = take(have);
    }
    memset(scratch, 0xFF, have); // NaN: reading what was never written shows
    return scratch;
}

static struct ggml_tensor tensor_2d(enum ggml_type type, void * data, int64_t n_rows, int64_t n,
                                    size_t row_size) {
    struct ggml_tensor t = { .type = type, .data = data, .ne = { n, n_rows, 1, 1 } };
    t.nb[0] = ggml_type_size(type);
    t.nb[1] = row_size;
    t.nb[2] = t.nb[3] = row_size * (size_t) n_rows;
    return t;
}

// The result with 1 thread; it must be the same bytes with more, complete, and nothing beyond it touched.
static void run_node(kernel_fn kernel, struct ggml_tensor * dst, kernel_env * env, void * userdata, float * y,
                     size_t n, const char * what) {
    static float other[MAX_RESULT + GUARD];
    for (int nth = 1; nth <= MAX_THREADS; nth++) {
        float * to = nth == 1 ? y : other;
        memset(to, 0xFF, (n + GUARD) * sizeof *to);
        dst->data = to;
        env->scratch = fresh_scratch(env->scratch_size);
        *(kernel_env *) userdata = *env;
        for (int ith = nth - 1; ith >= 0; ith--) kernel(dst, ith, nth, userdata);
        for (size_t i = 0; i < n; i++) {
            if (!isfinite(to[i])) fail("%s: %d threads: result %zu is not finite", what, nth, i);
        }
        for (size_t i = n; i < n + GUARD; i++) {
            uint32_t bits;
            memcpy(&bits, &to[i], 4);
            if (bits != 0xFFFFFFFFu) fail("%s: %d threads: wrote behind its result", what, nth);
        }
        if (nth > 1 && memcmp(y, other, n * sizeof *y))
            fail("%s: %d threads give other bytes than 1", what, nth);
    }
}

static atomic_int not_cancelled;

static kernel_env new_env(size_t scratch_size) {
    return (kernel_env) { .cancel = &not_cancelled, .scratch_size = (scratch_size + 63) / 64 * 64 };
}

// ------------------------------------------------------------------------------------------ linear

typedef struct linear_case {
    packed w;
    int64_t n_in, x_stride;
    size_t w_stride; // bytes; more than a row's where rows lie apart
    char *w_memory, *w_data;
    float *x_memory, *x, *b;              // b: NULL for no bias
    double expected[MAX_TOKENS][MAX_OUT]; // without bias
    double power[MAX_TOKENS][MAX_OUT]; // sum of squares of what is summed: the sum's own square may be near 0
} linear_case;

static void expect_linear(linear_case * c) {
    for (int t = 0; t < MAX_TOKENS; t++) {
        for (int o = 0; o < MAX_OUT; o++) {
            const float *w = c->w.values + o * c->n_in, *x = c->x + t * c->x_stride;
            double sum = 0, power = 0;
            for (int64_t i = 0; i < c->n_in; i++) {
                sum += (double) w[i] * x[i];
                power += (double) w[i] * x[i] * w[i] * x[i];
            }
            c->expected[t][o] = sum;
            c->power[t][o] = power;
        }
    }
}

// apart: rows with gaps between them, no address aligned to more than one number (blocks stay in place).
static bool make_linear(linear_case * c, enum ggml_type type, int64_t n_in, bool apart) {
    *c = (linear_case) { .n_in = n_in, .x_stride = n_in + (apart ? 3 : 0) };
    if (!pack_rows(&c->w, type, MAX_OUT, n_in)) return false;
    size_t element = apart && ggml_blck_size(type) == 1 ? ggml_type_size(type) : 0;
    c->w_stride = c->w.row_size + 3 * element;
    c->w_memory = take(c->w_stride * MAX_OUT);
    c->w_data = c->w_memory + element;
    for (size_t r = 0; r < MAX_OUT; r++)
        memcpy(c->w_data + r * c->w_stride, c->w.data + r * c->w.row_size, c->w.row_size);
    c->x_memory = normals((size_t) (MAX_TOKENS * c->x_stride) + 1, 1.0f);
    c->x = c->x_memory + apart;
    c->b = apart ? NULL : normals(MAX_OUT, 1.0f);
    expect_linear(c);
    return true;
}

static void free_linear(linear_case * c) {
    free(c->w_memory);
    free(c->x_memory);
    free(c->b);
    packed_free(&c->w);
}

static void run_linear(const linear_case * c, int n_tokens, int n_out) {
    if (left_out()) return;
    static float y[MAX_TOKENS * MAX_OUT + GUARD];
    static double expected[MAX_TOKENS * MAX_OUT], power[MAX_TOKENS * MAX_OUT];
    char what[160];
    snprintf(what, sizeof what, "linear %s n_tokens %d n_out %d n_in %d%s", ggml_type_name(c->w.type),
             n_tokens, n_out, (int) c->n_in, c->b ? "" : " rows apart, no bias");
    struct ggml_tensor w = tensor_2d(c->w.type, c->w_data, n_out, c->n_in, c->w_stride);
    struct ggml_tensor x =
        tensor_2d(GGML_TYPE_F32, c->x, n_tokens, c->n_in, (size_t) c->x_stride * sizeof(float));
    struct ggml_tensor b = tensor_2d(GGML_TYPE_F32, c->b, 1, n_out, (size_t) n_out * sizeof(float));
    struct ggml_tensor dst = tensor_2d(GGML_TYPE_F32, NULL, n_tokens, n_out, (size_t) n_out * sizeof(float));
    dst.src[0] = &w, dst.src[1] = &x, dst.src[2] = c->b ? &b : NULL;
    kernel_env env = new_env(linear_scratch_size()), used;
    for (int t = 0; t < n_tokens; t++) {
        for (int o = 0; o < n_out; o++) {
            expected[t * n_out + o] = c->expected[t][o] + (c->b ? c->b[o] : 0);
            power[t * n_out + o] = c->power[t][o] + (c->b ? c->b[o] * c->b[o] : 0);
        }
    }
    run_node(kernel_linear, &dst, &env, &used, y, (size_t) (n_tokens * n_out), what);
    check_nmse(expected, power, y, (size_t) (n_tokens * n_out), NMSE_GATE, what);
    run_node(kernel_linear_answers, &dst, &env, &used, y, (size_t) (n_tokens * n_out), what);
    check_nmse(expected, power, y, (size_t) (n_tokens * n_out), NMSE_GATE, what);
}

static void test_linear_shape(enum ggml_type type, int64_t n_in, bool apart, bool every) {
    static const int OUTS[] = { 1, 2, 31, 32, 33, 64, 65, MAX_OUT };
    static linear_case c;
    if (!make_linear(&c, type, n_in, apart)) return;
    for (int n_tokens = 1; n_tokens <= MAX_TOKENS; n_tokens += every || n_tokens < 5 ? 1 : 4) {
        for (int n_out = 1; every && n_out <= MAX_OUT; n_out++) run_linear(&c, n_tokens, n_out);
        for (size_t i = 0; !every && i < sizeof OUTS / sizeof *OUTS; i++) run_linear(&c, n_tokens, OUTS[i]);
    }
    free_linear(&c);
}

static int test_linear(void) {
    static const int WIDTHS[] = { 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 100, 511, 512, 513, 1025 };
    int n_types = 0;
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        if (ggml_blck_size((enum ggml_type) type) == 0) continue; // an id that is no longer used
        if (type != GGML_TYPE_F32 && !ggml_get_type_traits((enum ggml_type) type)->to_float) continue;
        n_types++;
        const int64_t block = ggml_blck_size((enum ggml_type) type);
        for (size_t i = 0; block == 1 && i < sizeof WIDTHS / sizeof *WIDTHS; i++) {
            test_linear_shape((enum ggml_type) type, WIDTHS[i], false, WIDTHS[i] == 65);
            test_linear_shape((enum ggml_type) type, WIDTHS[i], true, WIDTHS[i] == 17);
        }
        if (block == 1) continue;
        test_linear_shape((enum ggml_type) type, block, false, true);
        test_linear_shape((enum ggml_type) type, 3 * block, true, false);
        test_linear_shape((enum ggml_type) type, 512, true, false);
        test_linear_shape((enum ggml_type) type, 1024 + block, false, false);
    }
    return n_types;
}

// Every f16 number, denormals and infinities included, as a weight of one row each: y = w.
static void test_f16(void) {
    static uint16_t w[65536];
    static float y[4 * 65536];
    float x[4] = { 1, 1, 1, 1 };
    for (int i = 0; i < 65536; i++) w[i] = (uint16_t) i;
    for (int n_tokens = 1; n_tokens <= 4; n_tokens += 3) {
        struct ggml_tensor a = tensor_2d(GGML_TYPE_F16, w, 65536, 1, 2),
                           b = tensor_2d(GGML_TYPE_F32, x, n_tokens, 1, 4);
        struct ggml_tensor dst = tensor_2d(GGML_TYPE_F32, y, n_tokens, 65536, sizeof y / 4);
        dst.src[0] = &a, dst.src[1] = &b;
        kernel_env env = new_env(linear_scratch_size());
        env.scratch = fresh_scratch(env.scratch_size);
        kernel_linear(&dst, 0, 1, &env);
        for (int i = 0; i < 65536; i++) {
            float expected = ggml_fp16_to_fp32(w[i]), found = y[i];
            if (found != expected && !(isnan(found) && isnan(expected)))
                fail("f16 0x%04X: %g, need %g", i, found, expected);
        }
        n_checks++;
    }
}

// ------------------------------------------------------------------------------------------ attention

#define N_CELLS 160

typedef struct attention_case {
    int n_tokens, n_head, n_head_kv, d;
    bool causal; // a sequence's cells in any order; else an image: rows from first_row, all seen
    float scale; // of the queries
    packed k, v; // [N_CELLS][n_head_kv * d]
    float * q;
    int32_t cells[N_CELLS], n_visible[MAX_TOKENS];
    int32_t first_row;
} attention_case;

static const float * cell(const attention_case * c, const packed * cache, int position, int head_kv) {
    int row = c->causal ? c->cells[position] : c->first_row + position;
    return cache->values + ((size_t) row * c->n_head_kv + head_kv) * c->d;
}

static void expect_attention(const attention_case * c, int t, int head, double * out) {
    const int kv = head / (c->n_head / c->n_head_kv);
    const float * q = c->q + ((size_t) t * c->n_head + head) * c->d;
    double scores[N_CELLS], most = -INFINITY, sum = 0;
    for (int p = 0; p < c->n_visible[t]; p++) {
        const float * k = cell(c, &c->k, p, kv);
        scores[p] = 0;
        for (int i = 0; i < c->d; i++) scores[p] += (double) q[i] * k[i];
        scores[p] /= sqrt(c->d);
        most = scores[p] > most ? scores[p] : most;
    }
    for (int i = 0; i < c->d; i++) out[i] = 0;
    for (int p = 0; p < c->n_visible[t]; p++) sum += scores[p] = exp(scores[p] - most);
    for (int p = 0; p < c->n_visible[t]; p++) {
        const float * v = cell(c, &c->v, p, kv);
        for (int i = 0; i < c->d; i++) out[i] += scores[p] / sum * v[i];
    }
}

static int cut(const attention_case * c, int step, attention_block * blocks) {
    int n = 0;
    for (int t = 0; t < c->n_tokens; t += step) {
        blocks[n++] = (attention_block) { t, c->n_tokens - t < step ? c->n_tokens - t : step,
                                          c->causal ? c->cells : NULL, c->causal ? 0 : c->first_row };
    }
    return n;
}

static void run_attention(const attention_case * c) {
    static float y[MAX_RESULT + GUARD], alone[MAX_RESULT + GUARD];
    static double expected[MAX_RESULT];
    char what[200];
    const int width = c->n_head * c->d, group = c->n_head / c->n_head_kv;
    const size_t n = (size_t) (c->n_tokens * width);
    snprintf(what, sizeof what,
             "attention k %s v %s head_dim %d heads %d/%d n_tokens %d n_past %d %s, q * %g",
             ggml_type_name(c->k.type), ggml_type_name(c->v.type), c->d, c->n_head, c->n_head_kv, c->n_tokens,
             c->n_visible[0] - 1, c->causal ? "causal" : "image", c->scale);
    struct ggml_tensor q = tensor_2d(GGML_TYPE_F32, c->q, c->n_tokens, width, (size_t) width * sizeof(float));
    struct ggml_tensor k = tensor_2d(c->k.type, c->k.data, N_CELLS, c->n_head_kv * c->d, c->k.row_size);
    struct ggml_tensor v = tensor_2d(c->v.type, c->v.data, N_CELLS, c->n_head_kv * c->d, c->v.row_size);
    struct ggml_tensor dst =
        tensor_2d(GGML_TYPE_F32, NULL, c->n_tokens, width, (size_t) width * sizeof(float));
    dst.src[0] = &q, dst.src[1] = &k, dst.src[2] = &v;
    attention_block blocks[MAX_TOKENS];
    attention_env env = { .n_head = c->n_head,
                          .n_head_kv = c->n_head_kv,
                          .head_dim = c->d,
                          .blocks = blocks,
                          .n_visible = c->n_visible };
    kernel_env own = new_env(attention_scratch_size(c->n_head, c->n_head_kv, c->d));
    env.n_blocks = cut(c, KERNEL_QUERIES / group, blocks);
    run_node(kernel_attention, &dst, &own, &env, y, n, what);
    env.n_blocks = cut(c, 1, blocks);
    run_node(kernel_attention, &dst, &own, &env, alone, n, what);
    for (size_t i = 0; i < n; i++) {
        if (y[i] != alone[i]) fail("%s: result %zu depends on the queries beside it", what, i);
    }
    for (int t = 0; t < c->n_tokens; t++) {
        for (int h = 0; h < c->n_head; h++)
            expect_attention(c, t, h, expected + ((size_t) t * c->n_head + h) * c->d);
    }
    check_nmse(expected, NULL, y, n, c->scale > 10 ? 1e-5 : NMSE_GATE, what);
}

static void shuffle(int32_t * cells) {
    for (int i = 0; i < N_CELLS; i++) cells[i] = i;
    for (int i = N_CELLS - 1; i > 0; i--) {
        int j = (int) (uniform() * (i + 1));
        int32_t other = cells[i];
        cells[i] = cells[j], cells[j] = other;
    }
}

static void test_attention_case(attention_case * c, int n_past) {
    if (left_out()) return;
    c->q = normals((size_t) (c->n_tokens * c->n_head * c->d), c->scale);
    c->first_row = (int) (uniform() * (N_CELLS - 119));
    shuffle(c->cells);
    for (int t = 0; t < c->n_tokens; t++) c->n_visible[t] = c->causal ? n_past + t + 1 : n_past + c->n_tokens;
    run_attention(c);
    free(c->q);
}

static void test_attention_type(enum ggml_type k, enum ggml_type v, int d, int group) {
    static const float SCALES[] = { 0.3f, 1.0f, 1000.0f };
    static const int PAST[] = { 0, 1, 11, 12, 31, 32, 33, 64, 95 };
    attention_case c = { .n_head = 2 * group, .n_head_kv = 2, .d = d };
    if (d % ggml_blck_size(k) || d % ggml_blck_size(v)) return;
    pack_rows(&c.k, k, N_CELLS, 2 * d);
    pack_rows(&c.v, v, N_CELLS, 2 * d);
    for (c.n_tokens = 1; c.n_tokens <= MAX_TOKENS; c.n_tokens++) {
        c.causal = c.n_tokens % 3 != 0;
        c.scale = SCALES[c.n_tokens % 7 == 0 ? 2 : c.n_tokens % 2];
        test_attention_case(&c, PAST[(c.n_tokens + d + group) % 9]);
    }
    packed_free(&c.k);
    packed_free(&c.v);
}

static void test_attention(void) {
    static const enum ggml_type TYPES[] = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                                            GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0 };
    static const int DIMS[] = { 4, 6, 8, 10, 12, 16, 20, 32, 36, 40, 64, 80, 96, 128 },
                     GROUPS[] = { 1, 2, 3, 8 };
    for (size_t type = 0; type < sizeof TYPES / sizeof *TYPES; type++) {
        for (size_t d = 0; d < sizeof DIMS / sizeof *DIMS; d++) {
            for (size_t g = 0; g < sizeof GROUPS / sizeof *GROUPS; g++) {
                test_attention_type(TYPES[type], TYPES[type], DIMS[d], GROUPS[g]);
            }
        }
        test_attention_type(TYPES[type], GGML_TYPE_F32, 64, 2);
        test_attention_type(GGML_TYPE_F16, TYPES[type], 32, 3);
    }
}

// ------------------------------------------------------------------------------------------ rope

// Angles as the kernel rounds them, to f32; their cosine and sine to its rounding, and far positions too.
static void test_turns(int n_tokens, int head_dim) {
    static float y[MAX_TOKENS * 128 + GUARD];
    float divisors[64];
    int32_t positions[MAX_TOKENS];
    kernel_env env = new_env(0), used;
    for (int i = 0; i < head_dim / 2; i++) divisors[i] = (float) pow(10000, 2.0 * i / head_dim);
    for (int t = 0; t < n_tokens; t++) positions[t] = t < 3 ? t : (int32_t) (uniform() * 40000);
    struct ggml_tensor p = tensor_2d(GGML_TYPE_I32, positions, 1, n_tokens, (size_t) n_tokens * 4);
    struct ggml_tensor d = tensor_2d(GGML_TYPE_F32, divisors, 1, head_dim / 2, (size_t) head_dim * 2);
    struct ggml_tensor dst = tensor_2d(GGML_TYPE_F32, NULL, n_tokens, head_dim, (size_t) head_dim * 4);
    dst.src[0] = &p, dst.src[1] = &d;
    run_node(kernel_rope_table, &dst, &env, &used, y, (size_t) (n_tokens * head_dim), "rope_table");
    for (int t = 0; t < n_tokens; t++) {
        for (int i = 0; i < head_dim / 2; i++) {
            const float angle = (float) positions[t] / divisors[i], *found = y + t * head_dim + 2 * i;
            if (fabs(found[0] - cos(angle)) > 1e-7 || fabs(found[1] - sin(angle)) > 1e-7)
                fail("rope table: position %d, pair %d: %.9g %.9g, need %.9g %.9g", positions[t], i, found[0],
                     found[1], cos(angle), sin(angle));
        }
    }
    n_checks++;
}

// apart: rows with gaps between them. neox: the pairs are (i, i + head_dim / 2).
static void test_rope_shape(int n_tokens, int n_head, int head_dim, bool apart, bool neox) {
    static float y[MAX_RESULT + GUARD];
    static double expected[MAX_RESULT];
    char what[100];
    const int width = n_head * head_dim, stride = width + 3 * apart;
    snprintf(what, sizeof what, "rope%s n_tokens %d n_head %d head_dim %d%s", neox ? " neox" : "", n_tokens,
             n_head, head_dim, apart ? " rows apart" : "");
    float *from = normals((size_t) (n_tokens * stride) + 1, 1.0f), *table = take(MAX_TOKENS * 128 * 4);
    for (int i = 0; i < n_tokens * head_dim; i += 2) {
        const double angle = uniform() * 7;
        table[i] = (float) cos(angle), table[i + 1] = (float) sin(angle);
    }
    for (int t = 0; t < n_tokens; t++) {
        for (int i = 0; i < width; i += 2) {
            const int begin = i / head_dim * head_dim,
                      in_head = i - begin; // of the pair of that number, times 2
            const int a = neox ? begin + in_head / 2 : i, b = neox ? a + head_dim / 2 : i + 1;
            const float *x = from + apart + t * stride, *pair = table + t * head_dim + in_head;
            expected[t * width + a] = (double) x[a] * pair[0] - (double) x[b] * pair[1];
            expected[t * width + b] = (double) x[a] * pair[1] + (double) x[b] * pair[0];
        }
    }
    struct ggml_tensor x = tensor_2d(GGML_TYPE_F32, from + apart, n_tokens, width, (size_t) stride * 4);
    struct ggml_tensor r = tensor_2d(GGML_TYPE_F32, table, n_tokens, head_dim, (size_t) head_dim * 4);
    struct ggml_tensor dst = tensor_2d(GGML_TYPE_F32, NULL, n_tokens, width, (size_t) width * 4);
    dst.src[0] = &x, dst.src[1] = &r;
    kernel_env env = new_env(0), used;
    run_node(neox ? kernel_rope_neox : kernel_rope, &dst, &env, &used, y, (size_t) (n_tokens * width), what);
    check_nmse(expected, NULL, y, (size_t) (n_tokens * width), 1e-13, what);
    free(from);
    free(table);
}

static void test_rope(void) {
    static const int DIMS[] = { 2, 4, 6, 10, 14, 30, 32, 64, 66, 128 };
    for (size_t d = 0; d < sizeof DIMS / sizeof *DIMS; d++) {
        for (int n_tokens = 1; n_tokens <= MAX_TOKENS; n_tokens++) {
            test_turns(n_tokens, DIMS[d]);
            for (int n_head = 1; n_head <= 5; n_head += 2) {
                test_rope_shape(n_tokens, n_head, DIMS[d], n_tokens % 2, false);
                test_rope_shape(n_tokens, n_head, DIMS[d], n_tokens % 2, true);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------ store

// Rows of x to rows of the cache, in no order; the error of the type, and every other row as it was.
static void test_store_shape(enum ggml_type type, double gate, int n_tokens, int n) {
    char what[100];
    snprintf(what, sizeof what, "store %s n_tokens %d n %d", ggml_type_name(type), n_tokens, n);
    const bool apart = n_tokens % 2;
    const size_t row = ggml_row_size(type, n), size = row * N_CELLS, stride = (size_t) n + apart;
    char *cache = take(size), *first = take(size);
    float *from = normals((size_t) n_tokens * stride, 1.0f), *back = take((size_t) n * 4);
    int32_t cells[N_CELLS];
    int64_t rows[N_CELLS];
    shuffle(cells);
    for (int t = 0; t < N_CELLS; t++) rows[t] = cells[t];
    struct ggml_tensor x = tensor_2d(GGML_TYPE_F32, from, n_tokens, n, stride * 4);
    struct ggml_tensor c = tensor_2d(GGML_TYPE_I64, rows, 1, n_tokens, (size_t) n_tokens * 8);
    struct ggml_tensor dst = tensor_2d(type, cache, N_CELLS, n, row);
    dst.src[0] = &dst, dst.src[1] = &x, dst.src[2] = &c;
    for (int nth = 1; nth <= MAX_THREADS; nth++) {
        memset(cache, 0x5A, size);
        for (int ith = nth - 1; ith >= 0; ith--) kernel_store(&dst, ith, nth, NULL);
        if (nth == 1) memcpy(first, cache, size);
        else if (memcmp(first, cache, size)) fail("%s: %d threads give other bytes than 1", what, nth);
    }
    double error = 0, power = 0;
    for (int t = 0; t < N_CELLS; t++) {
        const char * stored = cache + (size_t) cells[t] * row;
        for (size_t i = 0; t >= n_tokens && i < row; i++) {
            if (stored[i] != 0x5A) fail("%s: touched row %d", what, cells[t]);
        }
        if (t >= n_tokens) continue;
        if (type == GGML_TYPE_F32) memcpy(back, stored, row);
        else ggml_get_type_traits(type)->to_float(stored, back, n);
        for (int i = 0; i < n; i++) {
            const double truth = from[(size_t) t * stride + (size_t) i];
            error += (back[i] - truth) * (back[i] - truth);
            power += truth * truth;
        }
    }
    if (!(error <= gate * power)) fail("%s: NMSE %.3g, need at most %g", what, error / power, gate);
    n_checks++;
    free(cache);
    free(first);
    free(from);
    free(back);
}

// f16 of floats of every exponent, also beyond what it holds.
static void test_store_f16(void) {
    enum { N = 1 << 14 };
    static float from[N];
    static uint16_t to[N];
    int32_t cell = 0;
    struct ggml_tensor x = tensor_2d(GGML_TYPE_F32, from, 1, N, sizeof from);
    struct ggml_tensor c = tensor_2d(GGML_TYPE_I32, &cell, 1, 1, 4);
    struct ggml_tensor dst = tensor_2d(GGML_TYPE_F16, to, 1, N, sizeof to);
    dst.src[1] = &x, dst.src[2] = &c;
    for (uint32_t base = 0, bits; base < 64; base++) {
        for (uint32_t i = 0; i < N; i++) {
            bits = base * 0x04000000u + i * 0x1000u; // a tie, its neighbours, anything
            bits += i % 4 == 3 ? (uint32_t) (uniform() * 0x1000) : i % 4 - 1;
            memcpy(&from[i], &bits, 4);
        }
        kernel_store(&dst, 0, 1, NULL);
        for (int i = 0; i < N; i++) {
            const uint16_t need = ggml_fp32_to_fp16(from[i]);
            if (to[i] != need && !(isnan(from[i]) && isnan(ggml_fp16_to_fp32(to[i]))))
                fail("store: f16 of %.9g is 0x%04X, need 0x%04X", from[i], to[i], need);
        }
    }
    n_checks++;
}

static void test_store(void) {
    static const struct {
        enum ggml_type type;
        double gate;
    } TYPES[] = {
        // half a step, squared
        { GGML_TYPE_F32, 0 },     { GGML_TYPE_F16, 2.4e-7 }, { GGML_TYPE_BF16, 1.6e-5 },
        { GGML_TYPE_Q8_0, 1e-4 }, { GGML_TYPE_Q5_1, 4e-3 },  { GGML_TYPE_Q5_0, 4e-3 },
        { GGML_TYPE_Q4_1, 2e-2 }, { GGML_TYPE_Q4_0, 2e-2 },  { GGML_TYPE_IQ4_NL, 2e-2 },
    };
    static const int WIDTHS[] = { 2, 6, 32, 66, 96, 128, 256 };
    test_store_f16();
    for (size_t type = 0; type < sizeof TYPES / sizeof *TYPES; type++) {
        for (size_t n = 0; n < sizeof WIDTHS / sizeof *WIDTHS; n++) {
            if (WIDTHS[n] % ggml_blck_size(TYPES[type].type)) continue;
            for (int n_tokens = 1; n_tokens <= MAX_TOKENS; n_tokens++)
                test_store_shape(TYPES[type].type, TYPES[type].gate, n_tokens, WIDTHS[n]);
        }
    }
}

static float exp_of(float x) {
    float all[16];
    for (int i = 0; i < 16; i++) all[i] = x;
    exp_all(all, 0.0f, 16);
    return all[11];
}

// The exponential alone: relative error below 2e-7 wherever it is not cut to zero.
static void test_exp(void) {
    for (double x = 0; x > -87; x -= 0.000731) {
        double expected = exp((float) x), found = exp_of((float) x);
        if (fabs(found - expected) > 2e-7 * expected) fail("exp(%.9g) = %.9g, need %.9g", x, found, expected);
    }
    if (exp_of(-INFINITY) != 0.0f || exp_of(-1e30f) != 0.0f) fail("exp of -inf is not 0");
    if (exp_of(0.0f) != 1.0f) fail("exp(0) is not 1");
    n_checks++;
}

// ------------------------------------------------------------------------------------------ gelu

// Every number of a range to a relative 1e-6 where it is not tiny, whatever the number of threads; the tails.
static void test_gelu_tanh(void) {
    enum { N = 1037 };
    float *x = take(N * 4), *y = take((N + GUARD) * 4);
    kernel_env env = new_env(0), used;
    for (int i = 0; i < N; i++) x[i] = (float) (i - N / 2) * 0.0137f;
    x[0] = -1e30f, x[1] = 1e30f, x[2] = -40.0f, x[3] = 40.0f;
    struct ggml_tensor from = tensor_2d(GGML_TYPE_F32, x, 1, N, N * 4);
    struct ggml_tensor dst = tensor_2d(GGML_TYPE_F32, NULL, 1, N, N * 4);
    dst.src[0] = &from;
    run_node(kernel_gelu_tanh, &dst, &env, &used, y, N, "gelu_tanh");
    for (int i = 0; i < N; i++) {
        const double v = x[i], u = sqrt(2 / acos(-1)) * (v + 0.044715 * v * v * v);
        const double expected = u < 0 ? v * (exp(2 * u) / (1 + exp(2 * u))) : v / (1 + exp(-2 * u));
        if (fabs(y[i] - expected) > 1e-6 * fabs(expected) + 1e-7)
            fail("gelu_tanh(%.9g) = %.9g, need %.9g", v, y[i], expected);
    }
    n_checks++;
    free(x);
    free(y);
}

int main(int argc, char ** argv) {
    if (argc > 1) every_nth = atoi(argv[1]);
    if (every_nth < 1) fail("every %s: need 1 or more", argv[1]);
    ggml_free(ggml_init((struct ggml_init_params) { .mem_size = 1024 })); // fills ggml's f16 table
    test_exp();
    test_f16();
    int n_types = test_linear();
    long n_linear = n_checks;
    test_attention();
    long n_attention = n_checks - n_linear;
    test_rope();
    test_store();
    test_gelu_tanh();
    ggml_quantize_free();
    printf("test-kernels: ok: %ld checks of linear over %d weight types, %ld of attention, %ld of rope, "
           "the cache and GELU; worst NMSE %.2g (at most %g)\n",
           n_linear, n_types, n_attention, n_checks - n_linear - n_attention, worst_nmse, NMSE_GATE);
    return 0;
}
