// model.c - see model.h.
#include "model.h"

#include "guard.h"
#include "quantize.h"

#include <ggml-backend.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ----------------------------------------------------------------------------------------- placing

// Cells of a session's KV cache.
static uint64_t cells_of(const pyllava_session_params * s) {
    return s->kv_cells > 0 ? (uint64_t) s->kv_cells : (uint64_t) s->n_ctx * (uint64_t) s->n_seq;
}

// An estimate of the numbers that the compute buffer of a language model holds at once: rows of the widest
// layer, the mask, the scores of attention without flash attention, and 64 rows of logits.
static uint64_t compute_of_text(const language_hparams * h, const pyllava_session_params * s, bool flash) {
    const uint64_t n = (uint64_t) s->n_batch, n_cells = cells_of(s);
    const uint64_t row = 6 * (uint64_t) h->n_embd + 3 * (uint64_t) h->n_ff;
    const uint64_t kv = 2 * n_cells * (uint64_t) h->n_head_kv * (uint64_t) h->head_dim;
    return 4 * (n * row + n * n_cells + 64 * (uint64_t) h->n_vocab) +
           (flash ? 0 : 4 * (2 * (uint64_t) h->n_head * n * n_cells + kv));
}

static uint64_t compute_of_vision(const vit_hparams * h, const pyllava_session_params * s, bool flash) {
    const uint64_t n_pos = (uint64_t) h->n_patch + 1, n_views = (uint64_t) s->n_views;
    const uint64_t row = (uint64_t) (5 + h->n_features) * (uint64_t) h->n_embd + 2 * (uint64_t) h->n_ff;
    return 4 * n_views * (n_pos * row + (flash ? 0 : 2 * (uint64_t) h->n_head * n_pos * n_pos));
}

// Bytes that one layer's keys and values take for a session.
static uint64_t kv_of_layer(const language_hparams * h, const pyllava_session_params * s) {
    const uint64_t n = 2 * cells_of(s) * (uint64_t) h->n_head_kv * (uint64_t) h->head_dim;
    const bool wide = s->precision == PYLLAVA_EXACT || (s->type_k && !strcmp(s->type_k, "f32")) ||
                      (s->type_v && !strcmp(s->type_v, "f32"));
    return n * (wide ? 4 : 2);
}

// The session that the plan leaves memory for: plan_for, with defaults for what is 0.
static pyllava_session_params session_of(const pyllava_model * m, const pyllava_model_params * p) {
    const vit_hparams * v = &m->vision.vit.hparams;
    pyllava_session_params s = { .precision = PYLLAVA_FAST, .flash_attn = -1 };
    if (p->plan_for) s = *p->plan_for;
    if (s.n_ctx < 1)
        s.n_ctx = m->language.hparams.n_ctx_train < 4096 ? m->language.hparams.n_ctx_train : 4096;
    if (s.n_batch < 1) s.n_batch = 1024;
    if (s.n_seq < 1) s.n_seq = 1;
    int32_t n_views = 1; // of the largest picture
    for (int32_t i = 0; v->aspect == PYLLAVA_ANYRES && i < v->n_pinpoints; i++) {
        const int32_t n = 1 + v->pinpoints[i][0] / v->image_size * (v->pinpoints[i][1] / v->image_size);
        if (n > n_views) n_views = n;
    }
    if (s.n_views < 1) s.n_views = n_views;
    if (m->has_vision) s.n_views = vision_views(&m->vision, s.n_views);
    return s;
}

// The type of keys or values that attention reads: f32 is cast to f16. Unknown names are refused when the
// session is created.
static enum ggml_type cache_type(const char * name) {
    pyllava_tensor_type type;
    const bool found = name && tensor_type_find(name, &type) == PYLLAVA_OK;
    return found && type.id != GGML_TYPE_F32 ? (enum ggml_type) type.id : GGML_TYPE_F16;
}

// Whether all devices have flash attention for the cache of such a session.
static bool has_flash(const pyllava_model * m, const pyllava_session_params * s) {
    const language_hparams * h = &m->language.hparams;
    if (s->precision != PYLLAVA_FAST || s->flash_attn == 0) return false;
    const enum ggml_type k = cache_type(s->type_k), v = cache_type(s->type_v);
    for (int32_t i = 0; i < m->placement.devices.n; i++) {
        ggml_backend_dev_t d = m->placement.devices.items[i];
        if (!device_has_flash(d, h->n_head, h->n_head_kv, h->head_dim, k, v)) return false;
    }
    return true;
}

