// runner.c - see runner.h.
#include "runner.h"

#include "guard.h"
#include "memory.h"

#include <micro.h>
#include <stdlib.h>
#include <string.h>

#define TENSORS        2048      // of a graph: the first size tried
#define MOST_TENSORS   (1 << 20) // and the last
#define WINDOW_TENSORS 20        // of one window's attention, at most

void runner_cancel(runner * r, bool cancel) {
    atomic_store(&r->cancelled, cancel);
    if (cancel) atomic_store(&r->stop, 1);
}

bool runner_is_cancelled(const runner * r) { return atomic_load(&r->cancelled) != 0; }

// A run that was stopped has skipped some of its work: it has no results, even if the cancel flag is cleared
// before it ends.
static bool has_to_stop(void * r) { return atomic_load(&((runner *) r)->stop) != 0; }

pyllava_status runner_cancelled(void) { FAIL(PYLLAVA_ERR_CANCELLED, "cancelled"); }

// ------------------------------------------------------------------------------------------ graphs

// The GPU to which matrices in host memory may be offloaded, or NULL.
static ggml_backend_dev_t offload_to(const runner * r) {
    const placement * p = &r->model->placement;
    const bool may =
        r->params->precision == PYLLAVA_FAST && p->n_for_layers > 0 && device_is_gpu(p->devices.items[0]);
    return may ? p->devices.items[0] : NULL;
}

// Begins a graph of this session, for attention with these heads.
static pyllava_status begin(runner * r, graph * g, int32_t n_head, int32_t n_head_kv, int32_t head_dim) {
    TRY(graph_begin(g, r->pool, &r->env, &r->attention, r->n_tensors));
    r->attention.n_head = n_head;
    r->attention.n_head_kv = n_head_kv;
    r->attention.head_dim = head_dim;
    g->flash = r->params->precision == PYLLAVA_EXACT ? FLASH_OFF : (flash_mode) r->params->flash_attn;
    g->offload = offload_to(r);
    g->on_host = r->model->placement.devices.n == 0;
    return PYLLAVA_OK;
}

static pyllava_status finish(const runner * r, graph * g, tensor * out) {
    if (g->flash_missing) {
        FAIL(PYLLAVA_ERR_DEVICE,
             "flash attention: %s has no kernel for this model with this KV cache: leave it to choose (auto)",
             ggml_backend_dev_name(r->model->placement.devices.items[0]));
    }
    return graph_finish(g, out);
}

static pyllava_status build_vision(runner * r, graph * g, int32_t n_views, tensor ** out_patches,
                                   tensor ** out_embd) {
    const vit * v = &r->model->vision.vit;
    const int64_t P = v->hparams.patch_size;
    const int32_t n_head = v->hparams.n_head;
    TRY(begin(r, g, n_head, n_head, v->hparams.n_embd / n_head));
    g->rows = ROWS_VIEW;
    g->n_views = n_views;
    *out_patches = nn_input(g, GGML_TYPE_F32, (int64_t) v->hparams.n_patch * n_views, 3 * P * P, "v.patches");
    *out_embd = vision_embed(g, &r->model->vision, *out_patches);
    return finish(r, g, *out_embd);
}

static pyllava_status build_text(runner * r, graph * g, row_kind rows, int32_t n, int32_t n_out,
                                 const attention_window * windows, int32_t n_windows, language_input * in,
                                 tensor ** out_logits) {
    const language_hparams * h = &r->model->language.hparams;
    TRY(begin(r, g, h->n_head, h->n_head_kv, h->head_dim));
    g->rows = rows;
    *in = (language_input) {
        .embd = nn_input(g, GGML_TYPE_F32, n, h->n_embd, "embd"),
        .positions = nn_input(g, GGML_TYPE_I32, 1, n, "positions"),
        .cells = nn_input(g, GGML_TYPE_I64, 1, n, "cells"),
        .rope_divisors = nn_input(g, GGML_TYPE_F32, 1, h->head_dim / 2, "rope_divisors"),
        .out_rows = nn_input(g, GGML_TYPE_I32, 1, n_out, "out_rows"),
    };
    g->windows = windows;
    g->n_windows = n_windows;
    const int64_t n_mask = attention_mask_size(windows, n_windows);
    if (n_windows) in->mask = g->mask = nn_input(g, GGML_TYPE_F16, 1, n_mask, "mask");
    *out_logits = language_logits(g, &r->model->language, in, r->kv);
    return finish(r, g, *out_logits);
}

