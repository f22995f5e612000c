// batch.c - see batch.h.
#include "batch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define F16_ZERO      0x0000
#define F16_MINUS_INF 0xFC00
#define F32_EXPONENT  0x7F800000u

pyllava_status batch_create(batch * b, int32_t n_max, int32_t n_embd) {
    const size_t n = (size_t) n_max;
    *b = (batch) { .n_max = n_max, .n_embd = n_embd };
    b->embd = malloc(n * (size_t) n_embd * sizeof *b->embd);
    b->positions = malloc(n * sizeof *b->positions);
    b->cells = malloc(n * sizeof *b->cells);
    b->n_visible = malloc(n * sizeof *b->n_visible);
    b->contents = malloc(n * sizeof *b->contents);
    b->out_rows = malloc(BATCH_LOGITS * sizeof *b->out_rows);
    b->blocks = malloc(n * sizeof *b->blocks);
    if (!b->embd || !b->positions || !b->cells || !b->n_visible || !b->contents || !b->out_rows ||
        !b->blocks) {
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory for a batch of %d rows", n_max);
    }
    return PYLLAVA_OK;
}

void batch_free(batch * b) {
    free(b->embd);
    free(b->positions);
    free(b->cells);
    free(b->n_visible);
    free(b->contents);
    free(b->out_rows);
    free(b->blocks);
    *b = (batch) { 0 };
}

void batch_clear(batch * b) { b->n = b->n_out = b->n_blocks = b->n_windows = 0; }

float * batch_add(batch * b, int32_t position, int32_t cell, uint64_t content) {
    b->positions[b->n] = position;
    b->n_visible[b->n] = position + 1;
    b->cells[b->n] = cell;
    b->contents[b->n] = content;
    return b->embd + (size_t) b->n++ * (size_t) b->n_embd;
}

int32_t attention_blocks(attention_block * out, int32_t n_blocks, int32_t first, int32_t n, int32_t longest,
                         const int32_t * cells, int32_t first_row) {
    const int32_t n_steps = (n + longest - 1) / longest;
    const int32_t step = n_steps ? (n + n_steps - 1) / n_steps : 1; // equally long
    for (int32_t i = 0; i < n; i += step) {
        out[n_blocks++] = (attention_block) { first + i, n - i < step ? n - i : step, cells, first_row };
    }
    return n_blocks;
}

void batch_attend(batch * b, int32_t first, int32_t longest, const int32_t * cells) {
    b->n_blocks = attention_blocks(b->blocks, b->n_blocks, first, b->n - first, longest, cells, 0);
}

// Whether one more sequence of so many rows, in the cells from `cell` on, continues a window whose sequences
// have n_cells at most: they lie at equal distances, do not overlap, and end before the cache does.
static bool continues(const attention_window * w, int32_t n_rows, int32_t cell, int32_t n_cells,
                      int32_t end) {
    if (!w->n_cells || cell < 0 || w->n_rows != n_rows) return false;
    const int32_t distance = cell - w->cell - (w->n_seqs - 1) * w->stride;
    return (w->n_seqs == 1 || distance == w->stride) && n_cells <= distance && n_cells <= end - cell;
}

void batch_window(batch * b, int32_t first, int32_t cell, int32_t n_cells, int32_t end) {
    const int32_t n = b->n - first;
    attention_window * last = b->n_windows ? &b->windows[b->n_windows - 1] : NULL;
    const int32_t most = last && last->n_cells > n_cells ? last->n_cells : n_cells;
    if (last && continues(last, n, cell, most, end)) {
        last->stride = (cell - last->cell) / last->n_seqs++;
        last->n_cells = most;
    } else if (last && cell < 0 && !last->n_cells) {
        last->n_rows += n;
    } else if (b->n_windows < MAX_WINDOWS) {
        b->windows[b->n_windows++] = cell < 0 ? (attention_window) { first, n, 1, 0, 0, 0 }
                                              : (attention_window) { first, n, 1, cell, 0, n_cells };
    } else { // too many: one for all
        b->windows[0] = (attention_window) { 0, b->n, 1, 0, 0, 0 };
        b->n_windows = 1;
    }
}

// Compilers vectorise the first loop.
size_t first_not_finite(const float * x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & F32_EXPONENT) == F32_EXPONENT;
    }
    size_t i = bad ? 0 : n;
    while (i < n && isfinite(x[i])) i++;
    return i;
}

pyllava_status batch_check(const batch * b) {
    const size_t width = (size_t) b->n_embd;
    for (int32_t i = 0; i < b->n; i++) {
        const size_t bad = first_not_finite(b->embd + (size_t) i * width, width);
        if (bad < width)
            FAIL(PYLLAVA_ERR_NUMERIC, "embedding at position %d: entry %zu is not finite (bad weights?)",
                 b->positions[i], bad);
    }
    return PYLLAVA_OK;
}

void batch_mask(const attention_block * block, int32_t n_visible, int32_t cell, int32_t n_cells,
                uint16_t * out) {
    for (int32_t i = 0; i < n_cells; i++) out[i] = F16_MINUS_INF;
    for (int32_t p = 0; p < n_visible; p++) out[block->cells[p] - cell] = F16_ZERO;
}
