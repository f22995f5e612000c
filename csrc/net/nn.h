// nn.h - the few operations our networks are written in, over a ggml graph. The builder is sticky: a NULL
// tensor passes through every function, and graph_finish reports it once.
#pragma once

#include "devices.h"
#include "error.h"
#include "pool.h"

#include <ggml.h>
#include <kernels.h>

typedef struct ggml_tensor tensor;
typedef struct node_call node_call;

// Results that a graph keeps for reading besides its last tensor.
typedef enum tap_kind {
    TAP_ROW_SUMS, // f32 [n_tokens]: NaN or infinite where a token's last layer is; on devices
    N_TAPS,
} tap_kind;

// Which entries of a head of d entries form a pair: ROPE_NORMAL (2i, 2i + 1), ROPE_NEOX (i, i + d/2).
typedef enum rope_kind { ROPE_NORMAL, ROPE_NEOX } rope_kind;

typedef enum flash_mode { FLASH_OFF = 0, FLASH_ON = 1, FLASH_AUTO = -1 } flash_mode; // on devices

// What rows of a step attend to on devices, in one operation: n_seqs sequences of n_rows rows each, from row
// `first` of the step on; the rows of sequence i read the cells from cell + i stride on, and a mask hides
// those that they do not see.
typedef struct attention_window {
    int32_t first, n_rows, n_seqs;
    int32_t cell, stride, n_cells;
} attention_window;
#define MAX_WINDOWS 4 // of a step

int64_t attention_mask_size(const attention_window * windows, int32_t n); // entries of their masks

// Our kernels divide their work among the session's pool, and ggml runs its own few nodes on the calling
// thread. A graph in which ggml multiplies matrices (few tokens, weights of a type that no kernel of ours
// reads) is run by ggml's threads, our kernels included. Layers whose weights lie on a device are ggml's own
// operations.
//
// Terms: the epilogue of a linear layer (linear_end) is applied to its results before they are written: an
// activation, a residual. Quantised activations are integers with scales, which the kernels of the fast mode
// read. A fine layer has 12 bits where others have 8. An offloaded matrix lies in host memory and is copied
// to a device for one product. A tap is a result that is kept besides the last.
typedef struct graph {
    struct ggml_context * ctx; // tensor headers of this graph
    struct ggml_cgraph * nodes;
    pool * pool;
    kernel_env * env; // of the session that runs it
    attention_env * attention;
    node_call * calls; // [n_max] of our kernels
    int32_t n_calls;
    int32_t n_max;                    // tensors that there is room for
    size_t size;                      // bytes of ctx that they take
    bool is_full;                     // there was no room for all
    bool on_engine;                   // ggml's threads run it
    bool on_host;                     // nothing of it is on a device
    row_kind rows;                    // kind of rows of the operations that follow (fast mode)
    ggml_backend_dev_t device;        // of the layer that is being built; NULL: the CPU computes it
    int32_t n_views;                  // attention is computed within each; 1 for text
    const attention_window * windows; // of attention on devices, [n_windows]; none: each view sees itself
    int32_t n_windows;
    tensor * mask; // f16: the rows [n_cells] of each window, one after the other; or NULL
    flash_mode flash;
    bool flash_missing;                 // FLASH_ON, but a device has no kernel for it
    ggml_backend_dev_t offload;         // GPU for offloaded matrices, or NULL
    tensor *quantised_from, *quantised; // the last quantised activations, and how
    linear_plan quantised_plan;
    tensor * linear; // the last fast linear layer, whose epilogue may still grow, and its job
    kernel_job * linear_job;
    struct {
        tensor *out, *x, *w, *b;
        float eps;
    } norm;                // the last normalisation
    tensor * taps[N_TAPS]; // NULL: not there
} graph;

pyllava_status graph_begin(graph * g, pool * p, kernel_env * env, attention_env * attention, int32_t n_max);
pyllava_status graph_finish(graph * g, tensor * out); // out: the last tensor, kept for reading
// The operations that follow belong to the layer that holds this weight, and run where it lies.
void graph_enter(graph * g, const tensor * weight);
int32_t graph_n_tensors(const graph * g); // so far
void graph_rewind(graph * g);             // before it is run again
void graph_free(graph * g);

tensor * nn_input(graph * g, enum ggml_type type, int64_t n_rows, int64_t n,
                  const char * name); // [n_rows, n]
