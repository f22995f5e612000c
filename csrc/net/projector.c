// projector.c - see projector.h.
#include "projector.h"

#include "hparams.h"

// --------------------------------------------------------------------------------------------- mlp

// LLaVA-1.5's two layers (Liu et al., "Improved Baselines with Visual Instruction Tuning", 2023).
static pyllava_status mlp_bind(projector * p, weights * w, int64_t D, int64_t E) {
    p->mlp.mm_0 = weights_matrix(w, E, D, "mm.0.weight");
    p->mlp.mm_0_b = weights_vector(w, E, "mm.0.bias");
    p->mlp.mm_2 = weights_matrix(w, E, E, "mm.2.weight");
    p->mlp.mm_2_b = weights_vector(w, E, "mm.2.bias");
    return w->status;
}

static tensor * mlp_apply(graph * g, const projector * p, tensor * x) {
    x = nn_name(g, nn_linear_fine(g, p->mlp.mm_0, p->mlp.mm_0_b, x), "mm.0");
    x = nn_name(g, nn_gelu(g, x), "mm.1");
    return nn_name(g, nn_linear_fine(g, p->mlp.mm_2, p->mlp.mm_2_b, x), "mm.2");
}

// Each patch becomes one row.
static int32_t same_side(int32_t n_side) { return n_side; }

// ----------------------------------------------------------------------------------------- choosing

static const projector_kind KINDS[] = {
    { "mlp", "mm.2.weight", mlp_bind, mlp_apply, same_side },
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
