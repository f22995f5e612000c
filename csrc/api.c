// api.c - the public functions: they check pointers and ranges and call the module that does the work.
#include "memory.h"
#include "model.h"
#include "plugins.h"
#include "quantize.h"
#include "sampler.h"
#include "prompt.h"
#include "session.h"

#include <ggml.h>
#include <stdlib.h>
#include <string.h>

#define NEED(condition, what)                                                                                \
    do {                                                                                                     \
        if (!(condition)) FAIL(PYLLAVA_ERR_ARGUMENT, "need %s", what);                                       \
    } while (0)

int pyllava_abi(void) { return PYLLAVA_ABI; }
const char * pyllava_version(void) { return PYLLAVA_VERSION; }
const char * pyllava_engine_version(void) { return ggml_version(); }
const char * pyllava_last_error(void) { return error_text(); }

// ---------------------------------------------------------------------------------------- plug-ins

pyllava_status pyllava_plugin_load(const char * const * paths, int32_t n) {
    NEED(paths && n > 0, "at least one path");
    for (int32_t i = 0; i < n; i++) NEED(paths[i], "every path");
    return plugin_load(paths, n);
}

// -------------------------------------------------------------------------------------- GGUF files

pyllava_status pyllava_gguf_open(const char * path, pyllava_gguf ** out_file) {
    NEED(path && out_file, "path and out_file");
    return gguf_open(out_file, path, true, NULL, NULL);
}

void pyllava_gguf_free(pyllava_gguf * file) { gguf_close(file); }
uint32_t pyllava_gguf_version(const pyllava_gguf * file) { return file ? file->version : 0; }
uint32_t pyllava_gguf_alignment(const pyllava_gguf * file) { return file ? file->alignment : 0; }
uint64_t pyllava_gguf_n_kv(const pyllava_gguf * file) { return file ? file->n_keys : 0; }
uint64_t pyllava_gguf_n_tensors(const pyllava_gguf * file) { return file ? file->n_tensors : 0; }

pyllava_status pyllava_gguf_kv(const pyllava_gguf * file, uint64_t i, pyllava_kv * out_kv) {
    NEED(file && out_kv && i < file->n_keys, "file, out_kv and i < n_kv");
    const gguf_key * k = &file->keys[i];
    *out_kv = (pyllava_kv) {
        .key = k->name, .type = k->type, .item_type = k->item_type, .n = k->n, .data = k->data
    };
    return PYLLAVA_OK;
}

pyllava_status pyllava_gguf_string(const pyllava_gguf * file, uint64_t i, uint64_t i_item,
                                   const char ** out_text, uint64_t * out_size) {
    NEED(file && out_text && out_size && i < file->n_keys, "file, outputs and i < n_kv");
    NEED(file->keys[i].strings && i_item < file->keys[i].n, "a string key and i_item < n");
    *out_text = file->keys[i].strings[i_item].data;
    *out_size = file->keys[i].strings[i_item].size;
    return PYLLAVA_OK;
}

pyllava_status pyllava_gguf_tensor(const pyllava_gguf * file, uint64_t i, pyllava_tensor_info * out_info) {
    NEED(file && out_info && i < file->n_tensors, "file, out_info and i < n_tensors");
    const gguf_tensor * t = &file->tensors[i];
    pyllava_tensor_info info = { .name = t->name,
                                 .type = ggml_type_name((enum ggml_type) t->type),
                                 .n_dims = t->n_dims,
                                 .offset = t->offset,
                                 .size = t->size };
    for (int d = 0; d < t->n_dims; d++) info.shape[d] = t->ne[t->n_dims - 1 - d];
    *out_info = info;
    return PYLLAVA_OK;
}

pyllava_status pyllava_gguf_record(const pyllava_gguf * file, uint64_t i, uint64_t * out_offset,
                                   uint64_t * out_size) {
    NEED(file && out_offset && out_size && i < file->n_keys, "file, outputs and i < n_kv");
    *out_offset = file->keys[i].offset;
    *out_size = file->keys[i].size;
    return PYLLAVA_OK;
}

// ----------------------------------------------------------------------------------------- devices

int32_t pyllava_device_count(void) {
    devices_set_up();
    int32_t n = 0;
    const pyllava_status status = devices_count(&n);
    return status == PYLLAVA_OK ? n : -(int32_t) status;
}

pyllava_status pyllava_device_describe(int32_t i, pyllava_device * out_device) {
    int32_t n = 0;
    TRY(devices_count(&n));
    NEED(out_device && i >= 0 && i < n, "out_device and i < the count of devices");
    device_describe(ggml_backend_dev_get((size_t) i), out_device);
    return PYLLAVA_OK;
}

