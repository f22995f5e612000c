// prompt.h - the spans of a run, read as one list of rows: the content of each row, the rows that a sequence
// shares with it, and a cursor.
#pragma once

#include "kv_cache.h"

// A position in the rows of all spans.
typedef struct span_cursor {
    const pyllava_span * spans;
    int32_t span, row, done; // done: rows before it, of all spans
} span_cursor;

// Counts the rows. PYLLAVA_ERR_ARGUMENT unless each span has either tokens or embeddings, and ids below
// n_vocab.
pyllava_status spans_check(const pyllava_span * spans, int32_t n_spans, int32_t n_vocab, int64_t * out_n);
// How many rows of the run a sequence already holds from position `from` on: rows of the same content and
// kind.
int32_t run_shared(const pyllava_run * run, const kv_sequence * q, int32_t from);
// The content and kind of a row as one number: its token id, or a hash of the picture's key and the row.
uint64_t span_content(const pyllava_span * span, int32_t i, pyllava_row_kind kind);
void span_skip(span_cursor * at, int32_t n);
// Moves to the next row: returns its span, and its index within the span through out_row.
const pyllava_span * span_next(span_cursor * at, int32_t * out_row);
