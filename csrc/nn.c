// nn.c - see nn.h. Everything that ggml does not do the way we need it is worked around here and nowhere
// else.
#include "nn.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

pyllava_status graph_begin(graph * g, kernel_env * env, attention_env * attention, int32_t n_nodes) {
    size_t size =
        ggml_tensor_overhead() * 2 * (size_t) n_nodes + ggml_graph_overhead_custom((size_t) n_nodes, false);
    *g = (graph) { .env = env, .attention = attention, .n_max_jobs = env->micro ? n_nodes : 0 };
    if (env->micro) {
        g->jobs = calloc((size_t) n_nodes, sizeof *g->jobs);
        TRY_ALLOC(g->jobs, sizeof *g->jobs * (size_t) n_nodes);
    }
    g->ctx = ggml_init((struct ggml_init_params) { .mem_size = size, .no_alloc = true });
    TRY_ALLOC(g->ctx, size);
    g->nodes = ggml_new_graph_custom(g->ctx, (size_t) n_nodes, false);
    return PYLLAVA_OK;
}

pyllava_status graph_finish(graph * g, tensor * out) {
    if (!out) FAIL(PYLLAVA_ERR_UNSUPPORTED, "the network could not be built: a weight is missing");
    ggml_set_output(out);
    ggml_build_forward_expand(g->nodes, out);
    return PYLLAVA_OK;
}

void graph_free(graph * g) {
    ggml_free(g->ctx);
    free(g->jobs);
    *g = (graph) { 0 };
}

tensor * nn_input(graph * g, enum ggml_type type, int64_t n_rows, int64_t n, const char * name) {
    tensor * x = ggml_new_tensor_2d(g->ctx, type, n, n_rows);
    ggml_set_input(x);
    return ggml_set_name(x, name);
}

