// vit.c - see vit.h.
#include "vit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ----------------------------------------------------------------------------------------- weights

// Files of the legacy converter call the expanding layer ffn_down; newer ones call it ffn_up. The shape tells
// (vit_bind refuses towers where it does not); where ffn_down's is wrong, that of ffn_up.
static bool is_legacy(const weights * w, const vit_hparams * h, int i) {
    char name[GGML_MAX_NAME];
    snprintf(name, sizeof name, "v.blk.%d.ffn_down.weight", i);
    const gguf_tensor * down = weights_find(w, name, NULL);
    if (down && (down->ne[0] == h->n_embd || down->ne[0] == h->n_ff)) return down->ne[0] == h->n_embd;
    snprintf(name, sizeof name, "v.blk.%d.ffn_up.weight", i);
    const gguf_tensor * up = weights_find(w, name, NULL);
    return up && up->ne[0] == h->n_ff;
}

static void bind_layer(vit_layer * l, weights * w, const vit_hparams * h, int i) {
    const int64_t D = h->n_embd, F = h->n_ff;
    // clang-format off: a table
    l->ln1        = weights_vector(w, D,    "v.blk.%d.ln1.weight", i);
    l->ln1_b      = weights_vector(w, D,    "v.blk.%d.ln1.bias", i);
    l->attn_q     = weights_matrix(w, D, D, "v.blk.%d.attn_q.weight", i);
    l->attn_q_b   = weights_vector(w, D,    "v.blk.%d.attn_q.bias", i);
    l->attn_k     = weights_matrix(w, D, D, "v.blk.%d.attn_k.weight", i);
    l->attn_k_b   = weights_vector(w, D,    "v.blk.%d.attn_k.bias", i);
    l->attn_v     = weights_matrix(w, D, D, "v.blk.%d.attn_v.weight", i);
    l->attn_v_b   = weights_vector(w, D,    "v.blk.%d.attn_v.bias", i);
    l->attn_out   = weights_matrix(w, D, D, "v.blk.%d.attn_out.weight", i);
    l->attn_out_b = weights_vector(w, D,    "v.blk.%d.attn_out.bias", i);
    l->ln2        = weights_vector(w, D,    "v.blk.%d.ln2.weight", i);
    l->ln2_b      = weights_vector(w, D,    "v.blk.%d.ln2.bias", i);
    // clang-format on

    const bool legacy = is_legacy(w, h, i);
    const char *fc1 = legacy ? "ffn_down" : "ffn_up", *fc2 = legacy ? "ffn_up" : "ffn_down";
    // clang-format off
    l->fc1        = weights_matrix(w, F, D, "v.blk.%d.%s.weight", i, fc1);
    l->fc1_b      = weights_vector(w, F,    "v.blk.%d.%s.bias", i, fc1);
    l->fc2        = weights_matrix(w, D, F, "v.blk.%d.%s.weight", i, fc2);
    l->fc2_b      = weights_vector(w, D,    "v.blk.%d.%s.bias", i, fc2);
    // clang-format on
}

// Layers behind the hidden state that is read may be there, and then are whole: those of a count that says
// more than the file holds are missing.
static pyllava_status ignore_rest(const vit_hparams * h, weights * w) {
    static const char * const PARTS[] = { "ln1",      "attn_q", "attn_k",   "attn_v",
                                          "attn_out", "ln2",    "ffn_down", "ffn_up" };
    char name[GGML_MAX_NAME];
    for (int i = h->n_layer_run; i < h->n_layer; i++) {
        for (int j = 0; j < 2 * (int) (sizeof PARTS / sizeof *PARTS); j++) {
            snprintf(name, sizeof name, "v.blk.%d.%s.%s", i, PARTS[j / 2], j % 2 ? "bias" : "weight");
            if (weights_find(w, name, NULL)) continue;
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: missing tensor %s (clip.vision.block_count: %d)",
                 w->files[0]->path, name, h->n_layer);
        }
        snprintf(name, sizeof name, "v.blk.%d.", i);
        weights_ignore(w, name);
    }
    weights_ignore(w, "v.post_ln.");
    weights_ignore(w, "v.head."); // SigLIP's pooling
    return w->status;
}

pyllava_status vit_bind(vit * v, weights * w) {
    const vit_hparams * h = &v->hparams;
    const int64_t D = h->n_embd;
    const bool has_class = weights_has(w, "v.class_embd"), has_pre_ln = weights_has(w, "v.pre_ln.weight");
    if (h->n_ff == h->n_embd) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED,
             "%s: feed_forward_length equals embedding_length %d: cannot tell ffn_up from ffn_down",
             w->files[0]->path, h->n_embd);
    }
    v->n_pos = h->n_patch + has_class;
    v->layers = calloc((size_t) h->n_layer_run + 1, sizeof *v->layers);
    TRY_ALLOC(v->layers, sizeof *v->layers * (size_t) h->n_layer_run);

    v->patch_embd =
        weights_unfolded(w, D, 3 * (int64_t) h->patch_size * h->patch_size, "v.patch_embd.weight");
    if (weights_has(w, "v.patch_embd.bias")) v->patch_embd_b = weights_vector(w, D, "v.patch_embd.bias");
    if (has_class) v->class_embd = weights_vector(w, D, "v.class_embd");
    v->position_embd = weights_table(w, v->n_pos, D, "v.position_embd.weight");
    if (has_pre_ln) v->pre_ln = weights_vector(w, D, "v.pre_ln.weight");
    if (has_pre_ln) v->pre_ln_b = weights_vector(w, D, "v.pre_ln.bias");
    for (int i = 0; i < h->n_layer_run; i++) bind_layer(&v->layers[i], w, h, i);
    TRY(w->status);
    return ignore_rest(h, w);
}

