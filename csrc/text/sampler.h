// sampler.h - from logits to a token: repeat penalty, temperature, top-k, top-p, min-p, then a draw.
#pragma once

#include "error.h"

pyllava_status sampler_create(const pyllava_sampler_params * params, pyllava_sampler ** out);
void sampler_free(pyllava_sampler * sampler);
pyllava_status sampler_choose(pyllava_sampler * sampler, const float * logits, int32_t n_vocab,
                              int32_t * out_id);
