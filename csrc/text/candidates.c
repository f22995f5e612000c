// candidates.c - see candidates.h. Every array has room for whole blocks, so that vectors may end beyond n.
#include "candidates.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK  1024 // weights in one sum: what a draw walks through
#define STEP   16   // numbers that a loop takes at once
#define N_BINS 512
#define FEW    256 // so many are sorted rather than put into bins

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef double d4 __attribute__((vector_size(32)));

static inline f4 load(const float * x) {
    f4 v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline f4 pick(i4 which, f4 a, f4 b) { return (f4) ((which & (i4) a) | (~which & (i4) b)); }

static inline bool any(i4 which) {
    int64_t halves[2];
    memcpy(halves, &which, sizeof halves);
    return (halves[0] | halves[1]) != 0;
}

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
    c->shares = calloc(4 * N_BINS, sizeof *c->shares);
    c->keys = calloc(n, sizeof *c->keys);
    if (c->ids && c->logits && c->weights && c->sums && c->near.logits && c->near.weights && c->near.places &&
        c->bins && c->shares && c->keys)
        return PYLLAVA_OK;
    candidates_free(c);
    FAIL(PYLLAVA_ERR_MEMORY, "out of memory: %zu bytes needed", n * (7 * sizeof(float) + sizeof *c->keys));
}

void candidates_free(candidates * c) {
    void * parts[] = { c->ids,          c->logits,      c->weights, c->sums,   c->near.logits,
                       c->near.weights, c->near.places, c->bins,    c->shares, c->keys };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
    *c = (candidates) { 0 };
}

// Numbers of the steps that hold n. A step is four vectors: one running sum or extreme would wait for itself.
static int32_t whole(int32_t n) { return (n + STEP - 1) / STEP * STEP; }

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

