// batch.h - the rows that one graph computes, of one or more sequences: their embeddings, positions and KV
// cells, the positions that each attends to, and the rows whose logits are wanted.
#pragma once

#include "nn.h"

#define BATCH_LOGITS 64 // rows of logits of one graph, at most

typedef struct batch { // room for n_max rows
    int32_t n, n_max, n_embd;
    float * embd;        // [n_max, n_embd]
    int32_t * positions; // [n_max]
    int64_t * cells;     // [n_max]
    int32_t * n_visible; // [n_max]
    uint64_t * contents; // [n_max]
    int32_t * out_rows;  // [BATCH_LOGITS]
    int32_t n_out;
    attention_block * blocks; // [n_max]
    int32_t n_blocks;
    attention_window windows[MAX_WINDOWS]; // n_cells: that are read at least, or 0: all that are in use
    int32_t n_windows;
} batch;

pyllava_status batch_create(batch * b, int32_t n_max, int32_t n_embd);
void batch_free(batch * b);
void batch_clear(batch * b);
// Adds a row whose cell is reserved; returns where its embedding is to be written.
float * batch_add(batch * b, int32_t position, int32_t cell, uint64_t content);
// Splits the rows from `first` on, which are consecutive in one sequence, into attention blocks of at most
// `longest` rows.
void batch_attend(batch * b, int32_t first, int32_t longest, const int32_t * cells);
// Says where the same rows' cells lie: n_cells in a range from `cell` on, or anywhere (-1), of a cache of
// `end`. Devices attend to one window after the other, so sequences at equal distances share one.
void batch_window(batch * b, int32_t first, int32_t cell, int32_t n_cells, int32_t end);
// Appends the blocks of n rows from `first` on to out[n_blocks]; returns the new number of blocks.
int32_t attention_blocks(attention_block * out, int32_t n_blocks, int32_t first, int32_t n, int32_t longest,
                         const int32_t * cells, int32_t first_row);
// PYLLAVA_ERR_NUMERIC for an embedding that is not finite: the softmax of a device may ignore it, and then
// the logits would not show it.
pyllava_status batch_check(const batch * b);
// For attention on devices: which of n_cells cells from `cell` on a row of the block sees, f16 [n_cells].
void batch_mask(const attention_block * block, int32_t n_visible, int32_t cell, int32_t n_cells,
                uint16_t * out);

size_t first_not_finite(const float * x, size_t n); // its index; n: all are finite
