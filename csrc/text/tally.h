// tally.h - a number for each of a few tokens, and the tokens chosen last, counted.
#pragma once

#include "error.h"

typedef struct tally {
    int32_t n;         // tokens that have a number
    int32_t * ids;     // [n] in no order, but in the same one after the same calls
    int32_t * numbers; // [n] of each
    int32_t * places;  // [n_vocab] where a token stands in ids, counted from 1; 0: it has no number
} tally;

// For n_max tokens of n_vocab at once. Zeroed before; to be freed, after a failure too.
pyllava_status tally_create(tally * t, int32_t n_vocab, int32_t n_max);
void tally_free(tally * t);
int32_t * tally_at(tally * t, int32_t id); // the number of a token, 0 if it had none
void tally_drop(tally * t, int32_t id);    // of one that has a number
void tally_clear(tally * t);

// The last `size` tokens that were chosen.
typedef struct window {
    int32_t size, n, at;
    int32_t * ids; // [size] a ring
    tally counts;  // how often each of them stands there
} window;

pyllava_status window_create(window * w, int32_t n_vocab, int32_t size); // as tally_create
void window_free(window * w);
void window_push(window * w, int32_t id);
