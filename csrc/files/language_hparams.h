// language_hparams.h - the numbers that describe a language model, read and checked from the metadata of its
// file. Names of keys: docs/gguf.md of ggml.
#pragma once

#include "gguf.h"

typedef struct language_hparams {
    int32_t n_vocab, n_ctx_train, n_embd, n_layer, n_ff, n_head, n_head_kv, head_dim;
    float eps;        // of RMSNorm
    float rope_theta; // base of the rotary frequencies
    float rope_scale; // positions are multiplied by this (1 / factor of linear scaling)
    // Granite's; 1 in all other families, but for attention_scale.
    float embedding_scale; // of what the first layer reads, tokens' rows and pictures'
    float attention_scale; // of products of queries and keys; 0: 1 / sqrt(head_dim)
    float residual_scale;  // of what a layer's parts add to their input
    float logit_scale;     // logits are divided by this
} language_hparams;

// architecture: what the names of the keys begin with.
pyllava_status language_hparams_read(language_hparams * out, const pyllava_gguf * file,
                                     const char * architecture);
