// language_hparams.h - the numbers that describe a language model, read and checked from the metadata of its
// file. Names of keys: docs/gguf.md of ggml.
#pragma once

#include "gguf.h"

// The language model (architecture "llama").
typedef struct llama_hparams {
    int32_t n_vocab, n_ctx_train, n_embd, n_layer, n_ff, n_head, n_head_kv, head_dim;
    float eps;        // of RMSNorm
    float rope_theta; // base of the rotary frequencies
    float rope_scale; // positions are multiplied by this (1 / factor of linear scaling)
} llama_hparams;

pyllava_status llama_hparams_read(llama_hparams * out, const pyllava_gguf * file);
