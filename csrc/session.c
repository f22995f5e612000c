// session.c - see session.h. A step is: rows of embeddings with their positions, cells and sequences are laid
// out in a batch; a graph is built for its size, run, and the cells are committed to their sequences only if
// that went well.
#include "session.h"

#include "memory.h"
#include "pool.h"
#include "thread.h"

#include <ggml-cpu.h>
#include <micro.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LOGIT_ROWS 64                 // rows of logits one graph returns at most
#define MAX_THREADS    256

typedef struct batch {                    // room for n_max rows
    int32_t   n, n_max;
    float *   embd;                       // [n_max, n_embd]
    int32_t * positions, * cells;         // [n_max]
    int32_t * n_visible;                  // [n_max]
    uint64_t * contents;                  // [n_max]
    int32_t * out_rows;                   // [MAX_LOGIT_ROWS or n_max]
    int32_t   n_out;
    attention_block * blocks;             // [n_max]
    int32_t   n_blocks;
} batch;

// The graph that the scheduler holds: kept, and run again for steps of the same shape.
typedef struct built_graph {
    enum { GRAPH_NONE, GRAPH_TEXT, GRAPH_VISION } kind;
    int32_t     n, n_out;                 // rows and rows of logits, or views
    graph       g;
    llama_input in;
    tensor *    patches, * out;           // out: logits or image embeddings
} built_graph;

// What we ask of ggml's CPU back end beside its graphs. Its own threads are started when a graph first needs
// them.
typedef struct engine {
    int32_t                  n_threads;   // 1 until then
    struct ggml_threadpool * threads;
    struct ggml_threadpool * (*threads_new)(struct ggml_threadpool_params *);
    void (*threads_free)(struct ggml_threadpool *);
    void (*set_threads)(ggml_backend_t, struct ggml_threadpool *);
    ggml_backend_set_n_threads_t      set_n;
    ggml_backend_set_abort_callback_t set_abort;
} engine;

struct pyllava_session {
    const pyllava_model * model;
    pyllava_session_params params;
    ggml_backend_t       backend;
    ggml_backend_sched_t sched;
    pool *               pool;
    engine               engine;
    kv_cache             kv;
    batch                batch;
    int32_t *            view_visible;    // [n_views * n_pos] for the vision tower
    attention_block *    view_blocks;
    float *              patches;         // [n_views * n_patch, 3 * patch_size^2]
    atomic_int           cancelled;       // until it is taken back
    atomic_int           stop;            // of this run; stays when that comes before the run has ended
    kernel_env           env;
    attention_env        attention;
    built_graph          built;
    pyllava_trace_fn     trace;
    void *               trace_user;
    pyllava_progress_fn  progress;
    void *               progress_user;
    pyllava_session_plan plan;
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
    const int32_t step = n_steps ? (n + n_steps - 1) / n_steps : 1;      // equally long
    for (int32_t i = 0; i < n; i += step) {
        out[n_blocks++] = (attention_block) { first + i, n - i < step ? n - i : step, cells, first_row };
    }
    return n_blocks;
}

static pyllava_status build_vision(pyllava_session * s, graph * g, int32_t n_views, tensor ** out_patches,
                                   tensor ** out_embd) {
    const vit * v = &s->model->vit;
    const int64_t P = v->hparams.patch_size;
    TRY(graph_begin(g, s->pool, &s->env, &s->attention, vit_n_nodes(v)));
    g->careful = true;
    *out_patches = nn_input(g, GGML_TYPE_F32, (int64_t) v->hparams.n_patch * n_views, 3 * P * P, "v.patches");
    *out_embd = projector_apply(g, &s->model->projector, vit_features(g, v, *out_patches, n_views));
    return graph_finish(g, *out_embd);
}

static pyllava_status build_text(pyllava_session * s, graph * g, int32_t n, int32_t n_out, llama_input * in,
                                 tensor ** out_logits) {
    const llama_hparams * h = &s->model->llama.hparams;
    TRY(graph_begin(g, s->pool, &s->env, &s->attention, llama_n_nodes(&s->model->llama)));
    *in = (llama_input) {
        .embd          = nn_input(g, GGML_TYPE_F32, n, h->n_embd, "embd"),
        .positions     = nn_input(g, GGML_TYPE_I32, 1, n, "positions"),
        .cells         = nn_input(g, GGML_TYPE_I32, 1, n, "cells"),
        .rope_divisors = nn_input(g, GGML_TYPE_F32, 1, h->head_dim / 2, "rope_divisors"),
        .out_rows      = nn_input(g, GGML_TYPE_I32, 1, n_out, "out_rows"),
    };
    *out_logits = llama_logits(g, &s->model->llama, in, &s->kv);
    return graph_finish(g, *out_logits);
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
    ggml_backend_sched_set_eval_callback(s->sched, fn ? on_tensor : NULL, fn ? s : NULL);
}

