// session.h - a model at work: a KV cache with sequences, a runner, a batch. One thread at a time uses it.
// pyllava.h says what the calls mean.
#pragma once

#include "runner.h"

struct pyllava_session {
    const pyllava_model * model;
    pyllava_session_params params;
    runner runner;
    kv_cache kv;
    bool kv_on_device; // of any layer
    batch batch;
    bool is_busy; // a call is under way, which may be calling the caller
    pyllava_progress_fn progress;
    void * progress_user;
    pyllava_session_plan plan;
    uint64_t host_size; // what of the plan is in host memory
};

pyllava_status session_create(const pyllava_model * model, const pyllava_session_params * params,
                              pyllava_session ** out);
void session_free(pyllava_session * s);
void session_cancel(pyllava_session * s, bool cancel);
void session_trace(pyllava_session * s, pyllava_trace_fn fn, void * user);
void session_progress(pyllava_session * s, pyllava_progress_fn fn, void * user);
pyllava_session_plan session_memory(const pyllava_session * s);
const pyllava_model * session_model(const pyllava_session * s);
const kv_cache * session_kv(const pyllava_session * s);
pyllava_status session_trim(pyllava_session * s, int32_t seq, int32_t n);
pyllava_status session_copy(pyllava_session * s, int32_t from, int32_t to, int32_t n);
// Cells that would be free if these sequences, each at most once, held nothing.
pyllava_status session_cells_free(pyllava_session * s, const int32_t * seqs, int32_t n, int32_t * out_n);
// Refuses a call from the callback of another one; is_busy is to be taken back.
pyllava_status session_enter(pyllava_session * s);
pyllava_status session_check(const pyllava_session * s); // PYLLAVA_ERR_CANCELLED where the work is to end
// Tells the caller how far a stage is; PYLLAVA_ERR_CANCELLED where the work is to end.
pyllava_status session_report(pyllava_session * s, const char * stage, float fraction);

pyllava_status session_encode(pyllava_session * s, const float * pixels, int32_t n_views, float * out_embd);
// keep: on failure the sequences keep what was computed, and else what they held (step.c).
pyllava_status session_step(pyllava_session * s, pyllava_run * runs, int32_t n_runs, bool keep);
// pyllava_generate; at least one step, more for so many microseconds.
pyllava_status session_generate(pyllava_session * s, pyllava_run * runs, int32_t n_runs, int32_t n_steps,
                                int64_t us, int32_t * out_n);