// The largest logit, or the smallest.
static float extreme_of(float * x, int32_t n, bool smallest) {
    const i4 flip = (i4) { 0 } - (int32_t) smallest;
    f4 found[4];
    for (int32_t i = n; i < whole(n); i++) x[i] = x[0];
    for (int32_t j = 0; j < 4; j++) found[j] = load(x + 4 * j);
    for (int32_t i = STEP; i < n; i += STEP) {
        for (int32_t j = 0; j < 4; j++) {
            const f4 v = load(x + i + 4 * j);
            found[j] = pick((v > found[j]) ^ flip, v, found[j]);
        }
    }
    float best = x[0];
    for (int32_t j = 0; j < STEP; j++) {
        const float v = found[j / 4][j % 4];
        if (smallest ? v < best : v > best) best = v;
    }
    return best;
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

void candidates_weigh(candidates * c, float temperature) {
    const float scale = scale_of(temperature);
    if (c->weighed && temperature == 1.0f && c->largest >= c->base - 4.0f) return;
    c->base = c->largest;
    c->total = 0.0;
    for (int32_t at = 0; at < c->n; at += BLOCK) {
        const int32_t n = c->n - at < BLOCK ? c->n - at : BLOCK;
        c->total += c->sums[at / BLOCK] = weigh_block(c->logits + at, c->weights + at, n, c->base, scale);
    }
    c->weighed = temperature == 1.0f;
}

static void weigh_again(candidates * c, int32_t at) {
    const float weight = exp2_below_0((f4) { 0 } + (c->logits[at] - c->base) * scale_of(1.0f))[0];
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
        const float old = c->logits[at], logit = fn(ids[i], of);
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

// ------------------------------------------------------------------------------------------- a cut

// Ascending keys are descending logits, and ascending places where those are equal.
static uint64_t key_of(float logit, int32_t at) {
    uint32_t bits;
    memcpy(&bits, &logit, sizeof bits);
    return (uint64_t) (bits >> 31 ? bits : ~bits ^ 0x80000000u) << 32 | (uint32_t) at;
}

static void sift_down(uint64_t * keys, int32_t at, int32_t n) {
    const uint64_t key = keys[at];
    for (int32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && keys[child + 1] > keys[child]) child++;
        if (keys[child] <= key) break;
        keys[at] = keys[child];
    }
    keys[at] = key;
}

static void sort_keys(uint64_t * keys, int32_t n) {
    for (int32_t i = n / 2 - 1; i >= 0; i--) sift_down(keys, i, n);
    for (int32_t i = n - 1; i > 0; i--) {
        const uint64_t last = keys[i];
        keys[i] = keys[0];
        keys[0] = last;
        sift_down(keys, 0, i);
    }
}

// The weights into bins, equal stretches of logits from the largest down; the last one takes all below.
static void fill_bins(candidates * c, const listing * list, float largest, float width) {
    const float * restrict x = list->logits, * restrict w = list->weights;
    const float per_bin = (float) (N_BINS - 1) / width, last = (float) (N_BINS - 1);
    int32_t * restrict bins = c->bins;
    double * restrict shares = c->shares; // four sets of bins: additions to one would wait for each other
    const int32_t n = list->n;
    memset(shares, 0, 4 * N_BINS * sizeof *shares);
    for (int32_t i = 0; i < n; i++) {
        const float bin = (largest - x[i]) * per_bin;
        bins[i] = (int32_t) (bin < last ? bin : last);
    }
    for (int32_t i = 0; i < n; i++) shares[i % 4 * N_BINS + bins[i]] += (double) w[i];
}

// The bin in which the sum reaches goal, or the last that weighs anything; *before: the sum up to there.
static int32_t bin_at(const candidates * c, double goal, double * before) {
    const double * s = c->shares;
    double sum = *before;
    int32_t found = 0;
    for (int32_t b = 0; b < N_BINS && (b == 0 || sum < goal); b++) {
        const double share = (s[b] + s[b + N_BINS]) + (s[b + 2 * N_BINS] + s[b + 3 * N_BINS]);
        if (share <= 0.0) continue;
        *before = sum;
        sum += share;
        found = b;
    }
    return found;
}

// What lies in one bin. The list may be the room that it goes to.
static listing only_bin(const candidates * c, const listing * list, int32_t bin) {
    const int32_t * bins = c->bins;
    listing to = { 0, c->near.logits, c->near.weights, c->near.places };
    for (int32_t i = 0; i < list->n; i += 4) {
        i4 four;
        memcpy(&four, bins + i, sizeof four);
        if (!any(four == bin)) continue;
        for (int32_t j = i; j < i + 4 && j < list->n; j++) {
            const int32_t place = list->places ? list->places[j] : j;
            to.logits[to.n] = list->logits[j];
            to.weights[to.n] = list->weights[j];
            to.places[to.n] = place;
            to.n += bins[j] == bin;
        }
    }
    return to;
}

// Where all logits are alike, places decide.
static int32_t count_alike(const listing * list, double missing) {
    const double n = ceil(missing / (double) list->weights[0]);
    return n < 1.0 ? 1 : n < (double) list->n ? (int32_t) n : list->n;
}

static cut cut_sorted(candidates * c, const listing * list, double goal, double sum) {
    for (int32_t i = 0; i < list->n; i++) c->keys[i] = key_of(list->logits[i], i);
    sort_keys(c->keys, list->n);
    int32_t at = 0;
    for (int32_t i = 0; i < list->n && (i == 0 || sum < goal); i++) {
        at = (int32_t) (uint32_t) c->keys[i];
        sum += (double) list->weights[at];
    }
    return (cut) { list->logits[at], list->places ? list->places[at] : at };
}

// Bins narrow the list to those near the cut, and again, with narrower bins, while many are left.
cut candidates_cut(candidates * c, double goal, float widest) {
    listing list = { c->n, c->logits, c->weights, NULL };
    double before = 0.0;
    while (list.n > FEW) {
        const float largest = list.places ? extreme_of(list.logits, list.n, false) : c->largest;
        const float smallest = extreme_of(list.logits, list.n, true);
        if (largest == smallest) {
            const int32_t at = count_alike(&list, goal - before) - 1;
            return (cut) { largest, list.places ? list.places[at] : at };
        }
        const float width = largest - smallest < widest ? largest - smallest : widest;
        if (width < 1e-30f) break; // bins so narrow cannot be numbered in float32
        fill_bins(c, &list, largest, width);
        list = only_bin(c, &list, bin_at(c, goal, &before));
    }
    return cut_sorted(c, &list, goal, before);
}

// Those of [begin, end) from the least logit up, behind the n that are kept already. There is no branch for
// each of them: half may be kept, in no order.
static int32_t keep_from(candidates * c, int32_t n, int32_t begin, int32_t end, float least) {
    int32_t * ids = c->ids;
    float * x = c->logits;
    for (int32_t i = begin, next; i < end; i = next) {
        next = i + 4 < end ? i + 4 : end;
        if (next == i + 4 && !any(load(x + i) >= least)) continue;
        for (int32_t j = i; j < next; j++) {
            const int32_t id = ids[j];
            const float logit = x[j];
            ids[n] = id;
            x[n] = logit;
            n += logit >= least;
        }
    }
    return n;
}

void candidates_keep(candidates * c, cut last) {
    const int32_t end = last.at < c->n ? last.at + 1 : c->n;
    const int32_t n = keep_from(c, 0, 0, end, last.logit);
    c->n = keep_from(c, n, end, c->n, nextafterf(last.logit, INFINITY));
    c->weighed = false;
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

void candidates_sort(candidates * c) {
    for (int32_t i = 0; i < c->n; i++) c->keys[i] = key_of(c->logits[i], c->ids[i]);
    sort_keys(c->keys, c->n);
    for (int32_t i = 0; i < c->n; i++) c->ids[i] = (int32_t) (uint32_t) c->keys[i];
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
