// sampler_stages.c - see sampler_stages.h. A new stage is a function and a row, its options stand in
// pyllava_sampler_params, their ranges in sampler_params.c; what it does to the candidates is an operation of
// theirs.
#include "sampler_stages.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef pyllava_sampler_params options;

// SplitMix64 (Steele, Lea and Flood, 2014), to a double in [0, 1).
double stages_uniform(stages * s) {
    uint64_t z = s->random += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double) ((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// --------------------------------------------------------------------------------- logits are changed

static double biased(float logit, int32_t i, const void * of) {
    const stages * s = of;
    return (double) logit + (double) s->biases[i];
}

static void logit_bias(candidates * c, stages * s) {
    candidates_drop(c, s->banned, s->n_banned);
    candidates_change(c, s->bias_ids, s->n_bias, biased, s);
}

// What changes a logit after a temperature takes into account that this one is not yet divided by it.
// Products of options and temperatures that no float holds are numbers still in float64.
typedef struct change {
    const stages * s;
    const tally * tally;
    float temperature;
} change;

static double penalised(float logit, int32_t i, const void * of) {
    const change * to = of;
    const options * o = &to->s->options;
    const double x = (double) logit, repeat = (double) o->repeat_penalty;
    const double less = to->tally->numbers[i] * (double) o->frequency_penalty + (double) o->presence_penalty;
    return (x <= 0.0 ? x * repeat : x / repeat) - less * (double) to->temperature;
}

// Keskar et al., "CTRL", 2019: each token of the window once, however often it stands there; and OpenAI's, by
// how often it does, and for standing there at all.
static void penalties(candidates * c, stages * s) {
    const tally * counts = &s->recent.counts;
    const change to = { s, counts, c->temperature };
    candidates_change(c, counts->ids, counts->n, penalised, &to);
}

static bool penalties_on(const options * o) {
    return o->repeat_last_n > 0 &&
           (o->repeat_penalty != 1.0f || o->presence_penalty != 0.0f || o->frequency_penalty != 0.0f);
}

static double repeating(float logit, int32_t i, const void * of) {
    const change * to = of;
    return (double) logit - dry_penalty(&to->s->dry, to->tally->numbers[i]) * (double) to->temperature;
}

static void dry_stage(candidates * c, stages * s) {
    const tally * repeats = dry_repeats(&s->dry);
    const change to = { s, repeats, c->temperature };
    candidates_change(c, repeats->ids, repeats->n, repeating, &to);
}

static bool dry_on(const options * o) { return o->dry_multiplier > 0.0f && o->dry_penalty_last_n > 0; }

// -------------------------------------------------------------------------------- candidates are cut off

// Tang et al., 2024: logit >= the largest - n standard deviations.
static void top_n_sigma(candidates * c, stages * s) {
    const double least = (double) c->largest - (double) s->options.top_n_sigma * candidates_deviation(c);
    candidates_keep(c, (cut) { (float) fmax(least, -FLT_MAX), c->n });
}

static bool top_n_sigma_on(const options * o) { return o->top_n_sigma > 0.0f; }

static void top_k(candidates * c, stages * s) {
    const int32_t k = s->options.top_k;
    if (k >= c->n) return;
    if (k == 1) {
        candidates_keep_best(c);
        return;
    }
    candidates_weigh_alike(c);
    candidates_keep(c, candidates_cut(c, k, FLT_MAX));
}

static bool top_k_on(const options * o) { return o->top_k > 0; }

// Meister et al., 2022: the shortest list of those whose -log p is nearest to the entropy, which holds more
// than typical_p. That distance is the one of the logit from the mean logit, divided by the temperature.
static void typical(candidates * c, stages * s) { candidates_keep_typical(c, (double) s->options.typical_p); }

static bool typical_on(const options * o) { return o->typical_p < 1.0f; }

// Holtzman et al., 2020: the shortest list that holds top_p. What is more than 32 below the largest logit has
// less than 1e-8 of it all, so that no cut but one for top_p within 1e-8 of 1 lies there.
static void top_p(candidates * c, stages * s) {
    candidates_weigh(c);
    const double goal = (double) s->options.top_p * c->total;
    candidates_keep(c, candidates_cut(c, goal, fminf(32.0f * fmaxf(c->temperature, 1.0f), FLT_MAX)));
}

static bool top_p_on(const options * o) { return o->top_p < 1.0f; }

// Nguyen et al., 2024: p >= min_p * the largest p.
static void min_p(candidates * c, stages * s) {
    const float log_min_p = (float) log((double) s->options.min_p);
    candidates_keep(c, (cut) { fmaxf(c->largest + log_min_p * c->temperature, -FLT_MAX), c->n });
}

static bool min_p_on(const options * o) { return o->min_p > 0.0f; }

// p-e-w, "Exclude Top Choices", 2024.
static void xtc(candidates * c, stages * s) {
    if (stages_uniform(s) < (double) s->options.xtc_probability)
        candidates_drop_likely(c, s->options.xtc_threshold);
}

static bool xtc_on(const options * o) { return o->xtc_probability > 0.0f && o->xtc_threshold <= 0.5f; }

// ------------------------------------------------------------------------------------------ temperature

// Zhu et al., 2023, "EDT": the temperature goes with the entropy, from 0 to that of equal probabilities.
static float dynamic_temperature(candidates * c, const options * o) {
    const float least = fmaxf(0.0f, o->temperature - o->dynatemp_range);
    const float most = o->temperature + o->dynatemp_range;
    const double mean = candidates_mean(c), entropy = log(c->total) - mean / (double) c->temperature;
    const double share = fmin(fmax(entropy / log((double) c->n), 0.0), 1.0);
    return (float) ((double) least + (double) (most - least) * pow(share, (double) o->dynatemp_exponent));
}

static void temperature(candidates * c, stages * s) {
    const options * o = &s->options;
    const bool dynamic = o->dynatemp_range > 0.0f && o->mirostat == 0;
    if (c->n == 1) return;
    const float t = dynamic ? dynamic_temperature(c, o) : o->temperature;
    if (t > 0.0f) candidates_temper(c, t);
    else candidates_keep_best(c);
}

static bool temperature_on(const options * o) { return o->temperature != 1.0f || o->dynatemp_range > 0.0f; }

// --------------------------------------------------------------------------------------------- the order

static bool never(const options * o) {
    (void) o;
    return false;
}

typedef enum effect {
    EACH, // changes logits, each by itself
    TAIL, // drops the least probable
    ANY   // may drop the most probable
} effect;

typedef struct stage {
    const char * name;
    stage_fn run;
    bool (*on)(const options * o);
    effect effect;
} stage;

// The names and the order are llama.cpp's. adaptive_p is the draw that follows (draw.h), wherever it is
// named.
// clang-format off
static const stage STAGES[] = {
    { "penalties",   penalties,   penalties_on,   EACH },
    { "dry",         dry_stage,   dry_on,         EACH },
    { "top_n_sigma", top_n_sigma, top_n_sigma_on, TAIL },
    { "top_k",       top_k,       top_k_on,       TAIL },
    { "typ_p",       typical,     typical_on,     ANY  },
    { "top_p",       top_p,       top_p_on,       TAIL },
    { "min_p",       min_p,       min_p_on,       TAIL },
    { "xtc",         xtc,         xtc_on,         ANY  },
    { "temperature", temperature, temperature_on, EACH },
    { "adaptive_p",  NULL,        never,          EACH },
};
// clang-format on

#define N_STAGES ((int32_t) (sizeof STAGES / sizeof *STAGES))

static const stage * stage_named(const char * name) {
    for (int32_t i = 0; i < N_STAGES; i++) {
        if (strcmp(name, STAGES[i].name) == 0) return &STAGES[i];
    }
    return NULL;
}

pyllava_status stages_check_order(const char * const * names, int32_t n) {
    if (n < 0 || n > MAX_STAGES) FAIL(PYLLAVA_ERR_ARGUMENT, "samplers: found %d, need 0..%d", n, MAX_STAGES);
    for (int32_t i = 0; names && i < n; i++) {
        if (names[i] && stage_named(names[i])) continue;
        char known[32 * N_STAGES] = "";
        for (int32_t j = 0; j < N_STAGES; j++) {
            if (j > 0) strcat(known, ", ");
            strcat(known, STAGES[j].name);
        }
        FAIL(PYLLAVA_ERR_ARGUMENT, "samplers: found %.40s, need some of %s", names[i] ? names[i] : "NULL",
             known);
    }
    return PYLLAVA_OK;
}

// What is to run, in its order. Where the most probable token is going to be chosen, the tail may as well
// stay: unless a stage that drops others looks at how much it holds.
static void plan(stages * s, const stage * const * order, int32_t n) {
    const options * o = &s->options;
    const bool fixed = o->temperature <= 0.0f && (o->dynatemp_range <= 0.0f || o->mirostat != 0);
    bool greedy = false, all = false;
    for (int32_t i = 0; i < n; i++) {
        greedy |= order[i]->run == temperature && fixed;
        all |= order[i]->effect == ANY && order[i]->on(o);
    }
    for (int32_t i = 0; i < n; i++) {
        if (order[i]->on(o) && (order[i]->effect != TAIL || all || !greedy)) s->run[s->n++] = order[i]->run;
    }
}

static bool runs(const stages * s, stage_fn run) {
    for (int32_t i = 0; i < s->n; i++) {
        if (s->run[i] == run) return true;
    }
    return false;
}

static void put_in_order(stages * s, const pyllava_sampler_params * p) {
    const stage * order[MAX_STAGES];
    const int32_t n = p->mirostat != 0 ? 1 : p->samplers ? p->n_samplers : N_STAGES;
    bool adaptive = false;
    for (int32_t i = 0; i < n; i++) {
        order[i] = p->mirostat != 0 ? stage_named("temperature")
                   : p->samplers    ? stage_named(p->samplers[i])
                                    : &STAGES[i];
        adaptive |= !order[i]->run;
    }
    if (!adaptive) s->options.adaptive_target = -1.0f;
    plan(s, order, n);
}

static pyllava_status copy_biases(stages * s, const tokenizer * t, const pyllava_sampler_params * p) {
    const int32_t n_vocab = t->vocab->n;
    s->bias_ids = calloc((size_t) p->n_logit_bias + 1, sizeof *s->bias_ids);
    s->biases = calloc((size_t) p->n_logit_bias + 1, sizeof *s->biases);
    s->banned = calloc((size_t) n_vocab, sizeof *s->banned);
    if (!s->bias_ids || !s->biases || !s->banned) FAIL(PYLLAVA_ERR_MEMORY, "out of memory for logit_bias");
    for (int32_t i = 0; i < p->n_logit_bias; i++) {
        const pyllava_bias b = p->logit_bias[i];
        if (b.bias == -INFINITY) {
            s->banned[b.id] = 1;
        } else {
            s->bias_ids[s->n_bias] = b.id;
            s->biases[s->n_bias++] = b.bias;
        }
    }
    for (int32_t id = 0; id < n_vocab; id++) { // marks become a list
        if (s->banned[id] || (p->ignore_eos && t->vocab->ends[id])) s->banned[s->n_banned++] = id;
    }
    if (s->n_banned == n_vocab)
        FAIL(PYLLAVA_ERR_ARGUMENT, "logit_bias: found all %d tokens forbidden, need one that is not",
             n_vocab);
    return PYLLAVA_OK;
}

pyllava_status stages_create(stages * s, const tokenizer * t, const pyllava_sampler_params * p) {
    s->options = *p;
    s->options.dry_sequence_breakers = s->options.samplers = NULL;
    s->options.logit_bias = NULL;
    s->random = p->seed;
    put_in_order(s, p);
    if (p->n_logit_bias > 0 || p->ignore_eos) TRY(copy_biases(s, t, p));
    if (runs(s, penalties)) TRY(window_create(&s->recent, t->vocab->n, p->repeat_last_n));
    return runs(s, dry_stage) ? dry_create(&s->dry, t, p) : PYLLAVA_OK;
}

void stages_free(stages * s) {
    window_free(&s->recent);
    dry_free(&s->dry);
    free(s->bias_ids);
    free(s->biases);
    free(s->banned);
}

void stages_run(stages * s, candidates * c, const uint32_t * mask) {
    if (mask) candidates_keep_masked(c, mask); // a grammar, or whatever else knows which tokens may come next
    if (c->n == 0) return;
    logit_bias(c, s);
    for (int32_t i = 0; i < s->n; i++) s->run[i](c, s);
}

void stages_push(stages * s, int32_t id) {
    window_push(&s->recent, id);
    dry_push(&s->dry, id);
}
