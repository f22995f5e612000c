// session.c - see session.h. A step is: rows of embeddings with their positions, cells and sequences are laid
// out in a batch; a graph is built for its size, run, and the cells are committed to their sequences only if
// that went well.
#include "session.h"

#include "engine.h"
#include "guard.h"
#include "memory.h"

#include <micro.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LOGIT_ROWS 64 // rows of logits one graph returns at most
#define MAX_THREADS    256
#define CELL_STEP      256 // devices look at multiples of so many cells: fewer graphs
#define F16_ZERO       0x0000
#define F16_MINUS_INF  0xFC00
#define F32_EXPONENT   0x7F800000u

typedef struct batch { // room for n_max rows
    int32_t n, n_max;
    float * embd;               // [n_max, n_embd]
    int32_t *positions, *cells; // [n_max]
    int32_t * n_visible;        // [n_max]
    uint64_t * contents;        // [n_max]
    int32_t * out_rows;         // [MAX_LOGIT_ROWS or n_max]
    int32_t n_out;
    attention_block * blocks; // [n_max]
    int32_t n_blocks;
} batch;

// The graph that the scheduler holds: kept, and run again for steps of the same shape.
typedef struct built_graph {
    enum { GRAPH_NONE, GRAPH_TEXT, GRAPH_VISION } kind;
    row_kind rows;
    int32_t n, n_out; // rows and rows of logits, or views
    int32_t n_cells;  // that devices look at
    graph g;
    llama_input in;
    tensor *patches, *out; // out: logits or image embeddings
} built_graph;

struct pyllava_session {
    const pyllava_model * model;
    pyllava_session_params params;
    engine engine;
    pool * pool;
    kv_cache kv;
    batch batch;
    int32_t * view_visible; // [n_views * n_pos] for the vision tower
    attention_block * view_blocks;
    float * patches;      // [n_views * n_patch, 3 * patch_size^2]
    atomic_int cancelled; // until it is taken back
    atomic_int stop;      // of this run; stays when that comes before the run has ended
    kernel_env env;
    attention_env attention;
    built_graph built;
    pyllava_trace_fn trace;
    void * trace_user;
    pyllava_progress_fn progress;
    void * progress_user;
    bool kv_on_device; // of any layer
    pyllava_session_plan plan;
    uint64_t host_size; // what of the plan is in host memory
};

const pyllava_model * session_model(const pyllava_session * s) { return s->model; }
kv_cache * session_kv(pyllava_session * s) { return &s->kv; }
pyllava_session_plan session_memory(const pyllava_session * s) { return s->plan; }

void session_cancel(pyllava_session * s, bool cancel) {
    atomic_store(&s->cancelled, cancel);
    if (cancel) atomic_store(&s->stop, 1);
}

void session_progress(pyllava_session * s, pyllava_progress_fn fn, void * user) {
    s->progress = fn;
    s->progress_user = user;
}

static bool is_cancelled(const pyllava_session * s) { return atomic_load(&s->cancelled) != 0; }

// What was asked to stop has skipped some of its work: its results are none, even if nobody asks any more.
static bool has_to_stop(void * session) { return atomic_load(&((pyllava_session *) session)->stop) != 0; }

static pyllava_status cancelled_status(void) { FAIL(PYLLAVA_ERR_CANCELLED, "cancelled"); }

static pyllava_status report(pyllava_session * s, const char * stage, float fraction) {
    if (s->progress && !s->progress(stage, fraction, s->progress_user)) return cancelled_status();
    return is_cancelled(s) ? cancelled_status() : PYLLAVA_OK;
}

// ------------------------------------------------------------------------------------------ graphs

// Rows of one sequence (or view) cut into attention blocks.
static int32_t add_blocks(const pyllava_session * s, attention_block * out, int32_t n_blocks, int32_t first,
                          int32_t n, int32_t head_dim, int32_t group, const int32_t * cells,
                          int32_t first_row) {
    const int32_t most = s->env.micro ? fast_attention_queries(head_dim) : KERNEL_QUERIES;
    const int32_t longest = most / group > 1 ? most / group : 1, n_steps = (n + longest - 1) / longest;
    const int32_t step = n_steps ? (n + n_steps - 1) / n_steps : 1; // equally long
    for (int32_t i = 0; i < n; i += step) {
        out[n_blocks++] = (attention_block) { first + i, n - i < step ? n - i : step, cells, first_row };
    }
    return n_blocks;
}

// The GPU that may be sent the CPU's matrices.
static ggml_backend_dev_t stream_of(const pyllava_session * s) {
    const device_list * devices = &s->model->placement.devices;
    const bool may = s->params.precision == PYLLAVA_FAST && s->model->placement.n_for_layers > 0 &&
                     device_is_gpu(devices->items[0]);
    return may ? devices->items[0] : NULL;
}

