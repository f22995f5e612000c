// projector.c - see projector.h.
#include "projector.h"

#include "hparams.h"

#include <stdio.h>
#include <string.h>

// --------------------------------------------------------------------------------------------- mlp

// LLaVA-1.5's two layers (Liu et al., "Improved Baselines with Visual Instruction Tuning", 2023).
static pyllava_status bind_mlp(projector_mlp * p, weights * w, int64_t D, int64_t E) {
    p->mm_0 = weights_matrix(w, E, D, "mm.0.weight");
    p->mm_0_b = weights_vector(w, E, "mm.0.bias");
    p->mm_2 = weights_matrix(w, E, E, "mm.2.weight");
    p->mm_2_b = weights_vector(w, E, "mm.2.bias");
    return w->status;
}

static tensor * apply_mlp(graph * g, const projector_mlp * p, tensor * x) {
    x = nn_name(g, nn_linear_fine(g, p->mm_0, p->mm_0_b, x), "mm.0");
    x = nn_name(g, nn_gelu(g, x), "mm.1");
    return nn_name(g, nn_linear_fine(g, p->mm_2, p->mm_2_b, x), "mm.2");
}

static pyllava_status mlp_bind(projector * p, weights * w, int64_t D, int64_t E) {
    return bind_mlp(&p->mlp, w, D, E);
}

static tensor * mlp_apply(graph * g, const projector * p, tensor * x) { return apply_mlp(g, &p->mlp, x); }

// Each patch becomes one row.
static int32_t same_side(int32_t n_side) { return n_side; }

// ------------------------------------------------------------------------------------------ linear

// The first LLaVA's one layer (Liu et al., "Visual Instruction Tuning", 2023).
static pyllava_status linear_bind(projector * p, weights * w, int64_t D, int64_t E) {
    p->mlp.mm_0 = weights_matrix(w, E, D, "mm.0.weight");
    p->mlp.mm_0_b = weights_vector(w, E, "mm.0.bias");
    return w->status;
}

static tensor * linear_apply(graph * g, const projector * p, tensor * x) {
    return nn_name(g, nn_linear_fine(g, p->mlp.mm_0, p->mlp.mm_0_b, x), "mm.0");
}

// ---------------------------------------------------------------------------------------- mlp_norm

#define MLP_NORM_EPS 1e-5f

// Yi-VL (Young et al., "Yi: Open Foundation Models", 2024): both layers are normalised.
static pyllava_status mlp_norm_bind(projector * p, weights * w, int64_t D, int64_t E) {
    projector_mlp_norm * m = &p->mlp_norm;
    m->mm_0 = weights_matrix(w, E, D, "mm.0.weight");
    m->mm_0_b = weights_vector(w, E, "mm.0.bias");
    m->mm_1 = weights_vector(w, E, "mm.1.weight");
    m->mm_1_b = weights_vector(w, E, "mm.1.bias");
    m->mm_3 = weights_matrix(w, E, E, "mm.3.weight");
    m->mm_3_b = weights_vector(w, E, "mm.3.bias");
    m->mm_4 = weights_vector(w, E, "mm.4.weight");
    m->mm_4_b = weights_vector(w, E, "mm.4.bias");
    return w->status;
}

static tensor * mlp_norm_apply(graph * g, const projector * p, tensor * x) {
    const projector_mlp_norm * m = &p->mlp_norm;
    x = nn_name(g, nn_linear_fine(g, m->mm_0, m->mm_0_b, x), "mm.0");
    x = nn_name(g, nn_layer_norm(g, m->mm_1, m->mm_1_b, MLP_NORM_EPS, x), "mm.1");
    x = nn_name(g, nn_linear_fine(g, m->mm_3, m->mm_3_b, nn_gelu(g, x)), "mm.3");
    return nn_name(g, nn_layer_norm(g, m->mm_4, m->mm_4_b, MLP_NORM_EPS, x), "mm.4");
}

// -------------------------------------------------------------------------------------- ldp, ldpv2

#define LDP_EPS 1e-6f

