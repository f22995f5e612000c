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
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.image_mean or image_std out of range (channel %d)",
                 f->path, c);
        }
    }
    return PYLLAVA_OK;
}

// CLIP's large and huge towers have 24 and 32 layers, SigLIP's So400m 27.
static bool is_whole_tower(const vit_hparams * h) {
    return h->is_siglip ? h->n_layer == 27 : h->n_layer == 24 || h->n_layer == 32;
}

// Layers to run. LLaVA reads hidden state -2: all layers but the last. Files of the legacy converter have
// dropped that layer already and do not say so (block_count = stored layers); newer ones name the hidden
// state in feature_layer, or several whose rows are to stand side by side.
static pyllava_status read_layers(vit_hparams * h, const pyllava_gguf * f) {
    TRY(gguf_get_int(f, "clip.vision.block_count", true, (gguf_range) { 1, PYLLAVA_MAX_LAYERS },
                     &h->n_layer));
    uint64_t n = 0;
    TRY(gguf_get_ints(f, "clip.vision.feature_layer", h->features, MAX_FEATURES, &n));
    h->n_features = n ? (int32_t) n : 1;
    if (n == 0) h->features[0] = is_whole_tower(h) ? h->n_layer - 1 : h->n_layer;
    for (int32_t i = 0; i < h->n_features; i++) {
        const int32_t found = h->features[i];
        if (found < -1 || found > h->n_layer) {
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.feature_layer: found %d, need -1..%d", f->path, found,
                 h->n_layer);
        }
        if (found == -1) h->features[i] = h->n_layer;
        if (h->features[i] > h->n_layer_run) h->n_layer_run = h->features[i];
    }
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
                 "at most %d tiles and %lld pixels",
                 f->path, p[0], p[1], S, MAX_TILES, (long long) MAX_PIXELS);
        }
        memcpy(h->pinpoints[h->n_pinpoints], p, sizeof h->pinpoints[0]);
    }
    if (n % 2) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.vision.image_grid_pinpoints: %d numbers, need pairs", f->path,
             (int) n);
    }
    return PYLLAVA_OK;
}

// "anyres", or LLaVA-OneVision's "anyres_max_N".
static bool is_anyres(gguf_text aspect, int32_t * out_max) {
    static const char START[] = "anyres_max_";
    const uint64_t n = sizeof START - 1;
    if (aspect.size == 0 || gguf_text_is(aspect, "anyres")) return true;
    if (aspect.size <= n || aspect.size > n + 3 || memcmp(aspect.data, START, n)) return false;
    for (uint64_t i = n; i < aspect.size; i++) {
        if (aspect.data[i] < '0' || aspect.data[i] > '9') return false;
        *out_max = 10 * *out_max + (aspect.data[i] - '0');
    }
    return *out_max > 0;
}

// How a picture is cut: LLaVA-1.6 says spatial_unpad and lists the resolutions; everything else is one view,
// of the padded picture with CLIP (its processor would cut borders off, and LLaVA was trained without that),
// and with SigLIP as its processor makes it.
static pyllava_status read_tiling(vit_hparams * h, const pyllava_gguf * f) {
    gguf_text merge = { "flat", 4 }, aspect = { "", 0 };
    TRY(gguf_get_text(f, "clip.vision.mm_patch_merge_type", false, &merge));
    TRY(gguf_get_text(f, "clip.vision.image_aspect_ratio", false, &aspect));
    TRY(read_pinpoints(h, f));
    const bool anyres = gguf_text_is(merge, "spatial_unpad"), pad = gguf_text_is(aspect, "pad");
    h->aspect = anyres ? PYLLAVA_ANYRES : h->is_siglip && !pad ? PYLLAVA_SQUASH : PYLLAVA_PAD;
    if (!anyres && !gguf_text_is(merge, "flat")) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED,
             "%s: clip.vision.mm_patch_merge_type '%.*s', this version runs 'flat' and 'spatial_unpad'",
             f->path, (int) (merge.size < 64 ? merge.size : 64), merge.data);
    }
    if (anyres && !is_anyres(aspect, &h->anyres_max)) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED,
             "%s: clip.vision.image_aspect_ratio '%.*s', this version runs 'anyres' and 'anyres_max_N'",
             f->path, (int) (aspect.size < 64 ? aspect.size : 64), aspect.data);
    }
    if (anyres && h->n_pinpoints == 0) {
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: says mm_patch_merge_type spatial_unpad, but lists no clip.vision.image_grid_pinpoints: "
             "convert it again with those of the model's config.json",
             f->path);
    }
    if (!anyres && h->n_pinpoints && !pad) {
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: lists image_grid_pinpoints, but clip.vision.mm_patch_merge_type is not spatial_unpad: "
             "convert it again from the original model",
             f->path);
    }
    return PYLLAVA_OK;
}

// The keys cannot tell GELU's tanh form, with which SigLIP was trained, from the erf form, and most files of
// SigLIP towers say neither: the kind of the tower decides.
static pyllava_status read_activation(vit_hparams * h, const pyllava_gguf * f) {
    bool gelu = false, silu = false;
    TRY(gguf_get_bool(f, "clip.use_gelu", &gelu));
    TRY(gguf_get_bool(f, "clip.use_silu", &silu));
    if (gelu && silu)
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: clip.use_gelu and clip.use_silu are both true", f->path);
    h->act = silu ? VIT_SILU : h->is_siglip ? VIT_GELU_TANH : gelu ? VIT_GELU : VIT_QUICK_GELU;
    return PYLLAVA_OK;
}

pyllava_status vit_hparams_read(vit_hparams * out, const pyllava_gguf * f) {
    vit_hparams h = { .is_siglip =
                          !gguf_find_tensor(f, "v.class_embd") && gguf_find_tensor(f, "v.patch_embd.bias") };
    TRY(gguf_get_int(f, "clip.vision.image_size", true, (gguf_range) { 1, 8192 }, &h.image_size));
    TRY(gguf_get_int(f, "clip.vision.patch_size", true, (gguf_range) { 1, h.image_size }, &h.patch_size));
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
    TRY(read_activation(&h, f));
    TRY(read_layers(&h, f));
    TRY(read_normalisation(&h, f));
    TRY(read_tiling(&h, f));
    *out = h;
    return PYLLAVA_OK;
}