// A graph of this session, for attention of such heads.
static pyllava_status begin(pyllava_session * s, graph * g, int32_t n_nodes, int32_t n_head,
                            int32_t n_head_kv, int32_t head_dim) {
    TRY(graph_begin(g, s->pool, &s->env, &s->attention, n_nodes));
    s->attention.n_head = n_head;
    s->attention.n_head_kv = n_head_kv;
    s->attention.head_dim = head_dim;
    g->flash = s->params.precision == PYLLAVA_EXACT ? FLASH_OFF : (flash_mode) s->params.flash_attn;
    g->stream = stream_of(s);
    g->on_host = s->model->placement.devices.n == 0;
    return PYLLAVA_OK;
}

static pyllava_status finish(const pyllava_session * s, graph * g, tensor * out) {
    if (g->flash_missing) {
        FAIL(PYLLAVA_ERR_DEVICE,
             "flash attention: %s has no kernel for this model with this KV cache: leave it to choose (auto)",
             ggml_backend_dev_name(s->model->placement.devices.items[0]));
    }
    return graph_finish(g, out);
}

static pyllava_status build_vision(pyllava_session * s, graph * g, int32_t n_views, tensor ** out_patches,
                                   tensor ** out_embd) {
    const vit * v = &s->model->vit;
    const int64_t P = v->hparams.patch_size;
    const int32_t n_head = v->hparams.n_head;
    TRY(begin(s, g, vit_n_nodes(v), n_head, n_head, v->hparams.n_embd / n_head));
    g->rows = ROWS_VIEW;
    g->n_views = n_views;
    *out_patches = nn_input(g, GGML_TYPE_F32, (int64_t) v->hparams.n_patch * n_views, 3 * P * P, "v.patches");
    *out_embd = projector_apply(g, &s->model->projector, vit_features(g, v, *out_patches, n_views));
    return finish(s, g, *out_embd);
}

static pyllava_status build_text(pyllava_session * s, graph * g, row_kind rows, int32_t n, int32_t n_out,
                                 int32_t n_cells, llama_input * in, tensor ** out_logits) {
    const llama_hparams * h = &s->model->llama.hparams;
    TRY(begin(s, g, llama_n_nodes(&s->model->llama), h->n_head, h->n_head_kv, h->head_dim));
    g->rows = rows;
    *in = (llama_input) {
        .embd = nn_input(g, GGML_TYPE_F32, n, h->n_embd, "embd"),
        .positions = nn_input(g, GGML_TYPE_I32, 1, n, "positions"),
        .cells = nn_input(g, GGML_TYPE_I32, 1, n, "cells"),
        .rope_divisors = nn_input(g, GGML_TYPE_F32, 1, h->head_dim / 2, "rope_divisors"),
        .out_rows = nn_input(g, GGML_TYPE_I32, 1, n_out, "out_rows"),
    };
    if (n_cells) in->mask = g->mask = nn_input(g, GGML_TYPE_F16, n, n_cells, "mask");
    *out_logits = llama_logits(g, &s->model->llama, in, &s->kv);
    return finish(s, g, *out_logits);
}

static bool is_intermediate(const struct ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->name[0] && strncmp(t->name, "node_", 5) &&
           strncmp(t->name, "leaf_", 5) && !strpbrk(t->name, " (#") && ggml_is_contiguous(t);
}

static bool on_tensor(struct ggml_tensor * t, bool ask, void * session) {
    pyllava_session * s = session;
    if (ask) return is_intermediate(t);
    float * data = malloc(ggml_nbytes(t));
    if (!data) return true;
    ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t));
    int64_t shape[4];
    int n_dims = ggml_n_dims(t) < 2 ? 2 : ggml_n_dims(t);
    for (int d = 0; d < n_dims; d++) shape[d] = t->ne[n_dims - 1 - d];
    s->trace(t->name, data, shape, n_dims, s->trace_user);
    free(data);
    return true;
}

void session_trace(pyllava_session * s, pyllava_trace_fn fn, void * user) {
    s->trace = fn;
    s->trace_user = user;
    ggml_backend_sched_set_eval_callback(s->engine.sched, fn ? on_tensor : NULL, fn ? s : NULL);
}

static void drop_graph(pyllava_session * s) {
    graph_free(&s->built.g);
    s->built = (built_graph) { 0 };
}

static pyllava_status build(void * session) {
    pyllava_session * s = session;
    built_graph * b = &s->built;
    if (b->kind == GRAPH_TEXT)
        TRY(build_text(s, &b->g, b->rows, b->n, b->n_out, b->n_cells, &b->in, &b->out));
    else TRY(build_vision(s, &b->g, b->n, &b->patches, &b->out));
    return engine_load(&s->engine, &b->g);
}

// Cells that attention on devices looks at; 0 where there is none.
static int32_t cells_looked_at(const pyllava_session * s) {
    if (!s->kv_on_device) return 0;
    const int32_t n = (kv_cells_used(&s->kv) + CELL_STEP - 1) / CELL_STEP * CELL_STEP;
    return n < s->kv.n_cells ? n : s->kv.n_cells;
}

