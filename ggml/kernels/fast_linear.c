// fast_linear.c - y = W x + b with quantised numbers (micro.h). Many tokens: a task packs a panel of weight
// rows, which stays in the L2 cache while it is multiplied with a few tokens at a time. Few tokens: a task is
// a run of weight rows, each read once for up to 8 tokens. Threads take tasks from a counter, since the cores
// of shared machines stall; the results do not depend on which thread computes a task.
#include "micro.h"

#include <string.h>

#define PANEL        (512 << 10) // bytes of packed weights
#define CHUNK        768         // tokens of a task whose weights are packed in parts
#define STREAM       (1 << 20)   // bytes of results from which on they bypass the caches
#define STEP         24          // tokens that are multiplied with a block together
#define DOT_ROWS     128         // weight rows of a task, at most
#define DOT_BYTES    (96 << 10)  // and their bytes, about: one thread reads them in sequence
#define ROUND_TOKENS 4           // tokens of a task of kernel_round

// Packed weights: the blocks of a panel one after the other, and their scales.
typedef struct packed {
    _Alignas(64) char blocks[PANEL];
    float scales[2 * PANEL / BLOCK];
} packed;

typedef struct fast_scratch {
    packed panel[2];              // of W and of the second matrix
    float y[2][CHUNK * MAX_ROWS]; // their sums
} fast_scratch;

size_t fast_linear_scratch_size(void) { return sizeof(fast_scratch); }
bool fast_norm_fits(int64_t n_in) { return n_in % GROUP == 0 && n_in <= CHUNK * MAX_ROWS; }

static bool is_float(enum ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

linear_plan fast_linear_plan(const micro * m, const struct ggml_tensor * w, row_kind rows, bool fine) {
    if (rows == ROWS_ANSWER && is_float(w->type)) return LINEAR_FLOAT_DOTS;
    const bool k_type = w->type == GGML_TYPE_Q4_K || w->type == GGML_TYPE_Q5_K || w->type == GGML_TYPE_Q6_K;
    if (rows == ROWS_ANSWER) return k_type ? LINEAR_DOTS_K : m->dot[w->type] ? LINEAR_DOTS16 : LINEAR_ENGINE;
    if (fine || (rows == ROWS_PROMPT && is_float(w->type))) return LINEAR_INT16;
    return k_type && m->direct_size ? LINEAR_DIRECT : LINEAR_INT8;
}

int64_t fast_linear_rounded_size(linear_plan plan, int64_t n_in) {
    switch (plan) {
        case LINEAR_DIRECT: return (int64_t) rounded_direct_of(n_in).size;
        case LINEAR_INT8:   return (int64_t) rounded8_of(n_in).size;
        case LINEAR_DOTS_K: return (int64_t) rounded_k_of(n_in).size;
        case LINEAR_INT16:
        case LINEAR_DOTS16: return (int64_t) rounded16_of(n_in).size;
        default:            return 0;
    }
}

static bool take(kernel_job * job, int64_t n_tasks, int64_t * task) {
    if (atomic_load_explicit(job->env->cancel, memory_order_relaxed)) return false;
    *task = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
    return *task < n_tasks;
}

static const float * floats(const struct ggml_tensor * dst, int src) {
    return src ? dst->src[src]->data : NULL;
}

void kernel_round(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) nth;
    kernel_job * job = userdata;
    const micro * m = job->env->micro;
    const struct ggml_tensor * x = dst->src[0];
    fast_scratch * s = (fast_scratch *) (void *) (job->env->scratch + (size_t) ith * job->env->scratch_size);
    const int64_t n_in = x->ne[0], n_tokens = dst->ne[1];
    for (int64_t task; take(job, (n_tokens + ROUND_TOKENS - 1) / ROUND_TOKENS, &task);) {
        for (int64_t t = task * ROUND_TOKENS; t < n_tokens && t < (task + 1) * ROUND_TOKENS; t++) {
            const float * from = (const float *) ((const char *) x->data + (size_t) t * x->nb[1]);
            char * to = (char *) dst->data + (size_t) t * dst->nb[1];
            if (job->norm == NORM_RMS) m->rms_norm(from, floats(dst, 1), job->eps, n_in, s->y[0]);
            if (job->norm == NORM_LAYER)
                m->layer_norm(from, floats(dst, 1), floats(dst, 2), job->eps, n_in, s->y[0]);
            if (job->norm != NORM_NONE) from = s->y[0];
            if (job->plan == LINEAR_INT8) m->round8(from, n_in, to);
            else if (job->plan == LINEAR_DIRECT) m->round_direct(from, n_in, to);
            else if (job->plan == LINEAR_DOTS_K) m->round_k(from, n_in, to);
            else if (job->plan == LINEAR_DOTS16) m->round_dots(from, n_in, to);
            else m->round16(from, n_in, to);
        }
    }
}

