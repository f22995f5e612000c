// test_kv_cache.c - the pool of cells against a plain account of it: random operations, the lowest cells
// first, what is said when none is left, pages that come and go, ranges, and the windows that they make.
#include "batch.h"
#include "kv_cache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_LAYER 2
#define N_EMBD  2048 // a page of f16 for each cell
#define N_SEQ   5
#define N_CTX   40
#define N_CELLS 100
#define N_STEPS 20000

static int n_bad;

#define CHECK(ok, ...)                                                                                       \
    do {                                                                                                     \
        if (!(ok) && n_bad++ < 10) {                                                                         \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #ok);                                                  \
            printf(__VA_ARGS__);                                                                             \
            printf("\n");                                                                                    \
        }                                                                                                    \
    } while (0)

static uint32_t state = 14;

static int32_t below(int32_t n) { // 0 <= it < n
    state = state * 1664525u + 1013904223u;
    return (int32_t) ((state >> 8) % (uint32_t) n);
}

static void create(kv_cache * kv, int32_t n_seq, int32_t n_ctx, int32_t n_cells) {
    ggml_backend_buffer_type_t where[N_LAYER] = { ggml_backend_cpu_buffer_type(),
                                                  ggml_backend_cpu_buffer_type() };
    const kv_params p = { N_LAYER, N_EMBD, n_ctx, n_seq, n_cells, GGML_TYPE_F16, GGML_TYPE_F16, false };
    *kv = (kv_cache) { 0 };
    CHECK(kv_cache_create(kv, &p, where) == PYLLAVA_OK, "%s", error_text());
    CHECK(kv_cache_size(&p) == (uint64_t) n_cells * N_LAYER * 2 * N_EMBD * 2, "%d", n_cells);
}

// Makes a sequence hold n positions more; each is its own number.
static void grow(kv_cache * kv, int32_t seq, int32_t n) {
    static uint64_t next;
    uint64_t contents[4096];
    for (int32_t i = 0; i < n; i++) contents[i] = next++;
    kv_reserve(kv, seq, n);
    kv_commit(kv, seq, contents, n);
}

static pyllava_status make_room(kv_cache * kv, int32_t seq, int32_t keep, int32_t n) {
    const kv_wish wish = { seq, keep, n };
    return kv_make_room(kv, &wish, 1);
}

// Counted from the lists of the sequences alone.
static int32_t count_free(const kv_cache * kv, int32_t * references) {
    memset(references, 0, (size_t) kv->n_cells * sizeof *references);
    for (int32_t s = 0; s < kv->n_seq; s++) {
        for (int32_t p = 0; p < kv->sequences[s].length; p++) references[kv->sequences[s].cells[p]]++;
    }
    int32_t n = 0;
    for (int32_t c = 0; c < kv->n_cells; c++) n += references[c] == 0;
    return n;
}

static void check_account(const kv_cache * kv, uint64_t held[N_SEQ][N_CTX], const int32_t * lengths) {
    int32_t references[N_CELLS], top = 0;
    const int32_t n_free = count_free(kv, references);
    CHECK(kv->n_free == n_free, "%d, need %d", kv->n_free, n_free);
    for (int32_t c = 0; c < N_CELLS; c++) {
        CHECK(kv->references[c] == references[c], "cell %d: %d, need %d", c, kv->references[c],
              references[c]);
        if (references[c]) top = c + 1;
    }
    CHECK(kv_cells_used(kv) == top, "%d, need %d", kv_cells_used(kv), top);
    for (int32_t s = 0; s < N_SEQ; s++) {
        const kv_sequence * q = &kv->sequences[s];
        CHECK(q->length == lengths[s], "sequence %d: %d, need %d", s, q->length, lengths[s]);
        CHECK(!memcmp(q->contents, held[s], (size_t) lengths[s] * sizeof **held), "sequence %d", s);
        const int32_t cell = kv_range(kv, s, q->length);
        for (int32_t p = 0; cell >= 0 && p < q->length; p++)
            CHECK(q->cells[p] == cell + p, "sequence %d: cell %d, need %d", s, q->cells[p], cell + p);
    }
}

