// model.c - see model.h.
#include "model.h"

#include <ggml-backend.h>
#include <stdlib.h>
#include <string.h>

static pyllava_status load_text(pyllava_model * m, const pyllava_model_params * p) {
    weights * w = &m->text_weights;
    TRY(weights_open(w, p->path, p->use_mmap, p->progress, &m->log));
    TRY(llama_hparams_read(&m->llama.hparams, w->files[0]));
    TRY(vocab_read(&m->vocab, w->files[0]));
    TRY(weights_prepare(w, llama_n_tensors(&m->llama.hparams)));
    TRY(llama_bind(&m->llama, w));
    return weights_finish(w);
}

static pyllava_status load_vision(pyllava_model * m, const pyllava_model_params * p) {
    weights * w = &m->vision_weights;
    TRY(weights_open(w, p->mmproj, p->use_mmap, p->progress, &m->log));
    TRY(vit_hparams_read(&m->vit.hparams, w->files[0]));
    TRY(weights_prepare(w, vit_n_tensors(&m->vit.hparams) + projector_n_tensors() + merge_n_tensors()));
    TRY(projector_bind(&m->projector, w, &m->vit.hparams, m->llama.hparams.n_embd));
    TRY(vit_bind(&m->vit, w));
    TRY(merge_bind(&m->merge, w, &m->vit.hparams, m->projector.n_embd));
    m->has_vision = true;
    return weights_finish(w);
}

static void keep_quiet(enum ggml_log_level level, const char * text, void * user) {
    (void) level, (void) text, (void) user;
}

pyllava_status model_load(const pyllava_model_params * p, pyllava_model ** out) {
    pyllava_model * m = calloc(1, sizeof *m);
    TRY_ALLOC(m, sizeof *m);
    m->log = (logger) { p->log, p->user };
    ggml_log_set(keep_quiet, NULL);                                      // the engine would print to stderr
    pyllava_status status = cores_create(&m->cores);
    if (status == PYLLAVA_OK) status = load_text(m, p);
    if (status == PYLLAVA_OK && p->mmproj) status = load_vision(m, p);
    m->log = (logger) { 0 };                                             // the callback is for loading only
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
    llama_free(&m->llama);
    vit_free(&m->vit);
    vocab_free(&m->vocab);
    weights_close(&m->text_weights);
    weights_close(&m->vision_weights);
    free(m);
}

void model_describe(const pyllava_model * m, pyllava_model_info * out) {
    const llama_hparams * h = &m->llama.hparams;
    const vit_hparams * v = &m->vit.hparams;
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
        .has_vision = m->has_vision,
        .image_size = v->image_size,
        .patch_size = v->patch_size,
        .n_image_tokens = v->n_patch,
        .n_embd_vision = v->n_embd,
        .n_layer_vision = v->n_layer,
        .n_layer_vision_run = v->n_layer_run,
        .anyres = v->anyres,
        .n_pinpoints = v->anyres ? v->n_pinpoints : 0,
        .size = m->text_weights.size,
        .size_vision = m->vision_weights.size,
    };
    memcpy(info.image_mean, v->image_mean, sizeof info.image_mean);
    memcpy(info.image_std, v->image_std, sizeof info.image_std);
    memcpy(info.pinpoints, v->pinpoints, sizeof info.pinpoints);
    *out = info;
}