static void drop_graph(pyllava_session * s) {
    graph_free(&s->built.g);
    s->built = (built_graph) { 0 };
}

static pyllava_status build(pyllava_session * s, built_graph * b) {
    if (b->kind == GRAPH_TEXT) TRY(build_text(s, &b->g, b->n, b->n_out, &b->in, &b->out));
    else TRY(build_vision(s, &b->g, b->n, &b->patches, &b->out));
    ggml_backend_sched_reset(s->sched);
    if (!ggml_backend_sched_alloc_graph(s->sched, b->g.nodes))
        FAIL(PYLLAVA_ERR_MEMORY, "no memory for the compute buffer");
    return PYLLAVA_OK;
}

// A graph of this shape, ready for its inputs: all of them, since what lies in their memory is overwritten.
static pyllava_status graph_for(pyllava_session * s, int kind, int32_t n, int32_t n_out) {
    built_graph * b = &s->built;
    if ((int) b->kind == kind && b->n == n && b->n_out == n_out) {
        graph_rewind(&b->g);
        return PYLLAVA_OK;
    }
    drop_graph(s);
    b->kind = kind;
    b->n = n;
    b->n_out = n_out;
    pyllava_status status = build(s, b);
    if (status != PYLLAVA_OK) drop_graph(s);
    return status;
}

static pyllava_status set_engine_threads(pyllava_session * s, int32_t n) {
    engine * e = &s->engine;
    if (n > e->n_threads) {
        if (!threads_can_start(n)) return PYLLAVA_OK; // it would abort: on as many as there are
        struct ggml_threadpool_params params = ggml_threadpool_params_default(n);
        params.poll = 0;                  // between graphs they sleep
        struct ggml_threadpool * threads = e->threads_new(&params);
        if (!threads) FAIL(PYLLAVA_ERR_DEVICE, "%d threads could not be started", n);
        e->set_threads(s->backend, threads);
        if (e->threads) e->threads_free(e->threads);
        e->threads = threads;
        e->n_threads = n;
    }
    e->set_n(s->backend, n);
    return PYLLAVA_OK;
}

static pyllava_status run(pyllava_session * s, graph * g) {
    TRY(set_engine_threads(s, g->on_engine ? pool_threads(s->pool) : 1));
    TRY(cores_take(s->model->cores, s->params.n_threads, &s->cancelled));
    atomic_store(&s->stop, 0);
    if (is_cancelled(s)) atomic_store(&s->stop, 1);
    enum ggml_status status = ggml_backend_sched_graph_compute(s->sched, g->nodes);
    cores_give(s->model->cores, s->params.n_threads);
    if (has_to_stop(s) || status == GGML_STATUS_ABORTED) return cancelled_status();
    if (status == GGML_STATUS_ALLOC_FAILED) FAIL(PYLLAVA_ERR_MEMORY, "no memory for the compute buffer");
    if (status != GGML_STATUS_SUCCESS)
        FAIL(PYLLAVA_ERR_DEVICE, "the back end failed with status %d", (int) status);
    return PYLLAVA_OK;
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
    };
    for (int32_t i = 0; i < n_views; i++) {
        const int32_t first = i * v->n_pos;
        s->attention.n_blocks = add_blocks(s, s->view_blocks, s->attention.n_blocks, first, v->n_pos,
                                           s->attention.head_dim, 1, NULL, first);
    }
    for (int32_t i = 0; i < n_views * v->n_pos; i++) s->view_visible[i] = v->n_pos;
    TRY(graph_for(s, GRAPH_VISION, n_views, 0));
    tensor * embd = s->built.out;
    put(s->built.patches, s->patches);
    TRY(run(s, &s->built.g));
    ggml_backend_tensor_get(embd, out, 0, ggml_nbytes(embd));
    for (size_t i = 0; i < ggml_nbytes(embd) / sizeof *out; i++) {
        if (!isfinite(out[i]))
            FAIL(PYLLAVA_ERR_NUMERIC, "image embeddings: entry %zu is not finite (bad weights or pixels)", i);
    }
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

