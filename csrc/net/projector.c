// projector.c - see projector.h.
#include "projector.h"

#include "hparams.h"

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
};

pyllava_status projector_read(projector * p, const pyllava_gguf * f) {
    gguf_text name = { "mlp", 3 }; // files of 2023 have no such key
    TRY(gguf_get_text(f, "clip.projector_type", false, &name));
    if (name.size == 0) TRY(gguf_get_text(f, "clip.vision.projector_type", false, &name));
    char known[256] = "";
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        p->kind = &KINDS[i];
        if (gguf_text_is(name, p->kind->name)) return PYLLAVA_OK;
        hparams_list(known, sizeof known, p->kind->name);
    }
    return hparams_refuse(f, "projector type", name, known);
}

pyllava_status projector_bind(projector * p, weights * w, int32_t n_embd_vision, int32_t n_embd_text) {
    const char * path = w->files[0]->path;
    if (weights_has(w, "mm.3.weight")) { // its files say mlp
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: projector of the kind 'mlp_norm' (Yi-VL), this version runs 'mlp'",
             path);
    }
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