void vit_free(vit * v) {
    free(v->layers);
    v->layers = NULL;
}

// ----------------------------------------------------------------------------------------- network

void vit_unfold(const vit_hparams * h, const float * pixels, float * out) {
    const int S = h->image_size, P = h->patch_size, n = S / P; // pixels right of and below n P are not seen
    for (int patch = 0; patch < n * n; patch++) {
        for (int c = 0; c < 3; c++) {
            for (int y = 0; y < P; y++, out += P) {
                const size_t row = (size_t) c * S + (size_t) (patch / n) * P + y;
                memcpy(out, pixels + row * S + (size_t) (patch % n) * P, (size_t) P * sizeof *out);
            }
        }
    }
}

// Patch embeddings with the class token in front of each view, plus position embeddings: [n_views * n_pos,
// D]. Not rounded: in patches of one colour little is left of a sum of large numbers.
static tensor * embed(graph * g, const vit * v, tensor * patches) {
    graph_enter(g, v->patch_embd);
    tensor * x = nn_name(g, nn_linear_exact(g, v->patch_embd, v->patch_embd_b, patches), "v.patch_embd");
    x = nn_views(g, x);
    if (v->class_embd) x = nn_put_first(g, v->class_embd, x);
    return nn_all_rows(g, nn_name(g, nn_add(g, x, v->position_embd), "v.embd"));
}

static tensor * vit_attention(graph * g, const vit_layer * l, int i, tensor * x) {
    tensor * q = nn_name(g, nn_linear_fine(g, l->attn_q, l->attn_q_b, x), "v.blk.%d.attn_q", i);
    tensor * k = nn_name(g, nn_linear_fine(g, l->attn_k, l->attn_k_b, x), "v.blk.%d.attn_k", i);
    tensor * h = nn_name(g, nn_linear_fine(g, l->attn_v, l->attn_v_b, x), "v.blk.%d.attn_v", i);
    h = nn_name(g, nn_attention(g, q, k, h), "v.blk.%d.attn", i);
    return nn_name(g, nn_linear_fine(g, l->attn_out, l->attn_out_b, h), "v.blk.%d.attn_out", i);
}

static tensor * activate(graph * g, vit_act act, tensor * x) {
    switch (act) {
        case VIT_GELU:      return nn_gelu(g, x);
        case VIT_GELU_TANH: return nn_gelu_tanh(g, x);
        case VIT_SILU:      return nn_silu(g, x);
        default:            return nn_quick_gelu(g, x);
    }
}

// One pre-norm encoder layer:   h = x + Attention(LN1(x))    y = h + fc2(act(fc1(LN2(h))))
// In the fast mode CLIP's fc2 has 8 bits: only the inputs of the other matrices have outlier channels
// (bench/RESULTS.md). SigLIP's would lose more by that, and gain less.
static tensor * vit_block(graph * g, const vit * v, const vit_layer * l, int i, tensor * x) {
    const vit_hparams * h = &v->hparams;
    tensor * y = nn_name(g, nn_layer_norm(g, l->ln1, l->ln1_b, h->eps, x), "v.blk.%d.ln1", i);
    x = nn_add(g, x, vit_attention(g, l, i, y));
    y = nn_name(g, nn_layer_norm(g, l->ln2, l->ln2_b, h->eps, x), "v.blk.%d.ln2", i);
    y = activate(g, h->act, nn_linear_fine(g, l->fc1, l->fc1_b, y));
    y = (h->is_siglip ? nn_linear_fine : nn_linear)(g, l->fc2, l->fc2_b, y);
    y = nn_name(g, y, "v.blk.%d.ffn_out", i);
    return nn_name(g, nn_add(g, x, y), "v.blk.%d.out", i); // [n_views * n_pos, D]
}

// The hidden states that are read, side by side in the order of the list.
static tensor * selected(graph * g, const vit_hparams * h, tensor * const * states) {
    tensor * x = states[h->features[0]];
    for (int i = 1; i < h->n_features; i++) x = nn_beside(g, x, states[h->features[i]]);
    return x;
}

tensor * vit_features(graph * g, const vit * v, tensor * patches) {
    tensor * states[PYLLAVA_MAX_LAYERS + 1]; // state i is what layer i reads
    tensor * x = embed(g, v, patches);
    if (v->pre_ln) x = nn_name(g, nn_layer_norm(g, v->pre_ln, v->pre_ln_b, v->hparams.eps, x), "v.pre_ln");
    states[0] = x;
    for (int i = 0; i < v->hparams.n_layer_run; i++)
        states[i + 1] = vit_block(g, v, &v->layers[i], i, states[i]);
    x = selected(g, &v->hparams, states);
    if (v->class_embd) x = nn_skip_first(g, x); // LLaVA reads the patches alone
    return nn_name(g, x, "v.features");         // [n_views * n_patch, n_features * D]
}
