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

#define CANDIDATES_BINS 512

typedef struct candidates {
    int32_t n, n_vocab; // how many are left, and of how many
    int32_t * ids;      // [n] ascending
    float * logits;     // [n] finite
    float * weights;    // [n] as candidates_weigh or candidates_weigh_alike left them
    float largest;      // of the logits
    float temperature;  // that the logits are to be divided by
    bool weighed;       // the weights are those of these logits at this temperature,
    float base;         // and are 1 for this logit
    double * sums;      // of each block of weights
    double total;       // of all weights
    listing near;       // room of candidates_cut: what may lie at the cut
    int32_t * bins;     // [n] likewise
    double * shares;    // [4][CANDIDATES_BINS] likewise
    uint64_t * keys;    // [n] likewise
    float * scores;     // [n] of candidates_keep_typical; the weights before candidates_favour
} candidates;

// Where a list ends that goes by (logit, id), the largest logit and the lowest id first: its last one.
typedef struct cut {
    float logit;
    int32_t at; // its place among the candidates
} cut;

pyllava_status candidates_create(candidates * c, int32_t n_vocab);
void candidates_free(candidates * c);
// Makes them the whole vocabulary at temperature 1. Logits that are not finite are an error.
pyllava_status candidates_load(candidates * c, const float * logits);
// Gives those of n ids that are still there another logit, one after the other: fn(its logit, its place among
// the ids, of), no NaN, cut to what a float holds.
typedef double (*candidates_logit_fn)(float logit, int32_t i, const void * of);
void candidates_change(candidates * c, const int32_t * ids, int32_t n, candidates_logit_fn fn,
                       const void * of);
// Divides the logits by a temperature > 0, so to say: the logits stay as they are.
void candidates_temper(candidates * c, float temperature);
// weight = exp((logit - base) / temperature) with a relative error below 2e-7 * (2 + |log weight|); base is
// the largest logit, or was before some were changed. Where the weight is less than e^-87 it is 0: all of
// those together are no share of 1e-30, which neither a sum nor a draw can tell.
void candidates_weigh(candidates * c);
void candidates_weigh_alike(candidates * c); // each weighs 1
// The mean logit by weight, counted from base, of weights that it makes if need be.
double candidates_mean(candidates * c);
double candidates_deviation(const candidates * c); // the standard deviation of the logits
// The end of the shortest list, one at least, whose weights reach goal; of everything, if they do not. Logits
// more than `widest` below the largest are told apart only if the cut lies there: a matter of speed alone.
cut candidates_cut(candidates * c, double goal, float widest);
void candidates_keep(candidates * c, cut last); // that list
// The shortest list, by the distance of the logit from the mean logit, that holds more than a share of all.
void candidates_keep_typical(candidates * c, double share);
void candidates_keep_best(candidates * c);                          // the largest logit of the lowest id
void candidates_keep_masked(candidates * c, const uint32_t * mask); // of the whole vocabulary
// Without n ids, ascending; nothing happens if those are all that is left.
void candidates_drop(candidates * c, const int32_t * ids, int32_t n);
// Without those that have a share or more of all, but for the last of these in the order of (logit, id).
void candidates_drop_likely(candidates * c, float share);
// Makes the logits peak - sharpness * d^2 / (1 + d), d = |p - target| / width, of their probabilities p, and
// the temperature 1. Leaves the weights before that in scores, returns their total.
double candidates_favour(candidates * c, float target, float width, float peak, float sharpness);
// The place of the one at which the running sum of weights exceeds share * total, 0 <= share < 1.
int32_t candidates_draw(const candidates * c, double share);
// Their ids in the order of (logit, id).
void candidates_sort(candidates * c);
// The n largest logits, descending; returns how many there are. The weights become alike.
int32_t candidates_top(candidates * c, int32_t n, float * out);
