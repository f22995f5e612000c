// projector.c - see projector.h.
#include "projector.h"

int32_t projector_n_tensors(void) { return 4; }

pyllava_status projector_bind(projector * p, weights * w, const vit_hparams * h, int32_t n_embd_text) {
    const char * path = w->files[0]->path;
    if (weights_has(w, "mm.3.weight")) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: projector of the kind 'mlp_norm' (Yi-VL), this version runs 'mlp'",
             path);
    }
    const gguf_tensor * last = weights_find(w, "mm.2.weight", NULL);
    if (!last) FAIL(PYLLAVA_ERR_MISMATCH, "%s: missing tensor mm.2.weight", path);
    const int64_t D = h->n_embd, E = last->ne[1];
    if (E != n_embd_text) {
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: the projector gives embeddings of width %lld, the language model needs %d: wrong mmproj?",
             path, (long long) E, n_embd_text);
    }
    p->n_embd = (int32_t) E;
    p->mm_0 = weights_matrix(w, E, D, "mm.0.weight");
    p->mm_0_b = weights_vector(w, E, "mm.0.bias");
    p->mm_2 = weights_matrix(w, E, E, "mm.2.weight");
    p->mm_2_b = weights_vector(w, E, "mm.2.bias");
    return w->status;
}

tensor * projector_apply(graph * g, const projector * p, tensor * x) {
    x = nn_name(g, nn_linear_fine(g, p->mm_0, p->mm_0_b, x), "mm.0");
    x = nn_name(g, nn_gelu(g, x), "mm.1");
    return nn_name(g, nn_linear_fine(g, p->mm_2, p->mm_2_b, x), "mm.2");
}
