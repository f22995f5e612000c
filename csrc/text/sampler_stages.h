// sampler_stages.h - the stages that a choice goes through, in their order.
#pragma once

#include "candidates.h"
#include "dry.h"

#define MAX_STAGES 16 // in one order

typedef struct stages stages;
typedef void (*stage_fn)(candidates * c, stages * s);

struct stages {
    pyllava_sampler_params options; // without its arrays
    uint64_t random;                // state of the generator
    window recent;                  // what the penalties count
    dry dry;
    int32_t n_bias, n_banned;
    int32_t * bias_ids; // [n_bias]
    float * biases;     // [n_bias] finite
    int32_t * banned;   // [n_banned] ascending: tokens that are not to be chosen
    int32_t n;
    stage_fn run[MAX_STAGES]; // [n] those that may change something
};

// From params that sampler_params_check passed. Zeroed before; to be freed, after a failure too.
pyllava_status stages_create(stages * s, const tokenizer * t, const pyllava_sampler_params * params);
void stages_free(stages * s);
pyllava_status stages_check_order(const char * const * names, int32_t n);
// From the whole vocabulary to those that may be drawn, with the temperature to weigh them at. A mask may
// leave none of them; no other stage does.
void stages_run(stages * s, candidates * c, const uint32_t * mask);
void stages_push(stages * s, int32_t id); // what was chosen
double stages_uniform(stages * s);        // the next number of the generator, in [0, 1)