static void drop_graph(runner * r) {
    graph_free(&r->built.g);
    r->built = (built_graph) { 0 };
}

static pyllava_status place_inputs(runner * r, graph * g) {
    const placement * p = &r->model->placement;
    const bool on_first = g->rows == ROWS_VIEW ? p->vision == 0 : placement_is_on_first(p);
    return on_first ? engine_place_inputs(&r->engine, g) : PYLLAVA_OK;
}

static pyllava_status build(void * runner_) {
    runner * r = runner_;
    built_graph * b = &r->built;
    if (b->kind == GRAPH_TEXT)
        TRY(build_text(r, &b->g, b->rows, b->n, b->n_out, b->windows, b->n_windows, &b->in, &b->out));
    else TRY(build_vision(r, &b->g, b->n, &b->patches, &b->out));
    TRY(place_inputs(r, &b->g));
    return engine_load(&r->engine, &b->g);
}

// The windows of a batch's attention on devices; none if no device holds the KV cache. Each reads a multiple
// of KV_STEP cells, or all up to the last one in use.
static int32_t windows_of(const runner * r, const batch * b, attention_window * out) {
    const int32_t n = r->kv_on_device && b ? b->n_windows : 0;
    for (int32_t i = 0; i < n; i++) {
        out[i] = b->windows[i];
        const int32_t n_cells = out[i].n_cells ? out[i].n_cells : kv_cells_used(r->kv),
                      rounded = GGML_PAD(n_cells, KV_STEP),
                      room = r->kv->n_rows - out[i].cell - (out[i].n_seqs - 1) * out[i].stride,
                      most = out[i].n_seqs > 1 && out[i].stride < room ? out[i].stride : room;
        out[i].n_cells = rounded < most ? rounded : most;
        if (out[i].n_seqs == 1) out[i].stride = out[i].n_cells;
    }
    return n;
}

// A graph of this shape, ready for its inputs. All inputs must be set each time, since a run overwrites their
// memory.
static pyllava_status graph_for(runner * r, int kind, row_kind rows, int32_t n, int32_t n_out,
                                const batch * asked) {
    built_graph * b = &r->built;
    attention_window windows[MAX_WINDOWS];
    const int32_t n_windows = windows_of(r, asked, windows);
    const size_t size = (size_t) n_windows * sizeof *windows;
    const bool fits = (int) b->kind == kind && b->rows == rows && b->n == n && b->n_out == n_out &&
                      b->n_windows == n_windows && !memcmp(b->windows, windows, size);
    if (fits && !r->engine.broken) {
        graph_rewind(&b->g);
        return PYLLAVA_OK;
    }
    drop_graph(r);
    b->kind = kind;
    b->rows = rows;
    b->n = n;
    b->n_out = n_out;
    b->n_windows = n_windows;
    memcpy(b->windows, windows, size);
    pyllava_status status = guarded(build, r);
    if (status != PYLLAVA_OK) drop_graph(r);
    return status;
}

static pyllava_status run(runner * r, graph * g) {
    TRY(cores_take(r->model->cores, r->params->n_threads, &r->cancelled));
    atomic_store(&r->stop, 0);
    if (runner_is_cancelled(r)) atomic_store(&r->stop, 1);
    r->trace_has_gap = false;
    pyllava_status status = engine_run(&r->engine, g, pool_threads(r->pool));
    cores_give(r->model->cores, r->params->n_threads);
    if (has_to_stop(r)) return runner_cancelled();
    TRY(status);
    if (r->trace_has_gap) FAIL(PYLLAVA_ERR_MEMORY, "out of memory for the copy of a traced tensor");
    return PYLLAVA_OK;
}

static pyllava_status put(runner * r, tensor * t, const void * data) {
    return engine_put(&r->engine, t, 0, data, ggml_nbytes(t));
}

static pyllava_status put_mask(runner * r, const batch * b) {
    const attention_window * w = r->built.windows;
    size_t at = 0;
    for (const attention_block * block = b->blocks; block < b->blocks + b->n_blocks; block++) {
        for (int32_t i = block->first; i < block->first + block->n; i++) {
            if (i == w->first + w->n_rows * w->n_seqs) w++;
            const size_t size = (size_t) w->n_cells * sizeof *r->mask_row;
            const int32_t seq = (i - w->first) / w->n_rows;
            batch_mask(block, b->n_visible[i], w->cell + seq * w->stride, w->n_cells, r->mask_row);
            TRY(engine_put(&r->engine, r->built.in.mask, at, r->mask_row, size));
            at += size;
        }
    }
    return PYLLAVA_OK;
}

