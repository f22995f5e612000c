// kv_cache.h - keys and values of several sequences in one pool of cells. A cell is one row of every layer's
// K and V. Each sequence lists its cells in order of position, so cells can be shared (copy), freed at the
// end (trim) and reused, and where a cell lies never changes what is computed. A position also remembers what
// it holds (a token id, or a picture's key and row), which is how a prompt finds the prefix it shares with
// the past.
//
// Sequences take cells as they need them, the lowest free ones first, and up to n_ctx each. In host memory
// the pool is address space, whose pages are allocated when a cell is first used; the pages above the last
// cell in use go back to the system when they are many megabytes.
//
// Devices read ranges of cells. For them, a sequence begins at a multiple of `slot` that has room, and
// goes on in the next cell while that is free: then it lies in one range that holds nothing else, and such
// ranges lie at equal distances. A sequence that shares cells, or whose next cell is taken, is scattered.
#pragma once

#include "error.h"

#include <ggml-backend.h>
#include <ggml.h>

#define KV_STORES 16
#define KV_STEP   256 // cells: devices read a multiple of it, for fewer new graphs and faster kernels

typedef struct kv_sequence {
    int32_t length;
    int32_t base, n_in_range; // the first n_in_range positions lie in cells base + p
    int32_t * cells;          // [n_ctx] cells[p] holds position p
    uint64_t * contents;      // [n_ctx]
} kv_sequence;

typedef struct kv_params {
    int32_t n_layer, n_embd; // n_embd: n_head_kv * head_dim
    int32_t n_ctx, n_seq;
    int32_t n_cells; // that the sequences share, at least n_ctx
    enum ggml_type type_k, type_v;
    bool in_ranges; // sequences lie in ranges, as devices read them
} kv_params;

typedef struct kv_store {
    ggml_backend_buffer_type_t type;
    struct ggml_context * ctx;
    ggml_backend_buffer_t buffer;
    void * pages; // memory of the buffer, `size` bytes; NULL: it has its own
    size_t size;
} kv_store;

typedef struct kv_cache {
    int32_t n_ctx, n_seq, n_cells;
    int32_t slot;   // cells from one place where ranges may begin to the next; 0: none
    int32_t n_rows; // of the tensors: n_cells, and zeros up to a whole step
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
// Finds the next unused cells from `first` on: sets `first` to the first of them and returns their number, or
// 0.
int32_t kv_next_unused(const kv_cache * kv, int32_t * first);

// What a step needs of a sequence, which has at most one wish: keep its first `keep` positions, and free n
// cells for more.
typedef struct kv_wish {
    int32_t seq, keep, n;
} kv_wish;

// Cuts the sequences as wished if this leaves enough free cells. Else PYLLAVA_ERR_CONTEXT, whose text says
// which sequences would hold the rest; then nothing has changed.
pyllava_status kv_make_room(kv_cache * kv, const kv_wish * wishes, int32_t n_wishes);
// Cells that would be free if these sequences, each at most once, held nothing.
int32_t kv_free_without(kv_cache * kv, const int32_t * seqs, int32_t n_seqs);
// Takes cells, which kv_make_room has freed, for n more positions of a sequence (at most n_ctx in all), and
// puts them in kv_sequence.cells[length..length + n). Once they are computed, kv_commit adds them to the
// length; kv_rollback gives them back instead.
void kv_reserve(kv_cache * kv, int32_t seq, int32_t n);
// The cell of position 0 if the first n positions of a sequence, reserved ones too, lie in a range; else -1.
int32_t kv_range(const kv_cache * kv, int32_t seq, int32_t n);
void kv_commit(kv_cache * kv, int32_t seq, const uint64_t * contents, int32_t n);
void kv_rollback(kv_cache * kv, int32_t seq, int32_t n);
void kv_trim(kv_cache * kv, int32_t seq, int32_t n);              // keep the first n positions
void kv_copy(kv_cache * kv, int32_t from, int32_t to, int32_t n); // to: the first n positions of from, shared