static void sizes_of(const pyllava_model * m, const pyllava_model_params * p, placement_sizes * out) {
    const language_hparams * h = &m->language.hparams;
    const pyllava_session_params s = session_of(m, p);
    const bool flash = has_flash(m, &s);
    const uint64_t kv = p->kv_on_host ? 0 : kv_of_layer(h, &s);
    *out = (placement_sizes) { .n_layer = h->n_layer, .compute = compute_of_text(h, &s, flash) };
    for (int32_t i = 0; i < h->n_layer; i++) {
        char prefix[32];
        snprintf(prefix, sizeof prefix, "blk.%d.", i);
        out->layers[i] = weights_size(&m->text_weights, prefix) + kv;
    }
    out->output = weights_size(&m->text_weights, "output");
    if (!weights_has(&m->text_weights, "output.weight"))
        out->output += weights_size(&m->text_weights, "token_embd");
    if (!p->mmproj) return;
    out->vision = weights_size(&m->vision_weights, "");
    out->compute_vision = compute_of_vision(&m->vision.vit.hparams, &s, flash);
}

// The index in p's devices of the device of that name, which is added if it is missing.
static pyllava_status find_or_add(placement * p, const char * name, int32_t * out) {
    device_list one;
    TRY(devices_choose("vision_device", name, &one));
    if (one.n > 1) FAIL(PYLLAVA_ERR_ARGUMENT, "vision_device: found '%s', need one device", name);
    *out = ON_HOST;
    if (one.n == 0) return PYLLAVA_OK;
    for (*out = 0; *out < p->devices.n; ++*out) {
        if (p->devices.items[*out] == one.items[0]) return PYLLAVA_OK;
    }
    if (p->devices.n == MAX_DEVICES) FAIL(PYLLAVA_ERR_ARGUMENT, "more than %d devices", MAX_DEVICES);
    p->devices.items[p->devices.n++] = one.items[0];
    return PYLLAVA_OK;
}

static pyllava_status check_wishes(const pyllava_model_params * p, int32_t n_devices) {
    if (p->n_gpu_layers < -1)
        FAIL(PYLLAVA_ERR_ARGUMENT, "n_gpu_layers: found %d, need -1 or more", p->n_gpu_layers);
    if (p->main_gpu < 0 || (p->main_gpu > 0 && p->main_gpu >= n_devices)) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "main_gpu: found %d, %s%d", p->main_gpu,
             n_devices ? "need 0.." : "devices: ", n_devices ? n_devices - 1 : 0);
    }
    float sum = 0;
    for (int32_t i = 0; p->tensor_split && i < p->n_tensor_split; i++) {
        if (!isfinite(p->tensor_split[i]) || p->tensor_split[i] < 0)
            FAIL(PYLLAVA_ERR_ARGUMENT, "tensor_split: share %d is %g, need 0 or more", i, p->tensor_split[i]);
        sum += p->tensor_split[i];
    }
    if (p->tensor_split && p->n_tensor_split && !(sum > 0))
        FAIL(PYLLAVA_ERR_ARGUMENT, "tensor_split: all shares are 0");
    if (p->n_tensor_split < 0 || (p->tensor_split && p->n_tensor_split > n_devices && n_devices > 0)) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "tensor_split: found %d shares for %d devices", p->n_tensor_split,
             n_devices);
    }
    return PYLLAVA_OK;
}

static void warn_of_no_device(const pyllava_model * m, const pyllava_model_params * p, int32_t n_devices) {
    if (p->n_gpu_layers <= 0 || n_devices) return;
    const bool asked = p->device && device_is_named(p->device, "cpu");
    log_text(&m->log, PYLLAVA_LOG_WARNING, "n_gpu_layers=%d has no effect: %s", p->n_gpu_layers,
             asked                ? "device is cpu"
             : devices_built_in() ? "no GPU was found"
                                  : "this build has no GPU back end (docs/building.md says how to get one)");
}

// SigLIP was trained with 0.5 for all colours; converters write CLIP's numbers unless they are told.
static void warn_of_mean(const pyllava_model * m, const pyllava_model_params * p) {
    const vit_hparams * v = &m->vision.vit.hparams;
    if (!v->is_siglip || fabsf(v->image_mean[0] - 0.4815f) > 1e-3f) return;
    log_text(&m->log, PYLLAVA_LOG_WARNING,
             "%s: a SigLIP tower with CLIP's clip.vision.image_mean and image_std, SigLIP has 0.5: the model "
             "sees wrong colours if that is a mistake of the conversion",
             p->mmproj);
}

