// fast_linear.c - y = W x + b with rounded numbers (micro.h). Many tokens: a task is a panel of weight rows
// and up to CHUNK tokens; block by block the panel is packed, small enough for the first cache, and all
// tokens pass it. Few tokens: a task is a run of weight rows, each read once for up to 8 tokens. Tasks are
// taken from a counter, since the cores of shared machines stall; who computes a task changes nothing in it.
#include "micro.h"

#include <string.h>

#define CHUNK     768                     // tokens of a task
#define STEP      48                      // tokens that pass a block together
#define DOT_ROWS  128                     // weight rows of a task, at most
#define DOT_BYTES (96 << 10)              // and about so many bytes: one thread reads them in a row
#define DOT_LIMIT 12                      // tokens up to which a pass per 8 tokens is faster than a panel
#define ROUND_TOKENS 4                    // tokens of a rounding task

typedef struct fast_scratch {
    _Alignas(64) char panel[2 * MAX_ROWS * BLOCK];
    float w_scales[MAX_ROWS];
    float y[CHUNK * MAX_ROWS], up[CHUNK * MAX_ROWS];
} fast_scratch;

size_t fast_linear_scratch_size(void) { return sizeof(fast_scratch); }
int64_t fast_norm_limit(void) { return CHUNK * MAX_ROWS; }

static bool is_float(enum ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

linear_plan fast_linear_plan(const micro * m, const struct ggml_tensor * w, int64_t n_tokens, bool careful) {
    const bool few = n_tokens <= DOT_LIMIT;
    if (few && is_float(w->type)) return LINEAR_FLOAT_DOTS;
    if (w->ne[0] % GROUP) return LINEAR_EXACT;
    const bool k_type = w->type == GGML_TYPE_Q4_K || w->type == GGML_TYPE_Q5_K || w->type == GGML_TYPE_Q6_K;
    if (few && k_type) return LINEAR_DOTS8;
    if (few) return m->dot[w->type] ? LINEAR_DOTS16 : LINEAR_ENGINE;
    return careful || is_float(w->type) ? LINEAR_INT16 : LINEAR_INT8;
}

int64_t fast_linear_rounded_size(linear_plan plan, int64_t n_in) {
    switch (plan) {
    case LINEAR_DOTS8:
    case LINEAR_INT8: return (int64_t) rounded8_of(n_in).size;
    case LINEAR_INT16:
    case LINEAR_DOTS16: return (int64_t) rounded16_of(n_in).size;
    default: return 0;
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
            if (job->norm == NORM_RMS) m->rms_norm(from, floats(dst, 1), job->eps, n_in, s->y);
            if (job->norm == NORM_LAYER)
                m->layer_norm(from, floats(dst, 1), floats(dst, 2), job->eps, n_in, s->y);
            if (job->norm != NORM_NONE) from = s->y;
            if (job->plan == LINEAR_INT8) m->round8(from, n_in, to);
            else if (job->plan == LINEAR_DOTS8) m->round_k(from, n_in, to);
            else m->round16(from, n_in, to);
        }
    }
}

static tile_end end_of(const kernel_job * job, const struct ggml_tensor * dst, int64_t row, int64_t token) {
    const int64_t n_out = dst->ne[0], at = token * n_out + row;
    const float * bias = floats(dst, job->bias), * residual = floats(dst, job->residual);
    return (tile_end) { .end = job->end,
                        .bias = bias ? bias + row : NULL,
                        .residual = residual ? residual + at : NULL,
                        .to = (float *) dst->data + at,
                        .stride = (size_t) n_out };
}

// ------------------------------------------------------------------------------------ many tokens

// A panel of n_rows weight rows and the tokens that pass it.
typedef struct panel_work {
    const micro * m;
    linear_plan   plan;
    const struct ggml_tensor * w, * x;
    int64_t       r0, t0;
    int           n_rows, n;
    float *       y;                      // [n][m->rows] sums
    const char *  next;                   // what is packed after this: asked for ahead
} panel_work;

// Rows lie too far apart for the hardware to guess: lines of the next block's rows [first, end).
static void prefetch_rows(const panel_work * p, const char * next, int first, int end) {
    const size_t size = ggml_row_size(p->w->type, BLOCK);
    for (int r = first; next && r < end; r++) {
        for (size_t line = 0; line < size; line += 64) __builtin_prefetch(next + (size_t) r * p->w->nb[1] + line);
    }
}

// Tokens [t, t + n) through the packed block that begins at input k0.
static void multiply_block(const panel_work * p, fast_scratch * s, int64_t k0, int n_k, int t, int n) {
    const char * tokens = (const char *) p->x->data + (size_t) (p->t0 + t) * p->x->nb[1];
    const size_t stride = p->x->nb[1], block = (size_t) (k0 / BLOCK * 4);
    float * y = p->y + t * p->m->rows;
    if (p->plan == LINEAR_INT16) {
        const rounded16 at = rounded16_of(p->w->ne[0]);
        p->m->multiply16(n, n_k, s->panel, s->w_scales, tokens + 2 * k0, tokens + at.scales + block,
                         tokens + at.sums + block, stride, y);
    } else {
        const rounded8 at = rounded8_of(p->w->ne[0]);
        p->m->multiply8(n, n_k, s->panel, s->w_scales, tokens + k0, tokens + at.scales + block,
                        tokens + at.sums + block, stride, y);
    }
}

