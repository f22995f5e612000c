// tokenizer.c - see tokenizer.h.
#include "tokenizer.h"

#include "hparams.h"
#include "tokenizer_bpe.h"
#include "tokenizer_spm.h"
#include "unicode_classes.h"

#include <stdlib.h>
#include <string.h>

static const tokenizer_kind KINDS[] = {
    { "llama", spm_check, spm_encode, spm_decode }, // SentencePiece
    { "gpt2", bpe_check, bpe_encode, bpe_decode },  // byte-level BPE
};

// ----------------------------------------------------------------------------------------- reading

static pyllava_status find_kind(const pyllava_gguf * f, const tokenizer_kind ** out) {
    gguf_text name = { 0 };
    TRY(gguf_get_text(f, "tokenizer.ggml.model", true, &name));
    char known[64] = "";
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        *out = &KINDS[i];
        if (gguf_text_is(name, KINDS[i].name)) return PYLLAVA_OK;
        hparams_list(known, sizeof known, KINDS[i].name);
    }
    return hparams_refuse(f, "tokenizer", name, known);
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

// A special token on its way into the order of texts.
typedef struct special {
    gguf_text text;
    int32_t id;
} special;

static int compare_texts(const void * a, const void * b) {
    const gguf_text *x = &((const special *) a)->text, *y = &((const special *) b)->text;
    const int order = memcmp(x->data, y->data, (size_t) (x->size < y->size ? x->size : y->size));
    return order ? order : (x->size > y->size) - (x->size < y->size);
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
        if (is_special && v->texts[id].size) found[t->n_specials++] = (special) { v->texts[id], id };
    }
    qsort(found, (size_t) t->n_specials, sizeof *found, compare_texts);
    for (int32_t i = 0; i < t->n_specials; i++) {
        t->specials[i] = found[i].id;
        t->first_special[(uint8_t) found[i].text.data[0] + 1] = i + 1;
    }
    for (int b = 1; b <= 256; b++) { // of bytes that none begins with, too
        if (t->first_special[b] < t->first_special[b - 1]) t->first_special[b] = t->first_special[b - 1];
    }
    free(found);
    return PYLLAVA_OK;
}

pyllava_status tokenizer_read(tokenizer * t, vocab * v, const pyllava_gguf * f, const logger * log) {
    TRY(find_kind(f, &t->kind));
    TRY(vocab_read_tokens(v, f));
    t->vocab = v;
    TRY(t->kind->check(t, v, f, log));
    TRY(vocab_read_ids(v, f));
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

// Byte `depth` of the text of special token i, -1 behind its end.
static int byte_at(const tokenizer * t, int32_t i, uint64_t depth) {
    const gguf_text s = t->vocab->texts[t->specials[i]];
    return depth < s.size ? (uint8_t) s.data[depth] : -1;
}

// The first of the special tokens lo..hi - 1, in order as far as byte `depth` goes, whose byte there is at
// least `byte`; hi where there is none. Looks near both ends first: texts that share many bytes lose few of
// their fellows with each.
static int32_t first_from(const tokenizer * t, int32_t lo, int32_t hi, uint64_t depth, int byte) {
    int32_t low = lo, high = hi; // those before low are less, that at high is not
    for (int32_t step = 1; low < high; step *= 2) {
        const int32_t up = high - low > step ? low + step - 1 : low,
                      down = high - low > step ? high - step : low;
        if (byte_at(t, up, depth) >= byte) high = up;
        else low = up + 1;
        if (down < low || down >= high) break;
        if (byte_at(t, down, depth) < byte) low = down + 1;
        else high = down;
    }
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (byte_at(t, middle, depth) >= byte) high = middle;
        else low = middle + 1;
    }
    return low;
}

// Ranges of a text that are plain: in order, apart from each other, and where the search has come to.
typedef struct plain_ranges {
    pyllava_range * items;
    uint64_t n, next;
} plain_ranges;

