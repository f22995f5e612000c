// nn.c - see nn.h. Where ggml does not do what we need, the workaround is here and nowhere else.
#include "nn.h"

#include "context.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define MOST_TENSORS 24   // of one operation, at most
#define LIGHT        8192 // results of a cheap node for which another thread pays
#define LINE         64   // bytes of a cache line; ggml aligns to 32, so inputs are padded to whole lines
#define HALVES_MIN   8    // up to so many rows, a device's kernels read weights of 16 bits without conversion
#define OFFLOAD_MIN  32   // tokens from which on copying a matrix to a device pays

typedef void (*kernel_fn)(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// A node that one of our kernels computes.
struct node_call {
    pool * pool;
    kernel_fn kernel;
    void * userdata;
    int32_t n_parts;
    tensor * dst;
    kernel_job job; // of a fast kernel
};

pyllava_status graph_begin(graph * g, pool * p, kernel_env * env, attention_env * attention, int32_t n_max) {
    size_t size = ggml_tensor_overhead() * (size_t) n_max + ggml_graph_overhead_custom((size_t) n_max, false);
    *g = (graph) { .pool = p, .env = env, .attention = attention, .n_max = n_max, .n_views = 1 };
    g->calls = calloc((size_t) n_max, sizeof *g->calls);
    TRY_ALLOC(g->calls, sizeof *g->calls * (size_t) n_max);
    g->ctx = context_new(size);
    TRY_ALLOC(g->ctx, size);
    g->nodes = ggml_new_graph_custom(g->ctx, (size_t) n_max, false);
    g->size = ggml_used_mem(g->ctx) + ggml_tensor_overhead() * (size_t) n_max;
    return PYLLAVA_OK;
}

int32_t graph_n_tensors(const graph * g) {
    const size_t left = (g->size - ggml_used_mem(g->ctx)) / ggml_tensor_overhead();
    return g->n_max - (int32_t) left;
}

// Whether there is room for the tensors of one operation; if not, graph_finish reports it.
static bool has_room(graph * g) {
    if (graph_n_tensors(g) + MOST_TENSORS > g->n_max) g->is_full = true;
    return !g->is_full;
}

pyllava_status graph_finish(graph * g, tensor * out) {
    if (g->is_full) FAIL(PYLLAVA_ERR_MEMORY, "a graph of more than %d tensors", g->n_max);
    if (!out) FAIL(PYLLAVA_ERR_UNSUPPORTED, "the network could not be built: a weight is missing");
    ggml_set_output(out);
    ggml_build_forward_expand(g->nodes, out);
    return PYLLAVA_OK;
}

void graph_enter(graph * g, const tensor * weight) { g->device = device_of(weight); }

void graph_rewind(graph * g) {
    for (int32_t i = 0; i < g->n_calls; i++) atomic_store(&g->calls[i].job.next, 0);
}

void graph_free(graph * g) {
    context_free(g->ctx);
    free(g->calls);
    *g = (graph) { 0 };
}

tensor * nn_input(graph * g, enum ggml_type type, int64_t n_rows, int64_t n, const char * name) {
    const int64_t line = LINE / (int64_t) ggml_type_size(type);
    const bool pad = g->on_host && (type == GGML_TYPE_I32 || type == GGML_TYPE_I64) && n % line;
    tensor * x = ggml_new_tensor_2d(g->ctx, type, pad ? (n + line - 1) / line * line : n, n_rows);
    ggml_set_input(x);
    return ggml_set_name(pad ? ggml_view_1d(g->ctx, x, n, 0) : x, name);
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

// ------------------------------------------------------------------------------- nodes of our own

static node_call * new_call(graph * g, kernel_fn kernel, void * userdata) {
    node_call * call = &g->calls[g->n_calls++];
    *call = (node_call) { g->pool, kernel, userdata, pool_threads(g->pool), NULL, { .env = g->env } };
    return call;
}

// The same for a kernel of the fast mode, which has a job.
static node_call * new_fast_call(graph * g, kernel_fn kernel, linear_plan plan) {
    node_call * call = new_call(g, kernel, NULL);
    if (!call) return NULL;
    call->userdata = &call->job;
    call->job.plan = plan;
    return call;
}

static void run_part(void * call_, int32_t part, int32_t n_parts) {
    const node_call * call = call_;
    call->kernel(call->dst, part, n_parts, call->userdata);
}

// The function that ggml calls, from each of its threads if it runs the graph with several.
static void run_node(tensor * dst, int ith, int nth, void * call_) {
    node_call * call = call_;
    if (nth > 1) {
        call->kernel(dst, ith, nth, call->userdata);
        return;
    }
    call->dst = dst;
    pool_run(call->pool, run_part, call, call->n_parts);
}

// A node [n_rows, width] of up to three sources; the first NULL ends them.
static tensor * add_node(graph * g, node_call * call, enum ggml_type type, int64_t n_rows, int64_t width,
                         tensor * const * sources) {
    if (!call) return NULL;
    tensor * args[3];
    int n = 0;
    for (; n < 3 && sources[n]; n++) args[n] = sources[n];
    return ggml_custom_4d(g->ctx, type, width, n_rows, 1, 1, args, n, run_node, GGML_N_TASKS_MAX, call);
}

// Cheap nodes of few results use fewer threads: waking more costs more than it saves.
static node_call * light(node_call * call, int64_t n_results) {
    if (call && n_results / LIGHT + 1 < call->n_parts) call->n_parts = (int32_t) (n_results / LIGHT + 1);
    return call;
}

// ---------------------------------------------------------------------------------- linear layers

// Layers that read the same activations (q, k, v; gate, up) share one quantised copy.
static tensor * quantised(graph * g, linear_plan plan, tensor * x) {
    const int64_t size = fast_linear_rounded_size(plan, x->ne[0]);
    if (size == 0) return x;
    if (g->quantised_from == x && g->quantised_plan == plan) return g->quantised;
    node_call * call = light(new_fast_call(g, kernel_round, plan), x->ne[0] * x->ne[1]);
    if (!call) return NULL;
    tensor * args[] = { x, NULL, NULL };
    if (g->norm.out == x && fast_norm_fits(x->ne[0])) { // normalise and quantise in one pass
        call->job.norm = g->norm.b ? NORM_LAYER : NORM_RMS;
        call->job.eps = g->norm.eps;
        args[0] = g->norm.x, args[1] = g->norm.w, args[2] = g->norm.b;
    }
    g->quantised_from = x;
    g->quantised_plan = plan;
    g->quantised = add_node(g, call, GGML_TYPE_I8, x->ne[1], size, args);
    return g->quantised;
}

// Adds a source to a node; returns its index.
static int add_source(tensor * node, tensor * source) {
    int i = 0;
    while (node->src[i]) i++;
    node->src[i] = source;
    return i;
}

static tensor * fast_linear(graph * g, linear_plan plan, tensor * w, tensor * b, tensor * x) {
    tensor * args[] = { w, quantised(g, plan, x), NULL };
    node_call * call = new_fast_call(g, kernel_fast_linear, plan);
    if (!args[1] || !call) return NULL;
    g->linear = add_node(g, call, GGML_TYPE_F32, x->ne[1], w->ne[1], args);
    g->linear_job = &call->job;
    if (b) call->job.bias = add_source(g->linear, b);
    return g->linear;
}

static linear_plan plan_of(const graph * g, const tensor * w, bool fine) {
    return g->env->micro ? fast_linear_plan(g->env->micro, w, g->rows, fine) : LINEAR_EXACT;
}

static bool is_fast(linear_plan plan) { return plan != LINEAR_EXACT && plan != LINEAR_ENGINE; }

// The job of x if it is a fast linear layer whose epilogue may still grow, else NULL.
static kernel_job * open_epilogue(const graph * g, const tensor * x) {
    return x && x == g->linear && g->linear_job->end == END_PLAIN && !g->linear_job->residual ? g->linear_job
                                                                                              : NULL;
}

// Whether a product may be left at 16-bit precision, in which cuBLAS sums in float32 (devices_set_up). With
// few rows CUDA's own kernels would sum in 16 bits; with many, asking for 32 bits would convert the weights
// first.
static bool may_be_halves(const graph * g, const tensor * w, const tensor * x) {
    ggml_backend_dev_t device = device_of(w) ? device_of(w) : g->offload;
    return g->env->micro && x->ne[1] > HALVES_MIN && device && device_sums_floats(device);
}

// ggml's own product, on a device or on its CPU threads. Sums in half precision would fail the gates.
static tensor * engine_linear(graph * g, tensor * w, tensor * b, tensor * x) {
    if (!device_of(w)) g->on_engine = true;
    tensor * y = ggml_mul_mat(g->ctx, w, x);
    if (!may_be_halves(g, w, x)) ggml_mul_mat_set_prec(y, GGML_PREC_F32);
    return b ? ggml_add(g->ctx, y, b) : y;
}

// Whether there are enough tokens to offload a matrix in host memory.
static bool is_offloaded(const graph * g, tensor * w, tensor * x) {
    if (!g->offload || x->ne[1] < OFFLOAD_MIN) return false;
    const tensor * y = ggml_mul_mat(g->ctx, w, x);
    return ggml_backend_dev_supports_op(g->offload, y) && ggml_backend_dev_offload_op(g->offload, y);
}

static tensor * linear(graph * g, tensor * w, tensor * b, tensor * x, linear_plan plan) {
    if (!w || !x || !has_room(g)) return NULL;
    if (device_of(w) || is_offloaded(g, w, x)) return engine_linear(g, w, b, x);
    if (plan == LINEAR_ENGINE) return engine_linear(g, w, b, x);
    if (is_fast(plan)) return fast_linear(g, plan, w, b, x);
    tensor * args[] = { w, x, b };
    ggml_custom_op_t kernel = g->rows == ROWS_ANSWER ? kernel_linear_answers : kernel_linear;
    return add_node(g, new_call(g, kernel, g->env), GGML_TYPE_F32, x->ne[1], w->ne[1], args);
}

tensor * nn_linear(graph * g, tensor * w, tensor * b, tensor * x) {
    return w ? linear(g, w, b, x, plan_of(g, w, false)) : NULL;
}
tensor * nn_linear_fine(graph * g, tensor * w, tensor * b, tensor * x) {
    return w ? linear(g, w, b, x, plan_of(g, w, true)) : NULL;
}
tensor * nn_linear_exact(graph * g, tensor * w, tensor * b, tensor * x) {
    return linear(g, w, b, x, LINEAR_EXACT);
}

tensor * nn_swiglu(graph * g, tensor * gate, tensor * up, tensor * x) {
    if (!gate || !up || !x || !has_room(g)) return NULL;
    if (g->device) return ggml_swiglu_split(g->ctx, nn_linear(g, gate, NULL, x), nn_linear(g, up, NULL, x));
    const linear_plan plan = is_offloaded(g, gate, x) ? LINEAR_ENGINE : plan_of(g, gate, false);
    if (!is_fast(plan) || plan_of(g, up, false) != plan)
        return nn_mul(g, nn_silu(g, nn_linear(g, gate, NULL, x)), nn_linear(g, up, NULL, x));
    tensor * y = fast_linear(g, plan, gate, NULL, x);
    if (!y) return NULL;
    g->linear_job->end = END_SWIGLU;
    g->linear_job->up = add_source(y, up);
    return y;
}

tensor * nn_add(graph * g, tensor * x, tensor * y) {
    if (!x || !y || !has_room(g)) return NULL;
    kernel_job * job = open_epilogue(g, y);
    if (!job || !ggml_are_same_shape(x, y) || !ggml_is_contiguous(x)) return ggml_add(g->ctx, x, y);
    job->residual = add_source(y, x);
    return y;
}

// ------------------------------------------------------------------- what surrounds linear layers

tensor * nn_mul(graph * g, tensor * x, tensor * y) {
    return x && y && has_room(g) ? ggml_mul(g->ctx, x, y) : NULL;
}

tensor * nn_scale(graph * g, tensor * x, float factor) {
    if (factor == 1.0f) return x;
    return x && has_room(g) ? ggml_scale(g->ctx, x, factor) : NULL;
}

tensor * nn_layer_norm(graph * g, tensor * w, tensor * b, float eps, tensor * x) {
    if (!w || !b || !x || !has_room(g)) return NULL;
    tensor * y = ggml_add(g->ctx, ggml_mul(g->ctx, ggml_norm(g->ctx, x, eps), w), b);
    g->norm.out = y, g->norm.x = x, g->norm.w = w, g->norm.b = b, g->norm.eps = eps;
    return y;
}

tensor * nn_rms_norm(graph * g, tensor * w, float eps, tensor * x) {
    if (!w || !x || !has_room(g)) return NULL;
    tensor * y = ggml_mul(g->ctx, ggml_rms_norm(g->ctx, x, eps), w);
    g->norm.out = y, g->norm.x = x, g->norm.w = w, g->norm.b = NULL, g->norm.eps = eps;
    return y;
}

static tensor * with_epilogue(kernel_job * job, linear_end end, tensor * x) {
    job->end = end;
    return x;
}

tensor * nn_silu(graph * g, tensor * x) {
    kernel_job * job = open_epilogue(g, x);
    return job ? with_epilogue(job, END_SILU, x) : x && has_room(g) ? ggml_silu(g->ctx, x) : NULL;
}

tensor * nn_gelu(graph * g, tensor * x) {
    kernel_job * job = open_epilogue(g, x);
    return job ? with_epilogue(job, END_GELU, x) : x && has_room(g) ? ggml_gelu_erf(g->ctx, x) : NULL;
}

tensor * nn_gelu_tanh(graph * g, tensor * x) {
    kernel_job * job = open_epilogue(g, x);
    if (job) return with_epilogue(job, END_GELU_TANH, x);
    if (!x || !has_room(g)) return NULL;
    if (g->device) return ggml_gelu(g->ctx, x);
    tensor * args[] = { x, NULL, NULL };
    node_call * call = light(new_call(g, kernel_gelu_tanh, NULL), ggml_nelements(x));
    return add_node(g, call, GGML_TYPE_F32, x->ne[1], x->ne[0], args);
}

// ggml's own quick GELU goes through a table of f16 values: x sigmoid(1.702 x) = silu(1.702 x) / 1.702.
tensor * nn_quick_gelu(graph * g, tensor * x) {
    kernel_job * job = open_epilogue(g, x);
    if (job) return with_epilogue(job, END_QUICK_GELU, x);
    if (!x || !has_room(g)) return NULL;
    return ggml_scale(g->ctx, ggml_silu(g->ctx, ggml_scale(g->ctx, x, 1.702f)), 1.0f / 1.702f);
}

// -------------------------------------------------------------------------------------- attention

// A table of our own: ggml computes powers of theta by repeated multiplication, whose error grows.
tensor * nn_rope_table(graph * g, tensor * positions, tensor * divisors) {
    if (!positions || !divisors || !has_room(g)) return NULL;
    const int64_t n_tokens = positions->ne[0], head_dim = 2 * divisors->ne[0];
    tensor * args[] = { positions, divisors, NULL };
    node_call * call =
        light(new_call(g, kernel_rope_table, NULL), 8 * n_tokens * head_dim); // sine and cosine are expensive
    return add_node(g, call, GGML_TYPE_F32, n_tokens, head_dim, args);
}

static const struct {
    kernel_fn kernel;
    int on_devices; // ggml's name for it
} ROPES[] = { [ROPE_NORMAL] = { kernel_rope, GGML_ROPE_TYPE_NORMAL },
              [ROPE_NEOX] = { kernel_rope_neox, GGML_ROPE_TYPE_NEOX } };

// theta^(-2i / head_dim) is 1 / divisor[i]: with a base of 1, the divisors are ggml's frequency factors.
static tensor * device_rope(graph * g, tensor * x, tensor * positions, tensor * divisors, int type) {
    const int64_t head_dim = 2 * divisors->ne[0], width = x->ne[0], n = x->ne[1];
    tensor * y = ggml_reshape_3d(g->ctx, x, head_dim, width / head_dim, n);
    y = ggml_rope_ext(g->ctx, y, positions, divisors, (int) head_dim, type, 0, 1, 1, 0, 1, 0, 0);
    return ggml_view_2d(g->ctx, y, width, n, y->nb[2], 0); // CUDA stores it as it is computed: no reshape
}

tensor * nn_rope(graph * g, tensor * x, tensor * rope_table, rope_kind kind) {
    if (!x || !rope_table || !has_room(g)) return NULL;
    if (g->device) return device_rope(g, x, rope_table->src[0], rope_table->src[1], ROPES[kind].on_devices);
    tensor * args[] = { x, rope_table, NULL };
    node_call * call = light(new_call(g, ROPES[kind].kernel, NULL), ggml_nelements(x));
    return add_node(g, call, GGML_TYPE_F32, x->ne[1], x->ne[0], args);
}

// Attention as one operation, with keys and values of at most 16 bits; NULL if the device has no kernel for
// it.
static tensor * flash_attention(graph * g, tensor * q, tensor * k, tensor * v, tensor * mask, float scale) {
    tensor * y = ggml_flash_attn_ext(g->ctx, q, k, v, mask, scale, 0.0f, 0.0f);
    ggml_flash_attn_ext_set_prec(y, GGML_PREC_F32);
    return ggml_backend_dev_supports_op(g->device, y) ? y : NULL;
}

// Attention as products and a softmax, in f32.
static tensor * plain_attention(graph * g, tensor * q, tensor * k, tensor * v, tensor * mask, float scale) {
    tensor * p = ggml_mul_mat(g->ctx, k, q); // [n_cells, n_rows, n_head, n_seqs]
    ggml_mul_mat_set_prec(p, GGML_PREC_F32);
    p = ggml_soft_max_ext(g->ctx, p, mask, scale, 0.0f);
    tensor * columns = ggml_cont(g->ctx, ggml_permute(g->ctx, v, 1, 0, 2, 3));
    tensor * y = ggml_mul_mat(g->ctx, columns, p); // [head_dim, n_rows, n_head, n_seqs]
    ggml_mul_mat_set_prec(y, GGML_PREC_F32);
    return ggml_cont(g->ctx, ggml_permute(g->ctx, y, 0, 2, 1, 3));
}

// The keys or values of a window, as a type: [head_dim, n_cells, n_head, n_seqs].
static tensor * cells_of(graph * g, const attention_window * w, tensor * x, int64_t n_head,
                         enum ggml_type type) {
    const size_t row = x->nb[1];
    tensor * y = ggml_view_3d(g->ctx, x, x->ne[0], w->n_cells, w->n_seqs, row, row * (size_t) w->stride,
                              row * (size_t) w->cell);
    if (y->type != type) y = ggml_cast(g->ctx, y, type);
    const int64_t d = x->ne[0] / n_head;
    return ggml_view_4d(g->ctx, y, d, w->n_cells, n_head, w->n_seqs, y->nb[1], ggml_row_size(type, d),
                        y->nb[2], 0);
}

// The queries of a window: [head_dim, n_rows, n_head, n_seqs].
static tensor * queries_of(graph * g, const attention_window * w, tensor * x, int64_t n_head) {
    const size_t row = x->nb[1], d = (size_t) (x->ne[0] / n_head);
    return ggml_view_4d(g->ctx, x, (int64_t) d, w->n_rows, n_head, w->n_seqs, row, d * sizeof(float),
                        row * (size_t) w->n_rows, row * (size_t) w->first);
}

// Its part of the mask, which begins at entry `at`: [n_cells, n_rows, 1, n_seqs].
static tensor * mask_of(graph * g, const attention_window * w, size_t at) {
    if (!g->mask) return NULL;
    const size_t size = ggml_type_size(g->mask->type), row = size * (size_t) w->n_cells,
                 all = row * (size_t) w->n_rows;
    return ggml_view_4d(g->ctx, g->mask, w->n_cells, w->n_rows, 1, w->n_seqs, row, all, all, size * at);
}

static enum ggml_type halves(enum ggml_type type) { return type == GGML_TYPE_F32 ? GGML_TYPE_F16 : type; }

static tensor * window_attention(graph * g, const attention_window * w, tensor * q, tensor * k, tensor * v,
                                 tensor * mask) {
    const attention_env * a = g->attention;
    const float scale = 1.0f / sqrtf((float) a->head_dim);
    tensor *queries = queries_of(g, w, q, a->n_head), *y = NULL;
    if (g->flash != FLASH_OFF) {
        tensor * K = cells_of(g, w, k, a->n_head_kv, halves(k->type));
        tensor * V = cells_of(g, w, v, a->n_head_kv, halves(v->type));
        y = flash_attention(g, queries, K, V, mask, scale);
        if (!y && g->flash == FLASH_ON) g->flash_missing = true;
    }
    if (!y) {
        tensor * K = cells_of(g, w, k, a->n_head_kv, k->type);
        tensor * V = cells_of(g, w, v, a->n_head_kv, GGML_TYPE_F32);
        y = plain_attention(g, queries, K, V, mask, scale);
    }
    return ggml_reshape_2d(g->ctx, y, q->ne[0], (int64_t) w->n_rows * w->n_seqs);
}

int64_t attention_mask_size(const attention_window * windows, int32_t n) {
    int64_t size = 0;
    for (const attention_window * w = windows; w < windows + n; w++)
        size += (int64_t) w->n_cells * w->n_rows * w->n_seqs;
    return size;
}

// Unlike our kernels, devices read ranges of cells: a mask hides those that a token does not see.
static tensor * device_attention(graph * g, tensor * q, tensor * k, tensor * v) {
    const int32_t n = (int32_t) (q->ne[1] / g->n_views);
    const attention_window views = { .n_rows = n, .n_seqs = g->n_views, .stride = n, .n_cells = n };
    const attention_window * w = g->n_windows ? g->windows : &views;
    const attention_window * end = w + (g->n_windows ? g->n_windows : 1);
    tensor * y = NULL;
    for (size_t at = 0; w < end; at += (size_t) attention_mask_size(w, 1), w++) {
        if (!has_room(g)) return NULL;
        tensor * part = window_attention(g, w, q, k, v, mask_of(g, w, at));
        y = y ? ggml_concat(g->ctx, y, part, 1) : part;
    }
    return y;
}

tensor * nn_attention(graph * g, tensor * q, tensor * k, tensor * v) {
    if (!q || !k || !v || !has_room(g)) return NULL;
    const bool cached = k->view_src && k->view_src->buffer; // then it is computed where the cache lies
    if (cached ? device_of(k) != NULL : g->device != NULL) return device_attention(g, q, k, v);
    tensor * args[] = { q, k, v };
    node_call * call = g->env->micro ? new_fast_call(g, kernel_fast_attention, LINEAR_EXACT)
                                     : new_call(g, kernel_attention, g->attention);
    if (call) call->job.attention = g->attention;
    return add_node(g, call, GGML_TYPE_F32, q->ne[1], q->ne[0], args);
}

tensor * nn_row_sums(graph * g, tensor * x) { return x && has_room(g) ? ggml_sum_rows(g->ctx, x) : NULL; }

void nn_tap(graph * g, tap_kind kind, tensor * x) {
    if (!x) return;
    if (g->linear == x) g->linear = NULL;
    ggml_set_output(x);
    ggml_build_forward_expand(g->nodes, x);
    g->taps[kind] = x;
}

tensor * nn_rows(graph * g, tensor * x, tensor * rows) {
    return x && rows && has_room(g) ? ggml_get_rows(g->ctx, x, rows) : NULL;
}

// ------------------------------------------------------------------------------------------- views

tensor * nn_views(graph * g, tensor * x) {
    if (!x || !has_room(g)) return NULL;
    return ggml_reshape_3d(g->ctx, x, x->ne[0], x->ne[1] / g->n_views, g->n_views);
}

tensor * nn_all_rows(graph * g, tensor * x) {
    return x && has_room(g) ? ggml_reshape_2d(g->ctx, x, x->ne[0], x->ne[1] * x->ne[2]) : NULL;
}

tensor * nn_put_first(graph * g, tensor * row, tensor * x) {
    if (!row || !x || !has_room(g)) return NULL;
    return ggml_concat(g->ctx, ggml_repeat_4d(g->ctx, row, x->ne[0], 1, x->ne[2], 1), x, 1);
}

tensor * nn_skip_first(graph * g, tensor * x) {
    if (!x || !has_room(g)) return NULL;
    const int64_t n_pos = x->ne[1] / g->n_views;
    const size_t row = ggml_row_size(GGML_TYPE_F32, x->ne[0]);
    x = ggml_view_3d(g->ctx, x, x->ne[0], n_pos - 1, g->n_views, row, row * (size_t) n_pos, row);
    return ggml_cont_2d(g->ctx, x, x->ne[0], (n_pos - 1) * g->n_views);
}

tensor * nn_beside(graph * g, tensor * x, tensor * y) {
    return x && y && has_room(g) ? ggml_concat(g->ctx, x, y, 0) : NULL;
}

tensor * nn_store_rows(graph * g, tensor * to, tensor * x, tensor * rows) {
    if (!to || !x || !rows || !has_room(g)) return NULL;
    if (device_of(to)) {
        tensor * stored = ggml_set_rows(g->ctx, to, x, rows);
        ggml_build_forward_expand(g->nodes, stored);
        return stored;
    }
    node_call * call = light(new_call(g, kernel_store, NULL), ggml_nelements(x));
    tensor * args[] = { x, rows };
    tensor * stored = ggml_custom_inplace(g->ctx, to, args, 2, run_node, GGML_N_TASKS_MAX, call);
    ggml_build_forward_expand(g->nodes, stored); // before whatever reads it
    return stored;
}

// ------------------------------------------------------------------------------------ convolutions

// Rows [n_views * n, width] of squares as [width, column, line, view].
static tensor * squares(graph * g, tensor * x, int32_t n_side) {
    return ggml_reshape_4d(g->ctx, x, x->ne[0], n_side, n_side, g->n_views);
}

// ggml takes the channels side by side as they are, if the kernel has them so as well.
tensor * nn_depthwise(graph * g, tensor * w, int32_t n_side, int32_t stride, tensor * x) {
    if (!w || !x || !has_room(g)) return NULL;
    const int64_t width = x->ne[0];
    w = ggml_cont(g->ctx, ggml_transpose(g->ctx, w)); // [9, width] to [width, 9]
    w = ggml_permute(g->ctx, ggml_reshape_4d(g->ctx, w, width, 1, 3, 3), 3, 2, 0, 1);
    x = ggml_permute(g->ctx, squares(g, x, n_side), 2, 0, 1, 3);
    x = ggml_conv_2d_dw_direct(g->ctx, w, x, stride, stride, 1, 1, 1, 1);
    const int64_t n = x->ne[0] * x->ne[1] * x->ne[3];
    return ggml_reshape_2d(g->ctx, ggml_permute(g->ctx, x, 1, 2, 0, 3), width, n);
}

tensor * nn_pool(graph * g, tensor * x, int32_t n_side, int32_t k) {
    if (!x || !has_room(g)) return NULL;
    const int64_t width = x->ne[0];
    x = ggml_cont(g->ctx, ggml_permute(g->ctx, squares(g, x, n_side), 2, 0, 1, 3));
    x = ggml_pool_2d(g->ctx, x, GGML_OP_POOL_AVG, k, k, k, k, 0, 0);
    const int64_t n = x->ne[0] * x->ne[1] * x->ne[3];
    return ggml_reshape_2d(g->ctx, ggml_cont(g->ctx, ggml_permute(g->ctx, x, 1, 2, 0, 3)), width, n);
}

tensor * nn_mean_of_views(graph * g, tensor * x) {
    if (!x || !has_room(g)) return NULL;
    const int64_t width = x->ne[0];
    x = ggml_reshape_3d(g->ctx, x, width, x->ne[1] / g->n_views, g->n_views);
    x = ggml_mean(g->ctx, ggml_cont(g->ctx, ggml_permute(g->ctx, x, 1, 0, 2, 3)));
    return ggml_reshape_2d(g->ctx, x, width, g->n_views);
}

tensor * nn_mul_views(graph * g, tensor * x, tensor * y) {
    if (!x || !y || !has_room(g)) return NULL;
    const int64_t width = x->ne[0], n = x->ne[1];
    x = ggml_reshape_3d(g->ctx, x, width, n / g->n_views, g->n_views);
    x = ggml_mul(g->ctx, x, ggml_reshape_3d(g->ctx, y, width, 1, g->n_views));
    return ggml_reshape_2d(g->ctx, x, width, n);
}

tensor * nn_relu(graph * g, tensor * x) { return x && has_room(g) ? ggml_relu(g->ctx, x) : NULL; }

tensor * nn_hard_sigmoid(graph * g, tensor * x) {
    return x && has_room(g) ? ggml_hardsigmoid(g->ctx, x) : NULL;
}

tensor * nn_hard_swish(graph * g, tensor * x) { return x && has_room(g) ? ggml_hardswish(g->ctx, x) : NULL; }
