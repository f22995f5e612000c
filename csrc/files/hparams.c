// hparams.c - see hparams.h.
#include "hparams.h"

#include <stdio.h>
#include <string.h>

pyllava_status hparams_architecture(const pyllava_gguf * f, gguf_text * out) {
    if (f->n_keys == 0) FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: no metadata", f->path);
    if (f->n_tensors == 0) FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: no weights", f->path);
    return gguf_get_text(f, "general.architecture", true, out);
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
