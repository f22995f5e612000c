// session.c - see session.h: creation, with the plan of its memory, and all calls that are not steps.
#include "session.h"

#include "guard.h"
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_THREADS 256

const pyllava_model * session_model(const pyllava_session * s) { return s->model; }
const kv_cache * session_kv(const pyllava_session * s) { return &s->kv; }
pyllava_session_plan session_memory(const pyllava_session * s) { return s->plan; }
void session_cancel(pyllava_session * s, bool cancel) { runner_cancel(&s->runner, cancel); }

void session_trace(pyllava_session * s, pyllava_trace_fn fn, void * user) {
    runner_trace(&s->runner, fn, user);
}

void session_progress(pyllava_session * s, pyllava_progress_fn fn, void * user) {
    s->progress = fn;
    s->progress_user = user;
}

pyllava_status session_enter(pyllava_session * s) {
    if (s->is_busy) FAIL(PYLLAVA_ERR_ARGUMENT, "the session is at work: this is a call from its callback");
    s->is_busy = true;
    return PYLLAVA_OK;
}

pyllava_status session_trim(pyllava_session * s, int32_t seq, int32_t n) {
    TRY(session_enter(s));
    kv_trim(&s->kv, seq, n);
    s->is_busy = false;
    return PYLLAVA_OK;
}

pyllava_status session_copy(pyllava_session * s, int32_t from, int32_t to, int32_t n) {
    TRY(session_enter(s));
    kv_copy(&s->kv, from, to, n);
    s->is_busy = false;
    return PYLLAVA_OK;
}

pyllava_status session_cells_free(pyllava_session * s, const int32_t * seqs, int32_t n, int32_t * out_n) {
    TRY(session_enter(s));
    *out_n = kv_free_without(&s->kv, seqs, n);
    s->is_busy = false;
    return PYLLAVA_OK;
}

pyllava_status session_check(const pyllava_session * s) {
    return runner_is_cancelled(&s->runner) ? runner_cancelled() : PYLLAVA_OK;
}

pyllava_status session_report(pyllava_session * s, const char * stage, float fraction) {
    const bool goes_on = !s->progress || s->progress(stage, fraction, s->progress_user);
    return goes_on ? session_check(s) : runner_cancelled();
}

static pyllava_status encode(pyllava_session * s, const float * pixels, int32_t n_views, float * out_embd) {
    const vision * v = &s->model->vision;
    const vit_hparams * h = &v->vit.hparams;
    const size_t n_pixels = 3 * (size_t) h->image_size * (size_t) h->image_size;
    const size_t n_out = (size_t) vision_rows(v, NULL) * (size_t) v->projector.n_embd;
    for (int32_t i = 0; i < n_views; i += s->params.n_views) {
        TRY(session_report(s, "encode", (float) i / (float) n_views));
        const int32_t n = n_views - i < s->params.n_views ? n_views - i : s->params.n_views;
        TRY(runner_views(&s->runner, pixels + (size_t) i * n_pixels, n, out_embd + (size_t) i * n_out));
    }
    return session_report(s, "encode", 1.0f);
}

