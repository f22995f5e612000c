// hparams.c - see hparams.h.
#include "hparams.h"

#include <stdio.h>
#include <string.h>

pyllava_status hparams_architecture(const pyllava_gguf * f, gguf_text * out) {
    if (f->n_keys == 0) FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: no metadata", f->path);
    if (f->n_tensors == 0) FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: no weights", f->path);
    return gguf_get_text(f, "general.architecture", true, out);
}

pyllava_status hparams_check_flags(const pyllava_gguf * f) {
    static const char * const FLAGS[] = {
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_sep_token",
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.remove_extra_whitespaces",
        "clip.has_text_encoder",
        "clip.has_vision_encoder",
        "clip.has_audio_encoder",
        "clip.has_llava_projector",
        "clip.use_gelu",
        "clip.use_silu",
    };
    bool flag;
    for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++) TRY(gguf_get_bool(f, FLAGS[i], &flag));
    return PYLLAVA_OK;
}

void hparams_list(char * list, size_t size, const char * name) {
    const size_t used = strlen(list);
    snprintf(list + used, size - used, "%s'%s'", used ? ", " : "", name);
}

pyllava_status hparams_refuse(const pyllava_gguf * f, const char * what, gguf_text found,
                              const char * known) {
    FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: %s '%.*s', this version runs %s", f->path, what,
         (int) (found.size < 64 ? found.size : 64), found.data, known);
}
