// engine.h - what runs graphs: the back ends of a model's devices and of the CPU, ggml's scheduler over them,
// and the threads of the CPU's. Those are started when a graph first needs them: our kernels have their own.
#pragma once

#include "nn.h"
#include "placement.h"

typedef struct engine {
    int32_t n; // back ends: one for each device, then the CPU's
    ggml_backend_t backends[MAX_DEVICES + 1];
    ggml_backend_buffer_type_t memory[MAX_DEVICES + 1]; // that their graphs are computed in
    ggml_backend_sched_t sched;
    ggml_backend_buffer_t staging; // host memory that the first device writes to by itself, or NULL
    bool broken;                   // a back end has given up: nothing more can be computed
    int32_t n_threads;             // 1 until more are needed
    struct ggml_threadpool * threads;
    struct ggml_threadpool * (*threads_new)(struct ggml_threadpool_params *);
    void (*threads_free)(struct ggml_threadpool *);
    void (*set_threads)(ggml_backend_t, struct ggml_threadpool *);
    ggml_backend_set_n_threads_t set_n;
} engine;

// Starts the back ends; has_to_stop is asked between the nodes that the CPU computes.
pyllava_status engine_start(engine * e, const placement * p, ggml_abort_callback has_to_stop, void * user);
void engine_stop(engine * e);
// Where the KV cache of a layer at this place goes.
ggml_backend_buffer_type_t engine_memory(const engine * e, const placement * p, int32_t place);

// For graphs of at most n_nodes. offload: matrices in host memory may be sent to a device for many tokens.
pyllava_status engine_schedule(engine * e, int32_t n_nodes, bool offload);
// fn sees every tensor that is computed from now on; NULL: none does.
void engine_observe(engine * e, ggml_backend_sched_eval_callback fn, void * user);
// Bytes of a graph's buffers: all of them, and those in host memory.
typedef struct engine_size {
    uint64_t all, host;
} engine_size;
pyllava_status engine_measure(engine * e, graph * g, engine_size * out);
pyllava_status engine_reserve(engine * e, graph * g); // takes them
pyllava_status engine_load(engine * e, graph * g);    // makes a graph ready for its inputs
// Runs the graph that was loaded, on n_threads of the CPU where ggml computes there.
// PYLLAVA_ERR_CANCELLED where has_to_stop said so.
pyllava_status engine_run(engine * e, graph * g, int32_t n_threads);
pyllava_status engine_get_rows(engine * e, const tensor * t, int64_t first, int64_t n, void * out);
pyllava_status engine_get(engine * e, const tensor * t, void * out); // a whole result
// Zeroes rows of a tensor that lies on a device.
pyllava_status engine_zero(engine * e, tensor * t, int64_t first, int64_t n);
