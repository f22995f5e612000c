// fast_linear.c - y = W x + b with rounded numbers (micro.h). Many tokens: a task is a panel of weight rows
// and up to CHUNK tokens; block by block the panel is packed, small enough for the first cache, and all
// tokens pass it. Few tokens: a task is a run of weight rows, each read once for up to 8 tokens. Tasks are
// taken from a counter, since the cores of shared machines stall; who computes a task changes nothing in it.
#include "micro.h"

#include <string.h>

#define CHUNK     768                     // tokens of a task
#define DOT_ROWS  128                     // weight rows of a task, at most
#define DOT_BYTES (96 << 10)              // and about so many bytes: one thread reads them in a row
#define DOT_LIMIT 12                      // tokens up to which a pass per 8 tokens is faster than a panel
#define ROUND_TOKENS 4                    // tokens of a rounding task

typedef struct fast_scratch {
    _Alignas(64) char panel[2 * MAX_ROWS * BLOCK];
    float w_scales[MAX_ROWS];
    float y[CHUNK * MAX_ROWS];
} fast_scratch;

size_t fast_linear_scratch_size(void) { return sizeof(fast_scratch); }

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

void kernel_round(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) ith, (void) nth;
    kernel_job * job = userdata;
    const micro * m = job->env->micro;
    const struct ggml_tensor * x = dst->src[0];
    const int64_t n_in = x->ne[0], n_tokens = dst->ne[1];
    for (int64_t task; take(job, (n_tokens + ROUND_TOKENS - 1) / ROUND_TOKENS, &task);) {
        for (int64_t t = task * ROUND_TOKENS; t < n_tokens && t < (task + 1) * ROUND_TOKENS; t++) {
            const float * from = (const float *) ((const char *) x->data + (size_t) t * x->nb[1]);
            char * to = (char *) dst->data + (size_t) t * dst->nb[1];
            if (job->plan == LINEAR_INT8) m->round8(from, n_in, to);
            else if (job->plan == LINEAR_DOTS8) m->round_k(from, n_in, to);
            else m->round16(from, n_in, to);
        }
    }
}

// ------------------------------------------------------------------------------------ many tokens

// The rows of the next block lie far apart: too far for the hardware to guess.
static void prefetch(const char * from, size_t row_size, int n_rows, size_t n) {
    for (int r = 0; r < n_rows; r++) {
        for (size_t line = 0; line < n; line += 64) __builtin_prefetch(from + (size_t) r * row_size + line);
    }
}

static void multiply_panel(const micro * m, linear_plan plan, fast_scratch * s, const struct ggml_tensor * w,
                           const struct ggml_tensor * x, int64_t r0, int n_rows, int64_t t0, int n) {
    const int64_t n_in = w->ne[0];
    const rounded8 at8 = rounded8_of(n_in);
    const rounded16 at16 = rounded16_of(n_in);
    const char * row = (const char *) w->data + (size_t) r0 * w->nb[1];
    const char * tokens = (const char *) x->data + (size_t) t0 * x->nb[1];
    const size_t stride = x->nb[1], block_size = ggml_row_size(w->type, BLOCK);
    memset(s->y, 0, (size_t) n * (size_t) m->rows * sizeof *s->y);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const int n_k = (int) (n_in - k0 < BLOCK ? n_in - k0 : BLOCK);
        const char * from = row + (size_t) (k0 / ggml_blck_size(w->type)) * ggml_type_size(w->type);
        const char * x8 = tokens + k0, * x16 = tokens + 2 * k0;
        const size_t block = (size_t) (k0 / BLOCK * 4);
        const bool last = k0 + BLOCK >= n_in;
        if (plan == LINEAR_INT16) {
            m->pack16(w->type, from, w->nb[1], n_rows, n_k, s->panel, s->w_scales);
            if (!last) prefetch(from + block_size, w->nb[1], n_rows, block_size);
            m->multiply16(n, n_k, s->panel, s->w_scales, x16, tokens + at16.scales + block,
                          tokens + at16.sums + block, stride, s->y);
        } else {
            m->pack8(w->type, from, w->nb[1], n_rows, n_k, s->panel, s->w_scales);
            if (!last) prefetch(from + block_size, w->nb[1], n_rows, block_size);
            m->multiply8(n, n_k, s->panel, s->w_scales, x8, tokens + at8.scales + block,
                         tokens + at8.sums + block, stride, s->y);
        }
    }
}

