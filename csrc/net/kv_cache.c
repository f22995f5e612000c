// kv_cache.c - see kv_cache.h.
#include "kv_cache.h"

#include "context.h"
#include "memory.h"

#include <ggml-alloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIVE_BACK ((size_t) 8 << 20) // bytes above the last cell in use that are worth giving back
#define NAMED     8                  // sequences that a message names at most
#define SLOT      32                 // cells: ranges begin at multiples of it

// A share of the cells for each sequence, in whole steps if it is that large.
static int32_t slot_of(const kv_params * p) {
    const int32_t share = p->n_cells / p->n_seq, step = share < KV_STEP ? SLOT : KV_STEP;
    return !p->in_ranges ? 0 : share < SLOT ? SLOT : share / step * step;
}

static int32_t rows_of(const kv_params * p) {
    return p->in_ranges ? GGML_PAD(p->n_cells, KV_STEP) : p->n_cells;
}

uint64_t kv_cache_size(const kv_params * p) {
    uint64_t row = ggml_row_size(p->type_k, p->n_embd) + ggml_row_size(p->type_v, p->n_embd);
    return row * (uint64_t) p->n_layer * (uint64_t) rows_of(p);
}

static pyllava_status create_tables(kv_cache * kv, int32_t n_layer) {
    kv->k = calloc((size_t) n_layer, sizeof *kv->k);
    kv->v = calloc((size_t) n_layer, sizeof *kv->v);
    kv->sequences = calloc((size_t) kv->n_seq, sizeof *kv->sequences);
    kv->references = calloc((size_t) kv->n_cells, sizeof *kv->references);
    if (!kv->k || !kv->v || !kv->sequences || !kv->references) FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    for (int32_t i = 0; i < kv->n_seq; i++) {
        kv->sequences[i].cells = calloc((size_t) kv->n_ctx, sizeof(int32_t));
        kv->sequences[i].contents = calloc((size_t) kv->n_ctx, sizeof(uint64_t));
        if (!kv->sequences[i].cells || !kv->sequences[i].contents) FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    }
    return PYLLAVA_OK;
}

// Finds or creates the store for layers in this memory.
static pyllava_status find_store(kv_cache * kv, ggml_backend_buffer_type_t type, struct ggml_context ** out) {
    int32_t i = 0;
    while (i < kv->n_stores && kv->stores[i].type != type) i++;
    if (i == kv->n_stores) {
        if (i == KV_STORES) FAIL(PYLLAVA_ERR_ARGUMENT, "KV cache on more than %d devices", KV_STORES);
        const size_t size = ggml_tensor_overhead() * (size_t) (2 * kv->n_layer + 1);
        struct ggml_context * ctx = context_new(size);
        TRY_ALLOC(ctx, size);
        kv->stores[i].type = type;
        kv->stores[i].ctx = ctx;
        kv->n_stores++;
    }
    *out = kv->stores[i].ctx;
    return PYLLAVA_OK;
}

static bool place_tensors(struct ggml_context * ctx, ggml_backend_buffer_t buffer) {
    struct ggml_tallocr to = ggml_tallocr_new(buffer);
    struct ggml_tensor * t = ggml_get_first_tensor(ctx);
    while (t && ggml_tallocr_alloc(&to, t) == GGML_STATUS_SUCCESS) t = ggml_get_next_tensor(ctx, t);
    return t == NULL;
}

// Creates the buffer of a store's tensors; in host memory it lies in pages of our own.
static bool create_buffer(kv_cache * kv, kv_store * s) {
    if (s->type != ggml_backend_cpu_buffer_type()) {
        s->buffer = ggml_backend_alloc_ctx_tensors_from_buft(s->ctx, s->type);
        // Devices multiply cells that a token does not see by 0: they must hold numbers.
        if (s->buffer && !ggml_backend_buffer_is_host(s->buffer)) ggml_backend_buffer_clear(s->buffer, 0);
        return s->buffer != NULL;
    }
    const size_t alignment = ggml_backend_buft_get_alignment(s->type);
    for (struct ggml_tensor * t = ggml_get_first_tensor(s->ctx); t; t = ggml_get_next_tensor(s->ctx, t)) {
        s->size += GGML_PAD(ggml_backend_buft_get_alloc_size(s->type, t), alignment);
        kv->cell_size += t->nb[1];
    }
    s->pages = pages_new(s->size);
    if (s->pages) s->buffer = ggml_backend_cpu_buffer_from_ptr(s->pages, s->size);
    return s->buffer && place_tensors(s->ctx, s->buffer);
}