// n new positions behind the first `keep`, as a prompt makes them; with `fails` they are taken back.
static void append(kv_cache * kv, int32_t seq, int32_t keep, int32_t n, bool fails) {
    int32_t references[N_CELLS], n_free = count_free(kv, references);
    const kv_sequence * q = &kv->sequences[seq];
    for (int32_t p = keep; p < q->length; p++) {
        if (--references[q->cells[p]] == 0) n_free++;
    }
    pyllava_status status = make_room(kv, seq, keep, n);
    CHECK((status == PYLLAVA_OK) == (n <= n_free), "%d cells, %d are free: status %d", n, n_free,
          (int) status);
    if (status != PYLLAVA_OK) {
        char text[64];
        snprintf(text, sizeof text, "KV cache: %d cells needed, %d of %d are free (", n, n_free, N_CELLS);
        CHECK(status == PYLLAVA_ERR_CONTEXT && !strncmp(error_text(), text, strlen(text)), "%s",
              error_text());
        return;
    }
    kv_reserve(kv, seq, n);
    for (int32_t i = 0, c = 0; i < n && !kv->slot; i++) {
        while (references[c]) c++;
        CHECK(q->cells[keep + i] == c, "found cell %d, need %d, the lowest", q->cells[keep + i], c);
        references[c]++;
    }
    kv_rollback(kv, seq, n);
    if (!fails) grow(kv, seq, n); // the same cells again
}

static void test_random_operations(int32_t slot) {
    kv_cache kv;
    create(&kv, N_SEQ, N_CTX, N_CELLS);
    kv.slot = slot;
    uint64_t held[N_SEQ][N_CTX];
    int32_t lengths[N_SEQ] = { 0 }, n_full = 0;
    for (int32_t step = 0; step < N_STEPS && !n_bad; step++) {
        const int32_t a = below(N_SEQ), b = below(N_SEQ), kind = below(4), n = below(lengths[a] + 1);
        if (kind == 0) {
            kv_trim(&kv, a, n);
            lengths[a] = n;
        } else if (kind == 1) {
            kv_copy(&kv, a, b, n);
            memmove(held[b], held[a], (size_t) n * sizeof **held);
            lengths[b] = n;
        } else {
            const int32_t n_new = below(N_CTX - n + 1), before = kv.n_free;
            append(&kv, a, n, n_new, below(4) == 0);
            const int32_t length = kv.sequences[a].length;
            n_full += length == lengths[a] && before == kv.n_free;
            memcpy(held[a], kv.sequences[a].contents, (size_t) length * sizeof **held);
            lengths[a] = length;
        }
        check_account(&kv, held, lengths);
    }
    CHECK(n_full > 100, "%d", n_full);
    for (int32_t s = 0; s < N_SEQ; s++) kv_trim(&kv, s, 0);
    CHECK(kv.n_free == N_CELLS && kv_cells_used(&kv) == 0, "%d", kv.n_free);
    kv_cache_free(&kv);
}