static tile_end end_of(const kernel_job * job, const struct ggml_tensor * dst, int64_t row, int64_t token) {
    const int64_t n_out = dst->ne[0], at = token * n_out + row;
    const float *bias = floats(dst, job->bias), *residual = floats(dst, job->residual);
    return (tile_end) { .end = job->end,
                        .bias = bias ? bias + row : NULL,
                        .residual = residual ? residual + at : NULL,
                        .to = (float *) dst->data + at,
                        .stride = (size_t) n_out };
}

// ------------------------------------------------------------------------------------ many tokens

// A panel of weight rows (of two matrices with SwiGLU) and the tokens it is multiplied with. The inputs [k0,
// k1) are packed at once: they stay in the L2 cache while they are multiplied with STEP tokens at a time.
typedef struct panel_work {
    const micro * m;
    linear_plan plan;
    const struct ggml_tensor *w[2], *x;
    int n_w;
    int64_t r0, t0, k0, k1;
    int n_rows, n;
    int64_t next; // bytes into the weights; 0: unknown
} panel_work;

// Bytes of one block of a panel.
static size_t block_size(const micro * m, linear_plan plan) {
    if (plan == LINEAR_DIRECT) return m->direct_size;
    return (size_t) m->rows * BLOCK * (plan == LINEAR_INT16 ? 2 : 1);
}

// Floats of its scales.
static int scales_of(const panel_work * p) { return p->m->rows * (p->plan == LINEAR_INT8 ? 2 : 1); }

static void pack(const panel_work * p, int which, packed * to) {
    const struct ggml_tensor * w = p->w[which];
    const char * row = (const char *) w->data + (size_t) p->r0 * w->nb[1];
    char * block = to->blocks;
    float * scales = to->scales;
    for (int64_t k = p->k0; k < p->k1; k += BLOCK) {
        const int n_k = (int) (p->k1 - k < BLOCK ? p->k1 - k : BLOCK);
        const size_t ahead = ggml_row_size(w->type, BLOCK);
        for (int r = 0; k + BLOCK < p->k1 && r < p->n_rows; r++) {
            const char * next = row + ggml_row_size(w->type, k + BLOCK) + (size_t) r * w->nb[1];
            for (size_t at = 0; at < ahead; at += 64) __builtin_prefetch(next + at);
        }
        const char * from = row + ggml_row_size(w->type, k);
        if (p->plan == LINEAR_DIRECT) p->m->pack_direct(w->type, from, w->nb[1], p->n_rows, block);
        else
            (p->plan == LINEAR_INT16 ? p->m->pack16 : p->m->pack8)(w->type, from, w->nb[1], p->n_rows, n_k,
                                                                   block, scales);
        block += block_size(p->m, p->plan);
        scales += scales_of(p);
    }
}

