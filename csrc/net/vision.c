// vision.c - see vision.h.
#include "vision.h"

#include "hparams.h"
#include "language.h"

#define VIEW_ROWS 4096 // of views that are encoded at once, where those of one view are not more

pyllava_status vision_read(vision * v, const pyllava_gguf * f) {
    gguf_text name = { 0 };
    bool has_tower = false;
    TRY(hparams_architecture(f, &name));
    TRY(hparams_check_flags(f));
    if (language_family_of(name))
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: this is a language model, need a projector file (mmproj)", f->path);
    if (!gguf_text_is(name, "clip")) return hparams_refuse(f, "architecture", name, "'clip'");
    TRY(gguf_get_bool(f, "clip.has_vision_encoder", &has_tower));
    if (!has_tower)
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: clip.has_vision_encoder is not true: no vision tower in it",
             f->path);
    TRY(projector_read(&v->projector, f));
    return vit_hparams_read(&v->vit.hparams, f);
}

// Rows of a view stand in a square of this side.
static int32_t side(const vision * v) { return v->projector.kind->side(v->projector.n_side); }

pyllava_status vision_bind(vision * v, weights * w, int32_t n_embd_text, ggml_backend_dev_t device) {
    const vit_hparams * h = &v->vit.hparams;
    weights_place(w, device);
    const int32_t n_side = h->image_size / h->patch_size;
    TRY(projector_bind(&v->projector, w, n_side, h->n_features * h->n_embd, n_embd_text));
    TRY(vit_bind(&v->vit, w));
    weights_place(w, NULL);
    v->merge.n_most = h->anyres_max;
    return merge_bind(&v->merge, w, h->aspect == PYLLAVA_ANYRES, side(v), v->projector.n_embd);
}

void vision_free(vision * v) { vit_free(&v->vit); }

int32_t vision_rows(const vision * v, const pyllava_layout * layout) {
    return layout ? merge_length(&v->merge, layout) : side(v) * side(v);
}

int32_t vision_views(const vision * v, int32_t n) {
    const int32_t most = VIEW_ROWS / v->vit.hparams.n_patch;
    return n <= most ? n : most > 1 ? most : 1;
}

tensor * vision_embed(graph * g, const vision * v, tensor * patches) {
    return v->projector.kind->apply(g, &v->projector, vit_features(g, &v->vit, patches));
}

void vision_merge(const vision * v, const pyllava_layout * layout, const float * views, float * out) {
    merge_apply(&v->merge, layout, views, out);
}
