// language.c - see language.h.
#include "language.h"

#include "hparams.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const language_family * const FAMILIES[] = { &LLAMA, &QWEN2, &GRANITE };

// ----------------------------------------------------------------------------------------- reading

const language_family * language_family_of(gguf_text architecture) {
    for (size_t i = 0; i < sizeof FAMILIES / sizeof *FAMILIES; i++) {
        if (gguf_text_is(architecture, FAMILIES[i]->name)) return FAMILIES[i];
    }
    return NULL;
}

pyllava_status language_read(language * m, const pyllava_gguf * f) {
    gguf_text name = { 0 };
    TRY(hparams_architecture(f, &name));
    TRY(hparams_check_flags(f));
    if (gguf_text_is(name, "clip"))
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: this is a projector (mmproj), need a language model", f->path);
    m->family = language_family_of(name);
    if (m->family) return language_hparams_read(&m->hparams, f, m->family->name);
    char known[256] = "";
    for (size_t i = 0; i < sizeof FAMILIES / sizeof *FAMILIES; i++)
        hparams_list(known, sizeof known, FAMILIES[i]->name);
    return hparams_refuse(f, "architecture", name, known);
}

// ----------------------------------------------------------------------------------------- weights

// Angle of pair i at position p: p * scale * theta^(-2i / head_dim) / freqs[i], computed in double and
// rounded once.
static pyllava_status compute_rope(language * m) {
    const language_hparams * h = &m->hparams;
    const int n = h->head_dim / 2;
    m->rope_divisors = malloc((size_t) n * sizeof(float));
    TRY_ALLOC(m->rope_divisors, (size_t) n * sizeof(float));
    for (int i = 0; i < n; i++) {
        double divisor = pow(h->rope_theta, 2.0 * i / h->head_dim) / h->rope_scale;
        if (m->rope_freqs) divisor *= ((const float *) m->rope_freqs->data)[i];
        if (!isfinite(divisor) || divisor <= 0)
            FAIL(PYLLAVA_ERR_MISMATCH, "rope_freqs.weight: entry %d is not a positive number", i);
        m->rope_divisors[i] = (float) divisor;
    }
    return PYLLAVA_OK;
}

static void * layer(const language * m, int i) {
    return (char *) m->layers + (size_t) i * m->family->layer_size;
}

pyllava_status language_bind(language * m, weights * w, const placement * p) {
    const language_hparams * h = &m->hparams;
    m->layers = calloc((size_t) h->n_layer, m->family->layer_size);
    TRY_ALLOC(m->layers, m->family->layer_size * (size_t) h->n_layer);
    m->token_embd = weights_matrix(w, h->n_vocab, h->n_embd, "token_embd.weight");
    if (weights_has(w, "rope_freqs.weight"))
        m->rope_freqs = weights_vector(w, h->head_dim / 2, "rope_freqs.weight");
    for (int i = 0; i < h->n_layer; i++) {
        weights_place(w, placement_device(p, p->layers[i]));
        m->family->bind(layer(m, i), w, h, i);
    }
    weights_place(w, placement_device(p, p->output));
    m->output_norm = weights_vector(w, h->n_embd, "output_norm.weight");
    const char * output = weights_has(w, "output.weight") ? "output.weight" : "token_embd.weight"; // tied
    const bool has_copy = p->output == ON_HOST && !strcmp(output, "token_embd.weight");
    m->output = has_copy ? m->token_embd : weights_matrix(w, h->n_vocab, h->n_embd, "%s", output);
    weights_place(w, NULL);
    TRY(w->status);
    return compute_rope(m);
}

void language_free(language * m) {
    free(m->layers);
    free(m->rope_divisors);
    m->layers = NULL;
    m->rope_divisors = NULL;
}

void language_embed(const language * m, int32_t id, float * out_row) {
    const tensor * t = m->token_embd;
    const char * row = (const char *) t->data + (size_t) id * t->nb[1];
    if (t->type == GGML_TYPE_F32) memcpy(out_row, row, (size_t) t->ne[0] * sizeof *out_row);
    else ggml_get_type_traits(t->type)->to_float(row, out_row, t->ne[0]);
}

// ----------------------------------------------------------------------------------------- network

// Results of attention are sums of values, so their rounding counts; where heads share values, their matrix
// is small and more bits cost little.
tensor * language_values(graph * g, const language_step * s, tensor * w, tensor * b, tensor * x) {
    const bool shared = s->hparams->n_head_kv < s->hparams->n_head;
    return shared ? nn_linear_fine(g, w, b, x) : nn_linear(g, w, b, x);
}

tensor * language_attend(graph * g, const language_step * s, int i, tensor * q, tensor * k, tensor * v) {
    q = nn_name(g, nn_rope(g, q, s->rope_table, s->rope), "blk.%d.attn_q_rope", i);
    k = nn_name(g, nn_rope(g, k, s->rope_table, s->rope), "blk.%d.attn_k_rope", i);
    const float scale = s->hparams->attention_scale; // nn_attention divides by sqrt(head_dim) itself
    if (scale != 0.0f) q = nn_scale(g, q, scale * sqrtf((float) s->hparams->head_dim));
    k = nn_store_rows(g, s->kv->k[i], k, s->cells);
    v = nn_store_rows(g, s->kv->v[i], v, s->cells);
    return nn_name(g, nn_attention(g, q, k, v), "blk.%d.attn", i); // [n_tokens, n_head * head_dim]
}

tensor * language_logits(graph * g, const language * m, const language_input * in, const kv_cache * kv) {
    const language_step s = { &m->hparams, m->family->rope, kv,
                              nn_rope_table(g, in->positions, in->rope_divisors), in->cells };
    tensor * x = nn_scale(g, in->embd, m->hparams.embedding_scale);
    for (int i = 0; i < m->hparams.n_layer; i++) x = m->family->block(g, layer(m, i), &s, i, x);
    if (in->mask) nn_tap(g, TAP_ROW_SUMS, nn_row_sums(g, x));
    graph_enter(g, m->output_norm);
    x = nn_rows(g, x, in->out_rows); // only these are asked for
    x = nn_name(g, nn_rms_norm(g, m->output_norm, m->hparams.eps, x), "output_norm");
    g->rows = ROWS_ANSWER;
    x = nn_scale(g, nn_linear(g, m->output, NULL, x), 1.0f / m->hparams.logit_scale);
    return nn_name(g, x, "logits"); // [n_out, n_vocab]
}
