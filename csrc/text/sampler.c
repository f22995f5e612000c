// sampler.c - see sampler.h: the object, the draw, and the log-probabilities that go with it.
#include "sampler.h"
#include "draw.h"
#include "sampler_params.h"
#include "sampler_stages.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

struct pyllava_sampler {
    stages stages;
    draw draw;
    candidates candidates;
};

static pyllava_status build(pyllava_sampler * s, const tokenizer * t, const pyllava_sampler_params * p) {
    TRY(candidates_create(&s->candidates, t->vocab->n));
    TRY(stages_create(&s->stages, t, p));
    s->draw = draw_of(&s->stages.options);
    return PYLLAVA_OK;
}

pyllava_status sampler_create(const tokenizer * t, const pyllava_sampler_params * p, pyllava_sampler ** out) {
    TRY(sampler_params_check(p, t->vocab->n));
    pyllava_sampler * s = calloc(1, sizeof *s);
    TRY_ALLOC(s, sizeof *s);
    const pyllava_status status = build(s, t, p);
    if (status == PYLLAVA_OK) *out = s;
    else sampler_free(s);
    return status;
}

void sampler_free(pyllava_sampler * s) {
    if (!s) return;
    stages_free(&s->stages);
    candidates_free(&s->candidates);
    free(s);
}

int32_t sampler_n_vocab(const pyllava_sampler * s) { return s->candidates.n_vocab; }

// softmax(logits) without any stage: log p = (logit - largest) - log of the sum of exp(logit - largest).
typedef struct log_softmax {
    const float * logits;
    double largest, log_sum;
} log_softmax;

static log_softmax log_softmax_of(candidates * c, const float * logits) {
    candidates_weigh(c);
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
    stages_run(&s->stages, c, mask);
    if (c->n == 0) return none_left(s);
    const int32_t id = c->ids[draw_run(&s->draw, c, stages_uniform(&s->stages))];
    if (n_alternatives > 0) TRY(find_alternatives(c, model, n_alternatives, out_alternatives));
    stages_push(&s->stages, id);
    *out_choice = choice_of(model, id);
    return PYLLAVA_OK;
}