// ------------------------------------------------------------------------------------------- trace

static bool is_intermediate(const struct ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->name[0] && strncmp(t->name, "node_", 5) &&
           strncmp(t->name, "leaf_", 5) && !strpbrk(t->name, " (#") && ggml_is_contiguous(t);
}

static bool on_tensor(struct ggml_tensor * t, bool ask, void * runner_) {
    runner * r = runner_;
    if (ask) return is_intermediate(t);
    float * data = malloc(ggml_nbytes(t));
    if (!data) r->trace_has_gap = true;
    if (!data) return true;
    ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t));
    int64_t shape[4];
    int n_dims = ggml_n_dims(t) < 2 ? 2 : ggml_n_dims(t);
    for (int d = 0; d < n_dims; d++) shape[d] = t->ne[n_dims - 1 - d];
    r->trace(t->name, data, shape, n_dims, r->trace_user);
    free(data);
    return true;
}

void runner_trace(runner * r, pyllava_trace_fn fn, void * user) {
    r->trace = fn;
    r->trace_user = user;
    engine_observe(&r->engine, fn ? on_tensor : NULL, r);
}

// ------------------------------------------------------------------------------------------- views

pyllava_status runner_views(runner * r, const float * pixels, int32_t n_views, float * out) {
    const vit * v = &r->model->vision.vit;
    const size_t S = (size_t) v->hparams.image_size, P = (size_t) v->hparams.patch_size;
    for (int32_t i = 0; i < n_views; i++) {
        vit_unfold(&v->hparams, pixels + (size_t) i * 3 * S * S,
                   r->patches + (size_t) i * (size_t) v->hparams.n_patch * 3 * P * P);
    }
    r->attention = (attention_env) {
        .env = r->env,
        .n_head = v->hparams.n_head,
        .n_head_kv = v->hparams.n_head,
        .head_dim = v->hparams.n_embd / v->hparams.n_head,
        .blocks = r->view_blocks,
        .n_visible = r->view_visible,
        .rows = ROWS_VIEW,
    };
    const int32_t longest = r->env.micro ? fast_attention_queries(r->attention.head_dim) : KERNEL_QUERIES;
    for (int32_t i = 0; i < n_views; i++) {
        const int32_t first = i * v->n_pos;
        r->attention.n_blocks =
            attention_blocks(r->view_blocks, r->attention.n_blocks, first, v->n_pos, longest, NULL, first);
    }
    for (int32_t i = 0; i < n_views * v->n_pos; i++) r->view_visible[i] = v->n_pos;
    TRY(graph_for(r, GRAPH_VISION, ROWS_VIEW, n_views, 0, NULL));
    tensor * embd = r->built.out;
    TRY(put(r, r->built.patches, r->patches));
    TRY(run(r, &r->built.g));
    TRY(engine_get(&r->engine, embd, out));
    const size_t n = ggml_nbytes(embd) / sizeof *out, bad = first_not_finite(out, n);
    if (bad < n)
        FAIL(PYLLAVA_ERR_NUMERIC, "image embeddings: entry %zu is not finite (bad weights or pixels)", bad);
    return PYLLAVA_OK;
}

// ------------------------------------------------------------------------------------------- rows

int32_t runner_block_rows(const runner * r) {
    const language_hparams * h = &r->model->language.hparams;
    const int32_t most = r->env.micro ? fast_attention_queries(h->head_dim) : KERNEL_QUERIES;
    const int32_t group = h->n_head / h->n_head_kv;
    return most / group > 1 ? most / group : 1;
}

// On devices, NaN or infinity in a cell must not go unnoticed: attention of other sequences reads that cell,
// too.
static pyllava_status check_sums(runner * r, const batch * b, const tensor * sums) {
    float * found = malloc(ggml_nbytes(sums));
    TRY_ALLOC(found, ggml_nbytes(sums));
    pyllava_status status = engine_get(&r->engine, sums, found);
    const size_t n = (size_t) ggml_nelements(sums),
                 bad = status == PYLLAVA_OK ? first_not_finite(found, n) : n;
    free(found);
    if (bad < n)
        FAIL(PYLLAVA_ERR_NUMERIC, "position %d is not finite (bad weights or embeddings)", b->positions[bad]);
    return status;
}

