// dry.c - see dry.h: what was chosen, read backwards, is compared with itself by the Z algorithm (Gusfield,
// 1997), which takes a few operations for each token of the window.
#include "dry.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static pyllava_status copy_breakers(dry * d, const char * const * breakers, int32_t n) {
    uint64_t total = 0;
    for (int32_t i = 0; i < n; i++) {
        const uint64_t size = breakers[i] ? strlen(breakers[i]) : 0;
        if (size < 1 || size > DRY_MAX_BREAKER) {
            FAIL(PYLLAVA_ERR_ARGUMENT, "dry_sequence_breakers: found one of %llu bytes, need 1..%d",
                 (unsigned long long) size, DRY_MAX_BREAKER);
        }
        total += size;
    }
    d->breakers = calloc((size_t) n, sizeof *d->breakers);
    d->breaker_text = malloc(total);
    if (!d->breakers || !d->breaker_text) FAIL(PYLLAVA_ERR_MEMORY, "out of memory for %d breakers", n);
    char * at = d->breaker_text;
    for (int32_t i = 0; i < n; i++) {
        d->breakers[i] = (gguf_text) { at, strlen(breakers[i]) };
        memcpy(at, breakers[i], d->breakers[i].size);
        at += d->breakers[i].size;
    }
    d->n_breakers = n;
    return PYLLAVA_OK;
}

static pyllava_status copy_pieces(dry * d, const tokenizer * t) {
    const int32_t n = t->vocab->n;
    uint64_t total = 0;
    for (int32_t id = 0; id < n; id++) total += tokenizer_piece(t, id, true).size;
    d->text = malloc(total + 1);
    TRY_ALLOC(d->text, total);
    d->begin = calloc((size_t) n + 1, sizeof *d->begin);
    TRY_ALLOC(d->begin, ((size_t) n + 1) * sizeof *d->begin);
    for (int32_t id = 0; id < n; id++) {
        const gguf_text piece = tokenizer_piece(t, id, true);
        if (piece.size > 0) memcpy(d->text + d->begin[id], piece.data, piece.size);
        d->begin[id + 1] = d->begin[id] + piece.size;
    }
    return PYLLAVA_OK;
}

pyllava_status dry_create(dry * d, const tokenizer * t, const pyllava_sampler_params * p) {
    d->multiplier = p->dry_multiplier;
    d->base = p->dry_base;
    d->allowed_length = p->dry_allowed_length;
    d->max_exponent =
        p->dry_base > 1.000001f ? (int32_t) (88.7228391 / log((double) p->dry_base)) : INT32_MAX;
    d->size = p->dry_multiplier > 0.0f ? p->dry_penalty_last_n : 0;
    if (d->size == 0) return PYLLAVA_OK;
    d->ids = calloc(2 * (size_t) d->size, sizeof *d->ids);
    TRY_ALLOC(d->ids, 2 * (size_t) d->size * sizeof *d->ids);
    d->lengths = calloc((size_t) d->size, sizeof *d->lengths);
    TRY_ALLOC(d->lengths, (size_t) d->size * sizeof *d->lengths);
    TRY(tally_create(&d->repeats, t->vocab->n, d->size));
    if (p->n_dry_sequence_breakers <= 0) return PYLLAVA_OK;
    TRY(copy_breakers(d, p->dry_sequence_breakers, p->n_dry_sequence_breakers));
    return copy_pieces(d, t);
}

void dry_free(dry * d) {
    free(d->ids);
    free(d->lengths);
    tally_free(&d->repeats);
    free(d->breakers);
    free(d->breaker_text);
    free(d->text);
    free(d->begin);
    *d = (dry) { 0 };
}

static gguf_text piece_of(const dry * d, int32_t id) {
    return (gguf_text) { d->text + d->begin[id], d->begin[id + 1] - d->begin[id] };
}

// Byte i of two texts, one after the other.
static char byte_of(gguf_text first, gguf_text second, uint64_t i) {
    return i < first.size ? first.data[i] : second.data[i - first.size];
}

// Whether a breaker ends in the second of two texts that follow each other.
static bool breaks(const dry * d, gguf_text before, gguf_text text) {
    for (int32_t b = 0; b < d->n_breakers; b++) {
        const gguf_text breaker = d->breakers[b];
        uint64_t at = breaker.size <= before.size ? before.size - breaker.size + 1 : 0;
        for (; at + breaker.size <= before.size + text.size; at++) {
            uint64_t n = 0;
            while (n < breaker.size && byte_of(before, text, at + n) == breaker.data[n]) n++;
            if (n == breaker.size) return true;
        }
    }
    return false;
}

static void note_breakers(dry * d, gguf_text piece) {
    const gguf_text before = { d->tail, d->n_tail };
    d->since = breaks(d, before, piece) ? 0 : d->since + 1;
    const uint64_t total = d->n_tail + piece.size, n = total < DRY_MAX_BREAKER ? total : DRY_MAX_BREAKER;
    char tail[DRY_MAX_BREAKER];
    for (uint64_t i = 0; i < n; i++) tail[i] = byte_of(before, piece, total - n + i);
    memcpy(d->tail, tail, n);
    d->n_tail = n;
}

void dry_push(dry * d, int32_t id) {
    if (d->size == 0) return;
    if (d->n == 2 * d->size) {
        memcpy(d->ids, d->ids + d->size, (size_t) d->size * sizeof *d->ids);
        d->n = d->size;
    }
    d->ids[d->n++] = id;
    if (d->n_breakers > 0) note_breakers(d, piece_of(d, id));
    else d->since = d->n;
}

// How many tokens before the one that is i before the last are those at the end: lengths[i], for i >= 1.
static void measure(const int32_t * last, int32_t n, int32_t * lengths) {
    int32_t begin = 0, end = 0; // the stretch that reaches back farthest is known to be equal to the end
    for (int32_t i = 1; i < n; i++) {
        int32_t length = 0;
        if (i < end) length = lengths[i - begin] < end - i ? lengths[i - begin] : end - i;
        while (i + length < n && last[-length] == last[-i - length]) length++;
        if (i + length > end) {
            begin = i;
            end = i + length;
        }
        lengths[i] = length;
    }
}

const tally * dry_repeats(dry * d) {
    tally * found = &d->repeats;
    const int32_t n = d->n < d->size ? d->n : d->size;
    tally_clear(found);
    if (d->since < d->allowed_length || n <= d->allowed_length) return found;
    const int32_t * last = d->ids + d->n - 1;
    measure(last, n, d->lengths);
    for (int32_t i = 1; i < n; i++) {
        const int32_t length = d->lengths[i] < d->since ? d->lengths[i] : d->since;
        if (length < d->allowed_length) continue;
        int32_t * longest = tally_at(found, last[1 - i]);
        if (length > *longest) *longest = length;
    }
    for (int32_t i = found->n - 1; i >= 0 && d->n_breakers > 0; i--) {
        if (breaks(d, (gguf_text) { NULL, 0 }, piece_of(d, found->ids[i]))) tally_drop(found, found->ids[i]);
    }
    return found;
}

// By multiplications alone, which are the same on every platform.
double dry_penalty(const dry * d, int32_t length) {
    const int32_t beyond = length - d->allowed_length;
    double penalty = (double) d->multiplier, power = (double) d->base;
    for (int32_t left = beyond < d->max_exponent ? beyond : d->max_exponent; left > 0; left /= 2) {
        if (left % 2 == 1) penalty *= power;
        power *= power;
    }
    return penalty;
}
