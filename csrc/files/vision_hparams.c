// vision_hparams.c - see vision_hparams.h.
#include "vision_hparams.h"

#include "hparams.h"

#include <string.h>

#define MAX_SIDE   1024                // patches a side of a view: the rows of all tiles fit an int32_t
#define MAX_PIXELS ((int64_t) 1 << 28) // of a tiled picture

static pyllava_status read_normalisation(vit_hparams * h, const pyllava_gguf * f) {
    uint64_t n_mean, n_std;
    TRY(gguf_get_floats(f, "clip.vision.image_mean", h->image_mean, 3, &n_mean));
    TRY(gguf_get_floats(f, "clip.vision.image_std", h->image_std, 3, &n_std));
    if (n_mean != 3 || n_std != 3) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.image_mean and image_std: %d and %d numbers, need 3 each",
             f->path, (int) n_mean, (int) n_std);
    }
    for (int c = 0; c < 3; c++) {
        if (!(h->image_mean[c] >= -1e3f && h->image_mean[c] <= 1e3f) ||
            !(h->image_std[c] > 1e-6f && h->image_std[c] <= 1e3f)) {
            FAIL(PYLLAVA_ERR_MISMATCH,
                 "%s: clip.vision.image_mean or image_std out of range (channel %d) [RANGE]", f->path, c);
        }
    }
    return PYLLAVA_OK;
}

// Layers to run. LLaVA reads hidden state -2: all layers but the last. Files of the legacy converter have
// dropped that layer already and do not say so (block_count = stored layers); newer ones name the hidden
// state in feature_layer.
static pyllava_status read_layers(vit_hparams * h, const pyllava_gguf * f) {
    TRY(gguf_get_int(f, "clip.vision.block_count", true, (gguf_range) { 1, PYLLAVA_MAX_LAYERS },
                     &h->n_layer));
    int32_t feature[PYLLAVA_MAX_LAYERS];
    uint64_t n = 0;
    TRY(gguf_get_ints(f, "clip.vision.feature_layer", feature, PYLLAVA_MAX_LAYERS, &n));
    if (n > 1)
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: clip.vision.feature_layer: %d layers, this version runs one",
             f->path, (int) n);
    int32_t layer = n ? feature[0] : -1;
    if (layer < -1 || layer > h->n_layer) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.feature_layer: found %d, need -1..%d [RANGE]", f->path,
             layer, h->n_layer);
    }
    // CLIP-L has 24 layers: 23 stored ones are the wanted ones, 24 without a feature_layer are the whole
    // tower.
    bool whole_tower = !n && (h->n_layer == 24 || h->n_layer == 32);
    h->n_layer_run = n && layer >= 0 ? layer : whole_tower ? h->n_layer - 1 : h->n_layer;
    return PYLLAVA_OK;
}

static pyllava_status read_pinpoints(vit_hparams * h, const pyllava_gguf * f) {
    uint64_t n = 0;
    int32_t sides[2 * MAX_PINPOINTS];
    TRY(gguf_get_ints(f, "clip.vision.image_grid_pinpoints", sides, 2 * MAX_PINPOINTS, &n));
    for (; h->n_pinpoints < (int32_t) (n / 2); h->n_pinpoints++) {
        const int32_t *p = &sides[2 * h->n_pinpoints], S = h->image_size;
        if (!p[0]) return PYLLAVA_OK; // some writers fill up with zeros
        if (p[0] < 0 || p[1] < 1 || p[0] % S || p[1] % S || (int64_t) (p[0] / S) * (p[1] / S) > MAX_TILES ||
            (int64_t) p[0] * p[1] > MAX_PIXELS) {
            FAIL(PYLLAVA_ERR_MISMATCH,
                 "%s: clip.vision.image_grid_pinpoints: found %d x %d, need multiples of image_size %d with "
                 "at most %d tiles and %lld pixels [RANGE]",
                 f->path, p[0], p[1], S, MAX_TILES, (long long) MAX_PIXELS);
        }
        memcpy(h->pinpoints[h->n_pinpoints], p, sizeof h->pinpoints[0]);
    }
    if (n % 2) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.image_grid_pinpoints: %d numbers, need pairs [ARR-LEN]",
             f->path, (int) n);
    }
    return PYLLAVA_OK;
}

