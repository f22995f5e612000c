// candidates.c - see candidates.h. Every array has room for whole blocks, so that vectors may end beyond n.
#include "candidates.h"
#include "vectors.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 1024 // weights in one sum: what a draw walks through

pyllava_status candidates_create(candidates * c, int32_t n_vocab) {
    const size_t n = ((size_t) n_vocab + BLOCK - 1) / BLOCK * BLOCK;
    *c = (candidates) { .n_vocab = n_vocab };
    c->ids = calloc(n, sizeof *c->ids);
    c->logits = calloc(n, sizeof *c->logits);
    c->weights = calloc(n, sizeof *c->weights);
    c->sums = calloc(n / BLOCK, sizeof *c->sums);
    c->near.logits = calloc(n, sizeof *c->near.logits);
    c->near.weights = calloc(n, sizeof *c->near.weights);
    c->near.places = calloc(n, sizeof *c->near.places);
    c->bins = calloc(n, sizeof *c->bins);
    c->shares = calloc(4 * CANDIDATES_BINS, sizeof *c->shares);
    c->keys = calloc(n, sizeof *c->keys);
    c->scores = calloc(n, sizeof *c->scores);
    if (c->ids && c->logits && c->weights && c->sums && c->near.logits && c->near.weights && c->near.places &&
        c->bins && c->shares && c->keys && c->scores)
        return PYLLAVA_OK;
    candidates_free(c);
    FAIL(PYLLAVA_ERR_MEMORY, "out of memory: %zu bytes needed", n * (8 * sizeof(float) + sizeof *c->keys));
}

void candidates_free(candidates * c) {
    void * parts[] = { c->ids,         c->logits, c->weights, c->sums, c->near.logits, c->near.weights,
                       c->near.places, c->bins,   c->shares,  c->keys, c->scores };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
    *c = (candidates) { 0 };
}

// Whole vectors of logits, with 0 for -0; tells whether all are finite.
static bool copy_finite(float * restrict to, const float * restrict from, int32_t n) {
    const i4 exponent = (i4) { 0 } + 0x7F800000;
    i4 wrong = { 0 };
    for (int32_t i = 0; i < n; i += 4) {
        const f4 v = load(from + i) + 0.0f;
        memcpy(to + i, &v, sizeof v);
        wrong |= ((i4) v & exponent) == exponent;
    }
    return !any(wrong);
}

static void restart(candidates * c) {
    c->largest = extreme_of(c->logits, c->n, false);
    c->weighed = false;
}

pyllava_status candidates_load(candidates * c, const float * logits) {
    const int32_t n = c->n_vocab, n_fours = n / 4 * 4;
    int32_t * ids = c->ids;
    float last[4] = { 0.0f };
    memcpy(last, logits + n_fours, (size_t) (n - n_fours) * sizeof *last);
    if (!copy_finite(c->logits, logits, n_fours) | !copy_finite(c->logits + n_fours, last, n - n_fours)) {
        int32_t i = 0;
        while (isfinite(logits[i])) i++;
        FAIL(PYLLAVA_ERR_NUMERIC, "logits: entry %d is not finite", i);
    }
    for (int32_t i = 0; i < n; i++) ids[i] = i;
    c->n = n;
    c->temperature = 1.0f;
    restart(c);
    return PYLLAVA_OK;
}

// The place of a token, or -1.
static int32_t find(const candidates * c, int32_t id) {
    int32_t from = 0, to = c->n;
    if (c->n == c->n_vocab) return id;
    while (from < to) {
        const int32_t middle = from + (to - from) / 2;
        if (c->ids[middle] < id) from = middle + 1;
        else to = middle;
    }
    return from < c->n && c->ids[from] == id ? from : -1;
}

// 2^x for x <= 0: 2^n 2^r with |r| <= 1/2 and a polynomial for 2^r, exactly 1 at 0; 0 below -126.
static inline f4 exp2_below_0(f4 x) {
    const i4 counts = x > -126.0f;
    const f4 y = pick(counts, x, (f4) { 0 });
    const f4 shifted = y + 12582912.0f; // 1.5 * 2^23: n stands in the last bits
    const f4 r = y - (shifted - 12582912.0f);
    f4 p = 1.5353362e-4f * r + 1.3398874e-3f;
    p = p * r + 9.6184373e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314720e-1f;
    p = p * r + 1.0f;
    return (f4) (((i4) p + ((i4) shifted << 23)) & counts);
}

