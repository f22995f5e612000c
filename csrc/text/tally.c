// tally.c - see tally.h: a sparse set whose members carry a number, and a ring.
#include "tally.h"

#include <stdlib.h>

pyllava_status tally_create(tally * t, int32_t n_vocab, int32_t n_max) {
    const size_t n = (size_t) (n_max < n_vocab ? n_max : n_vocab) + 1;
    t->ids = calloc(n, sizeof *t->ids);
    t->numbers = calloc(n, sizeof *t->numbers);
    t->places = calloc((size_t) n_vocab, sizeof *t->places);
    if (t->ids && t->numbers && t->places) return PYLLAVA_OK;
    FAIL(PYLLAVA_ERR_MEMORY, "out of memory: %zu bytes needed", (2 * n + (size_t) n_vocab) * sizeof *t->ids);
}

void tally_free(tally * t) {
    free(t->ids);
    free(t->numbers);
    free(t->places);
    *t = (tally) { 0 };
}

int32_t * tally_at(tally * t, int32_t id) {
    if (t->places[id] == 0) {
        t->ids[t->n] = id;
        t->numbers[t->n] = 0;
        t->places[id] = ++t->n;
    }
    return &t->numbers[t->places[id] - 1];
}

void tally_drop(tally * t, int32_t id) {
    const int32_t at = t->places[id] - 1, last = --t->n;
    t->ids[at] = t->ids[last];
    t->numbers[at] = t->numbers[last];
    t->places[t->ids[at]] = at + 1;
    t->places[id] = 0;
}

void tally_clear(tally * t) {
    for (int32_t i = 0; i < t->n; i++) t->places[t->ids[i]] = 0;
    t->n = 0;
}

pyllava_status window_create(window * w, int32_t n_vocab, int32_t size) {
    if (size == 0) return PYLLAVA_OK;
    w->size = size;
    w->ids = calloc((size_t) size, sizeof *w->ids);
    TRY_ALLOC(w->ids, (size_t) size * sizeof *w->ids);
    return tally_create(&w->counts, n_vocab, size);
}

void window_free(window * w) {
    free(w->ids);
    tally_free(&w->counts);
    *w = (window) { 0 };
}

void window_push(window * w, int32_t id) {
    if (w->size == 0) return;
    ++*tally_at(&w->counts, id);
    if (w->n == w->size) {
        const int32_t oldest = w->ids[w->at];
        if (--*tally_at(&w->counts, oldest) == 0) tally_drop(&w->counts, oldest);
    } else {
        w->n++;
    }
    w->ids[w->at] = id;
    w->at = (w->at + 1) % w->size;
}
