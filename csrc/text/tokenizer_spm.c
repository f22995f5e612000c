// tokenizer_spm.c - see tokenizer_spm.h. A text gets a leading space, spaces become U+2581, and from single
// characters on the neighbouring pair whose union has the best score is merged until no union of two
// neighbours is a token. Characters that are no token become bytes.
#include "tokenizer_spm.h"

#include "pair_merge.h"

#include <stdlib.h>
#include <string.h>

#define SPACE "\xE2\x96\x81" // U+2581, SentencePiece's visible space

typedef struct spm_data {
    int32_t byte_ids[256];
} spm_data;

// ------------------------------------------------------------------------------------- byte tokens

// The byte that a token's text stands for: 65 for "<0x41>", -1 if it is no such text.
static int32_t byte_of(gguf_text text) {
    static const char DIGITS[] = "0123456789ABCDEF";
    if (text.size != 6 || memcmp(text.data, "<0x", 3) || text.data[5] != '>') return -1;
    const char *high = memchr(DIGITS, text.data[3], 16), *low = memchr(DIGITS, text.data[4], 16);
    return high && low ? (int32_t) (16 * (high - DIGITS) + (low - DIGITS)) : -1;
}

pyllava_status spm_check(tokenizer * t, vocab * v, const pyllava_gguf * f, const logger * log) {
    (void) log;
    spm_data * own = t->own = malloc(sizeof *own);
    TRY_ALLOC(own, sizeof *own);
    v->bos = 1, v->unk = 0, v->add_bos = true; // LLaMA's
    t->space_prefix = true;
    TRY(gguf_get_bool(f, "tokenizer.ggml.add_space_prefix", &t->space_prefix));
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

// ----------------------------------------------------------------------------------------- merging

typedef struct spm {
    const vocab * v;
    const char * text;
} spm;

static bool find_union(const void * own, const merge_symbol * left, const merge_symbol * right,
                       merge_candidate * out) {
    const spm * s = own;
    out->id = vocab_find_word(s->v, s->text + left->begin, (uint64_t) (left->size + right->size));
    if (out->id < 0) return false;
    out->score = s->v->scores[out->id];
    return true;
}

static int32_t char_size(uint8_t b) { return b < 0x80 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4; }

// visible: a text with its spaces as U+2581.
static pyllava_status merge_text(const tokenizer * t, const char * visible, int32_t size, token_list * out) {
    const spm_data * own = t->own;
    const spm s = { t->vocab, visible };
    pair_merge m = { .find = find_union, .own = &s };
    pyllava_status status = pair_merge_start(&m, size);
    for (int32_t at = 0; status == PYLLAVA_OK && at < size;) {
        int32_t length = char_size((uint8_t) visible[at]);
        if (length > size - at) length = size - at; // a special token can begin within a character
        pair_merge_add(&m, length, vocab_find_word(s.v, visible + at, (uint64_t) length));
        at += length;
    }
    pair_merge_run(&m);
    for (int32_t i = m.n ? 0 : -1; i >= 0; i = m.symbols[i].next) {
        const merge_symbol * y = &m.symbols[i];
        for (int32_t b = 0; y->id < 0 && b < y->size; b++)
            token_list_add(out, own->byte_ids[(uint8_t) visible[y->begin + b]]);
        if (y->id >= 0) token_list_add(out, y->id);
    }
    pair_merge_free(&m);
    return status;
}

pyllava_status spm_encode(const tokenizer * t, gguf_text text, token_list * out) {
    char * visible = malloc((size_t) text.size * 3 + 3);
    TRY_ALLOC(visible, text.size * 3 + 3);
    int32_t n = 0;
    if (t->space_prefix) {
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