int32_t pyllava_cpu_count(void) { return cpu_count(); }

// ---------------------------------------------------------------------------------- number formats

pyllava_status pyllava_tensor_type_find(const char * name, pyllava_tensor_type * out_type) {
    NEED(name && out_type, "name and out_type");
    return tensor_type_find(name, out_type);
}

pyllava_status pyllava_quantize(const pyllava_rows * rows, const float * from, void * out) {
    NEED(rows && rows->type && from && out && (uintptr_t) out % 8 == 0, "rows, from and out, aligned to 8");
    return quantize_rows(rows, from, out);
}

pyllava_status pyllava_dequantize(const pyllava_rows * rows, const void * from, float * out) {
    NEED(rows && rows->type && from && out && (uintptr_t) from % 8 == 0, "rows, from, aligned to 8, and out");
    return dequantize_rows(rows, from, out);
}

// ------------------------------------------------------------------------------------------- model

pyllava_status pyllava_model_load(const pyllava_model_params * params, pyllava_model ** out_model) {
    NEED(params && params->path && out_model, "params, path and out_model");
    return model_load(params, out_model);
}

pyllava_status pyllava_model_plan(const pyllava_model_params * params, pyllava_model_devices * out_devices) {
    NEED(params && params->path && out_devices, "params, path and out_devices");
    return model_plan(params, out_devices);
}

void pyllava_model_free(pyllava_model * model) { model_free(model); }

pyllava_status pyllava_model_describe(const pyllava_model * model, pyllava_model_info * out_info) {
    NEED(model && out_info, "model and out_info");
    model_describe(model, out_info);
    return PYLLAVA_OK;
}

pyllava_status pyllava_model_placement(const pyllava_model * model, pyllava_model_devices * out_devices) {
    NEED(model && out_devices, "model and out_devices");
    model_devices(model, out_devices);
    return PYLLAVA_OK;
}

const pyllava_gguf * pyllava_model_file(const pyllava_model * model) {
    return model ? model->text_weights.files[0] : NULL;
}

const pyllava_gguf * pyllava_model_mmproj(const pyllava_model * model) {
    return model && model->has_vision ? model->vision_weights.files[0] : NULL;
}

// --------------------------------------------------------------------------------------- tokenizer

pyllava_status pyllava_tokenize(const pyllava_model * model, const char * text, uint64_t n_bytes,
                                const pyllava_range * plain, uint64_t n_plain, bool add_bos,
                                int32_t * out_ids, uint64_t n_max, uint64_t * out_n) {
    NEED(model && (text || !n_bytes) && (plain || !n_plain) && (out_ids || !n_max) && out_n,
         "model, text and outputs");
    if (!text_is_utf8(text, n_bytes)) FAIL(PYLLAVA_ERR_ARGUMENT, "text is not valid UTF-8");
    token_list out = { out_ids, 0, n_max };
    TRY(tokenizer_encode(&model->tokenizer, (gguf_text) { text, n_bytes }, plain, n_plain, add_bos, &out));
    *out_n = out.n;
    if (out.n > n_max)
        FAIL(PYLLAVA_ERR_ARGUMENT, "text has %llu tokens, there is room for %llu", (unsigned long long) out.n,
             (unsigned long long) n_max);
    return PYLLAVA_OK;
}

pyllava_status pyllava_token_piece(const pyllava_model * model, int32_t id, bool with_special,
                                   const char ** out_text, uint64_t * out_size) {
    NEED(model && out_text && out_size, "model and outputs");
    if (id < 0 || id >= model->vocab.n)
        FAIL(PYLLAVA_ERR_ARGUMENT, "token: found %d, need 0..%d", id, model->vocab.n - 1);
    const gguf_text piece = tokenizer_piece(&model->tokenizer, id, with_special);
    *out_text = piece.data;
    *out_size = piece.size;
    return PYLLAVA_OK;
}

bool pyllava_token_is_end(const pyllava_model * model, int32_t id) {
    return model && id >= 0 && id < model->vocab.n && model->vocab.ends[id];
}

// ----------------------------------------------------------------------------------------- session

pyllava_status pyllava_session_create(const pyllava_model * model, const pyllava_session_params * params,
                                      pyllava_session ** out_session) {
    NEED(model && params && out_session, "model, params and out_session");
    return session_create(model, params, out_session);
}

void pyllava_session_free(pyllava_session * session) { session_free(session); }