// MobileVLM (Chu et al., 2023): a quarter of the rows. The first block keeps the square of patches, the
// second one halves its side.
static pyllava_status bind_block(mobile_block * b, weights * w, int i, int64_t E) {
    char name[48];
    snprintf(name, sizeof name, "mm.model.mb_block.%d.block.1.fc1.weight", i);
    const gguf_tensor * fc1 = weights_find(w, name, NULL);
    const int64_t U = fc1 ? fc1->ne[1] : 1;
    b->depthwise = weights_unfolded(w, E, 9, "mm.model.mb_block.%d.block.0.0.weight", i);
    b->norm_1 = weights_vector(w, E, "mm.model.mb_block.%d.block.0.1.weight", i);
    b->norm_1_b = weights_vector(w, E, "mm.model.mb_block.%d.block.0.1.bias", i);
    b->fc1 = weights_matrix(w, U, E, "mm.model.mb_block.%d.block.1.fc1.weight", i);
    b->fc1_b = weights_vector(w, U, "mm.model.mb_block.%d.block.1.fc1.bias", i);
    b->fc2 = weights_matrix(w, E, U, "mm.model.mb_block.%d.block.1.fc2.weight", i);
    b->fc2_b = weights_vector(w, E, "mm.model.mb_block.%d.block.1.fc2.bias", i);
    b->pointwise = weights_matrix(w, E, E, "mm.model.mb_block.%d.block.2.0.weight", i);
    b->norm_2 = weights_vector(w, E, "mm.model.mb_block.%d.block.2.1.weight", i);
    b->norm_2_b = weights_vector(w, E, "mm.model.mb_block.%d.block.2.1.bias", i);
    return w->status;
}

static pyllava_status ldp_bind(projector * p, weights * w, int64_t D, int64_t E) {
    p->ldp.mlp.mm_0 = weights_matrix(w, E, D, "mm.model.mlp.1.weight");
    p->ldp.mlp.mm_0_b = weights_vector(w, E, "mm.model.mlp.1.bias");
    p->ldp.mlp.mm_2 = weights_matrix(w, E, E, "mm.model.mlp.3.weight");
    p->ldp.mlp.mm_2_b = weights_vector(w, E, "mm.model.mlp.3.bias");
    TRY(bind_block(&p->ldp.blocks[0], w, 1, E));
    return bind_block(&p->ldp.blocks[1], w, 2, E);
}

static tensor * apply_block(graph * g, const mobile_block * b, int32_t n_side, int32_t stride, tensor * x) {
    x = nn_depthwise(g, b->depthwise, n_side, stride, x);
    x = nn_hard_swish(g, nn_layer_norm(g, b->norm_1, b->norm_1_b, LDP_EPS, x));
    tensor * s = nn_relu(g, nn_linear_fine(g, b->fc1, b->fc1_b, nn_mean_of_views(g, x)));
    s = nn_hard_sigmoid(g, nn_linear_fine(g, b->fc2, b->fc2_b, s)); // what each channel of a view counts
    x = nn_linear_fine(g, b->pointwise, NULL, nn_mul_views(g, x, s));
    return nn_layer_norm(g, b->norm_2, b->norm_2_b, LDP_EPS, x);
}

static tensor * ldp_apply(graph * g, const projector * p, tensor * x) {
    x = apply_mlp(g, &p->ldp.mlp, x);
    tensor * y = apply_block(g, &p->ldp.blocks[0], p->n_side, 1, x);
    x = nn_name(g, nn_add(g, x, y), "mm.model.mb_block.1");
    return nn_name(g, apply_block(g, &p->ldp.blocks[1], p->n_side, 2, x), "mm.model.mb_block.2");
}

static int32_t half_side_up(int32_t n_side) { return (n_side + 1) / 2; }

// MobileVLM V2 (Chu et al., 2024): means of 2 x 2 patches, and their positions from a convolution.
static pyllava_status ldpv2_bind(projector * p, weights * w, int64_t D, int64_t E) {
    p->ldpv2.mlp.mm_0 = weights_matrix(w, E, D, "mm.model.mlp.0.weight");
    p->ldpv2.mlp.mm_0_b = weights_vector(w, E, "mm.model.mlp.0.bias");
    p->ldpv2.mlp.mm_2 = weights_matrix(w, E, E, "mm.model.mlp.2.weight");
    p->ldpv2.mlp.mm_2_b = weights_vector(w, E, "mm.model.mlp.2.bias");
    p->ldpv2.peg = weights_unfolded(w, E, 9, "mm.model.peg.0.weight");
    p->ldpv2.peg_b = weights_vector(w, E, "mm.model.peg.0.bias");
    return w->status;
}