// "0-11 on the CPU, 12-31 on CUDA0"
static void log_placement(const pyllava_model * m) {
    const placement * p = &m->placement;
    char text[1024] = "";
    size_t used = 0;
    for (int32_t i = 0, n; i < p->n_layer && used < sizeof text; i += n) {
        for (n = 1; i + n < p->n_layer && p->layers[i + n] == p->layers[i];) n++;
        ggml_backend_dev_t d = placement_device(p, p->layers[i]);
        used += (size_t) snprintf(text + used, sizeof text - used, "%d-%d on %s, ", i, i + n - 1,
                                  d ? ggml_backend_dev_name(d) : "the CPU");
    }
    ggml_backend_dev_t output = placement_device(p, p->output), vision = placement_device(p, p->vision);
    log_text(&m->log, PYLLAVA_LOG_INFO, "language model: layers %soutput on %s", text,
             output ? ggml_backend_dev_name(output) : "the CPU");
    if (!m->has_vision) return;
    log_text(&m->log, PYLLAVA_LOG_INFO, "clip_model_load: CLIP using %s backend%s%s",
             vision ? ggml_backend_dev_name(vision) : "CPU", vision ? ": " : "",
             vision ? ggml_backend_dev_description(vision) : "");
}

static pyllava_status choose_places(pyllava_model * m, const pyllava_model_params * p) {
    placement * to = &m->placement;
    TRY(devices_choose("device", p->device, &to->devices));
    TRY(devices_check(&to->devices));
    TRY(check_wishes(p, to->devices.n));
    to->kv_on_host = p->kv_on_host;
    const int32_t n_for_layers = to->devices.n;
    placement_wish wish = { .n_gpu_layers = p->n_gpu_layers, .vision = VISION_AUTO, .main_gpu = p->main_gpu };
    if (p->vision_device && !device_is_named(p->vision_device, "auto"))
        TRY(find_or_add(to, p->vision_device, &wish.vision));
    for (int32_t i = 0; i < to->devices.n; i++) {
        pyllava_device about;
        device_describe(to->devices.items[i], &about);
        wish.free[i] = about.memory_total ? about.memory_free : UINT64_MAX / 2; // unknown: all fits
        const bool shared = p->tensor_split && p->n_tensor_split;
        wish.split[i] = !shared ? 0 : i < p->n_tensor_split ? p->tensor_split[i] : 0;
    }
    placement_sizes sizes;
    sizes_of(m, p, &sizes);
    placement_plan(to, &sizes, &wish, n_for_layers);
    if (placement_n_gpu_layers(to) == 0 && to->vision == ON_HOST) to->devices.n = to->n_for_layers = 0;
    warn_of_no_device(m, p, n_for_layers);
    log_placement(m);
    return PYLLAVA_OK;
}

// ----------------------------------------------------------------------------------------- loading

static pyllava_status open_text(pyllava_model * m, const pyllava_model_params * p) {
    weights * w = &m->text_weights;
    TRY(weights_open(w, p->path, p->use_mmap, p->progress, &m->log));
    TRY(language_read(&m->language, w->files[0]));
    return tokenizer_read(&m->tokenizer, &m->vocab, w->files[0], &m->log);
}

static pyllava_status open_vision(pyllava_model * m, const pyllava_model_params * p) {
    weights * w = &m->vision_weights;
    TRY(weights_open(w, p->mmproj, p->use_mmap, p->progress, &m->log));
    m->has_vision = true;
    TRY(vision_read(&m->vision, w->files[0]));
    warn_of_mean(m, p);
    return PYLLAVA_OK;
}

static pyllava_status load_text(pyllava_model * m, const pyllava_model_params * p) {
    weights * w = &m->text_weights;
    TRY(weights_prepare(w));
    TRY(language_bind(&m->language, w, &m->placement));
    return weights_finish(w, p->progress, p->user);
}

static pyllava_status load_vision(pyllava_model * m, const pyllava_model_params * p) {
    weights * w = &m->vision_weights;
    TRY(weights_prepare(w));
    TRY(vision_bind(&m->vision, w, m->language.hparams.n_embd,
                    placement_device(&m->placement, m->placement.vision)));
    return weights_finish(w, p->progress, p->user);
}

// Arguments of functions that run inside a guard, since they call the back ends of devices.
typedef struct loading {
    pyllava_model * m;
    const pyllava_model_params * p;
} loading;

// Opens the files, reads the hyper-parameters and plans the placement: everything but the weights.
static pyllava_status prepare(void * loading_) {
    const loading * l = loading_;
    TRY(open_text(l->m, l->p));
    if (l->p->mmproj) TRY(open_vision(l->m, l->p));
    return choose_places(l->m, l->p);
}

