// language_hparams.c - see language_hparams.h.
#include "language_hparams.h"

#include "hparams.h"

#include <stdio.h>
#include <string.h>

#define MAX_KEY 128 // of names of keys that are asked for

// A file, and what its keys about the language model begin with: its architecture.
typedef struct source {
    const pyllava_gguf * file;
    const char * architecture;
} source;

static const char * full(const source * s, const char * key, char out[MAX_KEY]) {
    snprintf(out, MAX_KEY, "%s.%s", s->architecture, key);
    return out;
}

static bool has(const source * s, const char * key) {
    char name[MAX_KEY];
    return gguf_find_key(s->file, full(s, key, name));
}

static pyllava_status get_int(const source * s, const char * key, bool required, gguf_range range,
                              int32_t * out) {
    char name[MAX_KEY];
    return gguf_get_int(s->file, full(s, key, name), required, range, out);
}

static pyllava_status get_float(const source * s, const char * key, bool required, double min, double max,
                                float * out) {
    char name[MAX_KEY];
    return gguf_get_float(s->file, full(s, key, name), required, min, max, out);
}

static pyllava_status get_text(const source * s, const char * key, gguf_text * out) {
    char name[MAX_KEY];
    return gguf_get_text(s->file, full(s, key, name), false, out);
}

// Truth values that change nothing here, but for their types.
static pyllava_status check_flags(const source * s) {
    static const char * const FLAGS[] = { "attention.causal", "rope.scaling.finetuned",
                                          "use_parallel_residual" };
    char name[MAX_KEY];
    bool flag;
    for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++)
        TRY(gguf_get_bool(s->file, full(s, FLAGS[i], name), &flag));
    return PYLLAVA_OK;
}

static pyllava_status read_rope(language_hparams * h, const source * s) {
    h->rope_theta = 10000.0f;
    h->rope_scale = 1.0f;
    TRY(get_float(s, "rope.freq_base", false, 1.0, 1e12, &h->rope_theta));
    int32_t n_rot = h->head_dim;
    TRY(get_int(s, "rope.dimension_count", false, (gguf_range) { n_rot, n_rot }, &n_rot));
    gguf_text scaling = { "none", 4 };
    TRY(get_text(s, "rope.scaling.type", &scaling));
    float factor = 0.0f;
    TRY(get_float(s, "rope.scaling.factor", false, 0.0, 1e6, &factor));
    if (factor == 0.0f) TRY(get_float(s, "rope.scale_linear", false, 0.0, 1e6, &factor));
    bool linear =
        gguf_text_is(scaling, "linear") || (gguf_text_is(scaling, "none") && !has(s, "rope.scaling.type"));
    if (!linear && !gguf_text_is(scaling, "none")) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED,
             "%s: %s.rope.scaling.type '%.*s', this version runs 'none' and 'linear'", s->file->path,
             s->architecture, (int) (scaling.size < 64 ? scaling.size : 64), scaling.data);
    }
    if (has(s, "rope.scaling.type") && linear && factor == 0.0f) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s.rope.scaling.type is 'linear', but no %s.rope.scaling.factor > 0",
             s->file->path, s->architecture, s->architecture);
    }
    if (linear && factor > 0.0f) h->rope_scale = 1.0f / factor;
    return PYLLAVA_OK;
}

static pyllava_status read_scales(language_hparams * h, const source * s) {
    h->embedding_scale = h->residual_scale = h->logit_scale = 1.0f;
    if (strcmp(s->architecture, "granite") != 0) return PYLLAVA_OK;
    TRY(get_float(s, "embedding_scale", true, 1e-6, 1e6, &h->embedding_scale));
    TRY(get_float(s, "attention.scale", true, 1e-6, 1e6, &h->attention_scale));
    TRY(get_float(s, "residual_scale", true, 1e-6, 1e6, &h->residual_scale));
    return get_float(s, "logit_scale", true, 1e-6, 1e6, &h->logit_scale);
}

static pyllava_status read_heads(language_hparams * h, const source * s) {
    TRY(get_int(s, "attention.head_count", true, (gguf_range) { 1, 4096 }, &h->n_head));
    h->n_head_kv = h->n_head;
    TRY(get_int(s, "attention.head_count_kv", false, (gguf_range) { 1, h->n_head }, &h->n_head_kv));
    if (h->n_head % h->n_head_kv) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s.attention.head_count_kv: %d must divide head_count %d",
             s->file->path, s->architecture, h->n_head_kv, h->n_head);
    }
    h->head_dim = h->n_embd / h->n_head;
    if (h->n_embd % h->n_head && !has(s, "attention.key_length")) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s.embedding_length %d is not a multiple of head_count %d",
             s->file->path, s->architecture, h->n_embd, h->n_head);
    }
    int32_t value_dim = 0;
    TRY(get_int(s, "attention.key_length", false, (gguf_range) { 2, 1024 }, &h->head_dim));
    value_dim = h->head_dim;
    TRY(get_int(s, "attention.value_length", false, (gguf_range) { h->head_dim, h->head_dim }, &value_dim));
    if (h->head_dim % 2 || h->head_dim < 2 || h->head_dim > 1024) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: heads of width %d, need an even number in 2..1024", s->file->path,
             h->head_dim);
    }
    return PYLLAVA_OK;
}

pyllava_status language_hparams_read(language_hparams * out, const pyllava_gguf * f,
                                     const char * architecture) {
    const source s = { f, architecture };
    language_hparams h = { 0 };
    int32_t n_expert = 0;
    TRY(get_int(&s, "expert_count", false, (gguf_range) { 0, INT32_MAX }, &n_expert));
    if (n_expert)
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: mixture of %d experts, this version runs dense models", f->path,
             n_expert);
    TRY(get_int(&s, "context_length", true, (gguf_range) { 1, INT32_MAX }, &h.n_ctx_train));
    TRY(get_int(&s, "embedding_length", true, (gguf_range) { 1, MAX_WIDTH }, &h.n_embd));
    TRY(get_int(&s, "block_count", true, (gguf_range) { 1, PYLLAVA_MAX_LAYERS }, &h.n_layer));
    TRY(get_int(&s, "feed_forward_length", true, (gguf_range) { 1, MAX_WIDTH }, &h.n_ff));
    TRY(get_float(&s, "attention.layer_norm_rms_epsilon", true, 1e-30, 1.0, &h.eps));
    TRY(check_flags(&s));
    TRY(read_heads(&h, &s));
    TRY(read_rope(&h, &s));
    TRY(read_scales(&h, &s));
    const gguf_key * tokens = NULL;
    TRY(gguf_get_array(f, "tokenizer.ggml.tokens", GGUF_STRING, &tokens));
    if (!tokens || tokens->n == 0)
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: key tokenizer.ggml.tokens is missing or empty", f->path);
    if (tokens->n > MAX_WIDTH)
        FAIL(PYLLAVA_ERR_FILE, "%s: tokenizer.ggml.tokens: %llu entries, need at most %lld", f->path,
             (unsigned long long) tokens->n, (long long) MAX_WIDTH);
    h.n_vocab = (int32_t) tokens->n;
    TRY(get_int(&s, "vocab_size", false, (gguf_range) { h.n_vocab, h.n_vocab }, &h.n_vocab));
    *out = h;
    return PYLLAVA_OK;
}
