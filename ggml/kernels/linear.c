// linear.c - y = W x + b with weights of any ggml type and f32 activations. Many tokens: 32 rows of W and 512
// inputs at a time are unpacked to an f32 panel [512][32] that stays in the cache while it is multiplied with
// all tokens (tile.h). Rows of answers, usually few: rows of W are unpacked one by one and multiplied as dot
// products, since reading W then takes most of the time and transposing it would cost more than it saves.
#include "tile.h"

#define BLOCK_K 512 // a multiple of every type's block; 32 * 512 * 4 = 64 KiB of panel
#define FEW     8   // tokens that share one unpacked row

typedef struct linear_args {
    const char * w;
    enum ggml_type type;
    ggml_to_float_t to_float;
    size_t row_size, type_size;
    int64_t n_in, n_out, n_tokens, block;
    const float *x, *b;
    size_t x_stride;
    float * y;
    float *panel, *row; // scratch: [BLOCK_K][32], [32][BLOCK_K]
    float * edge;       // [8][32] for the last rows of W
} linear_args;

#if defined(KERNEL_SIZES)
size_t linear_scratch_size(void) { return (2 * KERNEL_PANEL * BLOCK_K + 8 * KERNEL_PANEL) * sizeof(float); }
#endif

static const float * unpack_row(const linear_args * a, int64_t r, int64_t k0, int64_t n, float * to) {
    const char * from = a->w + r * a->row_size + k0 / a->block * a->type_size;
    return unpack(from, a->type, a->to_float, to, n);
}

// panel[k][j] = W[r0 + j][k0 + k]; rows beyond n_out are zero.
static void pack(const linear_args * a, int64_t r0, int n_rows, int64_t k0, int n_k) {
    const float * rows[KERNEL_PANEL];
    for (int j = 0; j < KERNEL_PANEL; j++) {
        rows[j] = unpack_row(a, r0 + (j < n_rows ? j : 0), k0, n_k, a->row + j * BLOCK_K);
    }
    for (int k = 0; k < n_k; k++) {
        for (int j = 0; j < KERNEL_PANEL; j++) a->panel[k * KERNEL_PANEL + j] = rows[j][k];
    }
}

static void many_tokens(const linear_args * a, int64_t r0, int n_rows) {
    for (int64_t t = 0; t < a->n_tokens; t++) {
        for (int j = 0; j < n_rows; j++) a->y[t * a->n_out + r0 + j] = a->b ? a->b[r0 + j] : 0.0f;
    }
    for (int64_t k0 = 0; k0 < a->n_in; k0 += BLOCK_K) {
        int n_k = (int) (a->n_in - k0 < BLOCK_K ? a->n_in - k0 : BLOCK_K);
        pack(a, r0, n_rows, k0, n_k);
        for (int64_t t = 0; t < a->n_tokens; t += 8) {
            int n = (int) (a->n_tokens - t < 8 ? a->n_tokens - t : 8);
            const float * x = a->x + t * a->x_stride + k0;
            float * y = a->y + t * a->n_out + r0;
            if (n_rows == KERNEL_PANEL) {
                tile(n, y, a->n_out, x, a->x_stride, a->panel, KERNEL_PANEL, n_k);
                continue;
            }
            for (int i = 0; i < n; i++)
                memcpy(a->edge + i * KERNEL_PANEL, y + i * a->n_out, n_rows * sizeof *y);
            tile(n, a->edge, KERNEL_PANEL, x, a->x_stride, a->panel, KERNEL_PANEL, n_k);
            for (int i = 0; i < n; i++)
                memcpy(y + i * a->n_out, a->edge + i * KERNEL_PANEL, n_rows * sizeof *y);
        }
    }
}

static void few_tokens(const linear_args * a, int64_t r0, int n_rows, int64_t t0) {
    const int64_t n = a->n_tokens - t0 < FEW ? a->n_tokens - t0 : FEW;
    const float * x = a->x + t0 * a->x_stride;
    float * y = a->y + t0 * a->n_out;
    for (int64_t r = r0; r < r0 + n_rows; r++) {
        float sum[FEW] = { 0 };
        for (int64_t k0 = 0; k0 < a->n_in; k0 += BLOCK_K) {
            int n_k = (int) (a->n_in - k0 < BLOCK_K ? a->n_in - k0 : BLOCK_K);
            const float * w = unpack_row(a, r, k0, n_k, a->row);
            for (int64_t t = 0; t < n; t++) sum[t] += dot(w, x + t * a->x_stride + k0, n_k);
        }
        for (int64_t t = 0; t < n; t++) y[t * a->n_out + r] = sum[t] + (a->b ? a->b[r] : 0.0f);
    }
}

static void run_linear(struct ggml_tensor * dst, int ith, int nth, const kernel_env * env, bool few) {
    const struct ggml_tensor *w = dst->src[0], *x = dst->src[1], *b = dst->src[2];
    float * scratch = (float *) (env->scratch + ith * env->scratch_size);
    linear_args a = {
        .w = w->data,
        .type = w->type,
        .to_float = ggml_get_type_traits(w->type)->to_float,
        .row_size = w->nb[1],
        .type_size = ggml_type_size(w->type),
        .block = ggml_blck_size(w->type),
        .n_in = w->ne[0],
        .n_out = w->ne[1],
        .n_tokens = x->ne[1] * x->ne[2] * x->ne[3],
        .x = x->data,
        .x_stride = x->nb[1] / sizeof(float),
        .b = b ? b->data : NULL,
        .y = dst->data,
        .panel = scratch,
        .row = scratch + KERNEL_PANEL * BLOCK_K,
        .edge = scratch + 2 * KERNEL_PANEL * BLOCK_K,
    };
    int64_t n_tasks = (a.n_out + KERNEL_PANEL - 1) / KERNEL_PANEL;
    for (int64_t task = ith; task < n_tasks; task += nth) {
        if (atomic_load_explicit(env->cancel, memory_order_relaxed)) return;
        int64_t r0 = task * KERNEL_PANEL;
        int n_rows = (int) (a.n_out - r0 < KERNEL_PANEL ? a.n_out - r0 : KERNEL_PANEL);
        for (int64_t t = 0; few && t < a.n_tokens; t += FEW) few_tokens(&a, r0, n_rows, t);
        if (!few) many_tokens(&a, r0, n_rows);
    }
}

void KERNEL(linear)(struct ggml_tensor * dst, int ith, int nth, void * env) {
    run_linear(dst, ith, nth, env, false);
}

void KERNEL(linear_answers)(struct ggml_tensor * dst, int ith, int nth, void * env) {
    run_linear(dst, ith, nth, env, true);
}
