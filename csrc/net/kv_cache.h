// kv_cache.h - keys and values of several sequences in one pool of cells. A cell is one row of every layer's
// K and V. Each sequence lists its cells in order of position, so cells can be shared (copy), freed at the
// end (trim) and reused, and where a cell lies never changes what is computed. A position also remembers what
// it holds (a token id, or a picture's key and row), which is how a prompt finds the prefix it shares with
// the past.
//
// Sequences take cells as they need them, each up to n_ctx, the lowest that nobody uses first. In host memory
// the pool is address space, whose pages are there from a cell's first use on; those above the last cell in
// use go back when they are many megabytes.
#pragma once

#include "error.h"

#include <ggml-backend.h>
#include <ggml.h>

#define KV_STORES 16

typedef struct kv_sequence {
    int32_t length;
    int32_t * cells;     // [n_ctx] cells[p] holds position p
    uint64_t * contents; // [n_ctx]
} kv_sequence;

typedef struct kv_params {
    int32_t n_layer, n_embd; // n_embd: n_head_kv * head_dim
    int32_t n_ctx, n_seq;
    int32_t n_cells; // that the sequences share, at least n_ctx
    enum ggml_type type_k, type_v;
} kv_params;

typedef struct kv_store {
    ggml_backend_buffer_type_t type;
    struct ggml_context * ctx;
    ggml_backend_buffer_t buffer;
    void * pages; // of `size` bytes, that the buffer lies in; NULL: it has its own
    size_t size;
} kv_store;

typedef struct kv_cache {
    int32_t n_ctx, n_seq, n_cells;
    int32_t n_layer, n_stores;
    kv_store stores[KV_STORES];  // one for each kind of memory that holds layers
    struct ggml_tensor **k, **v; // [n_layer] each [n_cells, n_embd]
    kv_sequence * sequences;     // [n_seq]
    int32_t * references;        // [n_cells] sequences that list the cell
    int32_t n_free;              // cells that none lists
    int32_t lowest;              // no cell below is free
    int32_t n_touched;           // no cell from this one on has pages
    size_t cell_size;            // bytes of a cell in such pages
} kv_cache;

uint64_t kv_cache_size(const kv_params * p); // bytes of K and V
// where: [n_layer] the memory that holds each layer's keys and values, at most KV_STORES kinds.
pyllava_status kv_cache_create(kv_cache * kv, const kv_params * p, const ggml_backend_buffer_type_t * where);
void kv_cache_free(kv_cache * kv);
int32_t kv_cells_used(const kv_cache * kv); // no cell from this one on is in use
// The next run of cells from `first` on that nobody uses: its first cell and length; 0 where there is none.
int32_t kv_next_unused(const kv_cache * kv, int32_t * first);

// Of a sequence, each at most once: keep its first `keep` positions, and have n cells free for more.
typedef struct kv_wish {
    int32_t seq, keep, n;
} kv_wish;

// Cuts the sequences as wished, so that the cells wished for are free; PYLLAVA_ERR_CONTEXT where they would
// not be, with who would hold the rest: then nothing has changed.
pyllava_status kv_make_room(kv_cache * kv, const kv_wish * wishes, int32_t n_wishes);
// Cells that would be free if these sequences, each at most once, held nothing.
int32_t kv_free_without(kv_cache * kv, const int32_t * seqs, int32_t n_seqs);
// Cells, which kv_make_room has found, for n more positions of a sequence, n_ctx in all at most: in
// kv_sequence.cells[length..length + n). The length grows with kv_commit, after they have been computed, and
// kv_rollback gives them back instead.
void kv_reserve(kv_cache * kv, int32_t seq, int32_t n);
void kv_commit(kv_cache * kv, int32_t seq, const uint64_t * contents, int32_t n);
void kv_rollback(kv_cache * kv, int32_t seq, int32_t n);
void kv_trim(kv_cache * kv, int32_t seq, int32_t n);              // keep the first n positions
void kv_copy(kv_cache * kv, int32_t from, int32_t to, int32_t n); // to: the first n positions of from, shared
