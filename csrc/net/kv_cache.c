// kv_cache.c - see kv_cache.h. The pool has n_ctx cells for each sequence, so a sequence below n_ctx always
// finds one.
#include "kv_cache.h"

#include <ggml-alloc.h>
#include <stdlib.h>
#include <string.h>

uint64_t kv_cache_size(const kv_params * p) {
    uint64_t row = ggml_row_size(p->type_k, p->n_embd) + ggml_row_size(p->type_v, p->n_embd);
    return row * (uint64_t) p->n_layer * (uint64_t) p->n_ctx * (uint64_t) p->n_seq;
}

static pyllava_status create_tables(kv_cache * kv, int32_t n_layer) {
    kv->k = calloc((size_t) n_layer, sizeof *kv->k);
    kv->v = calloc((size_t) n_layer, sizeof *kv->v);
    kv->sequences = calloc((size_t) kv->n_seq, sizeof *kv->sequences);
    kv->references = calloc((size_t) kv->n_cells, sizeof *kv->references);
    kv->free_cells = calloc((size_t) kv->n_cells, sizeof *kv->free_cells);
    if (!kv->k || !kv->v || !kv->sequences || !kv->references || !kv->free_cells)
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    for (int32_t i = 0; i < kv->n_seq; i++) {
        kv->sequences[i].cells = calloc((size_t) kv->n_ctx, sizeof(int32_t));
        kv->sequences[i].contents = calloc((size_t) kv->n_ctx, sizeof(uint64_t));
        if (!kv->sequences[i].cells || !kv->sequences[i].contents) FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    }
    for (int32_t i = 0; i < kv->n_cells; i++)
        kv->free_cells[kv->n_free++] = kv->n_cells - 1 - i; // lowest first
    return PYLLAVA_OK;
}

// The store for layers in such memory.
static pyllava_status find_store(kv_cache * kv, ggml_backend_buffer_type_t type, struct ggml_context ** out) {
    int32_t i = 0;
    while (i < kv->n_stores && kv->stores[i].type != type) i++;
    if (i == kv->n_stores) {
        if (i == KV_STORES) FAIL(PYLLAVA_ERR_ARGUMENT, "KV cache on more than %d devices", KV_STORES);
        const size_t size = ggml_tensor_overhead() * (size_t) (2 * kv->n_layer + 1);
        struct ggml_context * ctx =
            ggml_init((struct ggml_init_params) { .mem_size = size, .no_alloc = true });
        TRY_ALLOC(ctx, size);
        kv->stores[i].type = type;
        kv->stores[i].ctx = ctx;
        kv->n_stores++;
    }
    *out = kv->stores[i].ctx;
    return PYLLAVA_OK;
}

pyllava_status kv_cache_create(kv_cache * kv, const kv_params * p, const ggml_backend_buffer_type_t * where) {
    kv->n_ctx = p->n_ctx;
    kv->n_seq = p->n_seq;
    kv->n_layer = p->n_layer;
    kv->n_cells = p->n_ctx * p->n_seq;
    TRY(create_tables(kv, p->n_layer));
    for (int32_t i = 0; i < p->n_layer; i++) {
        struct ggml_context * ctx = NULL;
        TRY(find_store(kv, where[i], &ctx));
        kv->k[i] = ggml_new_tensor_2d(ctx, p->type_k, p->n_embd, kv->n_cells);
        kv->v[i] = ggml_new_tensor_2d(ctx, p->type_v, p->n_embd, kv->n_cells);
    }
    for (int32_t i = 0; i < kv->n_stores; i++) {
        kv->stores[i].buffer =
            ggml_backend_alloc_ctx_tensors_from_buft(kv->stores[i].ctx, kv->stores[i].type);
        if (!kv->stores[i].buffer) {
            FAIL(PYLLAVA_ERR_MEMORY, "KV cache of %d x %d positions needs %.1f MiB: try a smaller n_ctx",
                 p->n_seq, p->n_ctx, (double) kv_cache_size(p) / (1 << 20));
        }
        // Devices multiply cells that a token does not see by 0: they must hold numbers.
        if (!ggml_backend_buffer_is_host(kv->stores[i].buffer))
            ggml_backend_buffer_clear(kv->stores[i].buffer, 0);
    }
    return PYLLAVA_OK;
}

void kv_cache_free(kv_cache * kv) {
    for (int32_t i = 0; kv->sequences && i < kv->n_seq; i++) {
        free(kv->sequences[i].cells);
        free(kv->sequences[i].contents);
    }
    free(kv->sequences);
    free(kv->references);
    free(kv->free_cells);
    free(kv->k);
    free(kv->v);
    for (int32_t i = 0; i < kv->n_stores; i++) {
        ggml_backend_buffer_free(kv->stores[i].buffer);
        ggml_free(kv->stores[i].ctx);
    }
    memset(kv, 0, sizeof *kv);
}

static void release(kv_cache * kv, int32_t cell) {
    if (--kv->references[cell] == 0) kv->free_cells[kv->n_free++] = cell;
}

void kv_reserve(kv_cache * kv, int32_t seq, int32_t n) {
    kv_sequence * s = &kv->sequences[seq];
    for (int32_t i = 0; i < n; i++) {
        int32_t cell = kv->free_cells[--kv->n_free];
        kv->references[cell] = 1;
        s->cells[s->length + i] = cell;
    }
}

void kv_commit(kv_cache * kv, int32_t seq, const uint64_t * contents, int32_t n) {
    kv_sequence * s = &kv->sequences[seq];
    memcpy(s->contents + s->length, contents, (size_t) n * sizeof *contents);
    s->length += n;
}

void kv_rollback(kv_cache * kv, int32_t seq, int32_t n) {
    kv_sequence * s = &kv->sequences[seq];
    while (n-- > 0) release(kv, s->cells[s->length + n]); // last first: the stack gives them back in order
}

void kv_trim(kv_cache * kv, int32_t seq, int32_t n) {
    kv_sequence * s = &kv->sequences[seq];
    while (s->length > n) release(kv, s->cells[--s->length]);
}

void kv_copy(kv_cache * kv, int32_t from, int32_t to, int32_t n) {
    if (from == to) {
        kv_trim(kv, to, n);
        return;
    }
    kv_trim(kv, to, 0);
    kv_sequence *a = &kv->sequences[from], *b = &kv->sequences[to];
    memcpy(b->cells, a->cells, (size_t) n * sizeof *a->cells);
    memcpy(b->contents, a->contents, (size_t) n * sizeof *a->contents);
    b->length = n;
    for (int32_t i = 0; i < n; i++) kv->references[b->cells[i]]++;
}

int32_t kv_cells_used(const kv_cache * kv) {
    int32_t n = kv->n_cells;
    while (n > 0 && kv->references[n - 1] == 0) n--;
    return n;
}

int32_t kv_next_unused(const kv_cache * kv, int32_t * first) {
    int32_t n = 0;
    while (*first < kv->n_cells && kv->references[*first]) ++*first;
    while (*first + n < kv->n_cells && !kv->references[*first + n]) n++;
    return n;
}
