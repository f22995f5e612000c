// merge.h - from the embeddings of a picture's views to the rows that the language model sees: LLaVA-NeXT's
// spatial_unpad (Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024), in
// LLaVA-OneVision (Li et al., 2024) with large grids reduced; or all patches of the tiles row by row.
#pragma once

#include "nn.h"
#include "weights.h"

typedef struct merge {
    int32_t n_side, n_embd; // a view is n_side x n_side rows
    int32_t n_most;         // a grid of clearly more than n_most views' rows is reduced to that; 0: none is
    tensor * newline;       // [n_embd]; NULL in LLaVA-1.5
} merge;

pyllava_status merge_bind(merge * m, weights * w, bool with_newline, int32_t n_side, int32_t n_embd);
int32_t merge_length(const merge * m, const pyllava_layout * layout);
// views [1 + columns * rows, n_side^2, n_embd] to out [merge_length, n_embd].
void merge_apply(const merge * m, const pyllava_layout * layout, const float * views, float * out);
