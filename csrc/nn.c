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

void graph_rewind(graph * g) {
    for (int32_t i = 0; i < g->n_jobs; i++) atomic_store(&g->jobs[i].next, 0);
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
    tensor * args[] = { x, NULL, NULL };
    int n_args = 1;
    if (g->norm.out == x && x->ne[0] <= fast_norm_limit()) { // normalise and round at once
        job->norm = g->norm.b ? NORM_LAYER : NORM_RMS;
        job->eps = g->norm.eps;
        args[0] = g->norm.x, args[1] = g->norm.w, args[2] = g->norm.b;
        n_args = g->norm.b ? 3 : 2;
    }
    g->rounded_from = x;
    g->rounded_plan = plan;
    g->rounded = ggml_custom_4d(g->ctx, GGML_TYPE_I8, size, x->ne[1], 1, 1, args, n_args, kernel_round,
                                GGML_N_TASKS_MAX, job);
    return g->rounded;
}

// One more source of a node; its number.
static int add_source(tensor * node, tensor * source) {
    int i = 0;
    while (node->src[i]) i++;
    node->src[i] = source;
    return i;
}

static tensor * fast_linear(graph * g, linear_plan plan, tensor * w, tensor * b, tensor * x) {
    tensor * args[] = { w, rounded(g, plan, x) };
    kernel_job * job = new_job(g, plan);
    if (!args[1] || !job) return NULL;
    g->linear = ggml_custom_4d(g->ctx, GGML_TYPE_F32, w->ne[1], x->ne[1], 1, 1, args, 2, kernel_fast_linear,
                               GGML_N_TASKS_MAX, job);
    g->linear_job = job;
    if (b) job->bias = add_source(g->linear, b);
    return g->linear;
}

static linear_plan plan_of(const graph * g, const tensor * w, const tensor * x) {
    return g->env->micro ? fast_linear_plan(g->env->micro, w, x->ne[1], g->careful) : LINEAR_EXACT;
}

static bool is_fast(linear_plan plan) { return plan != LINEAR_EXACT && plan != LINEAR_ENGINE; }

// The job of a fast linear layer that may still be given an end, or NULL.
static kernel_job * open_end(const graph * g, const tensor * x) {
    return x && x == g->linear && g->linear_job->end == END_PLAIN && !g->linear_job->residual ? g->linear_job
                                                                                              : NULL;
}

tensor * nn_linear(graph * g, tensor * w, tensor * b, tensor * x) {
    if (!w || !x) return NULL;
    const linear_plan plan = plan_of(g, w, x);
    if (plan == LINEAR_ENGINE) {
        tensor * y = ggml_mul_mat(g->ctx, w, x);
        return b ? ggml_add(g->ctx, y, b) : y;
    }
    if (is_fast(plan)) return fast_linear(g, plan, w, b, x);
    tensor * args[] = { w, x, b };
    return ggml_custom_4d(g->ctx, GGML_TYPE_F32, w->ne[1], x->ne[1], x->ne[2], x->ne[3], args, b ? 3 : 2,
                          kernel_linear, GGML_N_TASKS_MAX, g->env);
}

tensor * nn_swiglu(graph * g, tensor * gate, tensor * up, tensor * x) {
    if (!gate || !up || !x) return NULL;
    const linear_plan plan = plan_of(g, gate, x);
    if (!is_fast(plan) || plan_of(g, up, x) != plan)
        return nn_mul(g, nn_silu(g, nn_linear(g, gate, NULL, x)), nn_linear(g, up, NULL, x));
    tensor * y = fast_linear(g, plan, gate, NULL, x);
    if (!y) return NULL;
    g->linear_job->end = END_SWIGLU;
    g->linear_job->up = add_source(y, up);
    return y;
}

tensor * nn_add(graph * g, tensor * x, tensor * y) {
    if (!x || !y) return NULL;
    kernel_job * job = open_end(g, y);
    if (!job || !ggml_are_same_shape(x, y) || !ggml_is_contiguous(x)) return ggml_add(g->ctx, x, y);
    job->residual = add_source(y, x);
    return y;
}

tensor * nn_mul(graph * g, tensor * x, tensor * y) { return x && y ? ggml_mul(g->ctx, x, y) : NULL; }

tensor * nn_layer_norm(graph * g, tensor * w, tensor * b, float eps, tensor * x) {
    if (!w || !b || !x) return NULL;
    tensor * y = ggml_add(g->ctx, ggml_mul(g->ctx, ggml_norm(g->ctx, x, eps), w), b);
    g->norm.out = y, g->norm.x = x, g->norm.w = w, g->norm.b = b, g->norm.eps = eps;
    return y;
}

tensor * nn_rms_norm(graph * g, tensor * w, float eps, tensor * x) {
    if (!w || !x) return NULL;
    tensor * y = ggml_mul(g->ctx, ggml_rms_norm(g->ctx, x, eps), w);
    g->norm.out = y, g->norm.x = x, g->norm.w = w, g->norm.b = NULL, g->norm.eps = eps;
    return y;
}

static tensor * end_with(kernel_job * job, linear_end end, tensor * x) {
    job->end = end;
    return x;
}

tensor * nn_silu(graph * g, tensor * x) {
    kernel_job * job = open_end(g, x);
    return job ? end_with(job, END_SILU, x) : x ? ggml_silu(g->ctx, x) : NULL;
}

tensor * nn_gelu(graph * g, tensor * x) {
    kernel_job * job = open_end(g, x);
    return job ? end_with(job, END_GELU, x) : x ? ggml_gelu_erf(g->ctx, x) : NULL;
}

// ggml's own quick GELU goes through a table of f16 values: x sigmoid(1.702 x) = silu(1.702 x) / 1.702.
tensor * nn_quick_gelu(graph * g, tensor * x) {
    kernel_job * job = open_end(g, x);
    if (job) return end_with(job, END_QUICK_GELU, x);
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