// How a picture is cut: LLaVA-1.6 says spatial_unpad and lists the resolutions; everything else is one view.
static pyllava_status read_tiling(vit_hparams * h, const pyllava_gguf * f) {
    gguf_text merge = { "flat", 4 }, aspect = { "", 0 };
    TRY(gguf_get_text(f, "clip.vision.mm_patch_merge_type", false, &merge));
    TRY(gguf_get_text(f, "clip.vision.image_aspect_ratio", false, &aspect));
    TRY(read_pinpoints(h, f));
    h->anyres = gguf_text_is(merge, "spatial_unpad");
    if (!h->anyres && !gguf_text_is(merge, "flat")) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED,
             "%s: clip.vision.mm_patch_merge_type '%.*s', this version runs 'flat' and 'spatial_unpad'",
             f->path, (int) (merge.size < 64 ? merge.size : 64), merge.data);
    }
    if (h->anyres && aspect.size && !gguf_text_is(aspect, "anyres")) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: clip.vision.image_aspect_ratio '%.*s', this version runs 'anyres'",
             f->path, (int) (aspect.size < 64 ? aspect.size : 64), aspect.data);
    }
    if (h->anyres && h->n_pinpoints == 0) {
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: says mm_patch_merge_type spatial_unpad, but lists no clip.vision.image_grid_pinpoints: "
             "convert it again with those of the model's config.json",
             f->path);
    }
    if (!h->anyres && h->n_pinpoints && !gguf_text_is(aspect, "pad")) {
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: lists image_grid_pinpoints, but clip.vision.mm_patch_merge_type is not spatial_unpad: "
             "convert it again from the original model",
             f->path);
    }
    return PYLLAVA_OK;
}

pyllava_status vit_hparams_read(vit_hparams * out, const pyllava_gguf * f) {
    vit_hparams h = { 0 };
    bool gelu = false, silu = false;
    TRY(gguf_get_int(f, "clip.vision.image_size", true, (gguf_range) { 1, 8192 }, &h.image_size));
    TRY(gguf_get_int(f, "clip.vision.patch_size", true, (gguf_range) { 1, h.image_size }, &h.patch_size));
    if (h.image_size % h.patch_size) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.image_size %d is not a multiple of patch_size %d",
             f->path, h.image_size, h.patch_size);
    }
    if (h.image_size / h.patch_size > MAX_SIDE) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: clip.vision.patch_size %d: %d patches a side, at most %d", f->path,
             h.patch_size, h.image_size / h.patch_size, MAX_SIDE);
    }
    h.n_patch = (h.image_size / h.patch_size) * (h.image_size / h.patch_size);
    TRY(gguf_get_int(f, "clip.vision.embedding_length", true, (gguf_range) { 1, MAX_WIDTH }, &h.n_embd));
    TRY(gguf_get_int(f, "clip.vision.feed_forward_length", true, (gguf_range) { 1, MAX_WIDTH }, &h.n_ff));
    TRY(gguf_get_int(f, "clip.vision.attention.head_count", true, (gguf_range) { 1, 4096 }, &h.n_head));
    if (h.n_embd % h.n_head) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.embedding_length %d is not a multiple of head_count %d",
             f->path, h.n_embd, h.n_head);
    }
    TRY(gguf_get_float(f, "clip.vision.attention.layer_norm_epsilon", true, 1e-30, 1.0, &h.eps));
    TRY(gguf_get_bool(f, "clip.use_gelu", &gelu));
    TRY(gguf_get_bool(f, "clip.use_silu", &silu));
    if (gelu && silu)
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.use_gelu and clip.use_silu are both true", f->path);
    h.act = gelu ? VIT_GELU : silu ? VIT_SILU : VIT_QUICK_GELU;
    TRY(read_layers(&h, f));
    TRY(read_normalisation(&h, f));
    TRY(read_tiling(&h, f));
    *out = h;
    return PYLLAVA_OK;
}
