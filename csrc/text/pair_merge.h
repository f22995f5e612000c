// pair_merge.h - byte pair encoding (Gage, 1994; Sennrich et al., 2016): of the neighbours that may become
// one symbol, those with the best score do, the leftmost of equals, until none may. A priority queue holds
// the candidates: n symbols take O(n log n).
#pragma once

#include "error.h"

#include <stdbool.h>

typedef struct merge_symbol {
    int32_t previous, next; // -1: none
    int32_t begin, size;    // as its owner counts; size 0: merged into its left neighbour
    int32_t id;             // of the token that it is; -1: none
} merge_symbol;

typedef struct merge_candidate {
    float score;
    int32_t left, right, size, id; // symbols; size and id of their union
} merge_candidate;

typedef struct pair_merge {
    // Whether two neighbours may become one: then sets the id and the score of out.
    bool (*find)(const void * own, const merge_symbol * left, const merge_symbol * right,
                 merge_candidate * out);
    const void * own;
    merge_symbol * symbols; // [n]; after merging symbol 0 is the first, and next leads to the others
    merge_candidate * heap;
    int32_t n, n_heap, n_max;
} pair_merge;

// Forgets earlier symbols and makes room for n_max. PYLLAVA_ERR_MEMORY if there is none.
pyllava_status pair_merge_start(pair_merge * m, int32_t n_max);
void pair_merge_add(pair_merge * m, int32_t size, int32_t id); // the next symbol, of size > 0
void pair_merge_run(pair_merge * m);
void pair_merge_free(pair_merge * m);
