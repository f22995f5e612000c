// sampler_params.h - the ranges of a sampler's options.
#pragma once

#include "error.h"

// PYLLAVA_ERR_ARGUMENT names the first option that is out of its range, what it is and what it needs to be.
pyllava_status sampler_params_check(const pyllava_sampler_params * p, int32_t n_vocab);
