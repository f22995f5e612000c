// vision_hparams.h - the numbers that describe a vision tower and how a picture is cut for it, read and
// checked from the metadata of its file.
#pragma once

#include "gguf.h"

#define MAX_PINPOINTS 64
#define MAX_TILES     64 // of one picture
#define MAX_FEATURES  8  // hidden states that are read

typedef enum vit_act { VIT_QUICK_GELU, VIT_GELU, VIT_GELU_TANH, VIT_SILU } vit_act;

// The vision tower (architecture "clip").
typedef struct vit_hparams {
    int32_t image_size, patch_size, n_embd, n_ff, n_head, n_layer;
    bool is_siglip;                 // no class token, a bias on the patches; else CLIP
    int32_t n_features;             // hidden states that are read; their rows stand side by side
    int32_t features[MAX_FEATURES]; // in this order; 0 is what the first layer reads
    int32_t n_layer_run;            // layers computed: the deepest of features
    int32_t n_patch; // (image_size / patch_size)^2, rounded down: the rest of the pixels is not seen
    float eps, image_mean[3], image_std[3];
    vit_act act;
    pyllava_aspect aspect;
    int32_t anyres_max; // tiles are reduced to about so many views' rows; 0: they are not
    int32_t n_pinpoints;
    int32_t pinpoints[MAX_PINPOINTS][2]; // resolutions of the tiled picture: width, height
} vit_hparams;

pyllava_status vit_hparams_read(vit_hparams * out, const pyllava_gguf * file);