// A graph of this shape, ready for its inputs: all of them, since what lies in their memory is overwritten.
static pyllava_status graph_for(pyllava_session * s, int kind, row_kind rows, int32_t n, int32_t n_out) {
    built_graph * b = &s->built;
    const int32_t n_cells = kind == GRAPH_TEXT ? cells_looked_at(s) : 0;
    if ((int) b->kind == kind && b->rows == rows && b->n == n && b->n_out == n_out && b->n_cells == n_cells) {
        graph_rewind(&b->g);
        return PYLLAVA_OK;
    }
    drop_graph(s);
    b->kind = kind;
    b->rows = rows;
    b->n = n;
    b->n_out = n_out;
    b->n_cells = n_cells;
    pyllava_status status = guarded(build, s);
    if (status != PYLLAVA_OK) drop_graph(s);
    return status;
}

static pyllava_status run(pyllava_session * s, graph * g) {
    TRY(cores_take(s->model->cores, s->params.n_threads, &s->cancelled));
    atomic_store(&s->stop, 0);
    if (is_cancelled(s)) atomic_store(&s->stop, 1);
    pyllava_status status = engine_run(&s->engine, g, pool_threads(s->pool));
    cores_give(s->model->cores, s->params.n_threads);
    return has_to_stop(s) ? cancelled_status() : status;
}

// The index of the first number that is not finite; n: all are. Compilers vectorise the first loop.
static size_t first_not_finite(const float * x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & F32_EXPONENT) == F32_EXPONENT;
    }
    size_t i = bad ? 0 : n;
    while (i < n && isfinite(x[i])) i++;
    return i;
}

static void put(tensor * t, const void * data) { ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t)); }

// ------------------------------------------------------------------------------------------ images

static pyllava_status encode_views(pyllava_session * s, const float * pixels, int32_t n_views, float * out) {
    const vit * v = &s->model->vit;
    const size_t S = (size_t) v->hparams.image_size, P = (size_t) v->hparams.patch_size;
    for (int32_t i = 0; i < n_views; i++) {
        vit_unfold(&v->hparams, pixels + (size_t) i * 3 * S * S,
                   s->patches + (size_t) i * (size_t) v->hparams.n_patch * 3 * P * P);
    }
    s->attention = (attention_env) {
        .env = s->env,
        .n_head = v->hparams.n_head,
        .n_head_kv = v->hparams.n_head,
        .head_dim = v->hparams.n_embd / v->hparams.n_head,
        .blocks = s->view_blocks,
        .n_visible = s->view_visible,
        .rows = ROWS_VIEW,
    };
    for (int32_t i = 0; i < n_views; i++) {
        const int32_t first = i * v->n_pos;
        s->attention.n_blocks = add_blocks(s, s->view_blocks, s->attention.n_blocks, first, v->n_pos,
                                           s->attention.head_dim, 1, NULL, first);
    }
    for (int32_t i = 0; i < n_views * v->n_pos; i++) s->view_visible[i] = v->n_pos;
    TRY(graph_for(s, GRAPH_VISION, ROWS_VIEW, n_views, 0));
    tensor * embd = s->built.out;
    put(s->built.patches, s->patches);
    TRY(run(s, &s->built.g));
    TRY(engine_get(&s->engine, embd, out));
    const size_t n = ggml_nbytes(embd) / sizeof *out, bad = first_not_finite(out, n);
    if (bad < n)
        FAIL(PYLLAVA_ERR_NUMERIC, "image embeddings: entry %zu is not finite (bad weights or pixels)", bad);
    return PYLLAVA_OK;
}

pyllava_status session_encode(pyllava_session * s, const float * pixels, int32_t n_views, float * out_embd) {
    const vit_hparams * h = &s->model->vit.hparams;
    const size_t n_pixels = 3 * (size_t) h->image_size * (size_t) h->image_size;
    const size_t n_out = (size_t) h->n_patch * (size_t) s->model->projector.n_embd;
    for (int32_t i = 0; i < n_views; i += s->params.n_views) {
        TRY(report(s, "encode", (float) i / (float) n_views));
        const int32_t n = n_views - i < s->params.n_views ? n_views - i : s->params.n_views;
        TRY(encode_views(s, pixels + (size_t) i * n_pixels, n, out_embd + (size_t) i * n_out));
    }
    return report(s, "encode", 1.0f);
}

// ----------------------------------------------------------------------------------------- batches

// Adds row i of a span to the batch, as the next position of a sequence whose cells are reserved.
static void batch_add(pyllava_session * s, const pyllava_span * span, int32_t i, int32_t position,
                      int32_t cell, uint64_t content) {
    batch * b = &s->batch;
    const size_t E = (size_t) s->model->llama.hparams.n_embd;
    float * row = b->embd + (size_t) b->n * E;
    if (span->tokens) llama_embed(&s->model->llama, span->tokens[i], row);
    else memcpy(row, span->embd + (size_t) i * E, E * sizeof *row);
    b->positions[b->n] = position;
    b->n_visible[b->n] = position + 1;
    b->cells[b->n] = cell;
    b->contents[b->n++] = content;
}

