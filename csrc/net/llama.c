// llama.c - see llama.h.
#include "llama.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ----------------------------------------------------------------------------------------- weights

int32_t llama_n_tensors(const llama_hparams * h) { return 4 + 13 * h->n_layer; }

static tensor * optional_bias(weights * w, int64_t n, const char * name, int i) {
    return weights_has(w, "blk.%d.%s.bias", i, name) ? weights_vector(w, n, "blk.%d.%s.bias", i, name) : NULL;
}

static void bind_layer(llama_layer * l, weights * w, const llama_hparams * h, int i) {
    const int64_t E = h->n_embd, F = h->n_ff, Q = (int64_t) h->n_head * h->head_dim,
                  K = (int64_t) h->n_head_kv * h->head_dim;
    // clang-format off: a table
    l->attn_norm     = weights_vector(w, E,    "blk.%d.attn_norm.weight", i);
    l->attn_q        = weights_matrix(w, Q, E, "blk.%d.attn_q.weight", i);
    l->attn_k        = weights_matrix(w, K, E, "blk.%d.attn_k.weight", i);
    l->attn_v        = weights_matrix(w, K, E, "blk.%d.attn_v.weight", i);
    l->attn_output   = weights_matrix(w, E, Q, "blk.%d.attn_output.weight", i);
    l->ffn_norm      = weights_vector(w, E,    "blk.%d.ffn_norm.weight", i);
    l->ffn_gate      = weights_matrix(w, F, E, "blk.%d.ffn_gate.weight", i);
    l->ffn_up        = weights_matrix(w, F, E, "blk.%d.ffn_up.weight", i);
    l->ffn_down      = weights_matrix(w, E, F, "blk.%d.ffn_down.weight", i);
    l->attn_q_b      = optional_bias(w, Q, "attn_q", i);
    l->attn_k_b      = optional_bias(w, K, "attn_k", i);
    l->attn_v_b      = optional_bias(w, K, "attn_v", i);
    l->attn_output_b = optional_bias(w, E, "attn_output", i);
    // clang-format on
    char name[32];
    snprintf(name, sizeof name, "blk.%d.attn_rot_embd", i); // written by early converters, derived from theta
    weights_ignore(w, name);
}

// Angle of pair i at position p: p * scale * theta^(-2i / head_dim) / freqs[i], computed in double and
// rounded once.
static pyllava_status compute_rope(llama * m) {
    const llama_hparams * h = &m->hparams;
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

pyllava_status llama_bind(llama * m, weights * w, const placement * p) {
    const llama_hparams * h = &m->hparams;
    m->layers = calloc((size_t) h->n_layer, sizeof *m->layers);
    TRY_ALLOC(m->layers, sizeof *m->layers * (size_t) h->n_layer);
    m->token_embd = weights_matrix(w, h->n_vocab, h->n_embd, "token_embd.weight");
    if (weights_has(w, "rope_freqs.weight"))
        m->rope_freqs = weights_vector(w, h->head_dim / 2, "rope_freqs.weight");
    for (int i = 0; i < h->n_layer; i++) {
        weights_place(w, placement_device(p, p->layers[i]));
        bind_layer(&m->layers[i], w, h, i);
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

void llama_free(llama * m) {
    free(m->layers);
    free(m->rope_divisors);
    m->layers = NULL;
    m->rope_divisors = NULL;
}

void llama_embed(const llama * m, int32_t id, float * out_row) {
    const tensor * t = m->token_embd;
    const char * row = (const char *) t->data + (size_t) id * t->nb[1];
    if (t->type == GGML_TYPE_F32) memcpy(out_row, row, (size_t) t->ne[0] * sizeof *out_row);
    else ggml_get_type_traits(t->type)->to_float(row, out_row, t->ne[0]);
}

// ----------------------------------------------------------------------------------------- network

// What all layers share.
typedef struct llama_step {
    const kv_cache * kv;
    tensor * turns; // [n_tokens, head_dim] of the tokens' positions
    tensor * cells;
} llama_step;

// Values are what attention gives: where heads share them, their matrix is small and more bits cost little.
static tensor * llama_values(graph * g, const llama_layer * l, tensor * x) {
    const bool shared = l->attn_v && l->attn_q && l->attn_v->ne[1] < l->attn_q->ne[1];
    if (!shared) return nn_linear(g, l->attn_v, l->attn_v_b, x);
    return nn_linear_fine(g, l->attn_v, l->attn_v_b, x);
}

static tensor * llama_attention(graph * g, const llama_layer * l, const llama_step * s, int i, tensor * x) {
    tensor * q = nn_name(g, nn_linear(g, l->attn_q, l->attn_q_b, x), "blk.%d.attn_q", i);
    tensor * k = nn_name(g, nn_linear(g, l->attn_k, l->attn_k_b, x), "blk.%d.attn_k", i);
    tensor * v = nn_name(g, llama_values(g, l, x), "blk.%d.attn_v", i);
    q = nn_name(g, nn_rope(g, q, s->turns), "blk.%d.attn_q_rope", i);
    k = nn_name(g, nn_rope(g, k, s->turns), "blk.%d.attn_k_rope", i);
    k = nn_store_rows(g, s->kv->k[i], k, s->cells);
    v = nn_store_rows(g, s->kv->v[i], v, s->cells);
    x = nn_name(g, nn_attention(g, q, k, v), "blk.%d.attn", i); // [n_tokens, Q]
    return nn_name(g, nn_linear(g, l->attn_output, l->attn_output_b, x), "blk.%d.attn_out", i);
}

// SwiGLU (Shazeer, 2020):   down(silu(gate(x)) * up(x))
static tensor * llama_ffn(graph * g, const llama_layer * l, int i, tensor * x) {
    tensor * h = nn_swiglu(g, l->ffn_gate, l->ffn_up, x);
    return nn_name(g, nn_linear(g, l->ffn_down, NULL, h), "blk.%d.ffn_out", i);
}

// One pre-norm decoder layer:   h = x + Attention(RMS(x))    y = h + FFN(RMS(h))
static tensor * llama_block(graph * g, const llama * m, const llama_step * s, int i, tensor * x) {
    const llama_layer * l = &m->layers[i];
    const float eps = m->hparams.eps;
    graph_enter(g, l->attn_norm);
    tensor * y = nn_name(g, nn_rms_norm(g, l->attn_norm, eps, x), "blk.%d.attn_norm", i);
    x = nn_name(g, nn_add(g, x, llama_attention(g, l, s, i, y)), "blk.%d.ffn_inp", i);
    y = nn_name(g, nn_rms_norm(g, l->ffn_norm, eps, x), "blk.%d.ffn_norm", i);
    return nn_name(g, nn_add(g, x, llama_ffn(g, l, i, y)), "blk.%d.out", i); // [n_tokens, E]
}

tensor * llama_logits(graph * g, const llama * m, llama_input * in, const kv_cache * kv) {
    const llama_step s = { kv, nn_turns(g, in->positions, in->rope_divisors), in->cells };
    tensor * x = in->embd;
    for (int i = 0; i < m->hparams.n_layer; i++) x = llama_block(g, m, &s, i, x);
    if (in->mask) nn_tap(g, TAP_ROW_SUMS, nn_row_sums(g, x));
    graph_enter(g, m->output_norm);
    x = nn_rows(g, x, in->out_rows); // only these are asked for
    x = nn_name(g, nn_rms_norm(g, m->output_norm, m->hparams.eps, x), "output_norm");
    g->rows = ROWS_ANSWER;
    return nn_name(g, nn_linear(g, m->output, NULL, x), "logits"); // [n_out, n_vocab]
}
