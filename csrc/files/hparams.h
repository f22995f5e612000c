// hparams.h - what reading language models and projectors has in common.
#pragma once

#include "gguf.h"

#define MAX_WIDTH ((int64_t) 1 << 20) // of rows, and of a vocabulary

// Fails where the file holds no metadata, no weights or no architecture.
pyllava_status hparams_architecture(const pyllava_gguf * file, gguf_text * out);
// Fails where a key that holds a truth value is of another type, whether or not this version reads it.
pyllava_status hparams_check_flags(const pyllava_gguf * file);
// What a file asks for is the name of a row in a table: adds the name of a row to the list of those there
// are, and fails where none is asked for.
void hparams_list(char * list, size_t size, const char * name);
pyllava_status hparams_refuse(const pyllava_gguf * file, const char * what, gguf_text found,
                              const char * known);
