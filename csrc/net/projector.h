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

typedef struct projector_vip {
    tensor *input_norm, *input_norm_b; // [D]
    projector_mlp mlp;
} projector_vip;

struct projector {
    const projector_kind * kind;
    int32_t n_embd; // E
    union {         // as the kind says
        projector_mlp mlp;
        projector_vip vip;
    };
};

pyllava_status projector_read(projector * p, const pyllava_gguf * file); // its kind
pyllava_status projector_bind(projector * p, weights * w, int32_t n_embd_vision, int32_t n_embd_text);
