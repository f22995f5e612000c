// tokenizer.c - see tokenizer.h.
#include "tokenizer.h"

#include "tokenizer_spm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const tokenizer_kind KINDS[] = {
    { "llama", "SentencePiece", spm_check, spm_encode, spm_decode },
};

// ----------------------------------------------------------------------------------------- reading

static pyllava_status find_kind(const pyllava_gguf * f, const tokenizer_kind ** out) {
    gguf_text name = { 0 };
    TRY(gguf_get_text(f, "tokenizer.ggml.model", true, &name));
    char known[256] = "";
    size_t used = 0;
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        *out = &KINDS[i];
        if (gguf_text_is(name, KINDS[i].name)) return PYLLAVA_OK;
        if (used >= sizeof known) continue;
        used += (size_t) snprintf(known + used, sizeof known - used, "%s'%s' (%s)", i ? ", " : "",
                                  KINDS[i].name, KINDS[i].title);
    }
    FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: tokenizer '%.*s', this version runs %s", f->path,
         (int) (name.size < 64 ? name.size : 64), name.data, known);
}

static pyllava_status build_pieces(tokenizer * t) {
    const vocab * v = t->vocab;
    size_t size = 1;
    for (int32_t id = 0; id < v->n; id++) size += (size_t) v->texts[id].size;
    t->pieces = calloc((size_t) v->n, sizeof *t->pieces);
    TRY_ALLOC(t->pieces, (size_t) v->n * sizeof *t->pieces);
    t->arena = malloc(size);
    TRY_ALLOC(t->arena, size);
    char * out = t->arena;
    for (int32_t id = 0; id < v->n; id++) {
        t->pieces[id] = (gguf_text) { out, t->kind->decode(t, id, out) };
        out += t->pieces[id].size;
    }
    return PYLLAVA_OK;
}

typedef struct special {
    uint64_t size;
    int32_t id;
} special;

static int longest_first(const void * a, const void * b) {
    const special *x = a, *y = b;
    return x->size != y->size ? (x->size < y->size ? 1 : -1) : x->id - y->id;
}

static pyllava_status collect_specials(tokenizer * t) {
    const vocab * v = t->vocab;
    special * found = malloc((size_t) v->n * sizeof *found);
    t->specials = malloc((size_t) v->n * sizeof *t->specials);
    if (!found || !t->specials) {
        free(found);
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    }
    for (int32_t id = 0; id < v->n; id++) {
        bool is_special =
            v->kinds[id] == KIND_CONTROL || v->kinds[id] == KIND_UNKNOWN || v->kinds[id] == KIND_USER;
        if (is_special && v->texts[id].size) found[t->n_specials++] = (special) { v->texts[id].size, id };
    }
    qsort(found, (size_t) t->n_specials, sizeof *found, longest_first);
    for (int32_t i = 0; i < t->n_specials; i++) {
        t->specials[i] = found[i].id;
        t->starts_special[(uint8_t) v->texts[found[i].id].data[0]] = true;
    }
    free(found);
    return PYLLAVA_OK;
}

pyllava_status tokenizer_read(tokenizer * t, vocab * v, const pyllava_gguf * f) {
    TRY(find_kind(f, &t->kind));
    TRY(vocab_read(v, f));
    t->vocab = v;
    TRY(t->kind->check(t, v, f));
    TRY(build_pieces(t));
    return collect_specials(t);
}

void tokenizer_free(tokenizer * t) {
    free(t->own);
    free(t->specials);
    free(t->pieces);
    free(t->arena);
    memset(t, 0, sizeof *t);
}

// ---------------------------------------------------------------------------------------- encoding

static bool touches(uint64_t begin, uint64_t end, const pyllava_range * plain, uint64_t n_plain) {
    for (uint64_t i = 0; i < n_plain; i++) {
        if (plain[i].begin < plain[i].end && plain[i].begin < end && begin < plain[i].end) return true;
    }
    return false;
}

// The longest special token that begins at text[at], or -1. Where they touch a plain range, only user-defined
// tokens are seen.
static int32_t special_at(const tokenizer * t, gguf_text text, uint64_t at, const pyllava_range * plain,
                          uint64_t n_plain) {
    if (!t->starts_special[(uint8_t) text.data[at]]) return -1;
    for (int32_t i = 0; i < t->n_specials; i++) {
        int32_t id = t->specials[i];
        gguf_text s = t->vocab->texts[id];
        if (s.size > text.size - at || memcmp(s.data, text.data + at, (size_t) s.size)) continue;
        if (t->vocab->kinds[id] == KIND_USER || !touches(at, at + s.size, plain, n_plain)) return id;
    }
    return -1;
}

static pyllava_status encode_between(const tokenizer * t, const char * text, uint64_t size,
                                     token_list * out) {
    if (size == 0) return PYLLAVA_OK;
    if (size > TOKENIZER_MAX_TEXT)
        FAIL(PYLLAVA_ERR_ARGUMENT, "text of %llu bytes, need at most 64 MiB", (unsigned long long) size);
    return t->kind->encode(t, (gguf_text) { text, size }, out);
}

pyllava_status tokenizer_encode(const tokenizer * t, gguf_text text, const pyllava_range * plain,
                                uint64_t n_plain, bool add_bos, token_list * out) {
    if (add_bos) token_list_add(out, t->vocab->bos);
    uint64_t begin = 0;
    for (uint64_t at = 0; at < text.size;) {
        int32_t id = special_at(t, text, at, plain, n_plain);
        if (id < 0) {
            at++;
            continue;
        }
        TRY(encode_between(t, text.data + begin, at - begin, out));
        token_list_add(out, id);
        begin = at += t->vocab->texts[id].size;
    }
    return encode_between(t, text.data + begin, text.size - begin, out);
}

// ---------------------------------------------------------------------------------------- decoding

gguf_text tokenizer_piece(const tokenizer * t, int32_t id, bool with_special) {
    const uint8_t kind = t->vocab->kinds[id];
    const bool hidden = !with_special && (kind == KIND_CONTROL || kind == KIND_UNKNOWN);
    return hidden ? (gguf_text) { "", 0 } : t->pieces[id];
}