tensor * nn_name(graph * g, tensor * x, const char * format, ...)
    PYLLAVA_PRINTF(3, 4); // names an intermediate

// In the fast mode the operation that follows a linear layer (nn_add, nn_silu, one of GELU's forms) becomes
// its epilogue: nothing else may read such a layer. Normalised rows that only linear layers read are
// normalised and quantised in one pass.
tensor * nn_linear(graph * g, tensor * w, tensor * b, tensor * x); // W x + b; b may be NULL
// The same with 12 bits instead of 8 in prompts and views, for layers where rounding matters more than time.
tensor * nn_linear_fine(graph * g, tensor * w, tensor * b, tensor * x);
// The same without rounding in the fast mode.
tensor * nn_linear_exact(graph * g, tensor * w, tensor * b, tensor * x);
tensor * nn_swiglu(graph * g, tensor * gate, tensor * up, tensor * x); // silu(gate x) * up x
tensor * nn_add(graph * g, tensor * x, tensor * y);                    // y: may be a linear layer
tensor * nn_layer_norm(graph * g, tensor * w, tensor * b, float eps,
                       tensor * x);                                 // (x - mean) / sqrt(var + eps) * w + b
tensor * nn_rms_norm(graph * g, tensor * w, float eps, tensor * x); // x / sqrt(mean(x^2) + eps) * w
tensor * nn_gelu(graph * g, tensor * x);                            // x * Phi(x), the erf form
tensor * nn_gelu_tanh(graph * g, tensor * x);  // x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
tensor * nn_quick_gelu(graph * g, tensor * x); // x * sigmoid(1.702 x)
tensor * nn_silu(graph * g, tensor * x);       // x * sigmoid(x)
tensor * nn_mul(graph * g, tensor * x, tensor * y);
tensor * nn_scale(graph * g, tensor * x, float factor); // x itself where factor is 1
// Rotary positions: pair i of each head is rotated by the angle position / divisor[i].
tensor * nn_rope_table(graph * g, tensor * positions, tensor * divisors); // [n_tokens, head_dim] for nn_rope
tensor * nn_rope(graph * g, tensor * x, tensor * rope_table, rope_kind kind); // of rows of n_head * head_dim
// softmax(q k^T / sqrt(head_dim)) v as the session's attention_env says.
tensor * nn_attention(graph * g, tensor * q, tensor * k, tensor * v);
tensor * nn_row_sums(graph * g, tensor * x);            // [n_rows, n] to [n_rows, 1]
void nn_tap(graph * g, tap_kind kind, tensor * x);      // keeps x: nothing joins its epilogue
tensor * nn_rows(graph * g, tensor * x, tensor * rows); // x[rows]
tensor * nn_store_rows(graph * g, tensor * to, tensor * x, tensor * rows); // to[rows] = x; gives to
// Rows of views: [n_views * n, width] as [n_views, n, width], and back; with a row before those of each view;
// [n_views * n, width] without the first row of each view.
tensor * nn_views(graph * g, tensor * x);
tensor * nn_all_rows(graph * g, tensor * x);
tensor * nn_put_first(graph * g, tensor * row, tensor * x);
tensor * nn_skip_first(graph * g, tensor * x);
tensor * nn_beside(graph * g, tensor * x, tensor * y); // [n, a] and [n, b] to [n, a + b]

// What convolutional projectors are made of. The n rows of a view stand in a square of n_side.
//
// A convolution of 3 x 3 in each channel, w [width, 9], zeros around the square: [n_views * n, width] to as
// many rows, or to a square of (n_side + 1) / 2 with stride 2.
tensor * nn_depthwise(graph * g, tensor * w, int32_t n_side, int32_t stride, tensor * x);
tensor * nn_pool(graph * g, tensor * x, int32_t n_side, int32_t k); // means of k x k rows
tensor * nn_mean_of_views(graph * g, tensor * x);         // [n_views * n, width] to [n_views, width]
tensor * nn_mul_views(graph * g, tensor * x, tensor * y); // each row of view i of x times row i of y
tensor * nn_relu(graph * g, tensor * x);                  // max(x, 0)
tensor * nn_hard_sigmoid(graph * g, tensor * x);          // min(max(x + 3, 0), 6) / 6
tensor * nn_hard_swish(graph * g, tensor * x);            // x * hard_sigmoid(x)
