// vit.h - the vision tower, CLIP (Radford et al., 2021) or SigLIP (Zhai et al., 2023), both ViTs (Dosovitskiy
// et al., 2020), up to the hidden states that LLaVA reads.
#pragma once

#include "nn.h"
#include "vision_hparams.h"
#include "weights.h"

typedef struct vit_layer {                             // D = n_embd, F = n_ff
    tensor *ln1, *ln1_b;                               // [D]
    tensor *attn_q, *attn_q_b, *attn_k, *attn_k_b;     // [D, D], [D]
    tensor *attn_v, *attn_v_b, *attn_out, *attn_out_b; // [D, D], [D]
    tensor *ln2, *ln2_b;                               // [D]
    tensor *fc1, *fc1_b, *fc2, *fc2_b;                 // [F, D], [F], [D, F], [D]
} vit_layer;

typedef struct vit {
    vit_hparams hparams;
    int32_t n_pos;                     // rows of one view: patches and the class token, if any
    tensor *patch_embd, *patch_embd_b; // [D, 3 * patch_size^2] f32; the bias may be absent
    tensor * class_embd;               // [D], may be absent
    tensor * position_embd;            // [n_pos, D]
    tensor *pre_ln, *pre_ln_b;         // [D], may be absent
    vit_layer * layers;                // [n_layer_run]
} vit;

pyllava_status vit_bind(vit * v, weights * w);
void vit_free(vit * v);

// patches f32 [n_views * n_patch, 3 * patch_size^2] (channel, row, column) to features [n_views * n_patch,
// n_features * D].
tensor * vit_features(graph * g, const vit * v, tensor * patches); // of g->n_views
// Pixels f32 [3, image_size, image_size] of one view to its patches f32 [n_patch, 3 * patch_size^2], row by
// row.
void vit_unfold(const vit_hparams * h, const float * pixels, float * out_patches);