static int compare_ranges(const void * a, const void * b) {
    const pyllava_range *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

static pyllava_status order_ranges(const pyllava_range * plain, uint64_t n, plain_ranges * out) {
    if (n == 0) return PYLLAVA_OK;
    pyllava_range * items = out->items = malloc((size_t) n * sizeof *items);
    TRY_ALLOC(items, n * sizeof *items);
    memcpy(items, plain, (size_t) n * sizeof *items);
    qsort(items, (size_t) n, sizeof *items, compare_ranges);
    for (uint64_t i = 0; i < n; i++) {
        if (items[i].begin >= items[i].end) continue;
        pyllava_range * last = out->n ? &items[out->n - 1] : NULL;
        if (!last || last->end < items[i].begin) items[out->n++] = items[i];
        else if (last->end < items[i].end) last->end = items[i].end;
    }
    return PYLLAVA_OK;
}

// Whether bytes begin..end - 1 are plain in part; begin never goes back.
static bool touches(plain_ranges * p, uint64_t begin, uint64_t end) {
    while (p->next < p->n && p->items[p->next].end <= begin) p->next++;
    return p->next < p->n && p->items[p->next].begin < end;
}

// The longest special token that begins at text[at], or -1. Where they touch a plain range, only user-defined
// tokens are seen. Byte by byte, fewer tokens share what has been read.
static int32_t special_at(const tokenizer * t, gguf_text text, uint64_t at, plain_ranges * plain) {
    const uint8_t first = (uint8_t) text.data[at];
    int32_t lo = t->first_special[first], hi = t->first_special[first + 1], best = -1;
    for (uint64_t depth = 1; lo < hi; depth++) {
        const int32_t id = t->specials[lo];
        if (t->vocab->texts[id].size == depth) { // the shortest stands first
            if (t->vocab->kinds[id] == KIND_USER || !touches(plain, at, at + depth)) best = id;
            lo++;
        }
        if (depth == text.size - at) break;
        const int byte = (uint8_t) text.data[at + depth];
        lo = first_from(t, lo, hi, depth, byte);
        hi = first_from(t, lo, hi, depth, byte + 1);
    }
    return best;
}

static pyllava_status encode_between(const tokenizer * t, const char * text, uint64_t size,
                                     token_list * out) {
    if (size == 0) return PYLLAVA_OK;
    if (size > TOKENIZER_MAX_TEXT)
        FAIL(PYLLAVA_ERR_ARGUMENT, "text of %llu bytes, need at most 64 MiB", (unsigned long long) size);
    return t->kind->encode(t, (gguf_text) { text, size }, out);
}

// Where white space begins that reaches up to byte `end`, not before `begin`.
static uint64_t without_space(gguf_text text, uint64_t begin, uint64_t end) {
    while (end > begin) {
        const uint64_t before = text_character_before(text, end);
        if (before < begin || text_character(text, before).class != CHAR_SPACE) break;
        end = before;
    }
    return end;
}

static pyllava_status encode(const tokenizer * t, gguf_text text, plain_ranges * plain, token_list * out) {
    uint64_t begin = 0;
    for (uint64_t at = 0; at < text.size;) {
        int32_t id = special_at(t, text, at, plain);
        if (id < 0) {
            at++;
            continue;
        }
        const uint8_t strips = t->vocab->strips[id];
        const uint64_t end = strips & STRIP_LEFT ? without_space(text, begin, at) : at;
        TRY(encode_between(t, text.data + begin, end - begin, out));
        token_list_add(out, id);
        begin = at += t->vocab->texts[id].size;
        if (strips & STRIP_RIGHT) begin = at = text_run(text, at, CHAR_SPACE);
    }
    return encode_between(t, text.data + begin, text.size - begin, out);
}

pyllava_status tokenizer_encode(const tokenizer * t, gguf_text text, const pyllava_range * plain,
                                uint64_t n_plain, bool add_bos, token_list * out) {
    if (add_bos && t->vocab->bos < 0)
        FAIL(PYLLAVA_ERR_ARGUMENT, "BOS is wanted, and the vocabulary has none");
    if (add_bos) token_list_add(out, t->vocab->bos);
    plain_ranges ranges = { 0 };
    pyllava_status status = order_ranges(plain, n_plain, &ranges);
    if (status == PYLLAVA_OK) status = encode(t, text, &ranges, out);
    free(ranges.items);
    return status;
}

// ---------------------------------------------------------------------------------------- decoding

gguf_text tokenizer_piece(const tokenizer * t, int32_t id, bool with_special) {
    const uint8_t kind = t->vocab->kinds[id];
    const bool hidden = !with_special && (kind == KIND_CONTROL || kind == KIND_UNKNOWN);
    return hidden ? (gguf_text) { "", 0 } : t->pieces[id];
}
