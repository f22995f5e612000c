// hparams.c - see hparams.h.
#include "hparams.h"

pyllava_status hparams_check_architecture(const pyllava_gguf * f, const char * need, const char * other,
                                          const char * hint) {
    if (f->n_keys == 0) FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: no metadata", f->path);
    if (f->n_tensors == 0) FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: no weights", f->path);
    gguf_text arch = { 0 };
    TRY(gguf_get_text(f, "general.architecture", true, &arch));
    if (gguf_text_is(arch, other)) FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s", f->path, hint);
    if (!gguf_text_is(arch, need)) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: architecture '%.*s', this version runs '%s'", f->path,
             (int) (arch.size < 64 ? arch.size : 64), arch.data, need);
    }
    return PYLLAVA_OK;
}