static void panels(kernel_job * job, fast_scratch * s, struct ggml_tensor * dst) {
    const micro * m = job->env->micro;
    const struct ggml_tensor * w = dst->src[0], * x = dst->src[1], * b = dst->src[2];
    const float * bias = b ? b->data : NULL;
    const int64_t n_out = w->ne[1], n_tokens = dst->ne[1], n_panels = (n_out + m->rows - 1) / m->rows;
    const int64_t n_chunks = (n_tokens + CHUNK - 1) / CHUNK, chunk = (n_tokens + n_chunks - 1) / n_chunks;
    for (int64_t task; take(job, n_panels * n_chunks, &task);) {
        const int64_t r0 = task % n_panels * m->rows, t0 = task / n_panels * chunk;
        const int n_rows = (int) (n_out - r0 < m->rows ? n_out - r0 : m->rows);
        const int n = (int) (n_tokens - t0 < chunk ? n_tokens - t0 : chunk);
        multiply_panel(m, job->plan, s, w, x, r0, n_rows, t0, n);
        for (int t = 0; t < n; t++) {
            const float * from = s->y + t * m->rows;
            float * to = (float *) dst->data + (t0 + t) * n_out + r0;
            for (int r = 0; r < n_rows; r++) to[r] = bias ? from[r] + bias[r0 + r] : from[r];
        }
    }
}

// ------------------------------------------------------------------------------------- few tokens

// Rows of a task: long runs are read faster, but every thread should have a few.
static int64_t dot_rows(const struct ggml_tensor * w, int nth) {
    const int64_t long_run = DOT_BYTES / (int64_t) w->nb[1], share = w->ne[1] / (4 * nth);
    const int64_t n = long_run < share ? long_run : share;
    return n < 4 ? 4 : n < DOT_ROWS ? n : DOT_ROWS;
}

static void dots(kernel_job * job, struct ggml_tensor * dst, int nth) {
    const micro * m = job->env->micro;
    const struct ggml_tensor * w = dst->src[0], * x = dst->src[1], * b = dst->src[2];
    const float * bias = b ? b->data : NULL;
    const int64_t n_out = w->ne[1];
    const int n_tokens = (int) dst->ne[1];
    float * y = dst->data, out[DOT_ROWS * FEW_TOKENS];
    const int64_t step = dot_rows(w, nth);
    for (int64_t task; take(job, (n_out + step - 1) / step, &task);) {
        const int64_t r0 = task * step;
        const int n_rows = (int) (n_out - r0 < step ? n_out - r0 : step);
        const char * rows = (const char *) w->data + (size_t) r0 * w->nb[1];
        for (int t = 0; t < n_tokens; t += FEW_TOKENS) {
            const int n = n_tokens - t < FEW_TOKENS ? n_tokens - t : FEW_TOKENS;
            const char * tokens = (const char *) x->data + (size_t) t * x->nb[1];
            m->dot[w->type](n_rows, n, w->ne[0], rows, w->nb[1], tokens, x->nb[1], out);
            for (int i = 0; i < n; i++) {
                for (int r = 0; r < n_rows; r++)
                    y[(t + i) * n_out + r0 + r] = out[r * FEW_TOKENS + i] + (bias ? bias[r0 + r] : 0.0f);
            }
        }
    }
}

void kernel_fast_linear(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    kernel_job * job = userdata;
    char * scratch = job->env->scratch + (size_t) ith * job->env->scratch_size;
    const linear_plan plan = job->plan;
    if (plan == LINEAR_DOTS8 || plan == LINEAR_DOTS16 || plan == LINEAR_FLOAT_DOTS) dots(job, dst, nth);
    else panels(job, (fast_scratch *) (void *) scratch, dst);
}
