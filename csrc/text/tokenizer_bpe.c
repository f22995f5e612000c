// tokenizer_bpe.c - see tokenizer_bpe.h. A text is cut into pieces (pretokenizer.h); within each, single
// bytes are merged by the list of merges, the earliest first. In the texts of tokens a character stands for
// each byte: for 68 of them that would not show, one from U+0100 on.
#include "tokenizer_bpe.h"

#include "pair_merge.h"
#include "pretokenizer.h"

#include <stdlib.h>
#include <string.h>

typedef struct bpe_merge {
    int32_t left, right, id; // two tokens and what they become; left -1: an empty place of the table
    float score;             // minus the place in the list
} bpe_merge;

typedef struct bpe_data {
    const pretokenizer * rule;
    int32_t byte_ids[256]; // -1: no token, the byte is left out
    hash_key key;
    uint32_t mask;
    bpe_merge merges[]; // [mask + 1]
} bpe_data;

// -------------------------------------------------------------------------------- characters of bytes

// The character that stands for a byte; the size of its UTF-8.
static uint64_t put_byte(uint8_t byte, char * out) {
    uint32_t code = byte;
    if (byte <= 32) code = 0x100u + byte;
    else if (byte >= 127 && byte <= 160) code = 0x100u + 33 + byte - 127;
    else if (byte == 173) code = 0x143;
    if (code < 0x80) {
        *out = (char) code;
        return 1;
    }
    out[0] = (char) (0xC0 | code >> 6);
    out[1] = (char) (0x80 | (code & 0x3F));
    return 2;
}

// The byte that a character stands for, -1 if it stands for none.
static int32_t byte_of_code(uint32_t code) {
    if (code >= 0x100 && code <= 0x120) return (int32_t) (code - 0x100);
    if (code >= 0x121 && code <= 0x142) return (int32_t) (code - 0x121 + 127);
    if (code == 0x143) return 173;
    const bool shows = (code > 32 && code < 127) || (code > 160 && code < 256 && code != 173);
    return shows ? (int32_t) code : -1;
}

uint64_t bpe_decode(const tokenizer * t, int32_t id, char * out) {
    const gguf_text text = t->vocab->texts[id];
    const uint8_t kind = t->vocab->kinds[id];
    bool bytes = kind == KIND_NORMAL || kind == KIND_BYTE; // others have their texts as they stand
    uint64_t n = 0;
    for (uint64_t at = 0; bytes && at < text.size;) {
        uint32_t size;
        const int32_t byte = byte_of_code(text_code(text, at, &size));
        bytes = byte >= 0;
        out[n++] = (char) byte;
        at += size;
    }
    if (bytes) return n;
    memcpy(out, text.data, (size_t) text.size);
    return text.size;
}

// ----------------------------------------------------------------------------------------- reading

static uint32_t slot_of(const bpe_data * d, int32_t left, int32_t right) {
    const int32_t pair[2] = { left, right };
    uint32_t slot = (uint32_t) hash_bytes(d->key, pair, sizeof pair) & d->mask;
    for (;; slot = (slot + 1) & d->mask) {
        const bpe_merge * m = &d->merges[slot];
        if (m->left < 0 || (m->left == left && m->right == right)) return slot;
    }
}

// One of the three tokens of a merge.
static pyllava_status find_part(const vocab * v, const pyllava_gguf * f, uint64_t i, gguf_text part,
                                int32_t * out) {
    *out = vocab_find(v, part.data, part.size);
    if (*out >= 0) return PYLLAVA_OK;
    FAIL(PYLLAVA_ERR_MISMATCH, "%s: tokenizer.ggml.merges: entry %llu: '%.*s' is no token", f->path,
         (unsigned long long) i, (int) (part.size < 64 ? part.size : 64), part.data);
}

// Entry i is "left right". It is left out of the table where letters would become a control token.
static pyllava_status read_merge(bpe_data * d, const vocab * v, const pyllava_gguf * f, uint64_t i,
                                 gguf_text entry) {
    char both[2 * VOCAB_MAX_TOKEN];
    const char * space = entry.size > 1 ? memchr(entry.data + 1, ' ', (size_t) entry.size - 1) : NULL;
    const uint64_t n = space ? (uint64_t) (space - entry.data) : 0;
    if (!space || n + 1 == entry.size || entry.size > sizeof both)
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: tokenizer.ggml.merges: entry %llu is not two texts with a space between", f->path,
             (unsigned long long) i);
    const gguf_text left = { entry.data, n }, right = { space + 1, entry.size - n - 1 };
    bpe_merge m = { .score = -(float) i };
    memcpy(both, left.data, (size_t) left.size);
    memcpy(both + left.size, right.data, (size_t) right.size);
    TRY(find_part(v, f, i, left, &m.left));
    TRY(find_part(v, f, i, right, &m.right));
    TRY(find_part(v, f, i, (gguf_text) { both, left.size + right.size }, &m.id));
    bpe_merge * place = &d->merges[slot_of(d, m.left, m.right)];
    if (place->left < 0 && vocab_is_word(v, m.id)) *place = m;
    return PYLLAVA_OK;
}