// For attention on devices: which cells each row of the batch sees.
static void put_mask(const pyllava_session * s, tensor * mask) {
    const batch * b = &s->batch;
    const size_t n_cells = (size_t) mask->ne[0];
    uint16_t * seen = mask->data; // inputs lie in host memory
    for (size_t i = 0; i < n_cells * (size_t) b->n; i++) seen[i] = F16_MINUS_INF;
    for (int32_t j = 0; j < b->n_blocks; j++) {
        const attention_block * block = &b->blocks[j];
        for (int32_t i = block->first; i < block->first + block->n; i++) {
            for (int32_t p = 0; p < b->n_visible[i]; p++)
                seen[(size_t) i * n_cells + (size_t) block->cells[p]] = F16_ZERO;
        }
    }
}

// A device's softmax may pass over what is not a number, so its logits would not show it.
static pyllava_status check_rows(const batch * b, int32_t width) {
    for (int32_t i = 0; i < b->n; i++) {
        const size_t bad = first_not_finite(b->embd + (size_t) i * (size_t) width, (size_t) width);
        if (bad < (size_t) width)
            FAIL(PYLLAVA_ERR_NUMERIC, "embedding at position %d: entry %zu is not finite (bad weights?)",
                 b->positions[i], bad);
    }
    return PYLLAVA_OK;
}

static pyllava_status read_logits(pyllava_session * s, const tensor * logits, float * out_logits) {
    TRY(engine_get(&s->engine, logits, out_logits));
    const size_t n = ggml_nbytes(logits) / sizeof *out_logits, bad = first_not_finite(out_logits, n);
    if (bad < n)
        FAIL(PYLLAVA_ERR_NUMERIC, "logits: entry %zu is not finite (bad weights or embeddings)", bad);
    return PYLLAVA_OK;
}

// On devices, what is no number must not stay in the cells unnoticed: others look at them.
static pyllava_status check_sums(pyllava_session * s, const tensor * sums) {
    float * found = malloc(ggml_nbytes(sums));
    TRY_ALLOC(found, ggml_nbytes(sums));
    pyllava_status status = engine_get(&s->engine, sums, found);
    for (int64_t i = 0; status == PYLLAVA_OK && i < ggml_nelements(sums); i++) {
        if (!isfinite(found[i]))
            status = error_set(PYLLAVA_ERR_NUMERIC, "position %d is not finite (bad weights or embeddings)",
                               s->batch.positions[i]);
    }
    free(found);
    return status;
}

static pyllava_status batch_run(pyllava_session * s, row_kind rows, float * out_logits) {
    batch * b = &s->batch;
    const llama_hparams * h = &s->model->llama.hparams;
    s->attention = (attention_env) {
        .env = s->env,
        .n_head = h->n_head,
        .n_head_kv = h->n_head_kv,
        .head_dim = h->head_dim,
        .n_blocks = b->n_blocks,
        .blocks = b->blocks,
        .n_visible = b->n_visible,
        .rows = rows,
    };
    TRY(check_rows(b, h->n_embd));
    if (b->n_out == 0) b->out_rows[b->n_out++] = b->n - 1; // a graph has an end; its logits are not read
    TRY(graph_for(s, GRAPH_TEXT, rows, b->n, b->n_out));
    const llama_input * in = &s->built.in;
    tensor * logits = s->built.out;
    put(in->embd, b->embd);
    put(in->positions, b->positions);
    put(in->cells, b->cells);
    put(in->rope_divisors, s->model->llama.rope_divisors);
    put(in->out_rows, b->out_rows);
    if (in->mask) put_mask(s, in->mask);
    TRY(run(s, &s->built.g));
    if (in->sums) TRY(check_sums(s, in->sums));
    return out_logits ? read_logits(s, logits, out_logits) : PYLLAVA_OK;
}

// What a step that failed has left in the cells must not reach those who look at them, if only times 0.
static void scrub(pyllava_session * s) {
    for (int32_t first = 0, n; (n = kv_next_unused(&s->kv, &first)) > 0; first += n) {
        for (int32_t i = 0; i < s->kv.n_layer; i++) {
            if (device_of(s->kv.k[i])) engine_zero(&s->engine, s->kv.k[i], first, n);
            if (device_of(s->kv.v[i])) engine_zero(&s->engine, s->kv.v[i], first, n);
        }
    }
}

static void scrub_after(pyllava_session * s, pyllava_status status) {
    if (status == PYLLAVA_OK || !s->kv_on_device || s->engine.broken) return;
    char text[PYLLAVA_ERROR_MAX];
    snprintf(text, sizeof text, "%s", error_text()); // of the step, not of this
    scrub(s);
    error_set(status, "%s", text);
}

// ----------------------------------------------------------------------------------------- prompts

// What a position holds, as one number: token ids, and a mix of key and row for pictures (odd constant:
// SplitMix64's).
static uint64_t content_of(const pyllava_span * span, int32_t i) {
    if (span->tokens) return (uint64_t) (uint32_t) span->tokens[i];
    uint64_t x = span->key + 0x9E3779B97F4A7C15u * (uint64_t) (i + 1);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    return (x ^ (x >> 27)) | (uint64_t) 1 << 63; // never equal to a token
}

static int32_t shared_prefix(const kv_sequence * q, const pyllava_span * spans, int32_t n_spans) {
    int32_t n = 0;
    for (int32_t j = 0; j < n_spans; j++) {
        for (int32_t i = 0; i < spans[j].n; i++, n++) {
            if (n == q->length || q->contents[n] != content_of(&spans[j], i)) return n;
        }
    }
    return n;
}