static double weigh_block(float * x, float * w, int32_t n, float base, float scale) {
    d4 sum = { 0.0 };
    for (int32_t i = n; i < whole(n); i++) x[i] = -INFINITY; // weighs 0
    for (int32_t i = 0; i < n; i += STEP) {
        f4 weights[4];
        for (int32_t j = 0; j < 4; j++) weights[j] = exp2_below_0((load(x + i + 4 * j) - base) * scale);
        memcpy(w + i, weights, sizeof weights);
        sum += __builtin_convertvector((weights[0] + weights[1]) + (weights[2] + weights[3]), d4);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static float scale_of(float temperature) {
    return (float) (1.4426950408889634 / (double) (temperature > FLT_MIN ? temperature : FLT_MIN));
}

void candidates_temper(candidates * c, float temperature) {
    const double product = (double) c->temperature * (double) temperature;
    c->temperature = (float) (product < FLT_MIN ? FLT_MIN : product > FLT_MAX ? FLT_MAX : product);
    c->weighed &= temperature == 1.0f;
}

void candidates_weigh(candidates * c) {
    const float scale = scale_of(c->temperature);
    if (c->weighed && c->base - c->largest <= 4.0f * c->temperature) return;
    c->base = c->largest;
    c->total = 0.0;
    for (int32_t at = 0; at < c->n; at += BLOCK) {
        const int32_t n = c->n - at < BLOCK ? c->n - at : BLOCK;
        c->total += c->sums[at / BLOCK] = weigh_block(c->logits + at, c->weights + at, n, c->base, scale);
    }
    c->weighed = true;
}

static void weigh_again(candidates * c, int32_t at) {
    const float scale = scale_of(c->temperature);
    const float weight = exp2_below_0((f4) { 0 } + (c->logits[at] - c->base) * scale)[0];
    const double more = (double) weight - (double) c->weights[at];
    c->weights[at] = weight;
    c->sums[at / BLOCK] += more;
    c->total += more;
}

void candidates_change(candidates * c, const int32_t * ids, int32_t n, candidates_logit_fn fn,
                       const void * of) {
    bool lower = false;
    for (int32_t i = 0; i < n; i++) {
        const int32_t at = find(c, ids[i]);
        if (at < 0) continue;
        const float old = c->logits[at];
        const float logit = (float) fmin(fmax(fn(old, i, of), -FLT_MAX), FLT_MAX) + 0.0f; // never -0
        if (logit > c->largest) c->largest = logit;
        lower |= old == c->largest && logit < old;
        c->logits[at] = logit;
        c->weighed &= logit <= c->base;
        if (c->weighed) weigh_again(c, at);
    }
    if (lower) c->largest = extreme_of(c->logits, c->n, false);
}

void candidates_weigh_alike(candidates * c) {
    for (int32_t i = 0; i < c->n; i++) c->weights[i] = 1.0f;
    c->weighed = false;
}

double candidates_mean(candidates * c) {
    candidates_weigh(c);
    const int32_t n_fours = c->n / 4 * 4;
    const d4 base = (d4) { 0 } + (double) c->base;
    d4 sums = { 0.0 };
    for (int32_t i = 0; i < n_fours; i += 4) {
        const f4 x = load(c->logits + i), w = load(c->weights + i);
        sums += (__builtin_convertvector(x, d4) - base) * __builtin_convertvector(w, d4);
    }
    double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int32_t i = n_fours; i < c->n; i++)
        sum += ((double) c->logits[i] - (double) c->base) * (double) c->weights[i];
    return sum / c->total;
}

// Sums of x and x^2 counted from the largest: that is one of them, so that x^2 holds at most n times the
// variance, and the difference keeps 10 digits.
double candidates_deviation(const candidates * c) {
    const int32_t n_fours = c->n / 4 * 4;
    const d4 largest = (d4) { 0 } + (double) c->largest;
    d4 sums = { 0.0 }, squares = { 0.0 };
    for (int32_t i = 0; i < n_fours; i += 4) {
        const d4 x = __builtin_convertvector(load(c->logits + i), d4) - largest;
        sums += x;
        squares += x * x;
    }
    double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    for (int32_t i = n_fours; i < c->n; i++) {
        const double x = (double) c->logits[i] - (double) c->largest;
        sum += x;
        square += x * x;
    }
    const double variance = (square - sum * sum / c->n) / c->n;
    return variance > 0.0 ? sqrt(variance) : 0.0;
}

double candidates_favour(candidates * c, float target, float width, float peak, float sharpness) {
    candidates_weigh(c);
    const double total = c->total;
    const float per_total = (float) (1.0 / total), per_width = 1.0f / width;
    for (int32_t i = 0; i < c->n; i += 4) { // whole vectors: there is room for them
        const f4 w = load(c->weights + i), away = magnitude((w * per_total - target) * per_width);
        const f4 x = peak - sharpness * away * away / (1.0f + away);
        memcpy(c->scores + i, &w, sizeof w);
        memcpy(c->logits + i, &x, sizeof x);
    }
    c->temperature = 1.0f;
    restart(c);
    candidates_weigh(c);
    return total;
}

static int32_t place_of_largest(const candidates * c) {
    int32_t at = 0;
    while (c->logits[at] != c->largest) at++;
    return at;
}

void candidates_keep_best(candidates * c) {
    c->ids[0] = c->ids[place_of_largest(c)];
    c->logits[0] = c->largest;
    c->n = 1;
    c->weighed = false;
}

// Without those at n ascending places.
static void drop_places(candidates * c, const int32_t * places, int32_t n) {
    int32_t to = n > 0 ? places[0] : c->n;
    bool best = false;
    for (int32_t i = 0; i < n; i++) {
        const int32_t from = places[i] + 1, end = i + 1 < n ? places[i + 1] : c->n;
        best |= c->logits[places[i]] == c->largest;
        memmove(c->ids + to, c->ids + from, (size_t) (end - from) * sizeof *c->ids);
        memmove(c->logits + to, c->logits + from, (size_t) (end - from) * sizeof *c->logits);
        to += end - from;
    }
    c->n = to;
    if (n > 0) c->weighed = false;
    if (best) c->largest = extreme_of(c->logits, c->n, false);
}

void candidates_drop(candidates * c, const int32_t * ids, int32_t n) {
    int32_t *places = c->near.places, n_places = 0;
    for (int32_t i = 0; i < n; i++) {
        const int32_t at = find(c, ids[i]);
        if (at >= 0) places[n_places++] = at;
    }
    if (n_places < c->n) drop_places(c, places, n_places);
}

void candidates_drop_likely(candidates * c, float share) {
    candidates_weigh(c);
    int32_t *places = c->near.places, n = 0, last = -1;
    const float least = (float) ((double) share * c->total);
    for (int32_t i = 0; i < c->n; i += 4) {
        if (i + 4 <= c->n && !any(load(c->weights + i) >= least)) continue;
        for (int32_t j = i; j < i + 4 && j < c->n; j++) {
            if (c->weights[j] < least) continue;
            if (last < 0 || c->logits[j] <= c->logits[places[last]]) last = n;
            places[n++] = j;
        }
    }
    if (n < 2) return;
    memmove(places + last, places + last + 1, (size_t) (n - last - 1) * sizeof *places);
    drop_places(c, places, n - 1);
}

void candidates_keep_masked(candidates * c, const uint32_t * mask) {
    int32_t n = 0;
    for (int32_t id = 0; id < c->n_vocab; id++) {
        c->ids[n] = id;
        c->logits[n] = c->logits[id];
        n += mask[id / 32] >> (id % 32) & 1;
    }
    c->n = n;
    if (n > 0) restart(c);
}

int32_t candidates_draw(const candidates * c, double share) {
    double left = share * c->total;
    int32_t block = 0, chosen = -1;
    for (int32_t b = 0; b * BLOCK < c->n; b++) {
        if (c->sums[b] <= 0.0) continue;
        block = b;
        if (left < c->sums[b]) break;
        left -= c->sums[b];
    }
    const int32_t begin = block * BLOCK, end = c->n - begin < BLOCK ? c->n : begin + BLOCK;
    for (int32_t i = begin; i < end && left >= 0.0; i++) {
        if (c->weights[i] > 0.0f) chosen = i;
        left -= (double) c->weights[i];
    }
    return chosen >= 0 ? chosen : place_of_largest(c); // a block of which only rounding is left
}
