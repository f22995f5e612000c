// prompt.c - see prompt.h.
#include "prompt.h"

// The odd constant and the shifts are those of SplitMix64.
uint64_t span_content(const pyllava_span * span, int32_t i, pyllava_row_kind kind) {
    const uint64_t as_answer = kind == PYLLAVA_ANSWER ? (uint64_t) 1 << 62 : 0;
    if (span->tokens) return (uint64_t) (uint32_t) span->tokens[i] | as_answer;
    uint64_t x = span->key + 0x9E3779B97F4A7C15u * (uint64_t) (i + 1);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    return ((x ^ (x >> 27)) ^ as_answer) | (uint64_t) 1 << 63; // never equal to a token
}

pyllava_status spans_check(const pyllava_span * spans, int32_t n_spans, int32_t n_vocab, int64_t * out_n) {
    int64_t n = 0;
    for (int32_t j = 0; j < n_spans; j++) {
        if (spans[j].n < 0 || (spans[j].n && !spans[j].tokens == !spans[j].embd)) {
            FAIL(PYLLAVA_ERR_ARGUMENT, "span %d: need n >= 0 and either tokens or embd", j);
        }
        for (int32_t i = 0; spans[j].tokens && i < spans[j].n; i++) {
            if (spans[j].tokens[i] < 0 || spans[j].tokens[i] >= n_vocab)
                FAIL(PYLLAVA_ERR_ARGUMENT, "token %d: found %d, need 0..%d", i, spans[j].tokens[i],
                     n_vocab - 1);
        }
        n += spans[j].n;
    }
    if (n == 0) FAIL(PYLLAVA_ERR_ARGUMENT, "empty prompt");
    *out_n = n;
    return PYLLAVA_OK;
}

int32_t run_shared(const pyllava_run * run, const kv_sequence * q, int32_t from) {
    int32_t n = from;
    for (int32_t j = 0; j < run->n_spans; j++) {
        const pyllava_span * span = &run->spans[j];
        for (int32_t i = 0; i < span->n; i++, n++) {
            if (n == q->length || q->contents[n] != span_content(span, i, run->kind)) return n - from;
        }
    }
    return n - from;
}

void span_skip(span_cursor * at, int32_t n) {
    at->done += n;
    while (n > 0 && n >= at->spans[at->span].n - at->row) {
        n -= at->spans[at->span].n - at->row;
        at->span++;
        at->row = 0;
    }
    at->row += n;
}

const pyllava_span * span_next(span_cursor * at, int32_t * out_row) {
    while (at->row == at->spans[at->span].n) at->span++, at->row = 0; // empty spans too
    *out_row = at->row++;
    at->done++;
    return &at->spans[at->span];
}
