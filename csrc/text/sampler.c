// sampler.c - see sampler.h: the object, the draw, and the log-probabilities that go with it.
#include "sampler.h"
#include "sampler_stages.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

struct pyllava_sampler {
    stage_params params;
    uint64_t state;   // of the generator
    int32_t * recent; // [repeat_last_n] ring of chosen tokens
    int32_t at;
    candidates candidates;
};

// SplitMix64 (Steele, Lea and Flood, 2014), to a double in [0, 1).
static double next_uniform(pyllava_sampler * s) {
    uint64_t z = s->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double) ((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static pyllava_status check_params(const pyllava_sampler_params * p) {
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
    return PYLLAVA_OK;
}

static stage_params stage_params_of(pyllava_sampler_params p) {
    if (p.temperature <= 0.0f) { // greedy
        p.temperature = p.top_p = 1.0f;
        p.top_k = 1;
        p.min_p = 0.0f;
    }
    return (stage_params) { .options = p, .log_min_p = (float) log((double) p.min_p) };
}

pyllava_status sampler_create(int32_t n_vocab, const pyllava_sampler_params * p, pyllava_sampler ** out) {
    TRY(check_params(p));
    pyllava_sampler * s = calloc(1, sizeof *s);
    TRY_ALLOC(s, sizeof *s);
    s->params = stage_params_of(*p);
    s->state = p->seed;
    s->recent = calloc((size_t) p->repeat_last_n + 1, sizeof *s->recent);
    s->params.recent = s->recent;
    pyllava_status status = candidates_create(&s->candidates, n_vocab);
    if (status == PYLLAVA_OK && !s->recent) status = error_set(PYLLAVA_ERR_MEMORY, "out of memory");
    if (status == PYLLAVA_OK) *out = s;
    else sampler_free(s);
    return status;
}

void sampler_free(pyllava_sampler * s) {
    if (!s) return;
    free(s->recent);
    candidates_free(&s->candidates);
    free(s);
}

int32_t sampler_n_vocab(const pyllava_sampler * s) { return s->candidates.n_vocab; }

static void remember(pyllava_sampler * s, int32_t id) {
    const int32_t window = s->params.options.repeat_last_n;
    if (window == 0) return;
    s->recent[s->at] = id;
    s->at = (s->at + 1) % window;
    if (s->params.n_recent < window) s->params.n_recent++;
}

// softmax(logits) without any stage: log p = (logit - largest) - log of the sum of exp(logit - largest).
typedef struct log_softmax {
    const float * logits;
    double largest, log_sum;
} log_softmax;

static log_softmax log_softmax_of(candidates * c, const float * logits) {
    candidates_weigh(c, 1.0f);
    return (log_softmax) { logits, (double) c->largest, log(c->total) };
}

static pyllava_choice choice_of(log_softmax l, int32_t id) {
    return (pyllava_choice) { id, (float) ((double) l.logits[id] - l.largest - l.log_sum) };
}

static pyllava_status find_alternatives(candidates * c, log_softmax l, int32_t n, pyllava_choice * out) {
    TRY(candidates_load(c, l.logits));
    candidates_weigh_alike(c);
    candidates_keep(c, candidates_cut(c, n, FLT_MAX));
    candidates_sort(c);
    for (int32_t i = 0; i < n; i++) out[i] = choice_of(l, c->ids[i]);
    return PYLLAVA_OK;
}

static pyllava_status none_left(const pyllava_sampler * s) {
    FAIL(PYLLAVA_ERR_ARGUMENT, "mask: no token of %d is left, need one", s->candidates.n_vocab);
}

pyllava_status sampler_check(const pyllava_sampler * s, const uint32_t * mask, int32_t n_alternatives) {
    const int32_t n = s->candidates.n_vocab;
    if (n_alternatives < 0 || n_alternatives > n)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_alternatives: found %d, need 0..%d", n_alternatives, n);
    for (int32_t id = 0; mask && id < n; id++) {
        if (mask[id / 32] >> id % 32 & 1) return PYLLAVA_OK;
    }
    return mask ? none_left(s) : PYLLAVA_OK;
}

pyllava_status sampler_choose(pyllava_sampler * s, const float * logits, const uint32_t * mask,
                              int32_t n_alternatives, pyllava_choice * out_choice,
                              pyllava_choice * out_alternatives) {
    candidates * c = &s->candidates;
    TRY(candidates_load(c, logits));
    const log_softmax model = log_softmax_of(c, logits);
    s->params.logits = logits;
    s->params.mask = mask;
    stages_run(c, &s->params);
    if (c->n == 0) return none_left(s);
    const int32_t id = c->ids[candidates_draw(c, next_uniform(s))];
    if (n_alternatives > 0) TRY(find_alternatives(c, model, n_alternatives, out_alternatives));
    remember(s, id);
    *out_choice = choice_of(model, id);
    return PYLLAVA_OK;
}
