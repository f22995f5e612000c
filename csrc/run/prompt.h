// prompt.h - spans of token ids and embeddings as one run of positions: what each holds, what a sequence
// shares with it, and a walk over it in pieces.
#pragma once

#include "kv_cache.h"

// A place between the rows of all spans.
typedef struct span_cursor {
    const pyllava_span * spans;
    int32_t span, row, done; // done: rows before it, of all spans
} span_cursor;

// Their number of rows. PYLLAVA_ERR_ARGUMENT for spans of neither tokens nor embeddings, and ids not below
// n_vocab.
pyllava_status spans_check(const pyllava_span * spans, int32_t n_spans, int32_t n_vocab, int64_t * out_n);
// How many rows a sequence has from one on that are those of the run: what they hold, and the kind.
int32_t run_shared(const pyllava_run * run, const kv_sequence * q, int32_t from);
// What a row holds, as one number: its token id, or a mix of a picture's key and row; and the kind.
uint64_t span_content(const pyllava_span * span, int32_t i, pyllava_row_kind kind);
void span_skip(span_cursor * at, int32_t n);
// The next row: its span; its index within that goes to out_row.
const pyllava_span * span_next(span_cursor * at, int32_t * out_row);
