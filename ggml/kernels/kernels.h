// kernels.h - our CPU operations, put into a ggml graph as custom nodes (ggml_custom_4d). All of them keep
// f32 activations and full-precision weights, and each output element is computed by one thread in an order
// that does not depend on the number of threads: the same bytes for any thread count.
#pragma once

#include <ggml.h>
#include <stdatomic.h>

#define KERNEL_PANEL   32                 // weight rows (keys) computed together
#define KERNEL_QUERIES 32 // query rows an attention task takes at most (one token's heads may exceed it)

// What a node of ours needs besides its tensors. Belongs to a session and outlives the graph.
typedef struct kernel_env {
    const atomic_int * cancel;            // not zero: give up, the result does not matter
    char *             scratch;           // n_threads * scratch_size bytes, aligned to 64
    size_t             scratch_size;      // of one thread
} kernel_env;

// Consecutive query tokens of one sequence (or one image view).
typedef struct attention_block {
    int32_t         first, n;             // query tokens
    const int32_t * cells;                // row of K and V that holds position p, or NULL: row first_row + p
    int32_t         first_row;
} attention_block;

typedef struct attention_env {
    kernel_env            env;
    int32_t               n_head, n_head_kv, head_dim;
    int32_t               n_blocks;
    const attention_block * blocks;       // covering all query tokens
    const int32_t *       n_visible;      // [n_tokens] positions [0, n_visible) are attended to
} attention_env;

size_t linear_scratch_size(void);
size_t attention_scratch_size(int32_t n_head, int32_t n_head_kv, int32_t head_dim);

// y = W x + b.   src: W any type [n_out, n_in], x f32 [n_tokens, n_in], b f32 [n_out] or absent.   dst: f32
// [n_tokens, n_out]
void kernel_linear(struct ggml_tensor * dst, int ith, int nth, void * env);
// y = softmax(q k^T / sqrt(head_dim)) v per head.   src: q f32 [n_tokens, n_head * head_dim], k and v of any
// type that divides head_dim [n_rows, n_head_kv * head_dim].   dst: f32 like q
void kernel_attention(struct ggml_tensor * dst, int ith, int nth, void * env);
