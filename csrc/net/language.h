// language.h - a language model: embeddings, rotary positions, the loop over layers and the output, which all
// families share. A family is a row, in a file of its own such as llama.c; FAMILIES in language.c lists them.
#pragma once

#include "kv_cache.h"
#include "language_hparams.h"
#include "nn.h"
#include "placement.h"
#include "weights.h"

typedef struct language_step { // what all layers of a step share
    const language_hparams * hparams;
    rope_kind rope;
    const kv_cache * kv;
    tensor * rope_table; // [n_tokens, head_dim] of the tokens' positions
    tensor * cells;
} language_step;

typedef struct language_family {
    const char * name; // general.architecture of its files, and the prefix of their keys
    rope_kind rope;
    size_t layer_size; // bytes of the family's layer struct
    void (*bind)(void * layer, weights * w, const language_hparams * h, int i);
    tensor * (*block)(graph * g, const void * layer, const language_step * s, int i, tensor * x);
} language_family;

extern const language_family LLAMA, QWEN2, GRANITE;

typedef struct language {
    const language_family * family;
    language_hparams hparams;
    tensor * token_embd;   // [n_vocab, E = n_embd], read row by row on the host
    tensor * output_norm;  // [E]
    tensor * output;       // [n_vocab, E]; token_embd where the file ties them
    tensor * rope_freqs;   // [head_dim / 2], may be absent
    void * layers;         // [n_layer] of the family's struct
    float * rope_divisors; // [head_dim / 2] position / divisor = angle
} language;

typedef struct language_input {
    tensor * embd;          // f32 [n_tokens, E]
    tensor * positions;     // i32 [n_tokens]
    tensor * cells;         // i64 [n_tokens] rows of the cache that the tokens' keys and values go to
    tensor * rope_divisors; // f32 [head_dim / 2]
    tensor * out_rows;      // i32 [n_out] tokens whose logits are wanted
    tensor * mask; // f16 [n_tokens, n_cells in use]: 0 where a token sees a cell, else -inf; for devices
} language_input;

const language_family * language_family_of(gguf_text architecture);    // NULL: there is none
pyllava_status language_read(language * m, const pyllava_gguf * file); // the family and the hyper-parameters
pyllava_status language_bind(language * m, weights * w, const placement * p);
void language_free(language * m);
void language_embed(const language * m, int32_t id, float * out_row); // token_embd[id] as f32 [E]

tensor * language_logits(graph * g, const language * m, const language_input * in,
                         const kv_cache * kv); // f32 [n_out, n_vocab]

// For the blocks of families.
// The linear layer of the values: nn_linear, with 12 bits (nn_linear_fine) where heads share values.
tensor * language_values(graph * g, const language_step * s, tensor * w, tensor * b, tensor * x);
// Rotates queries and keys by their positions, stores keys and values in their cells, and computes attention.
tensor * language_attend(graph * g, const language_step * s, int i, tensor * q, tensor * k, tensor * v);