static pyllava_status check_spans(const pyllava_session * s, const pyllava_span * spans, int32_t n_spans,
                                  int32_t * out_n) {
    int64_t n = 0;
    for (int32_t j = 0; j < n_spans; j++) {
        if (spans[j].n < 0 || (spans[j].n && !spans[j].tokens == !spans[j].embd)) {
            FAIL(PYLLAVA_ERR_ARGUMENT, "span %d: need n >= 0 and either tokens or embd", j);
        }
        for (int32_t i = 0; spans[j].tokens && i < spans[j].n; i++) {
            if (spans[j].tokens[i] < 0 || spans[j].tokens[i] >= s->model->vocab.n) {
                FAIL(PYLLAVA_ERR_ARGUMENT, "token %d: found %d, need 0..%d", i, spans[j].tokens[i],
                     s->model->vocab.n - 1);
            }
        }
        n += spans[j].n;
    }
    if (n == 0) FAIL(PYLLAVA_ERR_ARGUMENT, "empty prompt");
    if (n > s->params.n_ctx) {
        FAIL(PYLLAVA_ERR_CONTEXT, "prompt of %lld positions, n_ctx is %d: raise n_ctx or shorten the prompt",
             (long long) n, s->params.n_ctx);
    }
    *out_n = (int32_t) n;
    return PYLLAVA_OK;
}

// A walk over the rows of all spans, in batches.
typedef struct prompt {
    const pyllava_span * spans;
    int32_t seq, span, row; // the next row
    int32_t done, total;
    bool all_rows;
} prompt;

static void prompt_skip(prompt * p, int32_t n) {
    p->done += n;
    while (n >= p->spans[p->span].n - p->row && n > 0) {
        n -= p->spans[p->span].n - p->row;
        p->span++;
        p->row = 0;
    }
    p->row += n;
}

static pyllava_status prompt_step(pyllava_session * s, prompt * p, float * out_logits) {
    batch * b = &s->batch;
    const int32_t most =
        p->all_rows && s->params.n_batch > MAX_LOGIT_ROWS ? MAX_LOGIT_ROWS : s->params.n_batch;
    const int32_t n = p->total - p->done < most ? p->total - p->done : most;
    const kv_sequence * q = &s->kv.sequences[p->seq];
    const bool last = p->done + n == p->total;
    kv_reserve(&s->kv, p->seq, n);
    b->n = b->n_out = 0;
    while (b->n < n) {
        const pyllava_span * span = &p->spans[p->span];
        if (p->row == span->n) {
            p->span++;
            p->row = 0;
            continue;
        }
        const int32_t position = q->length + b->n;
        batch_add(s, span, p->row, position, q->cells[position], content_of(span, p->row));
        p->row++;
    }
    for (int32_t i = p->all_rows ? 0 : n - 1; (p->all_rows || last) && i < n; i++)
        b->out_rows[b->n_out++] = i;
    const int32_t group = s->model->llama.hparams.n_head / s->model->llama.hparams.n_head_kv;
    b->n_blocks = add_blocks(s, b->blocks, 0, 0, n, s->model->llama.hparams.head_dim, group, q->cells, 0);
    pyllava_status status = batch_run(s, ROWS_PROMPT, p->all_rows || last ? out_logits : NULL);
    if (status != PYLLAVA_OK) {
        kv_rollback(&s->kv, p->seq, n);
        if (status == PYLLAVA_ERR_NUMERIC) kv_trim(&s->kv, p->seq, 0); // earlier batches may hold the cause
        scrub_after(s, status);
        return status;
    }
    kv_commit(&s->kv, p->seq, b->contents, n);
    p->done += n;
    return PYLLAVA_OK;
}

pyllava_status session_prefill(pyllava_session * s, int32_t seq, const pyllava_span * spans, int32_t n_spans,
                               bool all_rows, float * out_logits, int32_t * out_n_reused) {
    prompt p = { .spans = spans, .seq = seq, .all_rows = all_rows };
    TRY(check_spans(s, spans, n_spans, &p.total));
    int32_t n_shared = all_rows ? 0 : shared_prefix(&s->kv.sequences[seq], spans, n_spans);
    if (n_shared == p.total) n_shared--; // the last row gives the logits
    kv_trim(&s->kv, seq, n_shared);
    prompt_skip(&p, n_shared);
    const int32_t n_new = p.total - n_shared;
    while (p.done < p.total) {
        TRY(report(s, "prefill", (float) (p.done - n_shared) / (float) n_new));
        const size_t at = all_rows ? (size_t) p.done * (size_t) s->model->vocab.n : 0;
        TRY(prompt_step(s, &p, out_logits + at));
    }
    if (out_n_reused) *out_n_reused = n_shared;
    return report(s, "prefill", 1.0f);
}

// ---------------------------------------------------------------------------------------- decoding

