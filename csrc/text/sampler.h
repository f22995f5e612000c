// sampler.h - from logits to a token: the stages of sampler_stages.h, then a draw.
#pragma once

#include "tokenizer.h"

// For the vocabulary of a tokenizer, which it may outlive.
pyllava_status sampler_create(const tokenizer * t, const pyllava_sampler_params * params,
                              pyllava_sampler ** out);
void sampler_free(pyllava_sampler * sampler);
int32_t sampler_n_vocab(const pyllava_sampler * sampler);
// PYLLAVA_ERR_ARGUMENT for a mask that leaves no token, and for more alternatives than there are tokens.
pyllava_status sampler_check(const pyllava_sampler * sampler, const uint32_t * mask, int32_t n_alternatives);
// After sampler_check: fails for nothing but logits that are not finite, and a mask that was changed since.
pyllava_status sampler_choose(pyllava_sampler * sampler, const float * logits, const uint32_t * mask,
                              int32_t n_alternatives, pyllava_choice * out_choice,
                              pyllava_choice * out_alternatives);
