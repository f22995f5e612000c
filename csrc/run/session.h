// session.h - what it takes to run a model: KV cache, threads, compute buffers. See pyllava.h for what the
// calls mean.
#pragma once

#include "model.h"

pyllava_status session_create(const pyllava_model * model, const pyllava_session_params * params,
                              pyllava_session ** out);
void session_free(pyllava_session * s);
void session_cancel(pyllava_session * s, bool cancel);
void session_trace(pyllava_session * s, pyllava_trace_fn fn, void * user);
void session_progress(pyllava_session * s, pyllava_progress_fn fn, void * user);
pyllava_session_plan session_memory(const pyllava_session * s);
const pyllava_model * session_model(const pyllava_session * s);
kv_cache * session_kv(pyllava_session * s);

pyllava_status session_encode(pyllava_session * s, const float * pixels, int32_t n_views, float * out_embd);
// all_rows: logits of every row and no reuse; else of the last row alone.
pyllava_status session_prefill(pyllava_session * s, int32_t seq, const pyllava_span * spans, int32_t n_spans,
                               bool all_rows, float * out_logits, int32_t * out_n_reused);
pyllava_status session_decode(pyllava_session * s, const int32_t * seqs, const int32_t * ids, int32_t n,
                              float * out_logits);
