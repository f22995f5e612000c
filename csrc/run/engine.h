// engine.h - runs graphs on the back ends of a model's devices and of the CPU, through ggml's scheduler.
// ggml's own CPU threads are started when a graph first needs them: our kernels use the session's pool.
#pragma once

#include "nn.h"
#include "placement.h"
#include "transfer.h"

typedef struct engine {
    int32_t n; // back ends: one for each device, then the CPU's
    ggml_backend_t backends[MAX_DEVICES + 1];
    ggml_backend_buffer_type_t memory[MAX_DEVICES + 1]; // buffer type of each back end's graphs
    ggml_backend_sched_t sched;
    transfer transfer; // to and from the first device
    bool broken;       // a call of ggml did not return: scheduler and back ends can neither be used nor freed
    int32_t n_threads; // of those below
    struct ggml_threadpool * threads;
    struct ggml_threadpool * (*threads_new)(struct ggml_threadpool_params *);
    void (*threads_free)(struct ggml_threadpool *);
    void (*set_threads)(ggml_backend_t, struct ggml_threadpool *);
    ggml_backend_set_n_threads_t set_n;
    ggml_abort_callback has_to_stop; // what the back ends and the scheduler were started with
    void * user;
    int32_t n_nodes;
    bool offload;
    ggml_backend_sched_eval_callback observer;
    void * observer_user;
} engine;

// Starts the back ends; has_to_stop is called between the nodes that the CPU computes.
pyllava_status engine_start(engine * e, const placement * p, ggml_abort_callback has_to_stop, void * user);
void engine_stop(engine * e);
// The memory for the KV cache of a layer at this place.
ggml_backend_buffer_type_t engine_memory(const engine * e, const placement * p, int32_t place);

// Creates the scheduler for graphs of at most n_nodes. offload: for many tokens, matrices in host memory may
// be copied to a device.
pyllava_status engine_schedule(engine * e, int32_t n_nodes, bool offload);
// fn sees every tensor that is computed from now on; NULL: none does.
void engine_observe(engine * e, ggml_backend_sched_eval_callback fn, void * user);
// Bytes of a graph's buffers: all of them, and those in host memory.
typedef struct engine_size {
    uint64_t all, host;
} engine_size;
pyllava_status engine_measure(engine * e, graph * g, engine_size * out);
pyllava_status engine_reserve(engine * e, graph * g); // allocates them
pyllava_status engine_load(engine * e, graph * g);    // makes a graph ready for its inputs
// Before a graph is reserved or loaded, if all of it lies on the first device: see transfer_place.
pyllava_status engine_place_inputs(engine * e, graph * g);
pyllava_status engine_put(engine * e, tensor * t, size_t offset, const void * data, size_t size); // in bytes
// Runs the graph that was loaded, with n_threads where ggml computes on the CPU.
// PYLLAVA_ERR_CANCELLED if has_to_stop returned true.
pyllava_status engine_run(engine * e, graph * g, int32_t n_threads);
pyllava_status engine_get_rows(engine * e, const tensor * t, int64_t first, int64_t n, void * out);
pyllava_status engine_get(engine * e, const tensor * t, void * out); // a whole result
// Zeroes rows of a tensor that lies on a device.
pyllava_status engine_zero(engine * e, tensor * t, int64_t first, int64_t n);
