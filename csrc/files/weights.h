// weights.h - binds the tensors of GGUF files to the names and shapes a model asks for. The calls that ask
// are the model's specification: each states type, shape and name once. In host memory, matrices stay in the
// file's bytes (any ggml type, no copy); vectors and tables that are not f32 are widened to f32 in memory of
// our own. What is asked for after weights_place goes to a device: it is copied there by weights_finish.
#pragma once

#include "devices.h"
#include "gguf.h"

#include <ggml-backend.h>
#include <ggml.h>

typedef struct upload upload;

typedef struct weights_store { // what one device holds
    ggml_backend_dev_t device;
    struct ggml_context * ctx; // tensor headers
    ggml_backend_buffer_t buffer;
} weights_store;

typedef struct weights {
    pyllava_gguf ** files; // owned; more than one where a model is split
    int32_t n_files;
    bool ** used;              // [n_files][n_tensors]
    struct ggml_context * ctx; // tensor headers only
    int32_t n_bound, n_max;
    ggml_backend_buffer_t * buffers; // [n_files] over the files' bytes, then one for each block of our own
    void ** blocks;
    int32_t n_blocks;
    ggml_backend_dev_t place; // where what is asked for goes; NULL: host memory
    weights_store stores[MAX_DEVICES];
    int32_t n_stores;
    upload * uploads; // [n_max] what is to be copied
    int32_t n_uploads;
    uint64_t size;         // bytes bound
    pyllava_status status; // the first failure; everything after it returns NULL
} weights;

// Takes over the first file and opens the rest of a split model beside it.
pyllava_status weights_open(weights * w, const char * path, bool use_mmap, pyllava_progress_fn progress,
                            const logger * log);
// Room for all tensors of the files, one of them twice: a tied output may be on a device, too.
pyllava_status weights_prepare(weights * w);
void weights_close(weights * w);
// Where the tensors asked for from now on go; NULL: host memory. A matrix that the device has no kernel for
// stays in host memory.
void weights_place(weights * w, ggml_backend_dev_t device);
uint64_t weights_size(const weights * w, const char * prefix); // bytes of all tensors so named

// A linear layer's matrix [n_out, n_in].
struct ggml_tensor * weights_matrix(weights * w, int64_t n_out, int64_t n_in, const char * format, ...)
    PYLLAVA_PRINTF(4, 5);
// f32 [n] and f32 [n_rows, n].
struct ggml_tensor * weights_vector(weights * w, int64_t n, const char * format, ...) PYLLAVA_PRINTF(3, 4);
struct ggml_tensor * weights_table(weights * w, int64_t n_rows, int64_t n, const char * format, ...)
    PYLLAVA_PRINTF(4, 5);
// A convolution kernel as the f32 matrix [n_out, n_in] it is on unfolded patches; n_in = product of its other
// dimensions.
struct ggml_tensor * weights_unfolded(weights * w, int64_t n_out, int64_t n_in, const char * format, ...)
    PYLLAVA_PRINTF(4, 5);
bool weights_has(const weights * w, const char * format, ...) PYLLAVA_PRINTF(2, 3);
const gguf_tensor * weights_find(const weights * w, const char * name, int32_t * out_file);
void weights_ignore(weights * w, const char * prefix); // these may stay unused
// Copies to the devices what belongs there. Fails if a request failed, or with the count and an example where
// tensors of the files were not asked for.
pyllava_status weights_finish(weights * w, pyllava_progress_fn progress, void * user);
