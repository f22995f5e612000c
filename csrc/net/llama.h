// llama.h - the LLaMA decoder (Touvron et al., 2023): RMSNorm, rotary positions, grouped-query attention,
// SwiGLU.
#pragma once

#include "kv_cache.h"
#include "language_hparams.h"
#include "nn.h"
#include "placement.h"
#include "weights.h"

typedef struct llama_layer {   // E = n_embd, Q = n_head * head_dim, K = n_head_kv * head_dim, F = n_ff
    tensor * attn_norm;        // [E]
    tensor *attn_q, *attn_q_b; // [Q, E], [Q]; all biases may be absent
    tensor *attn_k, *attn_k_b, *attn_v, *attn_v_b; // [K, E], [K]
    tensor *attn_output, *attn_output_b;           // [E, Q]
    tensor * ffn_norm;                             // [E]
    tensor *ffn_gate, *ffn_up, *ffn_down;          // [F, E], [F, E], [E, F]
} llama_layer;

typedef struct llama {
    llama_hparams hparams;
    tensor * token_embd;   // [n_vocab, E], read row by row on the host
    tensor * output_norm;  // [E]
    tensor * output;       // [n_vocab, E]; token_embd where the file ties them
    tensor * rope_freqs;   // [head_dim / 2], may be absent
    llama_layer * layers;  // [n_layer]
    float * rope_divisors; // [head_dim / 2] position / divisor = angle
} llama;

typedef struct llama_input {
    tensor * embd;          // f32 [n_tokens, E]
    tensor * positions;     // i32 [n_tokens]
    tensor * cells;         // i32 [n_tokens] rows of the cache that the tokens' keys and values go to
    tensor * rope_divisors; // f32 [head_dim / 2]
    tensor * out_rows;      // i32 [n_out] tokens whose logits are wanted
    tensor * mask; // f16 [n_tokens, n_cells in use]: 0 where a token sees a cell, else -inf; for devices
} llama_input;

int32_t llama_n_tensors(const llama_hparams * h);
pyllava_status llama_bind(llama * m, weights * w, const placement * p);
void llama_free(llama * m);
void llama_embed(const llama * m, int32_t id, float * out_row); // token_embd[id] as f32 [E]

tensor * llama_logits(graph * g, const llama * m, llama_input * in,
                      const kv_cache * kv); // f32 [n_out, n_vocab]
