// draw.c - see draw.h.
#include "draw.h"

#include <float.h>
#include <math.h>

#define MIROSTAT_TOP 100 // logits that Zipf's exponent is estimated from

draw draw_of(const pyllava_sampler_params * p) {
    const double decay = fmin((double) p->adaptive_decay, 0.99), target = (double) p->adaptive_target;
    return (draw) {
        .mirostat = p->mirostat,
        .tau = (double) p->mirostat_tau,
        .eta = (double) p->mirostat_eta,
        .mu = 2.0 * (double) p->mirostat_tau,
        .target = target,
        .decay = decay,
        .sum = target / (1.0 - decay), // as after a long past of probabilities that hit the target
        .weight = 1.0 / (1.0 - decay),
    };
}

// Basu et al., "Mirostat", 2021: how many of the most probable tokens have a surprise of mu on the whole, if
// probabilities follow Zipf's law with the exponent that the first of them show.
static double count_for(const draw * d, candidates * c) {
    float top[MIROSTAT_TOP];
    const int32_t n = candidates_top(c, MIROSTAT_TOP, top);
    double sum = 0.0, squares = 0.0;
    for (int32_t i = 0; i + 1 < n; i++) {
        const double t = log((double) (i + 2) / (double) (i + 1));
        sum += t * ((double) top[i] - (double) top[i + 1]) / (double) c->temperature;
        squares += t * t;
    }
    const double s = sum / squares, epsilon = s - 1.0;
    const double log_n = log((double) c->n_vocab);
    const double per = epsilon == 0.0 ? 1.0 / log_n : epsilon / -expm1(-epsilon * log_n);
    return pow(per * exp2(d->mu), 1.0 / s);
}

static void mirostat_1(const draw * d, candidates * c) {
    if (c->n == 1) return;
    const double k = count_for(d, c); // may be infinite
    if (k < (double) c->n) candidates_keep(c, candidates_cut(c, fmax(floor(k), 1.0), FLT_MAX));
}

// Those whose surprise is mu bits at most.
static void mirostat_2(const draw * d, candidates * c) {
    candidates_weigh(c);
    const double least = (double) c->base + (double) c->temperature * (log(c->total) - d->mu * log(2.0));
    candidates_keep(c, (cut) { (float) fmax(fmin(least, (double) c->largest), -FLT_MAX), c->n });
}

static int32_t draw_mirostat(draw * d, candidates * c, double share) {
    if (d->mirostat == 1) mirostat_1(d, c);
    else mirostat_2(d, c);
    candidates_weigh(c);
    const int32_t at = candidates_draw(c, share);
    const double surprise = -log2((double) c->weights[at] / c->total);
    d->mu -= d->eta * (surprise - d->tau);
    return at;
}

// llama.cpp's adaptive-p (MrJackSpade, 2025): tokens whose probability is near a target become the likely
// ones; the target goes against what was drawn before, so that the probabilities drawn have the target as
// their mean.
static int32_t draw_adaptive(draw * d, candidates * c, double share) {
    const double target = fmin(fmax(2.0 * d->target - d->sum / d->weight, 0.0), 1.0);
    const double total = candidates_favour(c, (float) target, 0.3f, 5.0f, 10.0f);
    const int32_t at = candidates_draw(c, share);
    d->sum = (double) c->scores[at] / total + d->decay * d->sum;
    d->weight = 1.0 + d->decay * d->weight;
    return at;
}

int32_t draw_run(draw * d, candidates * c, double share) {
    if (d->mirostat != 0) return draw_mirostat(d, c, share);
    if (d->target >= 0.0) return draw_adaptive(d, c, share);
    candidates_weigh(c);
    return candidates_draw(c, share);
}