static pyllava_status batch_compute(pyllava_session * s, float * out_logits) {
    batch * b = &s->batch;
    const llama_hparams * h = &s->model->llama.hparams;
    s->attention = (attention_env) {
        .env = s->env, .n_head = h->n_head, .n_head_kv = h->n_head_kv, .head_dim = h->head_dim,
        .n_blocks = b->n_blocks, .blocks = b->blocks, .n_visible = b->n_visible,
    };
    if (b->n_out == 0) b->out_rows[b->n_out++] = b->n - 1; // a graph has an end; its logits are not read
    TRY(graph_for(s, GRAPH_TEXT, b->n, b->n_out));
    const llama_input * in = &s->built.in;
    tensor * logits = s->built.out;
    put(in->embd, b->embd);
    put(in->positions, b->positions);
    put(in->cells, b->cells);
    put(in->rope_divisors, s->model->llama.rope_divisors);
    put(in->out_rows, b->out_rows);
    TRY(run(s, &s->built.g));
    if (!out_logits) return PYLLAVA_OK;
    ggml_backend_tensor_get(logits, out_logits, 0, ggml_nbytes(logits));
    for (size_t i = 0; i < ggml_nbytes(logits) / sizeof *out_logits; i++) {
        if (!isfinite(out_logits[i]))
            FAIL(PYLLAVA_ERR_NUMERIC, "logits: entry %zu is not finite (bad weights or embeddings)", i);
    }
    return PYLLAVA_OK;
}

// ----------------------------------------------------------------------------------------- prompts

