// placement.h - which device holds each part of a model. The last layers go to the devices, the first stay in
// host memory, so that a step passes from the CPU to the devices once; several devices hold consecutive
// layers each.
#pragma once

#include "devices.h"

#define ON_HOST     (-1)
#define VISION_AUTO (-2)

typedef struct placement {
    device_list devices;
    int32_t n_layer;
    int32_t layers[PYLLAVA_MAX_LAYERS]; // index into devices, or ON_HOST
    int32_t output, vision;             // likewise: the last matrix; tower and projector
    bool kv_on_host;                    // the KV cache, instead of beside its layer
    int32_t n_for_layers;               // so many of the first devices; others hold the tower alone
} placement;

// What the parts take on a device, in bytes.
typedef struct placement_sizes {
    int32_t n_layer;
    uint64_t layers[PYLLAVA_MAX_LAYERS]; // weights, and the KV cache where it lies beside them
    uint64_t output, vision;             // weights
    uint64_t compute, compute_vision;    // the buffers of their graphs
} placement_sizes;

typedef struct placement_wish {
    int32_t n_gpu_layers;       // the last n, and the output if n > n_layer; -1: all that fit
    int32_t vision;             // a device, ON_HOST, or VISION_AUTO: the main one, where it fits
    int32_t main_gpu;           // index into devices
    uint64_t free[MAX_DEVICES]; // memory
    float split[MAX_DEVICES];   // shares of the layers; all 0: by free memory
} placement_wish;

// Fills layers, output and vision of p, whose devices are known; the first n_for_layers of them take layers.
void placement_plan(placement * p, const placement_sizes * sizes, const placement_wish * wish,
                    int32_t n_for_layers);
int32_t placement_n_gpu_layers(const placement * p); // as the wish counts them
bool placement_is_on_first(const placement * p);     // the whole language model, with its KV cache
ggml_backend_dev_t placement_device(const placement * p, int32_t place); // NULL for ON_HOST