// y [n][m->rows] += W x for tokens [t, t + n).
static void multiply(const panel_work * p, int which, const packed * from, int t, int n, float * y) {
    const char * tokens = (const char *) p->x->data + (size_t) (p->t0 + t) * p->x->nb[1];
    const int64_t n_in = p->w[0]->ne[0];
    const rounded at8 = rounded8_of(n_in), at16 = rounded16_of(n_in), direct = rounded_direct_of(n_in);
    const char * block = from->blocks;
    const float * scales = from->scales;
    for (int64_t k = p->k0; k < p->k1; k += BLOCK) {
        const size_t at = (size_t) (k / BLOCK * 4);
        if (p->plan == LINEAR_DIRECT)
            p->m->multiply_direct(p->w[which]->type, n, block, tokens + k,
                                  tokens + direct.scales + k / GROUP * 4,
                                  tokens + direct.sums + k / BLOCK * 4 * DIRECT_SUMS, p->x->nb[1], y);
        else if (p->plan == LINEAR_INT16)
            p->m->multiply16(n, BLOCK, block, scales, tokens + 2 * k, tokens + at16.scales + at,
                             tokens + at16.sums + at, p->x->nb[1], y);
        else
            p->m->multiply8(n, BLOCK, block, scales, tokens + k, tokens + at8.scales + at,
                            tokens + at8.sums + at, p->x->nb[1], y);
        block += block_size(p->m, p->plan);
        scales += scales_of(p);
    }
}

// Prefetches a part of the weights that this thread will probably pack next, and the residuals of a tile,
// which the hardware does not predict.
static void prefetch(const panel_work * p, const tile_end * e, int t, int n) {
    const int64_t size = p->next ? p->n_rows * (int64_t) p->w[0]->nb[1] : 0;
    const int early = p->n - p->n / 4; // lines fetched earlier would be evicted again
    const int64_t end = t + n > early ? size * (t + n - early) / (p->n - early) : 0;
    for (int64_t at = t > early ? size * (t - early) / (p->n - early) : 0; at < end; at += 64) {
        for (int i = 0; i < p->n_w; i++)
            __builtin_prefetch((const char *) p->w[i]->data + p->next + at, 0, 2);
    }
    for (int i = 0; e->residual && i < n; i++) {
        for (int r = 0; r < p->n_rows; r += 16) __builtin_prefetch(e->residual + (size_t) i * e->stride + r);
    }
}

static void run_panel(panel_work * p, fast_scratch * s, const tile_end * e, int64_t segment) {
    const int64_t n_in = p->w[0]->ne[0];
    const int rows = p->m->rows;
    for (p->k0 = 0; p->k0 < n_in; p->k0 = p->k1) {
        p->k1 = n_in - p->k0 < segment ? n_in : p->k0 + segment;
        for (int i = 0; i < p->n_w; i++) pack(p, i, &s->panel[i]);
        for (int t = 0; t < p->n; t += STEP) {
            const int n = p->n - t < STEP ? p->n - t : STEP, at = segment < n_in ? t * rows : 0;
            tile_end here = *e;
            here.to += (size_t) t * e->stride;
            if (here.residual) here.residual += (size_t) t * e->stride;
            prefetch(p, &here, t, n);
            for (int i = 0; i < p->n_w; i++) {
                if (p->k0 == 0) memset(s->y[i] + at, 0, (size_t) (n * rows) * sizeof(float));
                multiply(p, i, &s->panel[i], t, n, s->y[i] + at);
            }
            if (p->k1 < n_in) continue;
            p->m->end_tile(&here, n, p->n_rows, s->y[0] + at, p->n_w > 1 ? s->y[1] + at : NULL,
                           (size_t) rows);
        }
    }
}