static pyllava_status read_merges(tokenizer * t, const vocab * v, const pyllava_gguf * f) {
    const gguf_key * merges = NULL;
    TRY(gguf_get_array(f, "tokenizer.ggml.merges", GGUF_STRING, &merges));
    if (!merges) FAIL(PYLLAVA_ERR_MISMATCH, "%s: key tokenizer.ggml.merges is missing", f->path);
    uint32_t n = 1024;
    while (n < merges->n * 2) n *= 2; // at most GGUF_MAX_TEXTS
    const size_t size = sizeof(bpe_data) + n * sizeof(bpe_merge);
    bpe_data * d = t->own = malloc(size);
    TRY_ALLOC(d, size);
    memset(d, 0xFF, size);
    d->key = hash_key_new();
    d->mask = n - 1;
    for (uint64_t i = 0; i < merges->n; i++) TRY(read_merge(d, v, f, i, merges->strings[i]));
    for (int b = 0; b < 256; b++) {
        char text[2];
        d->byte_ids[b] = vocab_find_word(v, text, put_byte((uint8_t) b, text));
    }
    return PYLLAVA_OK;
}

static bool has_token(const vocab * v, int32_t id, const char * text) {
    return id < v->n && gguf_text_is(v->texts[id], text);
}

// The rule of a file from before there were names for them, as far as special tokens tell.
static const char * rule_without_name(const vocab * v) {
    if (has_token(v, 128000, "<|begin_of_text|>") && has_token(v, 128001, "<|end_of_text|>") &&
        has_token(v, 128006, "<|start_header_id|>") && has_token(v, 128007, "<|end_header_id|>") &&
        has_token(v, 128009, "<|eot_id|>"))
        return "llama-bpe";
    return has_token(v, 151644, "<|im_start|>") && has_token(v, 151645, "<|im_end|>") ? "qwen2" : "default";
}

pyllava_status bpe_check(tokenizer * t, vocab * v, const pyllava_gguf * f, const logger * log) {
    gguf_text name = { 0 };
    TRY(gguf_get_text(f, "tokenizer.ggml.pre", false, &name));
    if (!name.data) {
        const char * guessed = rule_without_name(v);
        name = (gguf_text) { guessed, strlen(guessed) };
        const bool known = strcmp(guessed, "default") != 0;
        log_text(log, known ? PYLLAVA_LOG_INFO : PYLLAVA_LOG_WARNING,
                 "%s: key tokenizer.ggml.pre is missing: texts are cut as '%s' says%s", f->path, guessed,
                 known ? "" : ", perhaps not as the model was trained");
    }
    const pretokenizer * rule;
    TRY(pretokenizer_find(f, name, &rule));
    TRY(read_merges(t, v, f));
    ((bpe_data *) t->own)->rule = rule;
    v->bos = v->unk = -1;
    v->add_bos = rule->add_bos;
    t->nfc = rule->nfc;
    return PYLLAVA_OK;
}

// ---------------------------------------------------------------------------------------- encoding

static bool find_union(const void * own, const merge_symbol * left, const merge_symbol * right,
                       merge_candidate * out) {
    const bpe_data * d = own;
    const bpe_merge * m = &d->merges[slot_of(d, left->id, right->id)];
    out->id = m->id;
    out->score = m->score;
    return m->left >= 0;
}

// The token that a piece is as a whole, -1 if it is none.
static int32_t whole_piece(const vocab * v, gguf_text piece) {
    char text[2 * VOCAB_MAX_TOKEN];
    uint64_t n = 0;
    if (piece.size > VOCAB_MAX_TOKEN) return -1;
    for (uint64_t i = 0; i < piece.size; i++) n += put_byte((uint8_t) piece.data[i], text + n);
    return vocab_find_word(v, text, n);
}

static pyllava_status encode_piece(const tokenizer * t, pair_merge * m, gguf_text piece, token_list * out) {
    const bpe_data * d = t->own;
    const int32_t whole = d->rule->ignore_merges ? whole_piece(t->vocab, piece) : -1;
    if (whole >= 0) {
        token_list_add(out, whole);
        return PYLLAVA_OK;
    }
    TRY(pair_merge_start(m, (int32_t) piece.size));
    for (uint64_t i = 0; i < piece.size; i++) {
        const int32_t id = d->byte_ids[(uint8_t) piece.data[i]];
        if (id >= 0) pair_merge_add(m, 1, id);
    }
    pair_merge_run(m);
    for (int32_t i = m->n ? 0 : -1; i >= 0; i = m->symbols[i].next) token_list_add(out, m->symbols[i].id);
    return PYLLAVA_OK;
}

pyllava_status bpe_encode(const tokenizer * t, gguf_text text, token_list * out) {
    const bpe_data * d = t->own;
    piece_cutter cutter = { .text = text };
    pair_merge m = { .find = find_union, .own = d };
    pyllava_status status = PYLLAVA_OK;
    gguf_text piece;
    while (status == PYLLAVA_OK && pretokenizer_next(d->rule, &cutter, &piece))
        status = encode_piece(t, &m, piece, out);
    pair_merge_free(&m);
    return status;
}