// What a position holds, as one number: token ids, and a mix of key and row for pictures (odd constant:
// SplitMix64's).
static uint64_t content_of(const pyllava_span * span, int32_t i) {
    if (span->tokens) return (uint64_t) (uint32_t) span->tokens[i];
    uint64_t x = span->key + 0x9E3779B97F4A7C15u * (uint64_t) (i + 1);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    return (x ^ (x >> 27)) | (uint64_t) 1 << 63;                         // never equal to a token
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
    int32_t seq, span, row;               // the next row
    int32_t done, total;
    bool    all_rows;
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
    pyllava_status status = batch_compute(s, p->all_rows || last ? out_logits : NULL);
    if (status != PYLLAVA_OK) {
        kv_rollback(&s->kv, p->seq, n);
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
    if (n_shared == p.total) n_shared--;                                 // the last row gives the logits
    kv_trim(&s->kv, seq, n_shared);
    prompt_skip(&p, n_shared);
    const int32_t n_new = p.total - n_shared;
    while (p.done < p.total) {
        TRY(report(s, "prefill", (float) (p.done - n_shared) / (float) n_new));
        const size_t at = all_rows ? (size_t) p.done * (size_t) s->model->vocab.n : 0;
        pyllava_status status = prompt_step(s, &p, out_logits + at);
        if (status == PYLLAVA_ERR_NUMERIC) kv_trim(&s->kv, seq, 0); // earlier batches may hold the cause
        TRY(status);
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
    pyllava_status status = batch_compute(s, out_logits);
    for (int32_t i = 0; i < n; i++) {
        if (status == PYLLAVA_OK) kv_commit(&s->kv, seqs[i], &b->contents[i], 1);
        else kv_rollback(&s->kv, seqs[i], 1);
    }
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
        while (i-- > 0) kv_trim(&s->kv, seqs[i], s->kv.sequences[seqs[i]].length - 1);       // all or none
        return status;
    }
    return PYLLAVA_OK;
}

// ---------------------------------------------------------------------------------------- creation

static pyllava_status kv_type(const char * name, pyllava_precision precision, int32_t head_dim,
                              const char * what, enum ggml_type * out) {
    if (!name) name = precision == PYLLAVA_EXACT ? "f32" : "f16";
    static const enum ggml_type ALLOWED[] = {
        GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
        GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL
    };
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

static pyllava_status start_backend(pyllava_session * s) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    s->backend = cpu ? ggml_backend_dev_init(cpu, NULL) : NULL;
    if (!s->backend) FAIL(PYLLAVA_ERR_DEVICE, "the CPU back end could not be started");
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(cpu);
    engine * e = &s->engine;
    e->threads_new = (struct ggml_threadpool * (*)(struct ggml_threadpool_params *) )
        ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_new");
    e->threads_free =
        (void (*)(struct ggml_threadpool *)) ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_free");
    e->set_threads = (void (*)(ggml_backend_t, struct ggml_threadpool *)) ggml_backend_reg_get_proc_address(
        reg, "ggml_backend_cpu_set_threadpool");
    e->set_n =
        (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    e->set_abort = (ggml_backend_set_abort_callback_t) ggml_backend_reg_get_proc_address(
        reg, "ggml_backend_set_abort_callback");
    if (!e->threads_new || !e->threads_free || !e->set_threads || !e->set_n || !e->set_abort)
        FAIL(PYLLAVA_ERR_DEVICE, "the CPU back end is too old");
    e->set_abort(s->backend, has_to_stop, s);
    TRY(set_engine_threads(s, 1));
    const int32_t n = s->params.n_threads < cpu_count() ? s->params.n_threads : cpu_count();
    return pool_create(n, &s->pool);      // more would only get in each other's way
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
    size = ((size > vision ? size : vision) + FILE_ALIGNMENT - 1) / FILE_ALIGNMENT * FILE_ALIGNMENT;
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

// The compute buffer of one graph: its size, or, with reserve, the buffer itself. The scheduler's table has
// no room for two graphs, so it is emptied before each.
static pyllava_status measure_graph(pyllava_session * s, graph * g, bool reserve, uint64_t * out_size) {
    size_t size = 0;
    ggml_backend_sched_reset(s->sched);
    if (!reserve) {
        ggml_backend_sched_reserve_size(s->sched, g->nodes, &size);
        *out_size = size;
    } else if (!ggml_backend_sched_reserve(s->sched, g->nodes)) {
        FAIL(PYLLAVA_ERR_MEMORY, "no memory for the compute buffer: try a smaller n_batch");
    }
    return PYLLAVA_OK;
}

// Measures the largest graphs or, with reserve, takes the buffer for them.
static pyllava_status measure(pyllava_session * s, bool reserve) {
    graph g = { 0 };
    llama_input in;
    tensor * a, * b;
    const int32_t n_out = s->batch.n_max < MAX_LOGIT_ROWS ? s->batch.n_max : MAX_LOGIT_ROWS;
    pyllava_status status = build_text(s, &g, s->batch.n_max, n_out, &in, &a);
    if (status == PYLLAVA_OK) status = measure_graph(s, &g, reserve, &s->plan.compute_size);
    graph_free(&g);
    if (status != PYLLAVA_OK || !s->model->has_vision) return status;
    status = build_vision(s, &g, s->params.n_views, &a, &b);
    if (status == PYLLAVA_OK) status = measure_graph(s, &g, reserve, &s->plan.compute_size_vision);
    graph_free(&g);
    return status;
}

static pyllava_status check_plan(const pyllava_session * s, int32_t n_ctx) {
    const uint64_t compute = s->plan.compute_size > s->plan.compute_size_vision ? s->plan.compute_size
                                                                                : s->plan.compute_size_vision;
    const uint64_t need = s->plan.kv_size + compute, have = memory_available();
    if (need > have) {
        FAIL(PYLLAVA_ERR_MEMORY,
             "need %.2f GiB (KV cache %.2f for n_ctx %d, compute buffer %.2f), %.2f GiB are free: try a "
             "smaller n_ctx or an f16 cache",
             (double) need / (1 << 30), (double) s->plan.kv_size / (1 << 30), n_ctx,
             (double) compute / (1 << 30), (double) have / (1 << 30));
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
    if (p->n_threads == 0) p->n_threads = cores_physical();
    if (p->n_threads > MAX_THREADS) p->n_threads = MAX_THREADS;
    if (p->n_batch > p->n_ctx) p->n_batch = p->n_ctx;
    return PYLLAVA_OK;
}

static pyllava_status create(pyllava_session * s) {
    const llama_hparams * h = &s->model->llama.hparams;
    TRY(check_params(&s->params));
    kv_params kv = { .n_layer = h->n_layer,
                     .n_embd = h->n_head_kv * h->head_dim,
                     .n_ctx = s->params.n_ctx,
                     .n_seq = s->params.n_seq };
    TRY(kv_type(s->params.type_k, s->params.precision, h->head_dim, "type_k", &kv.type_k));
    TRY(kv_type(s->params.type_v, s->params.precision, h->head_dim, "type_v", &kv.type_v));
    s->plan.kv_size = kv_cache_size(&kv);
    TRY(check_plan(s, kv.n_ctx));
    TRY(start_backend(s));
    ggml_backend_buffer_type_t where = ggml_backend_get_default_buffer_type(s->backend);
    TRY(kv_cache_create(&s->kv, &kv, where));
    TRY(create_scratch(s));
    TRY(create_batch(s));
    const int32_t n_text = llama_n_nodes(&s->model->llama),
                  n_vision = s->model->has_vision ? vit_n_nodes(&s->model->vit) : 0;
    s->sched = ggml_backend_sched_new(&s->backend, &where, 1,
                                      (size_t) (n_text > n_vision ? n_text : n_vision), false, false);
    if (!s->sched) FAIL(PYLLAVA_ERR_DEVICE, "the scheduler could not be started");
    TRY(measure(s, false));
    TRY(check_plan(s, kv.n_ctx));
    return measure(s, true);
}

pyllava_status session_create(const pyllava_model * model, const pyllava_session_params * params,
                              pyllava_session ** out) {
    pyllava_session * s = calloc(1, sizeof *s);
    TRY_ALLOC(s, sizeof *s);
    s->model = model;
    s->params = *params;
    pyllava_status status = create(s);
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
    if (s->sched) ggml_backend_sched_free(s->sched);
    if (s->backend) ggml_backend_free(s->backend);
    if (s->engine.threads) s->engine.threads_free(s->engine.threads);
    pool_free(s->pool);
    kv_cache_free(&s->kv);
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
