// projector.h - from the tower's features to the language model's embeddings. A kind of projector is a row of
// KINDS in projector.c.
#pragma once

#include "nn.h"
#include "weights.h"

typedef struct projector projector;

// D: width of the tower's features, E: of the language model.
typedef struct projector_kind {
    const char * name; // clip.projector_type of its files
    const char * last; // its last matrix [E, ...]
    pyllava_status (*bind)(projector * p, weights * w, int64_t D, int64_t E); // its tensors
    tensor * (*apply)(graph * g, const projector * p, tensor * x);            // [n, D] to [n', E]
    int32_t (*side)(int32_t n_side); // n_side x n_side patches become side x side rows
} projector_kind;

typedef struct projector_mlp {
    tensor *mm_0, *mm_0_b; // [E, D], [E]
    tensor *mm_2, *mm_2_b; // [E, E], [E]
} projector_mlp;

typedef struct projector_mlp_norm {
    tensor *mm_0, *mm_0_b; // [E, D], [E]
    tensor *mm_1, *mm_1_b; // [E]
    tensor *mm_3, *mm_3_b; // [E, E], [E]
    tensor *mm_4, *mm_4_b; // [E]
} projector_mlp_norm;

// A block of MobileNetV3 (Howard et al., 2019): a convolution in each channel, squeeze-and-excitation, a
// matrix. U: width between fc1 and fc2.
typedef struct mobile_block {
    tensor * depthwise;                // [E, 9]
    tensor *norm_1, *norm_1_b;         // [E]
    tensor *fc1, *fc1_b, *fc2, *fc2_b; // [U, E], [U], [E, U], [E]
    tensor * pointwise;                // [E, E]
    tensor *norm_2, *norm_2_b;         // [E]
} mobile_block;

typedef struct projector_ldp {
    projector_mlp mlp;
    mobile_block blocks[2];
} projector_ldp;

typedef struct projector_ldpv2 {
    projector_mlp mlp;
    tensor *peg, *peg_b; // [E, 9], [E]
} projector_ldpv2;

typedef struct projector_vip {
    tensor *input_norm, *input_norm_b; // [D]
    projector_mlp mlp;
} projector_vip;

struct projector {
    const projector_kind * kind;
    int32_t n_embd;        // E
    int32_t n_side;        // of the square of patches
    union {                // as the kind says
        projector_mlp mlp; // linear: mm_0 alone
        projector_mlp_norm mlp_norm;
        projector_ldp ldp;
        projector_ldpv2 ldpv2;
        projector_vip vip;
    };
};

pyllava_status projector_read(projector * p, const pyllava_gguf * file); // its kind
// n_side: of the square of patches.
pyllava_status projector_bind(projector * p, weights * w, int32_t n_side, int32_t n_embd_vision,
                              int32_t n_embd_text);
