// projector.h - from the tower's features to the language model's embeddings: LLaVA-1.5's two-layer MLP
// (Liu et al., "Improved Baselines with Visual Instruction Tuning", 2023).
#pragma once

#include "nn.h"
#include "vision_hparams.h"
#include "weights.h"

typedef struct projector {
    int32_t n_embd;        // E, width of the language model
    tensor *mm_0, *mm_0_b; // [E, D], [E]
    tensor *mm_2, *mm_2_b; // [E, E], [E]
} projector;

int32_t projector_n_tensors(void);
pyllava_status projector_bind(projector * p, weights * w, const vit_hparams * h, int32_t n_embd_text);
tensor * projector_apply(graph * g, const projector * p, tensor * x); // [n, D] to [n, E]
