// language_hparams.h - the numbers that describe a language model, read and checked from the metadata of its
// file. Names of keys: docs/gguf.md of ggml.
#pragma once

#include "gguf.h"

typedef struct language_hparams {
    int32_t n_vocab, n_ctx_train, n_embd, n_layer, n_ff, n_head, n_head_kv, head_dim;
    float eps;        // of RMSNorm
    float rope_theta; // base of the rotary frequencies
    float rope_scale; // positions are multiplied by this (1 / factor of linear scaling)
} language_hparams;

// architecture: what the names of the keys begin with.
pyllava_status language_hparams_read(language_hparams * out, const pyllava_gguf * file,
                                     const char * architecture);