// Sequences begin where there is room, go on there, and are scattered once they share or their way is
// blocked.
static void test_ranges(void) {
    kv_cache kv;
    create(&kv, N_SEQ, N_CTX, N_CELLS);
    kv.slot = 20;
    const int32_t cells[] = { 0, 40, 60 };
    for (int32_t s = 0; s < 3; s++) grow(&kv, s, 3);
    for (int32_t s = 0; s < 3; s++) {
        grow(&kv, s, 10);
        const int32_t first = kv_range(&kv, s, 13);
        CHECK(first == cells[s], "sequence %d: %d", s, first);
    }
    CHECK(kv_range(&kv, 1, 14) == -1 && kv_range(&kv, 3, 0) == -1, "it holds 13 and none");
    grow(&kv, 1, 7);
    CHECK(kv_range(&kv, 1, 20) == 40, "up to the next one");
    grow(&kv, 1, 1);
    CHECK(kv_range(&kv, 1, 21) == -1 && kv_range(&kv, 1, 20) == 40, "beyond it");
    kv_trim(&kv, 1, 15);
    CHECK(kv_range(&kv, 1, 15) == 40, "cut");
    kv_copy(&kv, 2, 3, 5);
    CHECK(kv_range(&kv, 3, 5) == 60, "shared");
    grow(&kv, 3, 1);
    CHECK(kv_range(&kv, 3, 6) == -1 && kv_range(&kv, 2, 13) == 60, "the other one's cell is next");
    kv_trim(&kv, 3, 0);
    grow(&kv, 3, 1);
    CHECK(kv_range(&kv, 3, 1) == 80, "%d: a new beginning", kv_range(&kv, 3, 1));
    grow(&kv, 4, 1);
    CHECK(kv_range(&kv, 4, 1) == 20, "%d: what is left", kv_range(&kv, 4, 1));
    kv_cache_free(&kv);
}

static void test_who_holds_the_rest(void) {
    kv_cache kv;
    create(&kv, 12, N_CTX, N_CELLS);
    grow(&kv, 3, 30);
    grow(&kv, 7, 40);
    kv_copy(&kv, 7, 0, 25);
    grow(&kv, 0, 10);
    CHECK(make_room(&kv, 1, 0, 21) == PYLLAVA_ERR_CONTEXT, "room for 21");
    const char * need = "KV cache: 21 cells needed, 20 of 100 are free (sequence 7 holds 40 (25 shared), "
                        "sequence 0 holds 35 (25 shared), sequence 3 holds 30): trim a sequence or raise "
                        "kv_cells";
    CHECK(!strcmp(error_text(), need), "%s", error_text());
    CHECK(make_room(&kv, 1, 0, 20) == PYLLAVA_OK, "%s", error_text());
    const kv_wish both[] = { { 7, 10, 40 }, { 0, 10, 20 } }; // of 25 shared cells 15 go
    CHECK(kv_make_room(&kv, both, 2) == PYLLAVA_OK, "%s", error_text());
    CHECK(kv.n_free == 60 && kv_cells_used(&kv) == 40, "%d", kv.n_free);
    const kv_wish too_many[] = { { 7, 5, 40 }, { 0, 5, 26 } };
    CHECK(kv_make_room(&kv, too_many, 2) == PYLLAVA_ERR_CONTEXT, "room for 66");
    need =
        "KV cache: 66 cells needed, 65 of 100 are free (sequence 3 holds 30, sequence 0 holds 5 (5 shared), "
        "sequence 7 holds 5 (5 shared)): trim a sequence or raise kv_cells";
    CHECK(!strcmp(error_text(), need), "%s", error_text());
    CHECK(kv.sequences[7].length == 10 && kv.n_free == 60, "%d", kv.n_free);
    for (int32_t s = 0; s < 12; s++) kv_trim(&kv, s, 0);
    for (int32_t s = 0; s < 12; s++) grow(&kv, s, 8);
    CHECK(make_room(&kv, 5, 3, 10) == PYLLAVA_ERR_CONTEXT, "room for 10");
    CHECK(strstr(error_text(), ", 9 of 100 are free (sequence 0 holds 8, sequence 1 holds 8, ") != NULL &&
              strstr(error_text(), "sequence 8 holds 8, 4 more): ") != NULL,
          "%s", error_text());
    CHECK(kv.sequences[5].length == 8 && kv.n_free == 4, "%d", kv.n_free);
    kv_cache_free(&kv);
}

static char * row(const kv_cache * kv, int32_t layer, int32_t cell) {
    return (char *) kv->v[layer]->data + (size_t) cell * kv->v[layer]->nb[1];
}

