// dry.h - "Don't Repeat Yourself" (p-e-w, 2024): which tokens would go on with something that was said
// before.
#pragma once

#include "tally.h"
#include "tokenizer.h"

#define DRY_MAX_BREAKER 40 // bytes of a breaker

typedef struct dry {
    float multiplier, base;
    int32_t allowed_length; // repeats that are shorter go unnoticed
    int32_t max_exponent;   // base^exponent stays below the largest float
    int32_t size, n;        // tokens that are looked back on, and those in memory, at most twice as many
    int32_t * ids;          // [2 * size] in the order of choice
    int32_t * lengths;      // [size] room of dry_repeats
    tally repeats;          // what dry_repeats found
    // A breaker ends what can be repeated. It is looked for in the text, so that it does not matter which
    // tokens make it up.
    gguf_text * breakers; // [n_breakers] into one copy of them
    int32_t n_breakers;
    char * breaker_text;
    char * text;                // of all tokens, one after the other
    uint64_t * begin;           // [n_vocab + 1] where each begins in text
    char tail[DRY_MAX_BREAKER]; // the last bytes that were chosen
    uint64_t n_tail;
    int32_t since; // tokens after the last breaker
} dry;

// From the options dry_* and the vocabulary, which it copies. Zeroed before; to be freed, after a failure
// too.
pyllava_status dry_create(dry * d, const tokenizer * t, const pyllava_sampler_params * params);
void dry_free(dry * d);
void dry_push(dry * d, int32_t id);
// For each token that would go on with a repeat of allowed_length or more: the longest one's length. No token
// that holds a breaker is among them.
const tally * dry_repeats(dry * d);
double dry_penalty(const dry * d, int32_t length); // what a token's logit is to lose for such a length