static pyllava_status load(void * loading_) {
    const loading * l = loading_;
    TRY(cores_create(&l->m->cores));
    TRY(prepare(loading_));
    TRY(load_text(l->m, l->p));
    return l->p->mmproj ? load_vision(l->m, l->p) : PYLLAVA_OK;
}

static pyllava_status close_weights(void * model) {
    pyllava_model * m = model;
    weights_close(&m->text_weights);
    weights_close(&m->vision_weights);
    return PYLLAVA_OK;
}

static pyllava_status begin(const pyllava_model_params * p, pyllava_model ** out) {
    pyllava_model * m = calloc(1, sizeof *m);
    TRY_ALLOC(m, sizeof *m);
    m->log = (logger) { p->log, p->user };
    devices_set_up();
    *out = m;
    return PYLLAVA_OK;
}

pyllava_status model_plan(const pyllava_model_params * p, pyllava_model_devices * out) {
    pyllava_model * m = NULL;
    TRY(begin(p, &m));
    pyllava_status status = guarded(prepare, &(loading) { m, p });
    if (status == PYLLAVA_OK) model_devices(m, out);
    model_free(m);
    return status;
}

pyllava_status model_load(const pyllava_model_params * p, pyllava_model ** out) {
    pyllava_model * m = NULL;
    TRY(begin(p, &m));
    pyllava_status status = guarded(load, &(loading) { m, p });
    m->log = (logger) { 0 }; // the callback is for loading only
    if (status == PYLLAVA_OK && p->progress && !p->progress("load", 1.0f, p->user)) {
        status = error_set(PYLLAVA_ERR_CANCELLED, "loading was cancelled");
    }
    if (status != PYLLAVA_OK) {
        model_free(m);
        return status;
    }
    *out = m;
    return PYLLAVA_OK;
}

void model_free(pyllava_model * m) {
    if (!m) return;
    cores_free(m->cores);
    language_free(&m->language);
    vision_free(&m->vision);
    tokenizer_free(&m->tokenizer);
    vocab_free(&m->vocab);
    if (m->placement.devices.n == 0 || !guard_has_failed()) guarded(close_weights, m);
    free(m);
}

void model_describe(const pyllava_model * m, pyllava_model_info * out) {
    const language_hparams * h = &m->language.hparams;
    const vit_hparams * v = &m->vision.vit.hparams;
    pyllava_model_info info = {
        .n_vocab = h->n_vocab,
        .n_embd = h->n_embd,
        .n_layer = h->n_layer,
        .n_head = h->n_head,
        .n_head_kv = h->n_head_kv,
        .head_dim = h->head_dim,
        .n_ff = h->n_ff,
        .n_ctx_train = h->n_ctx_train,
        .bos_id = m->vocab.bos,
        .eos_id = m->vocab.eos,
        .unk_id = m->vocab.unk,
        .add_bos = m->vocab.add_bos,
        .space_prefix = m->tokenizer.space_prefix,
        .nfc = m->tokenizer.nfc,
        .has_vision = m->has_vision,
        .image_size = v->image_size,
        .patch_size = v->patch_size,
        .n_image_tokens = m->has_vision ? vision_rows(&m->vision, NULL) : 0,
        .n_embd_vision = v->n_embd,
        .n_layer_vision = v->n_layer,
        .n_layer_vision_run = v->n_layer_run,
        .aspect = (int32_t) v->aspect,
        .anyres_max = v->anyres_max,
        .n_pinpoints = v->aspect == PYLLAVA_ANYRES ? v->n_pinpoints : 0,
        .size = m->text_weights.size,
        .size_vision = m->vision_weights.size,
    };
    memcpy(info.image_mean, v->image_mean, sizeof info.image_mean);
    memcpy(info.image_std, v->image_std, sizeof info.image_std);
    memcpy(info.pinpoints, v->pinpoints, sizeof info.pinpoints);
    *out = info;
}

static const char * name_of(const placement * p, int32_t place) {
    ggml_backend_dev_t d = placement_device(p, place);
    return d ? ggml_backend_dev_name(d) : "CPU";
}

void model_devices(const pyllava_model * m, pyllava_model_devices * out) {
    const placement * p = &m->placement;
    memset(out, 0, sizeof *out);
    out->n_layer = p->n_layer;
    for (int32_t i = 0; i < p->n_layer; i++) out->layers[i] = name_of(p, p->layers[i]);
    out->output = name_of(p, p->output);
    out->vision = m->has_vision ? name_of(p, p->vision) : NULL;
    out->kv_on_host = p->kv_on_host;
    out->n_gpu_layers = placement_n_gpu_layers(p);
}
