// sampler_stages.c - see sampler_stages.h. After the mask the order is llama.cpp's. A new stage that cuts by
// logit is a function and a row, and what it needs stands in stage_params; one that keeps others than the
// most probable needs an operation of candidates.c.
#include "sampler_stages.h"

#include <float.h>

// A grammar, or whatever else knows which tokens may come next.
static void mask(candidates * c, const stage_params * p) {
    if (p->mask) candidates_keep_masked(c, p->mask);
}

static float penalised(int32_t id, const void * params) {
    const stage_params * p = params;
    const float logit = p->logits[id], penalty = p->options.repeat_penalty;
    const float x = (logit <= 0.0f ? logit * penalty : logit / penalty) + 0.0f; // never -0
    return x < -FLT_MAX ? -FLT_MAX : x > FLT_MAX ? FLT_MAX : x;
}

// Keskar et al., "CTRL", 2019: each token of the window once, however often it stands there.
static void repeat_penalty(candidates * c, const stage_params * p) {
    if (p->options.repeat_penalty != 1.0f) candidates_change(c, p->recent, p->n_recent, penalised, p);
}

static void top_k(candidates * c, const stage_params * p) {
    const int32_t k = p->options.top_k;
    if (k == 0 || k >= c->n) return;
    if (k == 1) {
        candidates_keep_best(c);
        return;
    }
    candidates_weigh_alike(c);
    candidates_keep(c, candidates_cut(c, k, FLT_MAX));
}

// Holtzman et al., 2020: the shortest list that holds top_p. What is more than 32 below the largest logit has
// less than 1e-8 of it all, so that no cut but one for top_p within 1e-8 of 1 lies there.
static void top_p(candidates * c, const stage_params * p) {
    if (p->options.top_p >= 1.0f) return;
    candidates_weigh(c, 1.0f);
    candidates_keep(c, candidates_cut(c, (double) p->options.top_p * c->total, 32.0f));
}

// Nguyen et al., 2024: p >= min_p * the largest p.
static void min_p(candidates * c, const stage_params * p) {
    if (p->options.min_p <= 0.0f) return;
    candidates_keep(c, (cut) { c->largest + p->log_min_p, c->n });
}

static void temperature(candidates * c, const stage_params * p) {
    candidates_weigh(c, p->options.temperature);
}

typedef void (*stage)(candidates * c, const stage_params * p);

static const stage STAGES[] = { mask, repeat_penalty, top_k, top_p, min_p, temperature };

void stages_run(candidates * c, const stage_params * p) {
    for (size_t i = 0; i < sizeof STAGES / sizeof *STAGES && c->n > 0; i++) STAGES[i](c, p);
}
