// runner.h - computes for a session: it builds the graphs of steps and image views, keeps the last one for
// steps of the same shape, runs it with the engine and the threads, and can be stopped.
#pragma once

#include "batch.h"
#include "engine.h"
#include "model.h"

#include <stdatomic.h>

// The graph that the scheduler holds.
typedef struct built_graph {
    enum { GRAPH_NONE, GRAPH_TEXT, GRAPH_VISION } kind;
    row_kind rows;
    int32_t n, n_out;                      // n: rows or views; n_out: rows of logits
    attention_window windows[MAX_WINDOWS]; // of attention on devices
    int32_t n_windows;
    graph g;
    language_input in;
    tensor *patches, *out; // out: logits or image embeddings
} built_graph;

typedef struct runner {
    const pyllava_model * model;
    const pyllava_session_params * params;
    const kv_cache * kv;
    bool kv_on_device; // of any layer
    engine engine;
    int32_t n_tensors; // that a graph has room for
    pool * pool;
    kernel_env env;
    attention_env attention;
    built_graph built;
    int32_t * view_visible; // [n_views * n_pos] for the vision tower
    attention_block * view_blocks;
    float * patches;      // [n_views * n_patch, 3 * patch_size^2]
    uint16_t * mask_row;  // f16 [n_cells] of attention on devices
    atomic_int cancelled; // until runner_cancel(r, false)
    atomic_int stop;      // of this run: not cleared before it has ended
    pyllava_trace_fn trace;
    void * trace_user;
    bool trace_has_gap; // there was no memory for a tensor of the last run
} runner;

typedef struct runner_size {
    engine_size text, vision; // bytes of the largest graphs' buffers
} runner_size;

// To be called in this order. Starts the engine and the threads; prepares for the KV cache once there is one;
// measures and takes the memory that graphs need.
pyllava_status runner_start(runner * r, const pyllava_model * model, const pyllava_session_params * params);
pyllava_status runner_prepare(runner * r, const kv_cache * kv, bool kv_on_device, int32_t n_rows);
pyllava_status runner_measure(runner * r, int32_t n_rows, runner_size * out);
pyllava_status runner_reserve(runner * r, int32_t n_rows);
void runner_stop(runner * r);

int32_t runner_block_rows(const runner * r); // rows of a prompt in one attention block
// Computes the rows of a batch. Their logits are then read by runner_logits: n rows of them, from row `first`
// of the batch's out_rows on.
pyllava_status runner_rows(runner * r, const batch * b, row_kind rows);
pyllava_status runner_logits(runner * r, int32_t first, int32_t n, float * out);
pyllava_status runner_views(runner * r, const float * pixels, int32_t n_views, float * out);

void runner_cancel(runner * r, bool cancel); // from any thread
bool runner_is_cancelled(const runner * r);
pyllava_status runner_cancelled(void); // the error of cancelled work
void runner_trace(runner * r, pyllava_trace_fn fn, void * user);
// Zeroes the unused cells on devices: attention multiplies them by 0, so they must not hold NaN.
void runner_clear_unused(runner * r);