static pyllava_status check_decode(const pyllava_session * s, const int32_t * seqs, const int32_t * ids,
                                   int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        if (seqs[i] < 0 || seqs[i] >= s->params.n_seq)
            FAIL(PYLLAVA_ERR_ARGUMENT, "sequence: found %d, need 0..%d", seqs[i], s->params.n_seq - 1);
        if (ids[i] < 0 || ids[i] >= s->model->vocab.n)
            FAIL(PYLLAVA_ERR_ARGUMENT, "token: found %d, need 0..%d", ids[i], s->model->vocab.n - 1);
        for (int32_t j = 0; j < i; j++) {
            if (seqs[j] == seqs[i])
                FAIL(PYLLAVA_ERR_ARGUMENT, "sequence %d stands twice in one step", seqs[i]);
        }
        if (s->kv.sequences[seqs[i]].length >= s->params.n_ctx) {
            FAIL(PYLLAVA_ERR_CONTEXT, "sequence %d is full: n_ctx is %d", seqs[i], s->params.n_ctx);
        }
    }
    return PYLLAVA_OK;
}

static pyllava_status decode_step(pyllava_session * s, const int32_t * seqs, const int32_t * ids, int32_t n,
                                  float * out_logits) {
    batch * b = &s->batch;
    b->n = b->n_out = b->n_blocks = 0;
    for (int32_t i = 0; i < n; i++) {
        const pyllava_span span = { .tokens = &ids[i], .n = 1 };
        const kv_sequence * q = &s->kv.sequences[seqs[i]];
        kv_reserve(&s->kv, seqs[i], 1);
        b->blocks[b->n_blocks++] = (attention_block) { b->n, 1, q->cells, 0 };
        b->out_rows[b->n_out++] = b->n;
        batch_add(s, &span, 0, q->length, q->cells[q->length], content_of(&span, 0));
    }
    pyllava_status status = batch_run(s, ROWS_ANSWER, out_logits);
    for (int32_t i = 0; i < n; i++) {
        if (status == PYLLAVA_OK) kv_commit(&s->kv, seqs[i], &b->contents[i], 1);
        else kv_rollback(&s->kv, seqs[i], 1);
    }
    scrub_after(s, status);
    return status;
}

pyllava_status session_decode(pyllava_session * s, const int32_t * seqs, const int32_t * ids, int32_t n,
                              float * out_logits) {
    TRY(check_decode(s, seqs, ids, n));
    if (is_cancelled(s)) return cancelled_status();
    const int32_t most = s->batch.n_max < MAX_LOGIT_ROWS ? s->batch.n_max : MAX_LOGIT_ROWS;
    for (int32_t i = 0; i < n; i += most) {
        const size_t at = (size_t) i * (size_t) s->model->vocab.n;
        pyllava_status status =
            decode_step(s, seqs + i, ids + i, n - i < most ? n - i : most, out_logits + at);
        if (status == PYLLAVA_OK) continue;
        while (i-- > 0) kv_trim(&s->kv, seqs[i], s->kv.sequences[seqs[i]].length - 1); // all or none
        return status;
    }
    return PYLLAVA_OK;
}

// ---------------------------------------------------------------------------------------- creation

static pyllava_status kv_type(const char * name, pyllava_precision precision, int32_t head_dim,
                              const char * what, enum ggml_type * out) {
    if (!name) name = precision == PYLLAVA_EXACT ? "f32" : "f16";
    static const enum ggml_type ALLOWED[] = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                              GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                                              GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL };
    for (size_t i = 0; i < sizeof ALLOWED / sizeof *ALLOWED; i++) {
        if (strcmp(name, ggml_type_name(ALLOWED[i]))) continue;
        if (head_dim % ggml_blck_size(ALLOWED[i])) {
            FAIL(PYLLAVA_ERR_ARGUMENT, "%s: %s needs heads of a multiple of %d, the model's are %d", what,
                 name, (int) ggml_blck_size(ALLOWED[i]), head_dim);
        }
        *out = ALLOWED[i];
        return PYLLAVA_OK;
    }
    FAIL(PYLLAVA_ERR_ARGUMENT, "%s: found '%s', need f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 or iq4_nl", what,
         name);
}

static pyllava_status create_scratch(pyllava_session * s) {
    const llama_hparams * h = &s->model->llama.hparams;
    const vit_hparams * v = &s->model->vit.hparams;
    size_t size = linear_scratch_size();
    const size_t fast[] = { fast_linear_scratch_size(), fast_attention_scratch_size() };
    for (int i = 0; i < 2; i++) size = size > fast[i] ? size : fast[i];
    size_t text = attention_scratch_size(h->n_head, h->n_head_kv, h->head_dim);
    size_t vision =
        s->model->has_vision ? attention_scratch_size(v->n_head, v->n_head, v->n_embd / v->n_head) : 0;
    size = size > text ? size : text;
    size = ((size > vision ? size : vision) + MEMORY_ALIGNMENT - 1) / MEMORY_ALIGNMENT * MEMORY_ALIGNMENT;
    s->env = (kernel_env) { &s->stop, aligned_new(size * (size_t) s->params.n_threads), size, NULL };
    TRY_ALLOC(s->env.scratch, size * (size_t) s->params.n_threads);
    if (s->params.precision == PYLLAVA_EXACT) return PYLLAVA_OK;
    const char * wanted = getenv("PYLLAVA_CPU");
    s->env.micro = micro_choose(wanted);
    if (!s->env.micro)
        FAIL(PYLLAVA_ERR_ARGUMENT, "PYLLAVA_CPU=%s: no such instruction set on this machine", wanted);
    return PYLLAVA_OK;
}