// If no logits are wanted, those of the last row are computed and not read.
pyllava_status runner_rows(runner * r, const batch * b, row_kind rows) {
    const language_hparams * h = &r->model->language.hparams;
    r->attention = (attention_env) {
        .env = r->env,
        .n_head = h->n_head,
        .n_head_kv = h->n_head_kv,
        .head_dim = h->head_dim,
        .n_blocks = b->n_blocks,
        .blocks = b->blocks,
        .n_visible = b->n_visible,
        .rows = rows,
    };
    TRY(batch_check(b));
    const int32_t last = b->n - 1;
    TRY(graph_for(r, GRAPH_TEXT, rows, b->n, b->n_out ? b->n_out : 1, b));
    const language_input * in = &r->built.in;
    TRY(put(r, in->embd, b->embd));
    TRY(put(r, in->positions, b->positions));
    TRY(put(r, in->cells, b->cells));
    TRY(put(r, in->rope_divisors, r->model->language.rope_divisors));
    TRY(put(r, in->out_rows, b->n_out ? b->out_rows : &last));
    if (in->mask) TRY(put_mask(r, b));
    TRY(run(r, &r->built.g));
    const tensor * sums = r->built.g.taps[TAP_ROW_SUMS];
    return sums ? check_sums(r, b, sums) : PYLLAVA_OK;
}

pyllava_status runner_logits(runner * r, int32_t first, int32_t n, float * out) {
    const tensor * logits = r->built.out;
    TRY(engine_get_rows(&r->engine, logits, first, n, out));
    const size_t count = (size_t) n * (size_t) logits->ne[0], bad = first_not_finite(out, count);
    if (bad < count)
        FAIL(PYLLAVA_ERR_NUMERIC, "logits: entry %zu is not finite (bad weights or embeddings)", bad);
    return PYLLAVA_OK;
}

void runner_clear_unused(runner * r) {
    if (!r->kv_on_device || r->engine.broken) return;
    for (int32_t first = 0, n; (n = kv_next_unused(r->kv, &first)) > 0; first += n) {
        for (int32_t i = 0; i < r->kv->n_layer; i++) {
            if (device_of(r->kv->k[i])) engine_zero(&r->engine, r->kv->k[i], first, n);
            if (device_of(r->kv->v[i])) engine_zero(&r->engine, r->kv->v[i], first, n);
        }
    }
}

// ---------------------------------------------------------------------------------------- creation

static pyllava_status create_scratch(runner * r) {
    const language_hparams * h = &r->model->language.hparams;
    const vit_hparams * v = &r->model->vision.vit.hparams;
    size_t size = linear_scratch_size();
    const size_t fast[] = { fast_linear_scratch_size(), fast_attention_scratch_size() };
    for (int i = 0; i < 2; i++) size = size > fast[i] ? size : fast[i];
    size_t text = attention_scratch_size(h->n_head, h->n_head_kv, h->head_dim);
    size_t vision =
        r->model->has_vision ? attention_scratch_size(v->n_head, v->n_head, v->n_embd / v->n_head) : 0;
    size = size > text ? size : text;
    size = ((size > vision ? size : vision) + MEMORY_ALIGNMENT - 1) / MEMORY_ALIGNMENT * MEMORY_ALIGNMENT;
    r->env = (kernel_env) { &r->stop, aligned_new(size * (size_t) r->params->n_threads), size, NULL };
    TRY_ALLOC(r->env.scratch, size * (size_t) r->params->n_threads);
    if (r->params->precision == PYLLAVA_EXACT) return PYLLAVA_OK;
    const char * wanted = getenv("PYLLAVA_CPU");
    r->env.micro = micro_choose(wanted);
    if (!r->env.micro)
        FAIL(PYLLAVA_ERR_ARGUMENT, "PYLLAVA_CPU=%s: no such instruction set on this machine", wanted);
    return PYLLAVA_OK;
}

