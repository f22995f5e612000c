// devices.h - the devices that this build can compute on, from ggml's registry.
#pragma once

#include "error.h"

#include <ggml-backend.h>

#define MAX_DEVICES 15 // that one model uses: the scheduler takes 16, the CPU is one

typedef struct device_list {
    int32_t n;
    ggml_backend_dev_t items[MAX_DEVICES];
} device_list;

void devices_set_up(void);                     // silences ggml, makes CUDA sum in float32; call it first
pyllava_status devices_count(int32_t * out_n); // of ggml, which registers them at the first call
void device_describe(ggml_backend_dev_t device, pyllava_device * out);
ggml_backend_dev_t device_of(const struct ggml_tensor * t); // that holds its data; NULL: host memory, or none
bool device_is_gpu(ggml_backend_dev_t device);              // with memory of its own
bool devices_built_in(void);                                // any back end besides the CPU

// Fails if the list names any device after one has failed in this process.
pyllava_status devices_check(const device_list * devices);
#define DEVICES_WAY_OUT "start the process again, or use device=\"cpu\""

// "auto" or NULL: all GPUs, or, where there is none, the integrated ones; "cpu": none; else names of devices
// (in any case, with commas between them).
// what: the parameter, for messages.
pyllava_status devices_choose(const char * what, const char * names, device_list * out);
bool device_is_named(const char * name, const char * other); // in any case
// Whether the device sums products of 16-bit numbers in float32 without a request for each product.
bool device_sums_floats(ggml_backend_dev_t device);
// Whether attention may read several ranges of rows in one graph: tried on CUDA. With Vulkan in software,
// flash attention crashed when they differed in size.
bool device_reads_ranges(ggml_backend_dev_t device);
// Whether the device has flash attention for keys and values of these types.
bool device_has_flash(ggml_backend_dev_t device, int32_t n_head, int32_t n_head_kv, int32_t head_dim,
                      enum ggml_type k, enum ggml_type v);
