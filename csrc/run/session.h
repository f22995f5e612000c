// session.h - a model in use: a KV cache with sequences, a runner, a batch. One thread at a time uses it.
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
    bool is_busy; // a call is running, maybe in a callback of the caller
    pyllava_progress_fn progress;
    void * progress_user;
    pyllava_session_plan plan;
    uint64_t host_size; // the part of the plan in host memory
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
// Refuses a call from the callback of another one; else sets is_busy, which the caller clears.
pyllava_status session_enter(pyllava_session * s);
pyllava_status session_check(const pyllava_session * s); // PYLLAVA_ERR_CANCELLED if cancelled
// Reports the progress of a stage; PYLLAVA_ERR_CANCELLED if the callback returns false or the session is
// cancelled.
pyllava_status session_report(pyllava_session * s, const char * stage, float fraction);

pyllava_status session_encode(pyllava_session * s, const float * pixels, int32_t n_views, float * out_embd);
// keep: if the step fails, the sequences keep the rows computed so far; else only what they held before
// (step.c).
pyllava_status session_step(pyllava_session * s, pyllava_run * runs, int32_t n_runs, bool keep);
// pyllava_generate: one step, and more until `us` microseconds have passed.
pyllava_status session_generate(pyllava_session * s, pyllava_run * runs, int32_t n_runs, int32_t n_steps,
                                int64_t us, int32_t * out_n);
