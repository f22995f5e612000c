// sampler.c - see sampler.h. The order is llama.cpp's: penalty, top-k, top-p, min-p, temperature, draw.
// Sorting by (logit, id) makes every choice independent of how the candidates were found.
#include "sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct choice {
    float logit, p;
    int32_t id;
} choice;

struct pyllava_sampler {
    pyllava_sampler_params params;
    uint64_t state;   // of the generator
    int32_t * recent; // [repeat_last_n] ring of chosen tokens
    int32_t n_recent, at;
    choice * choices; // [n_vocab]
    int32_t n_vocab;
};

// SplitMix64 (Steele, Lea and Flood, 2014), to a double in [0, 1).
static double next_uniform(pyllava_sampler * s) {
    uint64_t z = s->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double) ((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

pyllava_status sampler_create(const pyllava_sampler_params * p, pyllava_sampler ** out) {
    if (!isfinite(p->temperature)) FAIL(PYLLAVA_ERR_ARGUMENT, "temperature: need a finite number");
    if (p->top_k < 0) FAIL(PYLLAVA_ERR_ARGUMENT, "top_k: found %d, need 0 (off) or more", p->top_k);
    if (!(p->top_p >= 0.0f && p->top_p <= 1.0f))
        FAIL(PYLLAVA_ERR_ARGUMENT, "top_p: found %g, need 0..1", p->top_p);
    if (!(p->min_p >= 0.0f && p->min_p <= 1.0f))
        FAIL(PYLLAVA_ERR_ARGUMENT, "min_p: found %g, need 0..1", p->min_p);
    if (!(p->repeat_penalty > 0.0f && isfinite(p->repeat_penalty))) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "repeat_penalty: found %g, need a number above 0 (1: off)",
             p->repeat_penalty);
    }
    if (p->repeat_last_n < 0 || p->repeat_last_n > 1 << 20) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "repeat_last_n: found %d, need 0..%d", p->repeat_last_n, 1 << 20);
    }
    pyllava_sampler * s = calloc(1, sizeof *s);
    TRY_ALLOC(s, sizeof *s);
    s->params = *p;
    s->state = p->seed;
    s->recent = calloc((size_t) p->repeat_last_n + 1, sizeof *s->recent);
    if (!s->recent) {
        free(s);
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    }
    *out = s;
    return PYLLAVA_OK;
}

void sampler_free(pyllava_sampler * s) {
    if (!s) return;
    free(s->recent);
    free(s->choices);
    free(s);
}

static pyllava_status load_logits(pyllava_sampler * s, const float * logits, int32_t n) {
    if (s->n_vocab < n) {
        choice * grown = realloc(s->choices, (size_t) n * sizeof *grown);
        TRY_ALLOC(grown, (size_t) n * sizeof *grown);
        s->choices = grown;
        s->n_vocab = n;
    }
    for (int32_t id = 0; id < n; id++) {
        if (!isfinite(logits[id])) FAIL(PYLLAVA_ERR_NUMERIC, "logits: entry %d is not finite", id);
        s->choices[id] = (choice) { logits[id], 0.0f, id };
    }
    return PYLLAVA_OK;
}

// Keskar et al., "CTRL", 2019: each token of the window once, however often it stands there.
static void penalise(pyllava_sampler * s, const float * logits, int32_t n) {
    const float penalty = s->params.repeat_penalty;
    for (int32_t i = 0; penalty != 1.0f && i < s->n_recent; i++) {
        int32_t id = s->recent[i];
        if (id < n) s->choices[id].logit = logits[id] <= 0.0f ? logits[id] * penalty : logits[id] / penalty;
    }
}

static int by_logit(const void * a, const void * b) {
    const choice *x = a, *y = b;
    return x->logit != y->logit ? (x->logit < y->logit ? 1 : -1) : x->id - y->id;
}

static int32_t greedy(const choice * c, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++) {
        if (c[i].logit > c[best].logit) best = i;
    }
    return c[best].id;
}

// p = softmax(logit / temperature) over the first n, which are sorted.
static void softmax(choice * c, int32_t n, float temperature) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += c[i].p = expf((c[i].logit - c[0].logit) / temperature);
    for (int32_t i = 0; i < n; i++) c[i].p = (float) (c[i].p / sum);
}

static int32_t draw(pyllava_sampler * s, int32_t n) {
    const pyllava_sampler_params * p = &s->params;
    choice * c = s->choices;
    qsort(c, (size_t) n, sizeof *c, by_logit);
    if (p->top_k > 0 && p->top_k < n) n = p->top_k;
    if (p->top_p < 1.0f) { // shortest prefix that holds top_p (Holtzman et al., 2020)
        softmax(c, n, 1.0f);
        double sum = 0.0;
        int32_t kept = 0;
        while (kept < n && (kept == 0 || sum < p->top_p)) sum += c[kept++].p;
        n = kept;
    }
    if (p->min_p > 0.0f) { // p >= min_p * max p (Nguyen et al., 2024)
        const float least = c[0].logit + logf(p->min_p);
        while (n > 1 && c[n - 1].logit < least) n--;
    }
    softmax(c, n, p->temperature);
    double u = next_uniform(s);
    for (int32_t i = 0; i < n - 1; i++) {
        u -= c[i].p;
        if (u < 0.0) return c[i].id;
    }
    return c[n - 1].id;
}

pyllava_status sampler_choose(pyllava_sampler * s, const float * logits, int32_t n_vocab, int32_t * out_id) {
    TRY(load_logits(s, logits, n_vocab));
    penalise(s, logits, n_vocab);
    int32_t id = s->params.temperature <= 0.0f ? greedy(s->choices, n_vocab) : draw(s, n_vocab);
    const int32_t window = s->params.repeat_last_n;
    if (window > 0) {
        s->recent[s->at] = id;
        s->at = (s->at + 1) % window;
        if (s->n_recent < window) s->n_recent++;
    }
    *out_id = id;
    return PYLLAVA_OK;
}