tensor * nn_name(graph * g, tensor * x, const char * format, ...) {
    (void) g;
    if (!x) return NULL;
    char name[GGML_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return ggml_set_name(x, name);
}

static kernel_job * new_job(graph * g, linear_plan plan) {
    if (g->n_jobs == g->n_max_jobs) return NULL;
    kernel_job * job = &g->jobs[g->n_jobs++];
    job->env = g->env;
    job->plan = plan;
    return job;
}

// Layers that read the same activations (q, k, v; gate, up) round them once.
static tensor * rounded(graph * g, linear_plan plan, tensor * x) {
    const int64_t size = fast_linear_rounded_size(plan, x->ne[0]);
    if (size == 0) return x;
    if (g->rounded_from == x && g->rounded_plan == plan) return g->rounded;
    kernel_job * job = new_job(g, plan);
    if (!job) return NULL;
    g->rounded_from = x;
    g->rounded_plan = plan;
    g->rounded = ggml_custom_4d(g->ctx, GGML_TYPE_I8, size, x->ne[1], 1, 1, &x, 1, kernel_round,
                                GGML_N_TASKS_MAX, job);
    return g->rounded;
}

static tensor * fast_linear(graph * g, linear_plan plan, tensor * w, tensor * b, tensor * x) {
    const int64_t n_tokens = x->ne[1];
    tensor * args[] = { w, rounded(g, plan, x), b };
    kernel_job * job = new_job(g, plan);
    if (!args[1] || !job) return NULL;
    return ggml_custom_4d(g->ctx, GGML_TYPE_F32, w->ne[1], n_tokens, 1, 1, args, b ? 3 : 2,
                          kernel_fast_linear, GGML_N_TASKS_MAX, job);
}

tensor * nn_linear(graph * g, tensor * w, tensor * b, tensor * x) {
    if (!w || !x) return NULL;
    const linear_plan plan =
        g->env->micro ? fast_linear_plan(g->env->micro, w, x->ne[1], g->careful) : LINEAR_EXACT;
    if (plan == LINEAR_ENGINE) {
        tensor * y = ggml_mul_mat(g->ctx, w, x);
        return b ? ggml_add(g->ctx, y, b) : y;
    }
    if (plan != LINEAR_EXACT) return fast_linear(g, plan, w, b, x);
    tensor * args[] = { w, x, b };
    return ggml_custom_4d(g->ctx, GGML_TYPE_F32, w->ne[1], x->ne[1], x->ne[2], x->ne[3], args, b ? 3 : 2,
                          kernel_linear, GGML_N_TASKS_MAX, g->env);
}

tensor * nn_add(graph * g, tensor * x, tensor * y) { return x && y ? ggml_add(g->ctx, x, y) : NULL; }

tensor * nn_mul(graph * g, tensor * x, tensor * y) { return x && y ? ggml_mul(g->ctx, x, y) : NULL; }

tensor * nn_layer_norm(graph * g, tensor * w, tensor * b, float eps, tensor * x) {
    if (!w || !b || !x) return NULL;
    return ggml_add(g->ctx, ggml_mul(g->ctx, ggml_norm(g->ctx, x, eps), w), b);
}

tensor * nn_rms_norm(graph * g, tensor * w, float eps, tensor * x) {
    return w && x ? ggml_mul(g->ctx, ggml_rms_norm(g->ctx, x, eps), w) : NULL;
}

tensor * nn_gelu(graph * g, tensor * x) { return x ? ggml_gelu_erf(g->ctx, x) : NULL; }

tensor * nn_silu(graph * g, tensor * x) { return x ? ggml_silu(g->ctx, x) : NULL; }

// ggml's own quick GELU goes through a table of f16 values: x sigmoid(1.702 x) = silu(1.702 x) / 1.702.
tensor * nn_quick_gelu(graph * g, tensor * x) {
    return x ? ggml_scale(g->ctx, ggml_silu(g->ctx, ggml_scale(g->ctx, x, 1.702f)), 1.0f / 1.702f) : NULL;
}

// With base 1 ggml's angle is position / divisor, rounded once; its own powers of theta drift by
// multiplication.
tensor * nn_rope(graph * g, tensor * x, tensor * positions, tensor * divisors, int32_t head_dim) {
    if (!x || !positions || !divisors) return NULL;
    int64_t width = x->ne[0], n = x->ne[1];
    x = ggml_reshape_3d(g->ctx, x, head_dim, width / head_dim, n);
    x = ggml_rope_ext(g->ctx, x, positions, divisors, head_dim, GGML_ROPE_TYPE_NORMAL, 0, 1.0f, 1.0f, 0.0f,
                      1.0f, 0.0f, 0.0f);
    return ggml_reshape_2d(g->ctx, x, width, n);
}

tensor * nn_attention(graph * g, tensor * q, tensor * k, tensor * v) {
    if (!q || !k || !v) return NULL;
    tensor * args[] = { q, k, v };
    if (g->env->micro) {
        kernel_job * job = new_job(g, LINEAR_EXACT);
        if (!job) return NULL;
        job->attention = g->attention;
        return ggml_custom_4d(g->ctx, GGML_TYPE_F32, q->ne[0], q->ne[1], 1, 1, args, 3, kernel_fast_attention,
                              GGML_N_TASKS_MAX, job);
    }
    return ggml_custom_4d(g->ctx, GGML_TYPE_F32, q->ne[0], q->ne[1], 1, 1, args, 3, kernel_attention,
                          GGML_N_TASKS_MAX, g->attention);
}

tensor * nn_rows(graph * g, tensor * x, tensor * rows) {
    return x && rows ? ggml_get_rows(g->ctx, x, rows) : NULL;
}

tensor * nn_store_rows(graph * g, tensor * to, tensor * x, tensor * rows) {
    if (!to || !x || !rows) return NULL;
    tensor * stored = ggml_set_rows(g->ctx, to, x, rows);
    ggml_build_forward_expand(g->nodes, stored);                         // before whatever reads it
    return stored;
}
