// tokenizer_spm.c - see tokenizer_spm.h. A text gets a leading space, spaces become U+2581, and from single
// characters on the neighbouring pair whose union has the best score is merged until no union of two
// neighbours is a token (ties: the leftmost). A priority queue holds the candidates; a merge of one of its
// parts makes a candidate stale, which shows in their size. Characters that are no token become bytes.
#include "tokenizer_spm.h"

#include <stdlib.h>
#include <string.h>

#define SPACE "\xE2\x96\x81" // U+2581, SentencePiece's visible space

typedef struct spm_data {
    int32_t byte_ids[256];
    bool add_space_prefix;
} spm_data;

typedef struct symbol {
    int32_t previous, next; // -1: none
    int32_t begin, size;    // bytes of the text; size 0: merged into its left neighbour
} symbol;

typedef struct candidate {
    float score;
    int32_t left, right, size; // symbols, and the size of their union
} candidate;

typedef struct spm {
    const vocab * v;
    const char * text;
    symbol * symbols;
    candidate * heap;
    int32_t n_heap;
} spm;

// ------------------------------------------------------------------------------------- byte tokens

// The byte that a token's text stands for: 65 for "<0x41>", -1 if it is no such text.
static int32_t byte_of(gguf_text text) {
    static const char DIGITS[] = "0123456789ABCDEF";
    if (text.size != 6 || memcmp(text.data, "<0x", 3) || text.data[5] != '>') return -1;
    const char *high = memchr(DIGITS, text.data[3], 16), *low = memchr(DIGITS, text.data[4], 16);
    return high && low ? (int32_t) (16 * (high - DIGITS) + (low - DIGITS)) : -1;
}

pyllava_status spm_check(tokenizer * t, vocab * v, const pyllava_gguf * f) {
    spm_data * own = t->own = malloc(sizeof *own);
    TRY_ALLOC(own, sizeof *own);
    own->add_space_prefix = true;
    TRY(gguf_get_bool(f, "tokenizer.ggml.add_space_prefix", &own->add_space_prefix));
    for (int b = 0; b < 256; b++) own->byte_ids[b] = -1;
    for (int32_t id = 0; id < v->n; id++) {
        int32_t b = byte_of(v->texts[id]);
        if (b < 0) continue;
        own->byte_ids[b] = id;
        v->kinds[id] = KIND_BYTE;
    }
    for (int b = 0; b < 256; b++) {
        if (own->byte_ids[b] < 0)
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: the vocabulary has no token <0x%02X> for a single byte", f->path,
                 b);
    }
    return PYLLAVA_OK;
}

uint64_t spm_decode(const tokenizer * t, int32_t id, char * out) {
    const gguf_text text = t->vocab->texts[id];
    const int32_t byte = byte_of(text);
    if (byte >= 0) {
        *out = (char) byte;
        return 1;
    }
    uint64_t n = 0;
    for (uint64_t i = 0; i < text.size; n++) {
        bool space = text.size - i >= 3 && !memcmp(text.data + i, SPACE, 3);
        out[n] = space ? ' ' : text.data[i];
        i += space ? 3 : 1;
    }
    return n;
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

// The id of the token with this text, or -1. Control tokens are none that letters become: "<s>" typed by a
// user stays letters. Nor are byte tokens.
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

// visible: a text with its spaces as U+2581.
static pyllava_status merge_text(const tokenizer * t, const char * visible, int32_t size, token_list * out) {
    const vocab * v = t->vocab;
    const spm_data * own = t->own;
    // Each symbol is proposed once with its right neighbour, and each merge proposes at most two pairs more.
    spm s = { v, visible, malloc((size_t) size * sizeof(symbol)),
              malloc((size_t) size * 3 * sizeof(candidate)), 0 };
    if (!s.symbols || !s.heap) {
        free(s.symbols);
        free(s.heap);
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory for a text of %d bytes", size);
    }
    int32_t n = 0;
    for (int32_t at = 0; at < size; n++) {
        int32_t length = char_size((uint8_t) visible[at]);
        if (length > size - at) length = size - at; // a special token can begin within a character
        s.symbols[n] = (symbol) { n - 1, at + length < size ? n + 1 : -1, at, length };
        at += length;
    }
    for (int32_t i = 0; i + 1 < n; i++) propose(&s, i, i + 1);
    merge_all(&s);
    for (int32_t i = 0; i >= 0; i = s.symbols[i].next) {
        const symbol * y = &s.symbols[i];
        const char * bytes = visible + y->begin;
        int32_t id = mergeable(v, bytes, y->size);
        for (int32_t b = 0; id < 0 && b < y->size; b++)
            token_list_add(out, own->byte_ids[(uint8_t) bytes[b]]);
        if (id >= 0) token_list_add(out, id);
    }
    free(s.symbols);
    free(s.heap);
    return PYLLAVA_OK;
}

pyllava_status spm_encode(const tokenizer * t, gguf_text text, token_list * out) {
    const spm_data * own = t->own;
    char * visible = malloc((size_t) text.size * 3 + 3);
    TRY_ALLOC(visible, text.size * 3 + 3);
    int32_t n = 0;
    if (own->add_space_prefix) {
        memcpy(visible, SPACE, 3);
        n = 3;
    }
    for (uint64_t i = 0; i < text.size; i++) {
        if (text.data[i] != ' ') visible[n++] = text.data[i];
        else memcpy(visible + n, SPACE, 3), n += 3;
    }
    pyllava_status status = merge_text(t, visible, n, out);
    free(visible);
    return status;
}
