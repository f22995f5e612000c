// sampler_params.c - see sampler_params.h: a row for each number, in the order of the struct.
#include "sampler_params.h"
#include "sampler_stages.h"

#include <float.h>
#include <math.h>
#include <stddef.h>

#define MAX_WINDOW (1 << 20) // tokens looked back on
#define MAX_LIST   (1 << 20) // entries of logit_bias

typedef struct range {
    const char * name;
    size_t at; // in the struct
    double from, to;
    const char * need;
} range;

#define AT(field) #field, offsetof(pyllava_sampler_params, field)

static const range REALS[] = {
    { AT(temperature), -FLT_MAX, FLT_MAX, "a finite number" },
    { AT(dynatemp_range), 0.0, FLT_MAX, "0 (off) or more" },
    { AT(dynatemp_exponent), 0.0, FLT_MAX, "0 or more" },
    { AT(top_p), 0.0, 1.0, "0..1" },
    { AT(min_p), 0.0, 1.0, "0..1" },
    { AT(typical_p), 0.0, 1.0, "0..1" },
    { AT(top_n_sigma), -FLT_MAX, FLT_MAX, "a finite number (0 or less: off)" },
    { AT(xtc_probability), 0.0, 1.0, "0..1" },
    { AT(xtc_threshold), 0.0, 1.0, "0..1" },
    { AT(repeat_penalty), FLT_TRUE_MIN, FLT_MAX, "a number above 0 (1: off)" },
    { AT(presence_penalty), -FLT_MAX, FLT_MAX, "a finite number" },
    { AT(frequency_penalty), -FLT_MAX, FLT_MAX, "a finite number" },
    { AT(dry_multiplier), 0.0, FLT_MAX, "0 (off) or more" },
    { AT(dry_base), 1.0, FLT_MAX, "1 or more" },
    { AT(mirostat_tau), 0.0, FLT_MAX, "0 or more" },
    { AT(mirostat_eta), 0.0, FLT_MAX, "0 or more" },
    { AT(adaptive_target), -FLT_MAX, 1.0, "0..1 (below 0: off)" },
    { AT(adaptive_decay), 0.0, 0.99, "0..0.99" },
};

static const range INTEGERS[] = {
    { AT(top_k), 0, INT32_MAX, "0 (off) or more" },
    { AT(repeat_last_n), 0, MAX_WINDOW, "0..1048576" },
    { AT(dry_allowed_length), 0, INT32_MAX, "0 or more" },
    { AT(dry_penalty_last_n), 0, MAX_WINDOW, "0..1048576" },
    { AT(n_dry_sequence_breakers), 0, 1024, "0..1024" },
    { AT(mirostat), 0, 2, "0 (off), 1 or 2" },
    { AT(n_logit_bias), 0, MAX_LIST, "0..1048576" },
};

static pyllava_status check_biases(const pyllava_sampler_params * p, int32_t n_vocab) {
    if (!p->logit_bias && p->n_logit_bias > 0) FAIL(PYLLAVA_ERR_ARGUMENT, "need logit_bias");
    for (int32_t i = 0; i < p->n_logit_bias; i++) {
        const pyllava_bias b = p->logit_bias[i];
        if (b.id < 0 || b.id >= n_vocab)
            FAIL(PYLLAVA_ERR_ARGUMENT, "logit_bias: found token %d, need 0..%d", b.id, n_vocab - 1);
        if (!isfinite(b.bias) && b.bias != -INFINITY) {
            FAIL(PYLLAVA_ERR_ARGUMENT, "logit_bias: found %g for token %d, need a finite number or -inf",
                 (double) b.bias, b.id);
        }
    }
    return PYLLAVA_OK;
}

pyllava_status sampler_params_check(const pyllava_sampler_params * p, int32_t n_vocab) {
    for (size_t i = 0; i < sizeof REALS / sizeof *REALS; i++) {
        const range * r = &REALS[i];
        const double x = (double) *(const float *) ((const char *) p + r->at);
        if (!(x >= r->from && x <= (double) (float) r->to))
            FAIL(PYLLAVA_ERR_ARGUMENT, "%s: found %g, need %s", r->name, x, r->need);
    }
    for (size_t i = 0; i < sizeof INTEGERS / sizeof *INTEGERS; i++) {
        const range * r = &INTEGERS[i];
        const int32_t x = *(const int32_t *) ((const char *) p + r->at);
        if (x < r->from || x > r->to)
            FAIL(PYLLAVA_ERR_ARGUMENT, "%s: found %d, need %s", r->name, x, r->need);
    }
    if (!p->dry_sequence_breakers && p->n_dry_sequence_breakers > 0)
        FAIL(PYLLAVA_ERR_ARGUMENT, "need dry_sequence_breakers");
    TRY(check_biases(p, n_vocab));
    return stages_check_order(p->samplers, p->n_samplers);
}
