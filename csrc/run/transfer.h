// transfer.h - how the inputs and results of graphs travel to the first device and back: through pinned host
// memory, since a device copies to and from ordinary memory several times slower, and in few large pieces,
// since each takes about 10 us. ggml ends these calls by exceptions when a device fails: call them guarded.
#pragma once

#include "nn.h"

typedef struct transfer {
    ggml_backend_dev_t device;
    ggml_backend_buffer_t staging; // pinned host memory; NULL: data travel without it
    // The inputs of the loaded graph, one after the other in memory of the device.
    struct ggml_context * ctx;
    tensor * inputs;   // i8 [capacity], or NULL: the scheduler copies each input by itself
    size_t begin, end; // bytes of it that wait in the staging memory
    // The result that was read last.
    const tensor * result;
    size_t read_begin, read_end; // bytes of it that are in the staging memory
} transfer;

void transfer_start(transfer * t, ggml_backend_dev_t device);
void transfer_stop(transfer * t);

// Before a graph is loaded: its inputs shall lie on the device, as all of the graph does. Where there is no
// memory for them, the scheduler copies them.
void transfer_place(transfer * t, graph * g);
// Puts data into an input that was placed. They are there after transfer_send.
void transfer_put(transfer * t, const tensor * input, size_t offset, const void * data, size_t size);
void transfer_send(transfer * t); // before each run
bool transfer_has(const transfer * t, const tensor * input);
void transfer_get(transfer * t, const tensor * result, size_t offset, size_t size, void * out);