static int32_t half_side(int32_t n_side) { return n_side / 2; }

static tensor * ldpv2_apply(graph * g, const projector * p, tensor * x) {
    x = nn_pool(g, apply_mlp(g, &p->ldpv2.mlp, x), p->n_side, 2);
    tensor * y = nn_add(g, nn_depthwise(g, p->ldpv2.peg, half_side(p->n_side), 1, x), p->ldpv2.peg_b);
    return nn_name(g, nn_add(g, x, y), "mm.model.peg.0");
}

// --------------------------------------------------------------------------------------------- vip

#define VIP_EPS 1e-5f

// ViP-LLaVA (Cai et al., "Making Large Multimodal Models Understand Arbitrary Visual Prompts", 2024): the
// layers' features are normalised together, then the two layers of LLaVA-1.5.
static pyllava_status vip_bind(projector * p, weights * w, int64_t D, int64_t E) {
    p->vip.input_norm = weights_vector(w, D, "mm.input_norm.weight");
    p->vip.input_norm_b = weights_vector(w, D, "mm.input_norm.bias");
    return bind_mlp(&p->vip.mlp, w, D, E);
}

static tensor * vip_apply(graph * g, const projector * p, tensor * x) {
    x = nn_layer_norm(g, p->vip.input_norm, p->vip.input_norm_b, VIP_EPS, x);
    return apply_mlp(g, &p->vip.mlp, nn_name(g, x, "mm.input_norm"));
}

// ----------------------------------------------------------------------------------------- choosing

static const projector_kind KINDS[] = {
    { "mlp", "mm.2.weight", mlp_bind, mlp_apply, same_side },
    { "vip", "mm.2.weight", vip_bind, vip_apply, same_side },
    { "ldp", "mm.model.mlp.3.weight", ldp_bind, ldp_apply, half_side_up },
    { "ldpv2", "mm.model.mlp.2.weight", ldpv2_bind, ldpv2_apply, half_side },
    { "linear", "mm.0.weight", linear_bind, linear_apply, same_side },
    { "mlp_norm", "mm.3.weight", mlp_norm_bind, mlp_norm_apply, same_side },
};

static const projector_kind * kind_of(gguf_text name) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        if (gguf_text_is(name, KINDS[i].name)) return &KINDS[i];
    }
    return NULL;
}

pyllava_status projector_read(projector * p, const pyllava_gguf * f) {
    gguf_text name = { "mlp", 3 }; // files of 2023 have no such key
    TRY(gguf_get_text(f, "clip.projector_type", false, &name));
    if (name.size == 0) TRY(gguf_get_text(f, "clip.vision.projector_type", false, &name));
    p->kind = kind_of(name);
    if (p->kind) return PYLLAVA_OK;
    char known[256] = "";
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        hparams_list(known, sizeof known, KINDS[i].name);
    return hparams_refuse(f, "projector type", name, known);
}

// The files of two other kinds say mlp: their tensors tell.
static void look_closer(projector * p, const weights * w) {
    if (strcmp(p->kind->name, "mlp")) return;
    if (weights_has(w, "mm.3.weight")) p->kind = kind_of((gguf_text) { "mlp_norm", 8 });
    else if (!weights_has(w, "mm.2.weight") && !weights_has(w, "mm.2.bias"))
        p->kind = kind_of((gguf_text) { "linear", 6 });
}

pyllava_status projector_bind(projector * p, weights * w, int32_t n_side, int32_t n_embd_vision,
                              int32_t n_embd_text) {
    const char * path = w->files[0]->path;
    look_closer(p, w);
    p->n_side = n_side;
    const gguf_tensor * last = weights_find(w, p->kind->last, NULL);
    if (!last) FAIL(PYLLAVA_ERR_MISMATCH, "%s: missing tensor %s", path, p->kind->last);
    if (last->ne[1] != n_embd_text) {
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: the projector gives embeddings of width %lld, the language model needs %d: wrong mmproj?",
             path, (long long) last->ne[1], n_embd_text);
    }
    p->n_embd = n_embd_text;
    return p->kind->bind(p, w, n_embd_vision, n_embd_text);
}
