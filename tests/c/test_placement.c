// test_placement.c - placement_plan: which device gets which layers, from sizes and free memory alone.
#include "placement.h"

#include <stdio.h>
#include <string.h>

#define MIB ((uint64_t) 1 << 20)
#define GIB ((uint64_t) 1 << 30)

typedef struct wanted {
    const char * name;
    int32_t n_layer, n_devices, n_for_layers;
    uint64_t layer, output, vision, compute, compute_vision;
    placement_wish wish;
    int32_t n_gpu_layers, vision_at, output_at;
    const char * layers; // one letter each: - the host, 0 1 2 the devices
} wanted;

// 8 layers of 100 MiB, an output of 50, a tower of 200; an eighth of free memory, at most 512 MiB, stays
// free.
#define MODEL                                                                                                \
    .n_layer = 8, .layer = 100 * MIB, .output = 50 * MIB, .vision = 200 * MIB, .compute = 64 * MIB,          \
    .compute_vision = 32 * MIB

static const wanted CASES[] = {
    { "no device", MODEL, .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO }, //
      .n_gpu_layers = 0, .vision_at = ON_HOST, .output_at = ON_HOST, .layers = "--------" },
    { "no device, all asked for", MODEL, .wish = { .n_gpu_layers = 99, .vision = VISION_AUTO }, //
      .n_gpu_layers = 0, .vision_at = ON_HOST, .output_at = ON_HOST, .layers = "--------" },
    { "all fits", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO, .free = { 4 * GIB } }, //
      .n_gpu_layers = 9, .vision_at = 0, .output_at = 0, .layers = "00000000" },
    { "the tower and some layers", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO, .free = { 800 * MIB } }, // 700 - 64 - 200 = 436
      .n_gpu_layers = 4, .vision_at = 0, .output_at = ON_HOST, .layers = "----0000" },
    { "all layers, not the output", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO, .free = { 1240 * MIB } }, // 1085 - 264 = 821
      .n_gpu_layers = 8, .vision_at = 0, .output_at = ON_HOST, .layers = "00000000" },
    { "the tower does not fit", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO, .free = { 240 * MIB } }, // 210 - 64 = 146
      .n_gpu_layers = 1, .vision_at = ON_HOST, .output_at = ON_HOST, .layers = "-------0" },
    { "nothing fits", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO, .free = { 100 * MIB } }, //
      .n_gpu_layers = 0, .vision_at = ON_HOST, .output_at = ON_HOST, .layers = "--------" },
    { "unknown memory", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO }, //
      .n_gpu_layers = 0, .vision_at = ON_HOST, .output_at = ON_HOST, .layers = "--------" },
    { "asked for, whether it fits or not", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = 99, .vision = 0, .free = { 100 * MIB } }, //
      .n_gpu_layers = 9, .vision_at = 0, .output_at = 0, .layers = "00000000" },
    { "three layers", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = 3, .vision = ON_HOST, .free = { 4 * GIB } }, //
      .n_gpu_layers = 3, .vision_at = ON_HOST, .output_at = ON_HOST, .layers = "-----000" },
    { "all layers asked for, not the output", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = 8, .vision = VISION_AUTO, .free = { 4 * GIB } }, //
      .n_gpu_layers = 8, .vision_at = 0, .output_at = ON_HOST, .layers = "00000000" },
    { "none, but the tower", MODEL, .n_devices = 1, .n_for_layers = 1,
      .wish = { .n_gpu_layers = 0, .vision = VISION_AUTO, .free = { 4 * GIB } }, //
      .n_gpu_layers = 0, .vision_at = 0, .output_at = ON_HOST, .layers = "--------" },
    { "a device for the tower alone", MODEL, .n_devices = 1, .n_for_layers = 0,
      .wish = { .n_gpu_layers = -1, .vision = 0, .free = { 4 * GIB } }, //
      .n_gpu_layers = 0, .vision_at = 0, .output_at = ON_HOST, .layers = "--------" },
    { "two alike", MODEL, .n_devices = 2, .n_for_layers = 2,
      .wish = { .n_gpu_layers = -1, .vision = VISION_AUTO, .free = { 4 * GIB, 4 * GIB } }, //
      .n_gpu_layers = 9, .vision_at = 0, .output_at = 1, .layers = "00001111" },
    { "by memory", MODEL, .n_devices = 2, .n_for_layers = 2,
      .wish = { .n_gpu_layers = -1, .vision = 1, .free = { 8 * GIB, 3 * GIB } }, //
      .n_gpu_layers = 9, .vision_at = 1, .output_at = 1, .layers = "00000001" },
    { "shares", MODEL, .n_devices = 3, .n_for_layers = 3,
      .wish = { .n_gpu_layers = -1,
                .vision = VISION_AUTO,
                .main_gpu = 2,
                .free = { 4 * GIB, 4 * GIB, 4 * GIB },
                .split = { 1, 0, 2 } },
      .n_gpu_layers = 9, .vision_at = 2, .output_at = 2, .layers = "00022222" },
    { "shares that one cannot hold", MODEL, .n_devices = 2, .n_for_layers = 2,
      .wish = { .n_gpu_layers = -1, .vision = ON_HOST, .free = { 4 * GIB, 310 * MIB }, .split = { 1, 1 } }, //
      .n_gpu_layers = 5, .vision_at = ON_HOST, .output_at = ON_HOST, .layers = "---00011" },
};

static bool is_right(const wanted * c) {
    placement p = { .devices = { .n = c->n_devices } };
    placement_sizes sizes = { .n_layer = c->n_layer,
                              .output = c->output,
                              .vision = c->vision,
                              .compute = c->compute,
                              .compute_vision = c->compute_vision };
    for (int32_t i = 0; i < c->n_layer; i++) sizes.layers[i] = c->layer;
    placement_plan(&p, &sizes, &c->wish, c->n_for_layers);
    char layers[PYLLAVA_MAX_LAYERS + 1] = "";
    for (int32_t i = 0; i < p.n_layer; i++)
        layers[i] = p.layers[i] == ON_HOST ? '-' : (char) ('0' + p.layers[i]);
    const bool right = !strcmp(layers, c->layers) && p.vision == c->vision_at && p.output == c->output_at &&
                       placement_n_gpu_layers(&p) == c->n_gpu_layers;
    if (!right) {
        printf("%s: found %s, output %d, vision %d, n_gpu_layers %d; need %s, %d, %d, %d\n", c->name, layers,
               p.output, p.vision, placement_n_gpu_layers(&p), c->layers, c->output_at, c->vision_at,
               c->n_gpu_layers);
    }
    return right;
}

int main(void) {
    int n_wrong = 0;
    const int n = sizeof CASES / sizeof *CASES;
    for (int i = 0; i < n; i++) n_wrong += !is_right(&CASES[i]);
    printf("placement: %d passed, %d failed\n", n - n_wrong, n_wrong);
    return n_wrong != 0;
}