static pyllava_status create_batch(pyllava_session * s) {
    batch * b = &s->batch;
    b->n_max = s->params.n_batch > s->params.n_seq ? s->params.n_batch : s->params.n_seq;
    const size_t n = (size_t) b->n_max;
    b->embd = malloc(n * (size_t) s->model->llama.hparams.n_embd * sizeof *b->embd);
    b->positions = malloc(n * sizeof *b->positions);
    b->cells = malloc(n * sizeof *b->cells);
    b->n_visible = malloc(n * sizeof *b->n_visible);
    b->contents = malloc(n * sizeof *b->contents);
    b->out_rows = malloc(n * sizeof *b->out_rows);
    b->blocks = malloc(n * sizeof *b->blocks);
    if (!b->embd || !b->positions || !b->cells || !b->n_visible || !b->contents || !b->out_rows ||
        !b->blocks) {
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory for a batch of %d rows", b->n_max);
    }
    if (!s->model->has_vision) return PYLLAVA_OK;
    const vit * v = &s->model->vit;
    const size_t n_pos = (size_t) v->n_pos * (size_t) s->params.n_views, P = (size_t) v->hparams.patch_size;
    s->view_visible = malloc(n_pos * sizeof *s->view_visible);
    s->view_blocks = malloc(n_pos * sizeof *s->view_blocks);
    s->patches = malloc(n_pos * 3 * P * P * sizeof *s->patches);
    if (!s->view_visible || !s->view_blocks || !s->patches)
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory for %d image views", s->params.n_views);
    return PYLLAVA_OK;
}

// The buffer of one graph: its size, or, with reserve, the buffer itself.
static pyllava_status measure_graph(pyllava_session * s, graph * g, bool reserve, engine_size * out) {
    return reserve ? engine_reserve(&s->engine, g) : engine_measure(&s->engine, g, out);
}

// Measures the largest graphs or, with reserve, takes the buffers for them.
static pyllava_status measure(pyllava_session * s, bool reserve) {
    graph g = { 0 };
    llama_input in;
    tensor *a, *b;
    engine_size text = { 0 }, vision = { 0 };
    const int32_t n_out = s->batch.n_max < MAX_LOGIT_ROWS ? s->batch.n_max : MAX_LOGIT_ROWS;
    pyllava_status status =
        build_text(s, &g, ROWS_PROMPT, s->batch.n_max, n_out, s->kv_on_device ? s->kv.n_cells : 0, &in, &a);
    if (status == PYLLAVA_OK) status = measure_graph(s, &g, reserve, &text);
    graph_free(&g);
    if (status == PYLLAVA_OK && s->model->has_vision) {
        status = build_vision(s, &g, s->params.n_views, &a, &b);
        if (status == PYLLAVA_OK) status = measure_graph(s, &g, reserve, &vision);
        graph_free(&g);
    }
    if (reserve) return status;
    s->plan.compute_size = text.all;
    s->plan.compute_size_vision = vision.all;
    s->host_size += text.host > vision.host ? text.host : vision.host;
    return status;
}

static pyllava_status check_plan(const pyllava_session * s, uint64_t kv_on_host) {
    const uint64_t need = s->host_size, have = memory_available();
    if (need > have) {
        FAIL(PYLLAVA_ERR_MEMORY,
             "need %.2f GiB (KV cache %.2f for n_ctx %d, compute buffer %.2f), %.2f GiB are free: try a "
             "smaller n_ctx or an f16 cache",
             (double) need / (1 << 30), (double) kv_on_host / (1 << 30), s->params.n_ctx,
             (double) (need - kv_on_host) / (1 << 30), (double) have / (1 << 30));
    }
    return PYLLAVA_OK;
}

static pyllava_status check_params(pyllava_session_params * p) {
    if (p->n_ctx < 1 || p->n_ctx > 1 << 24)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_ctx: found %d, need 1..%d", p->n_ctx, 1 << 24);
    if (p->n_batch < 1 || p->n_batch > 2048)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_batch: found %d, need 1..2048", p->n_batch);
    if (p->n_seq < 1 || p->n_seq > 256) FAIL(PYLLAVA_ERR_ARGUMENT, "n_seq: found %d, need 1..256", p->n_seq);
    if (p->n_views < 1 || p->n_views > 64)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_views: found %d, need 1..64", p->n_views);
    if (p->n_threads < 0 || p->n_threads > MAX_THREADS)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_threads: found %d, need 0..%d", p->n_threads, MAX_THREADS);
    if (p->precision != PYLLAVA_EXACT && p->precision != PYLLAVA_FAST)
        FAIL(PYLLAVA_ERR_ARGUMENT, "precision: found %d", (int) p->precision);
    if ((int64_t) p->n_ctx * p->n_seq > INT32_MAX)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_ctx %d times n_seq %d is too large", p->n_ctx, p->n_seq);
    if (p->flash_attn < -1 || p->flash_attn > 1)
        FAIL(PYLLAVA_ERR_ARGUMENT, "flash_attn: found %d, need -1, 0 or 1", p->flash_attn);
    if (p->flash_attn == 1 && p->precision == PYLLAVA_EXACT)
        FAIL(PYLLAVA_ERR_ARGUMENT, "flash_attn: rounds to 16 bits, precision is exact");
    if (p->n_threads == 0) p->n_threads = cores_physical();
    if (p->n_threads > MAX_THREADS) p->n_threads = MAX_THREADS;
    if (p->n_batch > p->n_ctx) p->n_batch = p->n_ctx;
    return PYLLAVA_OK;
}

