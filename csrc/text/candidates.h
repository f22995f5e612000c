// candidates.h - the tokens that can still be chosen, and what the sampler's stages do with them: weigh them,
// cut them off below a sum, draw one. Nothing is sorted but the few that lie next to a cut. Sums are made in
// a fixed order from operations that IEEE 754 fixes: a seed gives the same tokens on every platform.
#pragma once

#include "error.h"

// Logits and weights that lie side by side.
typedef struct listing {
    int32_t n;
    float * logits;   // [n] finite
    float * weights;  // [n]
    int32_t * places; // [n] of the candidates; NULL: 0, 1, 2, ...
} listing;

typedef struct candidates {
    int32_t n, n_vocab; // how many are left, and of how many
    int32_t * ids;      // [n] ascending
    float * logits;     // [n] finite
    float * weights;    // [n] as candidates_weigh or candidates_weigh_alike left them
    float largest;      // of the logits
    bool weighed;       // the weights are those of temperature 1,
    float base;         // and are 1 for this logit
    double * sums;      // of each block of weights
    double total;       // of all weights
    listing near;       // room of candidates_cut: what may lie at the cut
    int32_t * bins;     // [n] likewise
    double * shares;    // [4][N_BINS] likewise
    uint64_t * keys;    // [n] likewise
} candidates;

// Where a list ends that goes by (logit, id), the largest logit and the lowest id first: its last one.
typedef struct cut {
    float logit;
    int32_t at; // its place among the candidates
} cut;

pyllava_status candidates_create(candidates * c, int32_t n_vocab);
void candidates_free(candidates * c);
// Makes them the whole vocabulary. Logits that are not finite are an error.
pyllava_status candidates_load(candidates * c, const float * logits);
// Gives those of n ids that are still there another logit: fn(id, of), finite and the same each time.
typedef float (*candidates_logit_fn)(int32_t id, const void * of);
void candidates_change(candidates * c, const int32_t * ids, int32_t n, candidates_logit_fn fn,
                       const void * of);
// weight = exp((logit - base) / temperature) with a relative error below 2e-7 * (2 + |log weight|); base is
// the largest logit, or was before some were changed. Where the weight is less than e^-87 it is 0: all of
// those together are no share of 1e-30, which neither a sum nor a draw can tell.
void candidates_weigh(candidates * c, float temperature);
void candidates_weigh_alike(candidates * c); // each weighs 1
// The end of the shortest list, one at least, whose weights reach goal; of everything, if they do not. Logits
// more than `widest` below the largest are told apart only if the cut lies there: a matter of speed alone.
cut candidates_cut(candidates * c, double goal, float widest);
void candidates_keep(candidates * c, cut last);                     // that list
void candidates_keep_best(candidates * c);                          // the largest logit of the lowest id
void candidates_keep_masked(candidates * c, const uint32_t * mask); // of the whole vocabulary
// The place of the one at which the running sum of weights exceeds share * total, 0 <= share < 1.
int32_t candidates_draw(const candidates * c, double share);
// Their ids in the order of (logit, id).
void candidates_sort(candidates * c);
