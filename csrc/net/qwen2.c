// qwen2.c - Qwen 1.5 and 2 (Yang et al., "Qwen2 Technical Report", 2024): RMSNorm, rotary positions over the
// halves of a head, grouped-query attention with biases, SwiGLU.
#include "language.h"

typedef struct qwen2_layer {   // E = n_embd, Q = n_head * head_dim, K = n_head_kv * head_dim, F = n_ff
    tensor * attn_norm;        // [E]
    tensor *attn_q, *attn_q_b; // [Q, E], [Q]
    tensor *attn_k, *attn_k_b, *attn_v, *attn_v_b; // [K, E], [K]
    tensor * attn_output;                          // [E, Q]
    tensor * ffn_norm;                             // [E]
    tensor *ffn_gate, *ffn_up, *ffn_down;          // [F, E], [F, E], [E, F]
} qwen2_layer;

static void qwen2_bind(void * layer, weights * w, const language_hparams * h, int i) {
    qwen2_layer * l = layer;
    const int64_t E = h->n_embd, F = h->n_ff, Q = (int64_t) h->n_head * h->head_dim,
                  K = (int64_t) h->n_head_kv * h->head_dim;
    // clang-format off: a table
    l->attn_norm   = weights_vector(w, E,    "blk.%d.attn_norm.weight", i);
    l->attn_q      = weights_matrix(w, Q, E, "blk.%d.attn_q.weight", i);
    l->attn_q_b    = weights_vector(w, Q,    "blk.%d.attn_q.bias", i);
    l->attn_k      = weights_matrix(w, K, E, "blk.%d.attn_k.weight", i);
    l->attn_k_b    = weights_vector(w, K,    "blk.%d.attn_k.bias", i);
    l->attn_v      = weights_matrix(w, K, E, "blk.%d.attn_v.weight", i);
    l->attn_v_b    = weights_vector(w, K,    "blk.%d.attn_v.bias", i);
    l->attn_output = weights_matrix(w, E, Q, "blk.%d.attn_output.weight", i);
    l->ffn_norm    = weights_vector(w, E,    "blk.%d.ffn_norm.weight", i);
    l->ffn_gate    = weights_matrix(w, F, E, "blk.%d.ffn_gate.weight", i);
    l->ffn_up      = weights_matrix(w, F, E, "blk.%d.ffn_up.weight", i);
    l->ffn_down    = weights_matrix(w, E, F, "blk.%d.ffn_down.weight", i);
    // clang-format on
}

static tensor * qwen2_attention(graph * g, const qwen2_layer * l, const language_step * s, int i,
                                tensor * x) {
    tensor * q = nn_name(g, nn_linear(g, l->attn_q, l->attn_q_b, x), "blk.%d.attn_q", i);
    tensor * k = nn_name(g, nn_linear(g, l->attn_k, l->attn_k_b, x), "blk.%d.attn_k", i);
    tensor * v = nn_name(g, language_values(g, s, l->attn_v, l->attn_v_b, x), "blk.%d.attn_v", i);
    x = language_attend(g, s, i, q, k, v); // [n_tokens, Q]
    return nn_name(g, nn_linear(g, l->attn_output, NULL, x), "blk.%d.attn_out", i);
}

// down(silu(gate(x)) * up(x))
static tensor * qwen2_ffn(graph * g, const qwen2_layer * l, int i, tensor * x) {
    tensor * h = nn_swiglu(g, l->ffn_gate, l->ffn_up, x);
    return nn_name(g, nn_linear(g, l->ffn_down, NULL, h), "blk.%d.ffn_out", i);
}

// One pre-norm decoder layer:   h = x + Attention(RMS(x))    y = h + FFN(RMS(h))
static tensor * qwen2_block(graph * g, const void * layer, const language_step * s, int i, tensor * x) {
    const qwen2_layer * l = layer;
    const float eps = s->hparams->eps;
    graph_enter(g, l->attn_norm);
    tensor * y = nn_name(g, nn_rms_norm(g, l->attn_norm, eps, x), "blk.%d.attn_norm", i);
    x = nn_name(g, nn_add(g, x, qwen2_attention(g, l, s, i, y)), "blk.%d.ffn_inp", i);
    y = nn_name(g, nn_rms_norm(g, l->ffn_norm, eps, x), "blk.%d.ffn_norm", i);
    return nn_name(g, nn_add(g, x, qwen2_ffn(g, l, i, y)), "blk.%d.out", i); // [n_tokens, E]
}

const language_family QWEN2 = { "qwen2", ROPE_NEOX, sizeof(qwen2_layer), qwen2_bind, qwen2_block };
