// granite.c - IBM's Granite 3 ("Granite 3.0 Language Models", 2024): LLaMA's layers under four scales (of
// embeddings, attention, residuals and logits; language_hparams.h).
#include "language.h"

typedef struct granite_layer { // E = n_embd, Q = n_head * head_dim, K = n_head_kv * head_dim, F = n_ff
    tensor * attn_norm;        // [E]
    tensor *attn_q, *attn_k, *attn_v, *attn_output; // [Q, E], [K, E], [K, E], [E, Q]
    tensor * ffn_norm;                              // [E]
    tensor *ffn_gate, *ffn_up, *ffn_down;           // [F, E], [F, E], [E, F]
} granite_layer;

static void granite_bind(void * layer, weights * w, const language_hparams * h, int i) {
    granite_layer * l = layer;
    const int64_t E = h->n_embd, F = h->n_ff, Q = (int64_t) h->n_head * h->head_dim,
                  K = (int64_t) h->n_head_kv * h->head_dim;
    // clang-format off: a table
    l->attn_norm   = weights_vector(w, E,    "blk.%d.attn_norm.weight", i);
    l->attn_q      = weights_matrix(w, Q, E, "blk.%d.attn_q.weight", i);
    l->attn_k      = weights_matrix(w, K, E, "blk.%d.attn_k.weight", i);
    l->attn_v      = weights_matrix(w, K, E, "blk.%d.attn_v.weight", i);
    l->attn_output = weights_matrix(w, E, Q, "blk.%d.attn_output.weight", i);
    l->ffn_norm    = weights_vector(w, E,    "blk.%d.ffn_norm.weight", i);
    l->ffn_gate    = weights_matrix(w, F, E, "blk.%d.ffn_gate.weight", i);
    l->ffn_up      = weights_matrix(w, F, E, "blk.%d.ffn_up.weight", i);
    l->ffn_down    = weights_matrix(w, E, F, "blk.%d.ffn_down.weight", i);
    // clang-format on
}

static tensor * granite_attention(graph * g, const granite_layer * l, const language_step * s, int i,
                                  tensor * x) {
    tensor * q = nn_name(g, nn_linear(g, l->attn_q, NULL, x), "blk.%d.attn_q", i);
    tensor * k = nn_name(g, nn_linear(g, l->attn_k, NULL, x), "blk.%d.attn_k", i);
    tensor * v = nn_name(g, language_values(g, s, l->attn_v, NULL, x), "blk.%d.attn_v", i);
    x = language_attend(g, s, i, q, k, v); // [n_tokens, Q]
    return nn_name(g, nn_linear(g, l->attn_output, NULL, x), "blk.%d.attn_out", i);
}

// down(silu(gate(x)) * up(x))
static tensor * granite_ffn(graph * g, const granite_layer * l, int i, tensor * x) {
    tensor * h = nn_swiglu(g, l->ffn_gate, l->ffn_up, x);
    return nn_name(g, nn_linear(g, l->ffn_down, NULL, h), "blk.%d.ffn_out", i);
}

// One pre-norm decoder layer:   h = x + r Attention(RMS(x))    y = h + r FFN(RMS(h))
static tensor * granite_block(graph * g, const void * layer, const language_step * s, int i, tensor * x) {
    const granite_layer * l = layer;
    const float eps = s->hparams->eps, r = s->hparams->residual_scale;
    graph_enter(g, l->attn_norm);
    tensor * y = nn_name(g, nn_rms_norm(g, l->attn_norm, eps, x), "blk.%d.attn_norm", i);
    y = nn_scale(g, granite_attention(g, l, s, i, y), r);
    x = nn_name(g, nn_add(g, x, y), "blk.%d.ffn_inp", i);
    y = nn_name(g, nn_rms_norm(g, l->ffn_norm, eps, x), "blk.%d.ffn_norm", i);
    y = nn_scale(g, granite_ffn(g, l, i, y), r);
    return nn_name(g, nn_add(g, x, y), "blk.%d.out", i); // [n_tokens, E]
}

const language_family GRANITE = { "granite", ROPE_NORMAL, sizeof(granite_layer), granite_bind,
                                  granite_block };