// Rows in the middle of pages that were given back are zero again.
static void test_pages(void) {
    kv_cache kv;
    create(&kv, 2, 1024, 2048);
    grow(&kv, 0, 300);
    grow(&kv, 1, 1000);
    for (int32_t i = 0; i < N_LAYER; i++) {
        for (int32_t c = 0; c < 1300; c++) memset(row(&kv, i, c), c % 255 + 1, kv.v[i]->nb[1]);
    }
    kv_trim(&kv, 0, 0);
    kv_trim(&kv, 1, 800);
    CHECK(kv.n_touched == 1300, "%d: few at the top, or free cells below it, stay", kv.n_touched);
    CHECK(make_room(&kv, 1, 100, 50) == PYLLAVA_OK, "%s", error_text());
    CHECK(kv.n_touched == 450, "%d: what is needed next stays", kv.n_touched);
    for (int32_t i = 0; i < N_LAYER; i++) {
        for (int32_t c = 0; c < 450; c++) CHECK(row(&kv, i, c)[7] == (char) (c % 255 + 1), "cell %d", c);
#if defined(__linux__)
        for (int32_t c = 452; c < 1298; c++) CHECK(row(&kv, i, c)[7] == 0, "cell %d", c);
#endif
    }
    kv_trim(&kv, 1, 0);
    CHECK(kv.n_touched == 450, "%d: 7 MiB stay", kv.n_touched);
    kv_cache_free(&kv);
}

// Windows hold all rows in their order; what a window reads is there, and its sequences' cells lie apart.
static void test_windows(void) {
    enum { N_RUNS = 12, END = 640 };
    int32_t n_shared = 0, n_whole = 0;
    for (int32_t step = 0; step < N_STEPS; step++) {
        batch b = { 0 };
        int32_t cells[3 * N_RUNS], needs[3 * N_RUNS], at = 0;
        for (int32_t i = 0; i < N_RUNS; i++) {
            const int32_t first = b.n, n = below(8) ? 1 : 1 + below(3);
            at += 32 * (1 + (below(4) == 0));
            const int32_t cell = below(6) && at < END ? at : -1, room = END - at < 40 ? END - at : 40;
            const int32_t need = cell < 0 ? 0 : 1 + below(room);
            for (int32_t j = 0; j < n; j++, b.n++) cells[b.n] = cell, needs[b.n] = need;
            batch_window(&b, first, cell, need, END);
        }
        int32_t row = 0;
        for (const attention_window * w = b.windows; w < b.windows + b.n_windows; w++) {
            CHECK(w->first == row && w->n_rows > 0 && w->n_seqs > 0, "row %d, need %d", w->first, row);
            for (int32_t i = 0; w->n_cells && i < w->n_rows * w->n_seqs; i++) {
                const int32_t cell = w->cell + i / w->n_rows * w->stride;
                CHECK(cells[row + i] == cell, "cell %d, need %d", cell, cells[row + i]);
                CHECK(needs[row + i] <= w->n_cells && cell + w->n_cells <= END, "%d cells of %d", w->n_cells,
                      cell);
            }
            CHECK(w->n_seqs == 1 || w->n_cells <= w->stride, "%d cells, %d apart", w->n_cells, w->stride);
            n_shared += w->n_seqs > 1;
            n_whole += w->n_cells == 0;
            row += w->n_rows * w->n_seqs;
        }
        CHECK(row == b.n && b.n_windows <= MAX_WINDOWS, "%d rows in %d windows", row, b.n_windows);
    }
    CHECK(n_shared > 1000 && n_whole > 1000, "%d, %d", n_shared, n_whole);
}

int main(void) {
    test_random_operations(0);
    test_random_operations(16);
    test_ranges();
    test_windows();
    test_who_holds_the_rest();
    test_pages();
    printf(n_bad ? "%d checks failed\n" : "ok\n", n_bad);
    return n_bad != 0;
}