pyllava_status pyllava_session_memory(const pyllava_session * session, pyllava_session_plan * out_plan) {
    NEED(session && out_plan, "session and out_plan");
    *out_plan = session_memory(session);
    return PYLLAVA_OK;
}

void pyllava_session_cancel(pyllava_session * session, bool cancel) {
    if (session) session_cancel(session, cancel);
}

void pyllava_session_trace(pyllava_session * session, pyllava_trace_fn fn, void * user) {
    if (session) session_trace(session, fn, user);
}

void pyllava_session_progress(pyllava_session * session, pyllava_progress_fn fn, void * user) {
    if (session) session_progress(session, fn, user);
}

pyllava_status pyllava_encode(pyllava_session * session, const float * pixels, int32_t n_views,
                              float * out_embd) {
    NEED(session && pixels && out_embd && n_views > 0, "session, pixels, out_embd and n_views > 0");
    NEED(session_model(session)->has_vision, "a model with a projector (mmproj)");
    return session_encode(session, pixels, n_views, out_embd);
}

static pyllava_status need_layout(const pyllava_model * model, const pyllava_layout * layout) {
    NEED(model->has_vision, "a model with a projector (mmproj)");
    NEED(layout->columns >= 0 && layout->rows >= 0 && !layout->columns == !layout->rows &&
             (int64_t) layout->columns * layout->rows <= MAX_TILES,
         "columns and rows of at most 64 tiles, or 0 and 0");
    NEED(layout->width > 0 && layout->height > 0, "a picture's width and height above 0");
    NEED(layout->flat || model->vision.vit.hparams.aspect == PYLLAVA_ANYRES,
         "flat: the projector has no newline");
    return PYLLAVA_OK;
}

pyllava_status pyllava_merge_length(const pyllava_model * model, const pyllava_layout * layout,
                                    int32_t * out_n) {
    NEED(model && layout && out_n, "model, layout and out_n");
    TRY(need_layout(model, layout));
    *out_n = vision_rows(&model->vision, layout);
    return PYLLAVA_OK;
}

pyllava_status pyllava_merge(const pyllava_model * model, const pyllava_layout * layout, const float * views,
                             float * out_rows) {
    NEED(model && layout && views && out_rows, "model, layout, views and out_rows");
    TRY(need_layout(model, layout));
    vision_merge(&model->vision, layout, views, out_rows);
    return PYLLAVA_OK;
}

static pyllava_status need_sequence(const pyllava_session * session, int32_t seq) {
    const int32_t n_seq = session_kv(session)->n_seq;
    if (seq < 0 || seq >= n_seq) FAIL(PYLLAVA_ERR_ARGUMENT, "sequence: found %d, need 0..%d", seq, n_seq - 1);
    return PYLLAVA_OK;
}

static pyllava_status need_length(const pyllava_session * session, int32_t seq, int32_t n) {
    TRY(need_sequence(session, seq));
    const int32_t length = session_kv(session)->sequences[seq].length;
    if (n < 0 || n > length)
        FAIL(PYLLAVA_ERR_ARGUMENT, "sequence %d: found n = %d, it holds %d positions", seq, n, length);
    return PYLLAVA_OK;
}

pyllava_status pyllava_step(pyllava_session * session, pyllava_run * runs, int32_t n_runs) {
    NEED(session && runs, "session and runs");
    return session_step(session, runs, n_runs, false);
}

pyllava_status pyllava_generate(pyllava_session * session, pyllava_run * runs, int32_t n_runs,
                                int32_t n_steps, double seconds, int32_t * out_n_steps) {
    NEED(session && runs && out_n_steps && n_steps > 0, "session, runs, out_n_steps and n_steps > 0");
    NEED(seconds >= 0 && seconds <= 3600, "seconds of 0 to 3600");
    return session_generate(session, runs, n_runs, n_steps, (int64_t) (seconds * 1e6), out_n_steps);
}

pyllava_status pyllava_prefill(pyllava_session * session, int32_t seq, const pyllava_span * spans,
                               int32_t n_spans, float * out_logits, int32_t * out_n_reused) {
    NEED(session && spans && n_spans > 0 && out_logits, "a session, at least one span and out_logits");
    pyllava_run run = { .seq = seq, .spans = spans, .n_spans = n_spans, .first = PYLLAVA_LAST };
    run.logits = out_logits;
    TRY(session_step(session, &run, 1, true));
    if (out_n_reused) *out_n_reused = run.n_reused;
    return PYLLAVA_OK;
}

