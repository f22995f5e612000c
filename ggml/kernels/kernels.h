// kernels.h - our CPU operations, put into a ggml graph as custom nodes (ggml_custom_4d). The exact ones keep
// f32 activations and full-precision weights; the fast ones quantise (micro.h). Each output element is
// computed by one thread in an order that does not depend on the number of threads: the same bytes for any
// thread count.
#pragma once

#include <ggml.h>
#include <stdatomic.h>

#define KERNEL_PANEL   32 // weight rows (keys) computed together
#define KERNEL_QUERIES 32 // query rows of an attention task, at most (one token's heads may exceed it)

// What our nodes need besides their tensors. It belongs to a session and outlives the graph.
typedef struct kernel_env {
    const atomic_int * cancel;  // not zero: stop, the result is not used
    char * scratch;             // n_threads * scratch_size bytes, aligned to 64
    size_t scratch_size;        // of one thread
    const struct micro * micro; // the inner loops of the fast mode; NULL: exact
} kernel_env;

// How a linear layer is computed in the fast mode.
typedef enum linear_plan {
    LINEAR_EXACT,      // kernel_linear, kernel_linear_answers
    LINEAR_ENGINE,     // ggml's own
    LINEAR_INT8,       // panels of rotated int8
    LINEAR_DIRECT,     // K types unchanged, int8 activations
    LINEAR_INT16,      // where int8 loses too much: panels of about 12 bits
    LINEAR_DOTS_K,     // K types unchanged, activations of 14 bits
    LINEAR_DOTS16,     // other quantised types unchanged, int16 activations
    LINEAR_FLOAT_DOTS, // float weights, f32 activations
} linear_plan;

// The kind of a graph's rows decides how they are computed, and their number does not: a row gives the same
// numbers whatever is computed beside it.
typedef enum row_kind {
    ROWS_PROMPT, // usually many
    ROWS_ANSWER, // usually few: one of each sequence, or rows whose logits are wanted
    ROWS_VIEW,   // of the vision tower
} row_kind;

// The epilogue of a fast linear layer: applied to its sums after the bias, before they are written.
typedef enum linear_end {
    END_PLAIN,
    END_SILU,       // x sigmoid(x)
    END_GELU,       // x Phi(x)
    END_QUICK_GELU, // x sigmoid(1.702 x)
    END_GELU_TANH,  // GELU's tanh form
    END_SWIGLU,     // silu(W x) * (U x), U a second matrix
} linear_end;

typedef enum round_norm { NORM_NONE, NORM_RMS, NORM_LAYER } round_norm;

// The parameters of one fast node. Threads take tasks from the counter `next`, which is zero before every
// run.
typedef struct kernel_job {
    kernel_env * env;
    atomic_llong next;
    linear_plan plan;
    linear_end end;
    int bias, residual, up; // index in the node's src; 0: none
    round_norm norm;        // kernel_round normalises the rows first
    float eps;
    const struct attention_env * attention;
} kernel_job;

// Consecutive query tokens of one sequence (or one image view).
typedef struct attention_block {
    int32_t first, n;      // query tokens
    const int32_t * cells; // row of K and V that holds position p, or NULL: row first_row + p
    int32_t first_row;
} attention_block;

typedef struct attention_env {
    kernel_env env;
    int32_t n_head, n_head_kv, head_dim;
    int32_t n_blocks;
    const attention_block * blocks; // covering all query tokens
    const int32_t * n_visible;      // [n_tokens] positions [0, n_visible) are attended to
    row_kind rows;                  // for the fast mode
} attention_env;

size_t linear_scratch_size(void);
size_t attention_scratch_size(int32_t n_head, int32_t n_head_kv, int32_t head_dim);

// y = W x + b.   src: W any type [n_out, n_in], x f32 [n_tokens, n_in], b f32 [n_out] or absent.   dst: f32
// [n_tokens, n_out]. The first is for rows of prompts and views, the second for rows of answers: each sums in
// its own order, whatever the number of rows.
void kernel_linear(struct ggml_tensor * dst, int ith, int nth, void * env);
void kernel_linear_answers(struct ggml_tensor * dst, int ith, int nth, void * env);
// y = softmax(q k^T / sqrt(head_dim)) v per head.   src: q f32 [n_tokens, n_head * head_dim], k and v of any
// type that divides head_dim [n_rows, n_head_kv * head_dim].   dst: f32 like q
void kernel_attention(struct ggml_tensor * dst, int ith, int nth, void * env);

// Rotary positions, no userdata.   kernel_rope_table: src positions i32 [n_tokens], divisors f32 [head_dim
// / 2], dst f32 [n_tokens, head_dim], cosine and sine of position / divisor[i] at 2i and 2i + 1.
// kernel_rope: src x f32 [n_tokens, n_head * head_dim], such a table for pairs (2i, 2i + 1) of each head;
// dst f32 like x. kernel_rope_neox: the same for pairs (i, i + head_dim / 2). kernel_store, a node in place
// (ggml_custom_inplace): dst[cells[t]] = x[t]; src 1: x f32 [n_tokens, n], 2: cells i32 [n_tokens]; dst f32
// or of a type with from_float_ref [n_cells, n].
void kernel_rope_table(struct ggml_tensor * dst, int ith, int nth, void * unused);
void kernel_rope(struct ggml_tensor * dst, int ith, int nth, void * unused);
void kernel_rope_neox(struct ggml_tensor * dst, int ith, int nth, void * unused);
void kernel_store(struct ggml_tensor * dst, int ith, int nth, void * unused);

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 of every number, no userdata.   src: x f32, dst: like x,
// both contiguous
void kernel_gelu_tanh(struct ggml_tensor * dst, int ith, int nth, void * unused);

// The fast mode, userdata a kernel_job. Activations are quantised by a separate node, kernel_round: src x f32
// [n_tokens, n_in], weights (and bias) of job->norm; dst bytes [n_tokens, fast_linear_rounded_size]. Then
// kernel_fast_linear: src W and x (quantised or f32, as the plan says), and those that the job names: bias
// f32 [n_out], residual f32 like dst (added last), U like W.
// fine: at least 12 bits for every weight and activation.
linear_plan fast_linear_plan(const struct micro * m, const struct ggml_tensor * w, row_kind rows, bool fine);
int64_t fast_linear_rounded_size(linear_plan plan, int64_t n_in); // 0: not quantised
size_t fast_linear_scratch_size(void);
bool fast_norm_fits(int64_t n_in); // whether kernel_round can normalise so many
void kernel_round(struct ggml_tensor * dst, int ith, int nth, void * job);
void kernel_fast_linear(struct ggml_tensor * dst, int ith, int nth, void * job);
size_t fast_attention_scratch_size(void);
int32_t fast_attention_queries(int32_t head_dim); // KERNEL_QUERIES of the fast mode
void kernel_fast_attention(struct ggml_tensor * dst, int ith, int nth, void * job);