pyllava_status kv_cache_create(kv_cache * kv, const kv_params * p, const ggml_backend_buffer_type_t * where) {
    kv->n_ctx = p->n_ctx;
    kv->n_seq = p->n_seq;
    kv->n_layer = p->n_layer;
    kv->n_cells = kv->n_free = p->n_cells;
    kv->n_rows = rows_of(p);
    kv->slot = slot_of(p);
    TRY(create_tables(kv, p->n_layer));
    for (int32_t i = 0; i < p->n_layer; i++) {
        struct ggml_context * ctx = NULL;
        TRY(find_store(kv, where[i], &ctx));
        kv->k[i] = ggml_new_tensor_2d(ctx, p->type_k, p->n_embd, kv->n_rows);
        kv->v[i] = ggml_new_tensor_2d(ctx, p->type_v, p->n_embd, kv->n_rows);
    }
    for (int32_t i = 0; i < kv->n_stores; i++) {
        if (!create_buffer(kv, &kv->stores[i])) {
            FAIL(PYLLAVA_ERR_MEMORY, "KV cache of %d cells needs %.1f MiB: try a smaller n_ctx", p->n_cells,
                 (double) kv_cache_size(p) / (1 << 20));
        }
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
    free(kv->k);
    free(kv->v);
    for (int32_t i = 0; i < kv->n_stores; i++) {
        ggml_backend_buffer_free(kv->stores[i].buffer);
        pages_free(kv->stores[i].pages, kv->stores[i].size);
        context_free(kv->stores[i].ctx);
    }
    memset(kv, 0, sizeof *kv);
}

// ------------------------------------------------------------------------------------------- cells

static void release(kv_cache * kv, int32_t cell) {
    if (--kv->references[cell] > 0) return;
    kv->n_free++;
    if (cell < kv->lowest) kv->lowest = cell;
}

static void drop(kv_cache * kv, int32_t seq, int32_t keep) {
    kv_sequence * s = &kv->sequences[seq];
    while (s->length > keep) release(kv, s->cells[--s->length]);
    if (s->n_in_range > s->length) s->n_in_range = s->length;
}

// Gives back the pages of the cells from n on, none of which is in use, if they are many.
static void give_back(kv_cache * kv, int32_t n) {
    if ((size_t) (kv->n_touched - n) * kv->cell_size < GIVE_BACK) return;
    for (int32_t i = 0; i < kv->n_stores; i++) {
        const kv_store * s = &kv->stores[i];
        struct ggml_tensor * t = s->pages ? ggml_get_first_tensor(s->ctx) : NULL;
        for (; t; t = ggml_get_next_tensor(s->ctx, t)) {
            const size_t first = (size_t) n * t->nb[1], end = (size_t) kv->n_touched * t->nb[1];
            pages_give_back((char *) t->data + first, end - first);
        }
    }
    kv->n_touched = n;
}

// The cuts that kv_make_room would make.
typedef struct cuts {
    const kv_wish * wishes;
    int32_t n;
} cuts;

// What a sequence would hold after them.
static int32_t held_by(const kv_cache * kv, const cuts * c, int32_t seq) {
    for (int32_t i = 0; i < c->n; i++) {
        if (c->wishes[i].seq == seq) return c->wishes[i].keep;
    }
    return kv->sequences[seq].length;
}

// Adds `one` (-1 or 1) to the references of a sequence's cells from position `keep` on; returns how many of
// these cells are then unused.
static int32_t count_tail(kv_cache * kv, int32_t seq, int32_t keep, int32_t one) {
    const kv_sequence * s = &kv->sequences[seq];
    int32_t n_unused = 0;
    for (int32_t p = keep; p < s->length; p++) {
        kv->references[s->cells[p]] += one;
        n_unused += kv->references[s->cells[p]] == 0;
    }
    return n_unused;
}

static int32_t count_cut(kv_cache * kv, const cuts * c, int32_t one) {
    int32_t n_unused = 0;
    for (int32_t i = 0; i < c->n; i++) n_unused += count_tail(kv, c->wishes[i].seq, c->wishes[i].keep, one);
    return n_unused;
}

int32_t kv_free_without(kv_cache * kv, const int32_t * seqs, int32_t n_seqs) {
    int32_t n_unused = kv->n_free;
    for (int32_t i = 0; i < n_seqs; i++) n_unused += count_tail(kv, seqs[i], 0, -1);
    for (int32_t i = 0; i < n_seqs; i++) count_tail(kv, seqs[i], 0, 1);
    return n_unused;
}

// The sequences by what they hold, the largest first: the one after `last` (-1: the first), or -1 at the end.
static int32_t next_holder(const kv_cache * kv, const cuts * c, int32_t last) {
    const int32_t most = last < 0 ? INT32_MAX : held_by(kv, c, last);
    int32_t found = -1;
    for (int32_t i = 0; i < kv->n_seq; i++) {
        const int32_t n = held_by(kv, c, i);
        const bool is_after = n < most || (n == most && i > last);
        if (n && is_after && (found < 0 || n > held_by(kv, c, found))) found = i;
    }
    return found;
}

static int32_t count_shared(const kv_cache * kv, int32_t seq, int32_t n) {
    int32_t n_shared = 0;
    for (int32_t p = 0; p < n; p++) n_shared += kv->references[kv->sequences[seq].cells[p]] > 1;
    return n_shared;
}

// "sequence 2 holds 300, sequence 0 holds 120 (80 shared), 5 more", the largest first.
static void describe_holders(const kv_cache * kv, const cuts * c, char * text, size_t size) {
    size_t used = 0;
    int32_t i = next_holder(kv, c, -1), n_more = 0;
    for (int32_t n = 0; i >= 0 && n < NAMED; n++, i = next_holder(kv, c, i)) {
        const int32_t held = held_by(kv, c, i), n_shared = count_shared(kv, i, held);
        const char * comma = n ? ", " : "";
        used += (size_t) snprintf(text + used, size - used, "%ssequence %d holds %d", comma, i, held);
        if (n_shared) used += (size_t) snprintf(text + used, size - used, " (%d shared)", n_shared);
    }
    for (; i >= 0; i = next_holder(kv, c, i)) n_more++;
    if (n_more) snprintf(text + used, size - used, ", %d more", n_more);
}

pyllava_status kv_make_room(kv_cache * kv, const kv_wish * wishes, int32_t n_wishes) {
    const cuts c = { wishes, n_wishes };
    int64_t n = 0;
    for (int32_t i = 0; i < n_wishes; i++) n += wishes[i].n;
    const int32_t n_free = kv->n_free + count_cut(kv, &c, -1);
    char holders[NAMED * 64 + 16] = "";
    if (n > n_free) describe_holders(kv, &c, holders, sizeof holders);
    count_cut(kv, &c, 1);
    if (n > n_free) {
        FAIL(PYLLAVA_ERR_CONTEXT,
             "KV cache: %lld cells needed, %d of %d are free (%s): trim a sequence or raise kv_cells",
             (long long) n, n_free, kv->n_cells, holders);
    }
    for (int32_t i = 0; i < n_wishes; i++) drop(kv, wishes[i].seq, wishes[i].keep);
    const int32_t top = kv_cells_used(kv); // the n lowest free cells lie below top + n
    if (n < kv->n_cells - top) give_back(kv, top + (int32_t) n);
    return PYLLAVA_OK;
}

// Where a range begins: the first slot before the most free cells, of which two slots are enough, and best
// every second slot; -1 if none is free. Half of the sequences, mostly, keep what earlier ones held.
static int32_t best_slot(const kv_cache * kv) {
    const int32_t enough = 2 * kv->slot;
    int32_t found = -1, most = 1, n = 0;
    for (int32_t cell = kv->slot ? kv->n_cells - 1 : -1; cell >= 0; cell--) {
        n = kv->references[cell] ? 0 : n + 1;
        const int32_t worth = (n < enough ? n : enough) + (n && cell % enough == 0);
        if (cell % kv->slot == 0 && worth >= most) most = worth, found = cell;
    }
    return found;
}

// A free cell for position p of a sequence: the next one of its range, or the lowest.
static int32_t free_cell(kv_cache * kv, kv_sequence * s, int32_t p) {
    if (p == 0) s->base = best_slot(kv);
    const int32_t next = s->base < 0 || s->n_in_range < p ? -1 : s->base + p;
    if (next >= 0 && next < kv->n_cells && !kv->references[next]) {
        s->n_in_range = p + 1;
        return next;
    }
    while (kv->references[kv->lowest]) kv->lowest++;
    return kv->lowest++;
}

void kv_reserve(kv_cache * kv, int32_t seq, int32_t n) {
    kv_sequence * s = &kv->sequences[seq];
    for (int32_t i = 0; i < n; i++) {
        const int32_t cell = free_cell(kv, s, s->length + i);
        s->cells[s->length + i] = cell;
        kv->references[cell] = 1;
        if (kv->n_touched <= cell) kv->n_touched = cell + 1;
    }
    kv->n_free -= n;
}

int32_t kv_range(const kv_cache * kv, int32_t seq, int32_t n) {
    const kv_sequence * s = &kv->sequences[seq];
    return n && s->n_in_range >= n ? s->base : -1;
}

void kv_commit(kv_cache * kv, int32_t seq, const uint64_t * contents, int32_t n) {
    kv_sequence * s = &kv->sequences[seq];
    memcpy(s->contents + s->length, contents, (size_t) n * sizeof *contents);
    s->length += n;
}

void kv_rollback(kv_cache * kv, int32_t seq, int32_t n) {
    kv_sequence * s = &kv->sequences[seq];
    for (int32_t i = 0; i < n; i++) release(kv, s->cells[s->length + i]);
    if (s->n_in_range > s->length) s->n_in_range = s->length;
}

void kv_trim(kv_cache * kv, int32_t seq, int32_t n) {
    drop(kv, seq, n);
    give_back(kv, kv_cells_used(kv));
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
    b->base = a->base;
    b->n_in_range = a->n_in_range < n ? a->n_in_range : n;
    for (int32_t i = 0; i < n; i++) kv->references[b->cells[i]]++;
}

int32_t kv_cells_used(const kv_cache * kv) {
    int32_t n = kv->n_touched;
    while (n > 0 && kv->references[n - 1] == 0) n--;
    return n;
}

int32_t kv_next_unused(const kv_cache * kv, int32_t * first) {
    int32_t n = 0;
    while (*first < kv->n_cells && kv->references[*first]) ++*first;
    while (*first + n < kv->n_cells && !kv->references[*first + n]) n++;
    return n;
}