pyllava_status pyllava_logits(pyllava_session * session, int32_t seq, const pyllava_span * spans,
                              int32_t n_spans, float * out_logits) {
    NEED(session && spans && n_spans > 0 && out_logits, "a session, at least one span and out_logits");
    pyllava_run run = { .seq = seq, .spans = spans, .n_spans = n_spans, .logits = out_logits };
    return session_step(session, &run, 1, true);
}

pyllava_status pyllava_decode(pyllava_session * session, const int32_t * seqs, const int32_t * ids, int32_t n,
                              float * out_logits) {
    NEED(session && seqs && ids && out_logits && n > 0, "session, seqs, ids, out_logits and n > 0");
    pyllava_run * runs = calloc((size_t) n, sizeof *runs);
    pyllava_span * spans = calloc((size_t) n, sizeof *spans);
    const size_t n_vocab = (size_t) session_model(session)->vocab.n;
    for (int32_t i = 0; runs && spans && i < n; i++) {
        spans[i] = (pyllava_span) { .tokens = &ids[i], .n = 1 };
        runs[i] = (pyllava_run) { .seq = seqs[i], .append = true, .kind = PYLLAVA_ANSWER, .n_spans = 1 };
        runs[i].spans = &spans[i];
        runs[i].logits = out_logits + (size_t) i * n_vocab;
    }
    pyllava_status status = runs && spans ? session_step(session, runs, n, false)
                                          : error_set(PYLLAVA_ERR_MEMORY, "out of memory for a step");
    free(runs);
    free(spans);
    return status;
}

pyllava_status pyllava_seq_length(const pyllava_session * session, int32_t seq, int32_t * out_n) {
    NEED(session && out_n, "session and out_n");
    TRY(need_sequence(session, seq));
    *out_n = session_kv(session)->sequences[seq].length;
    return PYLLAVA_OK;
}

pyllava_status pyllava_seq_shared(const pyllava_session * session, int32_t seq, const pyllava_run * runs,
                                  int32_t n_runs, int32_t * out_n) {
    NEED(session && runs && n_runs >= 0 && out_n, "session, runs and out_n");
    TRY(need_sequence(session, seq));
    int32_t n = 0;
    for (int32_t i = 0; i < n_runs; i++) {
        int64_t total;
        NEED(runs[i].spans && runs[i].n_spans > 0, "at least one span in each run");
        TRY(spans_check(runs[i].spans, runs[i].n_spans, session_model(session)->vocab.n, &total));
        const int32_t shared = run_shared(&runs[i], &session_kv(session)->sequences[seq], n);
        n += shared;
        if (shared < total) break;
    }
    *out_n = n;
    return PYLLAVA_OK;
}

pyllava_status pyllava_cells_free(pyllava_session * session, const int32_t * seqs, int32_t n,
                                  int32_t * out_n) {
    NEED(session && n >= 0 && (seqs || n == 0) && out_n, "session, seqs and out_n");
    for (int32_t i = 0; i < n; i++) {
        TRY(need_sequence(session, seqs[i]));
        for (int32_t j = 0; j < i; j++) NEED(seqs[i] != seqs[j], "each sequence once");
    }
    return session_cells_free(session, seqs, n, out_n);
}

pyllava_status pyllava_seq_trim(pyllava_session * session, int32_t seq, int32_t n) {
    NEED(session, "session");
    TRY(need_length(session, seq, n));
    return session_trim(session, seq, n);
}

pyllava_status pyllava_seq_copy(pyllava_session * session, int32_t from, int32_t to, int32_t n) {
    NEED(session, "session");
    TRY(need_length(session, from, n));
    TRY(need_sequence(session, to));
    return session_copy(session, from, to, n);
}

// ----------------------------------------------------------------------------------------- sampler

pyllava_status pyllava_sampler_create(const pyllava_model * model, const pyllava_sampler_params * params,
                                      pyllava_sampler ** out_sampler) {
    NEED(model && params && out_sampler, "model, params and out_sampler");
    return sampler_create(&model->tokenizer, params, out_sampler);
}

void pyllava_sampler_free(pyllava_sampler * sampler) { sampler_free(sampler); }

pyllava_status pyllava_sample(pyllava_sampler * sampler, const float * logits, const uint32_t * mask,
                              int32_t n_alternatives, pyllava_choice * out_choice,
                              pyllava_choice * out_alternatives) {
    NEED(sampler && logits && out_choice, "sampler, logits and out_choice");
    NEED(out_alternatives || n_alternatives == 0, "out_alternatives for n_alternatives > 0");
    TRY(sampler_check(sampler, mask, n_alternatives));
    return sampler_choose(sampler, logits, mask, n_alternatives, out_choice, out_alternatives);
}
