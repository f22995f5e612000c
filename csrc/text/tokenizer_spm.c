// tokenizer_spm.c - see tokenizer_spm.h. A text is cut at special tokens; each piece between them gets a
// leading space, spaces become U+2581, and from single characters on the neighbouring pair whose union has
// the best score is merged until none is left (ties: the leftmost). A priority queue holds the candidates;
// one whose parts have changed since is stale and is known by its length. Characters that are no token become
// bytes.
#include "tokenizer_spm.h"

#include <stdlib.h>
#include <string.h>

#define SPACE "\xE2\x96\x81"

typedef struct symbol {
    int32_t previous, next; // -1: none
    int32_t begin, size;    // bytes of the text; size 0: merged into its left neighbour
} symbol;

typedef struct candidate {
    float score;
    int32_t left, right, size;
} candidate;

typedef struct output {
    int32_t * ids;
    uint64_t n, n_max;
} output;

typedef struct spm {
    const vocab * v;
    const char * text;
    symbol * symbols;
    candidate * heap;
    int32_t n_heap;
} spm;

static void emit(output * out, int32_t id) {
    if (out->n < out->n_max) out->ids[out->n] = id;
    out->n++;
}

// ---------------------------------------------------------------------------------- priority queue

static bool better(const candidate * a, const candidate * b) {
    return a->score != b->score ? a->score > b->score : a->left < b->left;
}

static void heap_push(spm * s, candidate c) {
    int32_t i = s->n_heap++;
    for (; i > 0 && better(&c, &s->heap[(i - 1) / 2]); i = (i - 1) / 2) s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = c;
}

static candidate heap_pop(spm * s) {
    candidate top = s->heap[0], last = s->heap[--s->n_heap];
    int32_t i = 0;
    for (;;) {
        int32_t child = 2 * i + 1;
        if (child >= s->n_heap) break;
        if (child + 1 < s->n_heap && better(&s->heap[child + 1], &s->heap[child])) child++;
        if (!better(&s->heap[child], &last)) break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    s->heap[i] = last;
    return top;
}

// ----------------------------------------------------------------------------------------- merging

// Only these kinds come from text; "<s>" typed by a user stays letters.
static int32_t mergeable(const vocab * v, const char * text, int32_t size) {
    int32_t id = vocab_find(v, text, (uint64_t) size);
    if (id < 0) return -1;
    const uint8_t kind = v->kinds[id];
    return kind == KIND_NORMAL || kind == KIND_USER || kind == KIND_UNUSED ? id : -1;
}

static void propose(spm * s, int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    int32_t size = s->symbols[left].size + s->symbols[right].size;
    int32_t id = mergeable(s->v, s->text + s->symbols[left].begin, size);
    if (id >= 0) heap_push(s, (candidate) { s->v->scores[id], left, right, size });
}

static void merge_all(spm * s) {
    while (s->n_heap) {
        candidate c = heap_pop(s);
        symbol *left = &s->symbols[c.left], *right = &s->symbols[c.right];
        if (!left->size || !right->size || left->size + right->size != c.size) continue;
        left->size = c.size;
        right->size = 0;
        left->next = right->next;
        if (right->next >= 0) s->symbols[right->next].previous = c.left;
        propose(s, left->previous, c.left);
        propose(s, c.left, left->next);
    }
}

static int32_t char_size(uint8_t b) { return b < 0x80 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4; }

static pyllava_status encode(const vocab * v, const char * text, int32_t size, output * out) {
    // each symbol is proposed once with its right neighbour, each merge at most twice more
    spm s = { v, text, malloc((size_t) size * sizeof(symbol)), malloc((size_t) size * 3 * sizeof(candidate)),
              0 };
    if (!s.symbols || !s.heap) {
        free(s.symbols);
        free(s.heap);
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory for a text of %d bytes", size);
    }
    int32_t n = 0;
    for (int32_t at = 0; at < size; n++) {
        int32_t length = char_size((uint8_t) text[at]);
        if (length > size - at) length = size - at; // a token can cut through a character
        s.symbols[n] = (symbol) { n - 1, at + length < size ? n + 1 : -1, at, length };
        at += length;
    }
    for (int32_t i = 0; i + 1 < n; i++) propose(&s, i, i + 1);
    merge_all(&s);
    for (int32_t i = 0; i >= 0; i = s.symbols[i].next) {
        const symbol * y = &s.symbols[i];
        int32_t id = mergeable(v, text + y->begin, y->size);
        for (int32_t b = 0; id < 0 && b < y->size; b++) emit(out, v->byte_ids[(uint8_t) text[y->begin + b]]);
        if (id >= 0) emit(out, id);
    }
    free(s.symbols);
    free(s.heap);
    return PYLLAVA_OK;
}

// A stretch without special tokens: spaces made visible, one more in front if it follows a special token or
// nothing.
static pyllava_status encode_fragment(const vocab * v, const char * text, uint64_t size, output * out) {
    if (size == 0) return PYLLAVA_OK;
    if (size > (uint64_t) 64 << 20)
        FAIL(PYLLAVA_ERR_ARGUMENT, "text of %llu bytes, need at most 64 MiB", (unsigned long long) size);
    char * visible = malloc((size_t) size * 3 + 3);
    TRY_ALLOC(visible, size * 3 + 3);
    int32_t n = 0;
    if (v->add_space_prefix) {
        memcpy(visible, SPACE, 3);
        n = 3;
    }
    for (uint64_t i = 0; i < size; i++) {
        if (text[i] != ' ') visible[n++] = text[i];
        else memcpy(visible + n, SPACE, 3), n += 3;
    }
    pyllava_status status = encode(v, visible, n, out);
    free(visible);
    return status;
}

pyllava_status spm_tokenize(const vocab * v, gguf_text text, const pyllava_range * plain, uint64_t n_plain,
                            bool add_bos, int32_t * out_ids, uint64_t n_max, uint64_t * out_n) {
    output out = { out_ids, 0, n_max };
    if (add_bos) emit(&out, v->bos);
    uint64_t begin = 0;
    for (uint64_t at = 0; at < text.size;) {
        int32_t id = vocab_special_at(v, text, at, plain, n_plain);
        if (id < 0) {
            at++;
            continue;
        }
        TRY(encode_fragment(v, text.data + begin, at - begin, &out));
        emit(&out, id);
        begin = at += v->texts[id].size;
    }
    TRY(encode_fragment(v, text.data + begin, text.size - begin, &out));
    *out_n = out.n;
    return PYLLAVA_OK;
}