static void panels(kernel_job * job, fast_scratch * s, struct ggml_tensor * dst, int nth) {
    const micro * m = job->env->micro;
    const struct ggml_tensor *w = dst->src[0], *up = job->up ? dst->src[job->up] : NULL;
    const int64_t n_out = w->ne[1], n_tokens = dst->ne[1], n_panels = (n_out + m->rows - 1) / m->rows;
    const int64_t segment = (int64_t) (PANEL / block_size(m, job->plan)) * BLOCK;
    const int64_t most = segment < w->ne[0] ? CHUNK : n_tokens;
    int64_t n_chunks = (n_tokens + most - 1) / most;
    while (n_panels * n_chunks < 8 * nth && n_tokens / n_chunks >= 4 * STEP) n_chunks++;
    const int64_t chunk = (n_tokens + n_chunks - 1) / n_chunks;
    const bool stream = ggml_nbytes(dst) >= STREAM && (uintptr_t) dst->data % 64 == 0 && n_out % 16 == 0;
    panel_work p = { .m = m, .plan = job->plan, .w = { w, up }, .x = dst->src[1], .n_w = up ? 2 : 1 };
    for (int64_t task; take(job, n_panels * n_chunks, &task);) {
        const int64_t r_next =
            (task + nth) % n_panels * m->rows; // its next task if all threads are equally fast
        p.r0 = task % n_panels * m->rows, p.t0 = task / n_panels * chunk;
        p.n_rows = (int) (n_out - p.r0 < m->rows ? n_out - p.r0 : m->rows);
        p.n = (int) (n_tokens - p.t0 < chunk ? n_tokens - p.t0 : chunk);
        p.next = r_next + p.n_rows <= n_out ? r_next * (int64_t) w->nb[1] : 0;
        tile_end e = end_of(job, dst, p.r0, p.t0);
        e.stream = stream;
        run_panel(&p, s, &e, segment);
    }
    if (stream) atomic_thread_fence(memory_order_seq_cst); // orders the stores that bypass the caches
}

// ------------------------------------------------------------------------------------- few tokens

// Rows of a task: long runs are read faster, but every thread should get several tasks.
static int64_t dot_rows(const struct ggml_tensor * w, int64_t n_tokens, int nth) {
    const int64_t long_run = (n_tokens < 3 ? 1 : 2) * DOT_BYTES / (int64_t) w->nb[1],
                  share = w->ne[1] / (4 * nth);
    const int64_t n = long_run < share ? long_run : share;
    return n < 4 ? 4 : n < DOT_ROWS ? n : DOT_ROWS;
}

// Sums [n][DOT_ROWS] of n_rows rows of W for n <= FEW_TOKENS tokens.
static void dot_run(const micro * m, const struct ggml_tensor * w, int64_t r0, int n_rows, const char * x,
                    size_t stride, int n, float * y) {
    float out[DOT_ROWS * FEW_TOKENS];
    m->dot[w->type](n_rows, n, w->ne[0], (const char *) w->data + (size_t) r0 * w->nb[1], w->nb[1], x, stride,
                    out);
    for (int t = 0; t < n; t++) {
        for (int r = 0; r < n_rows; r++) y[t * DOT_ROWS + r] = out[r * FEW_TOKENS + t];
    }
}

static void dots(kernel_job * job, fast_scratch * s, struct ggml_tensor * dst, int nth) {
    const micro * m = job->env->micro;
    const struct ggml_tensor *w = dst->src[0], *x = dst->src[1], *up = job->up ? dst->src[job->up] : NULL;
    const int64_t n_out = w->ne[1], step = dot_rows(w, dst->ne[1], nth);
    const int n_tokens = (int) dst->ne[1];
    for (int64_t task; take(job, (n_out + step - 1) / step, &task);) {
        const int64_t r0 = task * step;
        const int n_rows = (int) (n_out - r0 < step ? n_out - r0 : step);
        for (int t = 0; t < n_tokens; t += FEW_TOKENS) {
            const int n = n_tokens - t < FEW_TOKENS ? n_tokens - t : FEW_TOKENS;
            const char * tokens = (const char *) x->data + (size_t) t * x->nb[1];
            dot_run(m, w, r0, n_rows, tokens, x->nb[1], n, s->y[0]);
            if (up) dot_run(m, up, r0, n_rows, tokens, x->nb[1], n, s->y[1]);
            const tile_end e = end_of(job, dst, r0, t);
            m->end_tile(&e, n, n_rows, s->y[0], up ? s->y[1] : NULL, DOT_ROWS);
        }
    }
}

void kernel_fast_linear(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    kernel_job * job = userdata;
    fast_scratch * s = (fast_scratch *) (void *) (job->env->scratch + (size_t) ith * job->env->scratch_size);
    const linear_plan plan = job->plan;
    if (plan == LINEAR_DOTS_K || plan == LINEAR_DOTS16 || plan == LINEAR_FLOAT_DOTS) dots(job, s, dst, nth);
    else panels(job, s, dst, nth);
}
