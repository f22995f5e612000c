// sampler_stages.h - the stages that a choice goes through, in their order.
#pragma once

#include "candidates.h"

typedef struct stage_params {
    pyllava_sampler_params options; // a greedy one: top_k = 1 and no other cut
    float log_min_p;
    const float * logits;   // [n_vocab] as the model gave them
    const uint32_t * mask;  // NULL: every token
    const int32_t * recent; // [n_recent] tokens that the penalty looks at
    int32_t n_recent;
} stage_params;

// From the whole vocabulary to those that may be drawn, with the weights to draw them by. A mask may leave
// none of them; no other stage does.
void stages_run(candidates * c, const stage_params * p);