pyllava_status session_encode(pyllava_session * s, const float * pixels, int32_t n_views, float * out_embd) {
    TRY(session_enter(s));
    const pyllava_status status = encode(s, pixels, n_views, out_embd);
    s->is_busy = false;
    return status;
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

static pyllava_status check_plan(const pyllava_session * s, uint64_t kv_on_host) {
    const uint64_t need = s->host_size, have = memory_available();
    const int32_t n_cells = s->params.kv_cells;
    const char * what = n_cells ? "kv_cells" : "n_ctx";
    if (need > have) {
        FAIL(PYLLAVA_ERR_MEMORY,
             "need %.2f GiB (KV cache %.2f for %s %d, compute buffer %.2f), %.2f GiB are free: try a "
             "smaller %s or an f16 cache",
             (double) need / (1 << 30), (double) kv_on_host / (1 << 30), what,
             n_cells ? n_cells : s->params.n_ctx, (double) (need - kv_on_host) / (1 << 30),
             (double) have / (1 << 30), what);
    }
    return PYLLAVA_OK;
}

static pyllava_status check_params(pyllava_session_params * p) {
    if (p->n_ctx < 1 || p->n_ctx > 1 << 24)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_ctx: found %d, need 1..%d", p->n_ctx, 1 << 24);
    if (p->n_batch < 1 || p->n_batch > 2048)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_batch: found %d, need 1..2048", p->n_batch);
    if (p->n_seq < 1 || p->n_seq > 256) FAIL(PYLLAVA_ERR_ARGUMENT, "n_seq: found %d, need 1..256", p->n_seq);
    if (p->n_views < 1 || p->n_views > MAX_TILES + 1)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_views: found %d, need 1..%d", p->n_views, MAX_TILES + 1);
    if (p->n_threads < 0 || p->n_threads > MAX_THREADS)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_threads: found %d, need 0..%d", p->n_threads, MAX_THREADS);
    if (p->precision != PYLLAVA_EXACT && p->precision != PYLLAVA_FAST)
        FAIL(PYLLAVA_ERR_ARGUMENT, "precision: found %d", (int) p->precision);
    const int64_t most_cells = (int64_t) p->n_ctx * p->n_seq;
    if (p->kv_cells && (p->kv_cells < p->n_ctx || p->kv_cells > most_cells)) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "kv_cells: found %d, need 0 or %d..%lld (n_ctx to n_ctx times n_seq)",
             p->kv_cells, p->n_ctx, (long long) most_cells);
    }
    if (!p->kv_cells && most_cells > INT32_MAX)
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

// Creates the KV cache, each layer's part where the placement says.
static pyllava_status create_cache(pyllava_session * s) {
    const language_hparams * h = &s->model->language.hparams;
    const placement * p = &s->model->placement;
    kv_params kv = { .n_layer = h->n_layer,
                     .n_embd = h->n_head_kv * h->head_dim,
                     .n_ctx = s->params.n_ctx,
                     .n_seq = s->params.n_seq };
    kv.n_cells = s->params.kv_cells ? s->params.kv_cells : kv.n_ctx * kv.n_seq;
    TRY(kv_type(s->params.type_k, s->params.precision, h->head_dim, "type_k", &kv.type_k));
    TRY(kv_type(s->params.type_v, s->params.precision, h->head_dim, "type_v", &kv.type_v));
    ggml_backend_buffer_type_t where[PYLLAVA_MAX_LAYERS];
    int32_t n_on_host = 0;
    for (int32_t i = 0; i < h->n_layer; i++) {
        where[i] = engine_memory(&s->runner.engine, p, p->layers[i]);
        n_on_host += p->kv_on_host || p->layers[i] == ON_HOST;
    }
    s->kv_on_device = kv.in_ranges = n_on_host < h->n_layer;
    for (int32_t i = 0; i < p->devices.n; i++) kv.in_ranges &= device_reads_ranges(p->devices.items[i]);
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
    const pyllava_session_params * p = &s->params;
    TRY(check_params(&s->params));
    if (s->model->has_vision) s->params.n_views = vision_views(&s->model->vision, s->params.n_views);
    TRY(runner_start(&s->runner, s->model, p));
    TRY(create_cache(s));
    const int32_t n_rows = p->n_batch > p->n_seq ? p->n_batch : p->n_seq;
    TRY(runner_prepare(&s->runner, &s->kv, s->kv_on_device, n_rows));
    TRY(batch_create(&s->batch, n_rows, s->model->language.hparams.n_embd));
    const uint64_t kv_on_host = s->host_size;
    runner_size size;
    TRY(runner_measure(&s->runner, n_rows, &size));
    s->plan.compute_size = size.text.all;
    s->plan.compute_size_vision = size.vision.all;
    s->host_size += size.text.host > size.vision.host ? size.text.host : size.vision.host;
    TRY(check_plan(s, kv_on_host));
    return runner_reserve(&s->runner, n_rows);
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
    runner_stop(&s->runner);
    if (!s->kv_on_device || !guard_has_failed()) guarded(free_cache, s); // else freed with the process
    batch_free(&s->batch);
    free(s);
}