// The KV cache, each layer's where the placement wants it.
static pyllava_status create_cache(pyllava_session * s) {
    const llama_hparams * h = &s->model->llama.hparams;
    const placement * p = &s->model->placement;
    kv_params kv = { .n_layer = h->n_layer,
                     .n_embd = h->n_head_kv * h->head_dim,
                     .n_ctx = s->params.n_ctx,
                     .n_seq = s->params.n_seq };
    TRY(kv_type(s->params.type_k, s->params.precision, h->head_dim, "type_k", &kv.type_k));
    TRY(kv_type(s->params.type_v, s->params.precision, h->head_dim, "type_v", &kv.type_v));
    ggml_backend_buffer_type_t where[PYLLAVA_MAX_LAYERS];
    int32_t n_on_host = 0;
    for (int32_t i = 0; i < h->n_layer; i++) {
        where[i] = engine_memory(&s->engine, p, p->layers[i]);
        n_on_host += p->kv_on_host || p->layers[i] == ON_HOST;
    }
    s->kv_on_device = n_on_host < h->n_layer;
    s->plan.kv_size = kv_cache_size(&kv);
    s->host_size = s->plan.kv_size / (uint64_t) h->n_layer * (uint64_t) n_on_host;
    TRY(check_plan(s, s->host_size));
    TRY(kv_cache_create(&s->kv, &kv, where));
    for (int32_t i = 0; i < h->n_layer; i++) {
        ggml_backend_dev_t d = device_of(s->kv.k[i]);
        if (!d) continue;
        if (ggml_backend_dev_supports_op(d, s->kv.k[i]) && ggml_backend_dev_supports_op(d, s->kv.v[i]))
            continue;
        FAIL(PYLLAVA_ERR_MEMORY,
             "KV cache: %s does not take a layer's %.0f MiB for %d positions as one tensor: try a smaller "
             "n_ctx, or the cache in host memory",
             ggml_backend_dev_name(d), (double) ggml_nbytes(s->kv.k[i]) / (1 << 20), s->kv.n_cells);
    }
    return PYLLAVA_OK;
}

static pyllava_status create(void * session) {
    pyllava_session * s = session;
    TRY(check_params(&s->params));
    TRY(engine_start(&s->engine, &s->model->placement, has_to_stop, s));
    // More threads than cores would only get in each other's way.
    TRY(pool_create(s->params.n_threads < cpu_count() ? s->params.n_threads : cpu_count(), &s->pool));
    TRY(create_cache(s));
    TRY(create_scratch(s));
    TRY(create_batch(s));
    const int32_t n_text = llama_n_nodes(&s->model->llama),
                  n_vision = s->model->has_vision ? vit_n_nodes(&s->model->vit) : 0;
    TRY(engine_schedule(&s->engine, n_text > n_vision ? n_text : n_vision, stream_of(s) != NULL));
    const uint64_t kv_on_host = s->host_size;
    TRY(measure(s, false));
    TRY(check_plan(s, kv_on_host));
    return measure(s, true);
}

static pyllava_status free_cache(void * session) {
    kv_cache_free(&((pyllava_session *) session)->kv);
    return PYLLAVA_OK;
}

pyllava_status session_create(const pyllava_model * model, const pyllava_session_params * params,
                              pyllava_session ** out) {
    pyllava_session * s = calloc(1, sizeof *s);
    TRY_ALLOC(s, sizeof *s);
    s->model = model;
    s->params = *params;
    pyllava_status status = guarded(create, s);
    if (status != PYLLAVA_OK) {
        session_free(s);
        return status;
    }
    *out = s;
    return PYLLAVA_OK;
}

void session_free(pyllava_session * s) {
    if (!s) return;
    drop_graph(s);
    engine_stop(&s->engine);
    pool_free(s->pool);
    if (!s->kv_on_device || !guard_has_failed()) guarded(free_cache, s); // else the process keeps it
    free(s->batch.embd);
    free(s->batch.positions);
    free(s->batch.cells);
    free(s->batch.n_visible);
    free(s->batch.contents);
    free(s->batch.out_rows);
    free(s->batch.blocks);
    free(s->view_visible);
    free(s->view_blocks);
    free(s->patches);
    aligned_free(s->env.scratch);
    free(s);
}
