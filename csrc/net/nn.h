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

// What is kept for reading, besides a graph's last tensor.
typedef enum tap_kind {
    TAP_ROW_SUMS, // f32 [n_tokens]: not finite where a token's last layer is not; on devices
    N_TAPS,
} tap_kind;

// What a rotation takes as a pair, of heads of d entries: ROPE_NORMAL (2i, 2i + 1), ROPE_NEOX (i, i + d/2).
typedef enum rope_kind { ROPE_NORMAL, ROPE_NEOX } rope_kind;

typedef enum flash_mode { FLASH_OFF = 0, FLASH_ON = 1, FLASH_AUTO = -1 } flash_mode; // on devices

// Our kernels share their work over the session's pool, and ggml runs its own few nodes on the calling
// thread. Where ggml multiplies matrices itself (weights that no kernel of ours reads for few tokens), its
// threads run the graph, and our kernels with them. Layers whose weights lie on a device are ggml's own
// operations.
//
// Some words of what follows. An end is what is applied to the results of a linear layer as they leave it (a
// residual, an activation). Rounded activations are integers with scales, as kernels of the fast mode read
// them. A fine layer gets 12 bits where others get 8. Offloaded is a matrix in host memory that is sent to
// a device for one product. A tap is a result that is kept besides the last.
typedef struct graph {
    struct ggml_context * ctx; // tensor headers of this graph
    struct ggml_cgraph * nodes;
    pool * pool;
    kernel_env * env; // of the session that runs it
    attention_env * attention;
    node_call * calls; // [n_max] of our kernels
    int32_t n_calls;
    int32_t n_max;             // tensors that there is room for
    size_t size;               // bytes of ctx that they take
    bool is_full;              // there was no room for all
    bool on_engine;            // to be run by ggml's threads
    bool on_host;              // nothing of it is on a device
    row_kind rows;             // of the operations that follow, in the fast mode
    ggml_backend_dev_t device; // of the layer that is being built; NULL: the CPU computes it
    int32_t n_views;           // attention stays within each; 1 for text
    tensor * mask;             // of attention on devices: f16 [n_tokens, n_cells], or NULL
    flash_mode flash;
    bool flash_missing;             // FLASH_ON, and a device has no kernel for it
    ggml_backend_dev_t offload;     // a GPU that is sent the CPU's matrices where many tokens use them
    tensor *rounded_from, *rounded; // the last activations rounded, and how
    linear_plan rounded_plan;
    tensor * linear; // the last fast linear layer, whose end is still open, and its job
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

// In the fast mode the operation that follows a linear layer (nn_add, nn_silu, nn_gelu, nn_quick_gelu)
// becomes its end: nothing else may read such a layer. Normalised rows that only linear layers read are
// rounded as they are made.
tensor * nn_linear(graph * g, tensor * w, tensor * b, tensor * x); // W x + b; b may be NULL
// The same, in prompts and views at 12 bits rather than 8: where a rounding is felt more than it costs.
tensor * nn_linear_fine(graph * g, tensor * w, tensor * b, tensor * x);
tensor * nn_swiglu(graph * g, tensor * gate, tensor * up, tensor * x); // silu(gate x) * up x
tensor * nn_add(graph * g, tensor * x, tensor * y);                    // y: may be a linear layer
tensor * nn_layer_norm(graph * g, tensor * w, tensor * b, float eps,
                       tensor * x);                                 // (x - mean) / sqrt(var + eps) * w + b
tensor * nn_rms_norm(graph * g, tensor * w, float eps, tensor * x); // x / sqrt(mean(x^2) + eps) * w
tensor * nn_gelu(graph * g, tensor * x);                            // x * Phi(x), the erf form
tensor * nn_quick_gelu(graph * g, tensor * x);                      // x * sigmoid(1.702 x)
tensor * nn_silu(graph * g, tensor * x);                            // x * sigmoid(x)
tensor * nn_mul(graph * g, tensor * x, tensor * y);
// Rotary positions: pair i of each head is turned by position / divisor[i].
tensor * nn_rope_table(graph * g, tensor * positions, tensor * divisors); // [n_tokens, head_dim] for nn_rope
tensor * nn_rope(graph * g, tensor * x, tensor * rope_table, rope_kind kind); // of rows of n_head * head_dim
// softmax(q k^T / sqrt(head_dim)) v as the session's attention_env says.
tensor * nn_attention(graph * g, tensor * q, tensor * k, tensor * v);
tensor * nn_row_sums(graph * g, tensor * x);            // [n_rows, n] to [n_rows, 1]
void nn_tap(graph * g, tap_kind kind, tensor * x);      // x is kept as it is: nothing becomes its end
tensor * nn_rows(graph * g, tensor * x, tensor * rows); // x[rows]
tensor * nn_store_rows(graph * g, tensor * to, tensor * x, tensor * rows); // to[rows] = x; gives to
// Rows of views: [n_views * n, width] as [n_views, n, width], and back; a row in front of those of each view;
// [n_views * n, width] without the first of each.
tensor * nn_views(graph * g, tensor * x);
tensor * nn_all_rows(graph * g, tensor * x);
tensor * nn_put_first(graph * g, tensor * row, tensor * x);
tensor * nn_skip_first(graph * g, tensor * x);
