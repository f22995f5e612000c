// draw.h - the last step of a choice: draws a token from the candidates, by their probabilities or nearer to
// a target.
#pragma once

#include "candidates.h"

// What earlier draws have left behind.
typedef struct draw {
    int32_t mirostat;
    double tau, eta, mu; // mirostat: surprise that is aimed at, rate of learning, surprise that is allowed
    double target, decay, sum, weight; // adaptive_p; the sum of probabilities by weight, and that of weights
} draw;

draw draw_of(const pyllava_sampler_params * params); // adaptive_target < 0: no adaptive_p
// The place of the one that is drawn with a random number in [0, 1).
int32_t draw_run(draw * d, candidates * c, double share);