static pyllava_status create_views(runner * r) {
    if (!r->model->has_vision) return PYLLAVA_OK;
    const vit * v = &r->model->vision.vit;
    const size_t n_pos = (size_t) v->n_pos * (size_t) r->params->n_views, P = (size_t) v->hparams.patch_size;
    r->view_visible = malloc(n_pos * sizeof *r->view_visible);
    r->view_blocks = malloc(n_pos * sizeof *r->view_blocks);
    r->patches = malloc(n_pos * 3 * P * P * sizeof *r->patches);
    if (!r->view_visible || !r->view_blocks || !r->patches)
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory for %d image views", r->params->n_views);
    return PYLLAVA_OK;
}

pyllava_status runner_start(runner * r, const pyllava_model * model, const pyllava_session_params * params) {
    r->model = model;
    r->params = params;
    TRY(engine_start(&r->engine, &model->placement, has_to_stop, r));
    // More threads than cores would only slow each other down.
    return pool_create(params->n_threads < cpu_count() ? params->n_threads : cpu_count(), &r->pool);
}

// Calls fn with the largest graph of each kind.
static pyllava_status each_largest(runner * r, int32_t n_rows,
                                   pyllava_status (*fn)(runner *, graph *, engine_size *),
                                   runner_size * out) {
    graph g = { 0 };
    language_input in;
    tensor *a, *b;
    const int32_t n_out = n_rows < BATCH_LOGITS ? n_rows : BATCH_LOGITS;
    const attention_window all = { .n_rows = n_rows, .n_seqs = 1, .n_cells = r->kv->n_rows };
    const int32_t n_windows = r->kv_on_device ? 1 : 0;
    pyllava_status status = build_text(r, &g, ROWS_PROMPT, n_rows, n_out, &all, n_windows, &in, &a);
    if (status == PYLLAVA_OK) status = fn(r, &g, &out->text);
    graph_free(&g);
    if (status == PYLLAVA_OK && r->model->has_vision) {
        status = build_vision(r, &g, r->params->n_views, &a, &b);
        if (status == PYLLAVA_OK) status = fn(r, &g, &out->vision);
        graph_free(&g);
    }
    return status;
}

static pyllava_status count(runner * r, graph * g, engine_size * out) {
    (void) r;
    out->all = (uint64_t) graph_n_tensors(g);
    return PYLLAVA_OK;
}

// A graph of any shape gets room for twice the tensors of the largest one.
static pyllava_status count_tensors(runner * r, int32_t n_rows) {
    runner_size n = { 0 };
    pyllava_status status = PYLLAVA_ERR_MEMORY;
    for (r->n_tensors = TENSORS; status == PYLLAVA_ERR_MEMORY && r->n_tensors < MOST_TENSORS;
         r->n_tensors *= 2)
        status = each_largest(r, n_rows, count, &n);
    r->n_tensors = 2 * (int32_t) (n.text.all > n.vision.all ? n.text.all : n.vision.all);
    if (r->kv_on_device) r->n_tensors += (MAX_WINDOWS - 1) * WINDOW_TENSORS * r->kv->n_layer;
    return status;
}

pyllava_status runner_prepare(runner * r, const kv_cache * kv, bool kv_on_device, int32_t n_rows) {
    r->kv = kv;
    r->kv_on_device = kv_on_device;
    r->mask_row = malloc((size_t) kv->n_rows * sizeof *r->mask_row);
    TRY_ALLOC(r->mask_row, (size_t) kv->n_rows * sizeof *r->mask_row);
    TRY(create_scratch(r));
    TRY(create_views(r));
    TRY(count_tensors(r, n_rows));
    return engine_schedule(&r->engine, r->n_tensors, offload_to(r) != NULL);
}

static pyllava_status measure(runner * r, graph * g, engine_size * out) {
    return engine_measure(&r->engine, g, out);
}

static pyllava_status reserve(runner * r, graph * g, engine_size * out) {
    (void) out;
    TRY(place_inputs(r, g));
    return engine_reserve(&r->engine, g);
}

pyllava_status runner_measure(runner * r, int32_t n_rows, runner_size * out) {
    *out = (runner_size) { 0 };
    return each_largest(r, n_rows, measure, out);
}

pyllava_status runner_reserve(runner * r, int32_t n_rows) {
    runner_size none = { 0 };
    return each_largest(r, n_rows, reserve, &none);
}

void runner_stop(runner * r) {
    drop_graph(r);
    engine_stop(&r->engine);
    pool_free(r->pool);
    free(r->view_visible);
    free(r->view_blocks);
    free(r->patches);
    free(r->mask_row);
    aligned_free(r->env.scratch);
}
