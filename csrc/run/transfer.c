// transfer.c - see transfer.h.
#include "transfer.h"

#include <string.h>

#define STAGING_SIZE ((size_t) 4 << 20)

void transfer_start(transfer * t, ggml_backend_dev_t device) {
    ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(device);
    t->device = device;
    t->staging = pinned ? ggml_backend_buft_alloc_buffer(pinned, STAGING_SIZE) : NULL;
}

static void free_inputs(transfer * t) {
    if (t->inputs) ggml_backend_buffer_free(t->inputs->buffer);
    ggml_free(t->ctx);
    t->inputs = NULL;
    t->ctx = NULL;
    t->begin = t->end = 0;
}

void transfer_stop(transfer * t) {
    free_inputs(t);
    ggml_backend_buffer_free(t->staging);
    *t = (transfer) { 0 };
}

static char * staging(const transfer * t) { return ggml_backend_buffer_get_base(t->staging); }

// ------------------------------------------------------------------------------------------ inputs

static void create_inputs(transfer * t, size_t size) {
    free_inputs(t);
    ggml_backend_buffer_t buffer =
        ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(t->device), size);
    if (!buffer) return;
    t->ctx = ggml_init((struct ggml_init_params) { .mem_size = ggml_tensor_overhead(), .no_alloc = true });
    t->inputs = t->ctx ? ggml_new_tensor_1d(t->ctx, GGML_TYPE_I8, (int64_t) size) : NULL;
    if (t->inputs) ggml_backend_tensor_alloc(buffer, t->inputs, ggml_backend_buffer_get_base(buffer));
    else ggml_backend_buffer_free(buffer);
}

// The first input of a graph from this tensor on, or NULL.
static tensor * next_input(const graph * g, tensor * x) {
    while (x && !(x->flags & GGML_TENSOR_FLAG_INPUT)) x = ggml_get_next_tensor(g->ctx, x);
    return x;
}

void transfer_place(transfer * t, graph * g) {
    if (!t->staging) return;
    const size_t alignment = ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(t->device));
    tensor * first = next_input(g, ggml_get_first_tensor(g->ctx));
    size_t size = 0, at = 0;
    for (tensor * x = first; x; x = next_input(g, ggml_get_next_tensor(g->ctx, x)))
        size += GGML_PAD(ggml_nbytes(x), alignment);
    if (!t->inputs || ggml_nbytes(t->inputs) < size) create_inputs(t, size);
    for (tensor * x = t->inputs ? first : NULL; x; x = next_input(g, ggml_get_next_tensor(g->ctx, x))) {
        ggml_backend_tensor_alloc(t->inputs->buffer, x, (char *) t->inputs->data + at);
        at += GGML_PAD(ggml_nbytes(x), alignment);
    }
    t->begin = t->end = 0;
}

bool transfer_has(const transfer * t, const tensor * input) {
    return t->inputs && input->buffer == t->inputs->buffer;
}

void transfer_send(transfer * t) {
    if (t->begin < t->end) ggml_backend_tensor_set(t->inputs, staging(t), t->begin, t->end - t->begin);
    t->begin = t->end;
    t->result = NULL;
}

// Inputs are put in the order in which they lie there: bytes between them are padding, and travel with them.
void transfer_put(transfer * t, const tensor * input, size_t offset, const void * data, size_t size) {
    const size_t first = (size_t) ((char *) input->data - (char *) t->inputs->data) + offset;
    t->result = NULL;
    for (size_t done = 0, n; done < size; done += n) {
        const size_t at = first + done;
        if (at < t->end || at >= t->begin + STAGING_SIZE) transfer_send(t);
        if (t->begin == t->end) t->begin = at;
        const size_t room = t->begin + STAGING_SIZE - at;
        n = size - done < room ? size - done : room;
        memcpy(staging(t) + (at - t->begin), (const char *) data + done, n);
        t->end = at + n;
    }
}

// ----------------------------------------------------------------------------------------- results

// Reads on as far as the staging memory has room: rows of a result are asked for one after the other.
static void read_ahead(transfer * t, const tensor * result, size_t at) {
    const size_t left = ggml_nbytes(result) - at;
    t->result = result;
    t->read_begin = at;
    t->read_end = at + (left < STAGING_SIZE ? left : STAGING_SIZE);
    ggml_backend_tensor_get(result, staging(t), at, t->read_end - at);
}

void transfer_get(transfer * t, const tensor * result, size_t offset, size_t size, void * out) {
    if (!t->staging || device_of(result) != t->device) {
        ggml_backend_tensor_get(result, out, offset, size);
        return;
    }
    for (size_t done = 0, n; done < size; done += n) {
        const size_t at = offset + done, left = size - done;
        if (t->result != result || at < t->read_begin || at >= t->read_end) read_ahead(t, result, at);
        n = t->read_end - at < left ? t->read_end - at : left;
        memcpy((char *) out + done, staging(t) + (at - t->read_begin), n);
    }
}
