// candidates_cut.c - where a list of candidates ends, and what is kept of it; see candidates.h.
#include "candidates.h"
#include "vectors.h"

#include <float.h>
#include <math.h>

#define N_BINS CANDIDATES_BINS
#define FEW    256 // so many are sorted rather than put into bins

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
static cut cut_of(candidates * c, listing list, float largest, double goal, float widest) {
    double before = 0.0;
    while (list.n > FEW) {
        const float smallest = extreme_of(list.logits, list.n, true);
        if (largest == smallest) {
            const int32_t at = count_alike(&list, goal - before) - 1;
            return (cut) { largest, list.places ? list.places[at] : at };
        }
        const float width = largest - smallest < widest ? largest - smallest : widest;
        if (width < 1e-30f) break; // bins so narrow cannot be numbered in float32
        fill_bins(c, &list, largest, width);
        list = only_bin(c, &list, bin_at(c, goal, &before));
        largest = extreme_of(list.logits, list.n, false);
    }
    return cut_sorted(c, &list, goal, before);
}

cut candidates_cut(candidates * c, double goal, float widest) {
    return cut_of(c, (listing) { c->n, c->logits, c->weights, NULL }, c->largest, goal, widest);
}

// Those of [begin, end) whose score in `by` is the least or more, behind the n that are kept already. There
// is no branch for each of them: half may be kept, in no order. The scores may be the logits.
static int32_t keep_from(candidates * c, const float * by, int32_t n, int32_t begin, int32_t end,
                         float least) {
    int32_t * ids = c->ids;
    float * x = c->logits;
    for (int32_t i = begin, next; i < end; i = next) {
        next = i + 4 < end ? i + 4 : end;
        if (next == i + 4 && !any(load(by + i) >= least)) continue;
        for (int32_t j = i; j < next; j++) {
            const int32_t id = ids[j];
            const float logit = x[j], score = by[j];
            ids[n] = id;
            x[n] = logit;
            n += score >= least;
        }
    }
    return n;
}

static void keep_by(candidates * c, const float * by, cut last) {
    const int32_t end = last.at < c->n ? last.at + 1 : c->n;
    const int32_t n = keep_from(c, by, 0, 0, end, last.logit);
    c->n = keep_from(c, by, n, end, c->n, nextafterf(last.logit, INFINITY));
    c->weighed = false;
}

void candidates_keep(candidates * c, cut last) { keep_by(c, c->logits, last); }

void candidates_keep_typical(candidates * c, double share) {
    const float mean = (float) fmax(candidates_mean(c), -FLT_MAX);
    for (int32_t i = 0; i < c->n; i += 4) { // whole vectors: there is room for them
        const f4 score = -magnitude((load(c->logits + i) - c->base) - mean);
        memcpy(c->scores + i, &score, sizeof score);
    }
    const listing list = { c->n, c->scores, c->weights, NULL };
    const float best = extreme_of(list.logits, list.n, false);
    keep_by(c, c->scores, cut_of(c, list, best, nextafter(share * c->total, INFINITY), 64.0f));
    c->largest = extreme_of(c->logits, c->n, false);
}

void candidates_sort(candidates * c) {
    for (int32_t i = 0; i < c->n; i++) c->keys[i] = key_of(c->logits[i], c->ids[i]);
    sort_keys(c->keys, c->n);
    for (int32_t i = 0; i < c->n; i++) c->ids[i] = (int32_t) (uint32_t) c->keys[i];
}

int32_t candidates_top(candidates * c, int32_t n, float * out) {
    candidates_weigh_alike(c);
    const cut last = candidates_cut(c, n, FLT_MAX);
    int32_t n_keys = 0;
    for (int32_t i = 0; i < c->n; i++) {
        const float x = c->logits[i];
        if (x > last.logit || (x == last.logit && i <= last.at)) c->keys[n_keys++] = key_of(x, i);
    }
    sort_keys(c->keys, n_keys);
    for (int32_t i = 0; i < n_keys; i++) out[i] = c->logits[(int32_t) (uint32_t) c->keys[i]];
    return n_keys;
}