// All blocks of a panel; with e, its results leave while the last block is multiplied.
static void multiply_panel(const panel_work * p, fast_scratch * s, const tile_end * e, const float * up) {
    const micro * m = p->m;
    const int64_t n_in = p->w->ne[0];
    const char * row = (const char *) p->w->data + (size_t) p->r0 * p->w->nb[1];
    memset(p->y, 0, (size_t) p->n * (size_t) m->rows * sizeof *p->y);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const bool last = k0 + BLOCK >= n_in;
        const int n_k = (int) (last ? n_in - k0 : BLOCK);
        const char * from = row + ggml_row_size(p->w->type, k0);
        const char * next = last ? p->next : from + ggml_row_size(p->w->type, BLOCK);
        (p->plan == LINEAR_INT16 ? m->pack16 : m->pack8)(p->w->type, from, p->w->nb[1], p->n_rows, n_k,
                                                         s->panel, s->w_scales);
        for (int t = 0; t < p->n; t += STEP) {
            const int n = p->n - t < STEP ? p->n - t : STEP;
            prefetch_rows(p, next, t * p->n_rows / p->n, (t + n) * p->n_rows / p->n);
            multiply_block(p, s, k0, n_k, t, n);
            if (!last || !e) continue;
            tile_end here = *e;
            here.to += (size_t) t * e->stride;
            if (here.residual) here.residual += (size_t) t * e->stride;
            m->end_tile(&here, n, p->n_rows, up ? up + t * m->rows : p->y + t * m->rows,
                        up ? p->y + t * m->rows : NULL, (size_t) m->rows);
        }
    }
}

static const char * row_of(const struct ggml_tensor * w, int64_t row) {
    return row < w->ne[1] ? (const char *) w->data + (size_t) row * w->nb[1] : NULL;
}

static void panels(kernel_job * job, fast_scratch * s, struct ggml_tensor * dst) {
    const micro * m = job->env->micro;
    const struct ggml_tensor * w = dst->src[0], * up = job->up ? dst->src[job->up] : NULL;
    const int64_t n_out = w->ne[1], n_tokens = dst->ne[1], n_panels = (n_out + m->rows - 1) / m->rows;
    const int64_t n_chunks = (n_tokens + CHUNK - 1) / CHUNK, chunk = (n_tokens + n_chunks - 1) / n_chunks;
    panel_work p = { .m = m, .plan = job->plan, .x = dst->src[1] };
    for (int64_t task; take(job, n_panels * n_chunks, &task);) {
        const int64_t after = atomic_load_explicit(&job->next, memory_order_relaxed) % n_panels * m->rows;
        p.r0 = task % n_panels * m->rows, p.t0 = task / n_panels * chunk;
        p.n_rows = (int) (n_out - p.r0 < m->rows ? n_out - p.r0 : m->rows);
        p.n = (int) (n_tokens - p.t0 < chunk ? n_tokens - p.t0 : chunk);
        const tile_end e = end_of(job, dst, p.r0, p.t0);
        const char * next = after + p.n_rows <= n_out ? row_of(w, after) : NULL;
        p.w = w, p.y = s->y, p.next = up ? row_of(up, p.r0) : next;
        multiply_panel(&p, s, up ? NULL : &e, NULL);
        if (!up) continue;
        p.w = up, p.y = s->up, p.next = next;
        multiply_panel(&p, s, &e, s->y);
    }
}

// ------------------------------------------------------------------------------------- few tokens

// Rows of a task: long runs are read faster, but every thread should have a few.
static int64_t dot_rows(const struct ggml_tensor * w, int nth) {
    const int64_t long_run = DOT_BYTES / (int64_t) w->nb[1], share = w->ne[1] / (4 * nth);
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
    const struct ggml_tensor * w = dst->src[0], * x = dst->src[1], * up = job->up ? dst->src[job->up] : NULL;
    const int64_t n_out = w->ne[1], step = dot_rows(w, nth);
    const int n_tokens = (int) dst->ne[1];
    for (int64_t task; take(job, (n_out + step - 1) / step, &task);) {
        const int64_t r0 = task * step;
        const int n_rows = (int) (n_out - r0 < step ? n_out - r0 : step);
        for (int t = 0; t < n_tokens; t += FEW_TOKENS) {
            const int n = n_tokens - t < FEW_TOKENS ? n_tokens - t : FEW_TOKENS;
            const char * tokens = (const char *) x->data + (size_t) t * x->nb[1];
            dot_run(m, w, r0, n_rows, tokens, x->nb[1], n, s->y);
            if (up) dot_run(m, up, r0, n_rows, tokens, x->nb[1], n, s->up);
            const tile_end e = end_of(job, dst, r0, t);
            m->end_tile(&e, n, n_rows, s->y, up ? s->up : NULL, DOT_ROWS);
        }
    }
}

void kernel_fast_linear(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    kernel_job * job = userdata;
    fast_scratch * s = (fast_scratch *) (void *) (job->env->scratch + (size_t) ith * job->env->scratch_size);
    const linear_plan plan = job->plan;
    if (plan == LINEAR_DOTS8 || plan == LINEAR_DOTS16 || plan == LINEAR_FLOAT_DOTS) dots(job, s, dst, nth);
    else panels(job, s, dst);
}
