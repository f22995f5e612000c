// hparams.h - what language_hparams.c and vision_hparams.c share.
#pragma once

#include "gguf.h"

#define MAX_WIDTH ((int64_t) 1 << 20) // of rows, and of a vocabulary

// Fails unless the file's architecture is the one that is needed; the other one deserves a hint.
pyllava_status hparams_check_architecture(const pyllava_gguf * file, const char * need, const char * other,
                                          const char * hint);
