// pretokenizer.c - see pretokenizer.h. The alternatives of an expression are tried in its order at each
// place. The only one that looks ahead is \s+(?!\S): white space before something else leaves its last
// character, which may begin the next piece.
#include "pretokenizer.h"

#include "hparams.h"

#include <string.h>

#define ANYTHING (CHAR_LETTER | CHAR_NUMBER | CHAR_SPACE | CHAR_PUNCTUATION | CHAR_OTHER)
#define SIGNS    (CHAR_PUNCTUATION | CHAR_OTHER) // [^\s\p{L}\p{N}]

static unsigned class_at(gguf_text text, uint64_t at) {
    return at < text.size ? text_character(text, at).class : 0;
}

static bool is_line_end(gguf_text text, uint64_t at) {
    return at < text.size && (text.data[at] == '\n' || text.data[at] == '\r');
}

// The size of 's 't 're 've 'm 'll 'd at this place, 0 where there is none. Without regard to case the long
// s (U+017F) is an s.
static uint64_t contraction_size(gguf_text text, uint64_t at, bool any_case) {
    static const char * const ENDS[] = { "s", "t", "re", "ve", "m", "ll", "d" };
    const char * p = text.data + at + 1;
    const uint64_t room = text.size - at - 1;
    if (text.data[at] != '\'') return 0;
    for (size_t i = 0; i < sizeof ENDS / sizeof *ENDS; i++) {
        const size_t size = strlen(ENDS[i]);
        bool same = size <= room;
        for (size_t k = 0; same && k < size; k++)
            same = p[k] == ENDS[i][k] || (any_case && p[k] == ENDS[i][k] - 'a' + 'A');
        if (same) return 1 + size;
    }
    return any_case && room >= 2 && !memcmp(p, "\xC5\xBF", 2) ? 3 : 0;
}

// \s+(?!\S)|\s+
static uint64_t space_end(gguf_text text, uint64_t at) {
    const uint64_t end = text_run(text, at, CHAR_SPACE);
    const uint64_t last = text_character_before(text, end);
    return end < text.size && last > at ? last : end;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static uint64_t gpt2_end(gguf_text text, uint64_t at) {
    const uint64_t contraction = contraction_size(text, at, false);
    if (contraction) return at + contraction;
    const unsigned next = text.data[at] == ' ' ? class_at(text, at + 1) : 0;
    const uint64_t begin = next & ~(unsigned) CHAR_SPACE ? at + 1 : at;
    const unsigned class = class_at(text, begin);
    return class == CHAR_SPACE ? space_end(text, at) : text_run(text, begin, class & SIGNS ? SIGNS : class);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|
// \s+(?!\S)|\s+
static uint64_t llama3_end(gguf_text text, uint64_t at, int n) {
    const uint64_t contraction = contraction_size(text, at, true);
    if (contraction) return at + contraction;
    const character c = text_character(text, at);
    if (c.class == CHAR_LETTER) return text_run(text, at, CHAR_LETTER);
    if (c.class == CHAR_NUMBER) {
        for (; n > 0 && class_at(text, at) == CHAR_NUMBER; n--) at += text_character(text, at).size;
        return at;
    }
    if (!is_line_end(text, at) && class_at(text, at + c.size) == CHAR_LETTER)
        return text_run(text, at + c.size, CHAR_LETTER);
    const uint64_t begin = text.data[at] == ' ' ? at + 1 : at;
    if (class_at(text, begin) & SIGNS) {
        uint64_t end = text_run(text, begin, SIGNS);
        while (is_line_end(text, end)) end++;
        return end;
    }
    uint64_t end = text_run(text, at, CHAR_SPACE);
    while (end > at && !is_line_end(text, end - 1)) end--; // behind the last line's end
    return end > at ? end : space_end(text, at);
}

// ------------------------------------------------------------------------------------------- rules

static uint64_t rule_gpt2(piece_cutter * c) { return gpt2_end(c->text, c->at); }
static uint64_t rule_llama3(piece_cutter * c) { return llama3_end(c->text, c->at, 3); }
static uint64_t rule_qwen2(piece_cutter * c) { return llama3_end(c->text, c->at, 1); }

static gguf_text up_to(const piece_cutter * c, uint64_t end) { return (gguf_text) { c->text.data, end }; }

// \p{N} first, gpt2 between these.
static uint64_t rule_starcoder(piece_cutter * c) {
    const character first = text_character(c->text, c->at);
    if (first.class == CHAR_NUMBER) return c->at + first.size;
    if (c->stretch_end <= c->at) c->stretch_end = text_run(c->text, c->at, ANYTHING & ~CHAR_NUMBER);
    return gpt2_end(up_to(c, c->stretch_end), c->at);
}

// [\p{P}\$\+<=>\^~\|]
static bool is_mark(gguf_text text, uint64_t at) {
    return class_at(text, at) == CHAR_PUNCTUATION || memchr("$+<=>^~|", text.data[at], 8);
}

static bool has_three_digits(gguf_text text, uint64_t at) {
    for (uint64_t i = at; i < at + 3; i++) {
        if (i >= text.size || text.data[i] < '0' || text.data[i] > '9') return false;
    }
    return true;
}

// Four passes: marks (see above), gpt2, \p{N}+, [0-9][0-9][0-9].
static uint64_t rule_default(piece_cutter * c) {
    if (c->stretch_end <= c->at) {
        const bool marks = is_mark(c->text, c->at);
        uint64_t end = c->at;
        while (end < c->text.size && is_mark(c->text, end) == marks) end += text_character(c->text, end).size;
        c->stretch_end = end;
    }
    if (c->stretch_end_2 <= c->at) c->stretch_end_2 = gpt2_end(up_to(c, c->stretch_end), c->at);
    const gguf_text piece = up_to(c, c->stretch_end_2);
    if (class_at(piece, c->at) != CHAR_NUMBER) return text_run(piece, c->at, ANYTHING & ~CHAR_NUMBER);
    if (has_three_digits(piece, c->at)) return c->at + 3;
    uint64_t end = c->at;
    while (class_at(piece, end) == CHAR_NUMBER && !has_three_digits(piece, end))
        end += text_character(piece, end).size;
    return end;
}

// clang-format off: a table
//                                         ignore_merges  add_bos    nfc
static const pretokenizer LLAMA3 =    { rule_llama3,    true,  true,  false },
                          SMAUG =     { rule_llama3,    false, false, false },
                          QWEN2 =     { rule_qwen2,     false, false, true },
                          STABLELM2 = { rule_qwen2,     false, false, false },
                          GPT2 =      { rule_gpt2,      false, false, false },
                          STARCODER = { rule_starcoder, false, false, false },
                          DEFAULT =   { rule_default,   false, false, false };
static const struct {
    const char * name;
    const pretokenizer * rule;
} NAMES[] = {
    { "llama-bpe", &LLAMA3 },    { "llama3", &LLAMA3 },    { "llama-v3", &LLAMA3 },  { "smaug-bpe", &SMAUG },
    { "dbrx", &SMAUG },          { "qwen2", &QWEN2 },      { "stablelm2", &STABLELM2 },
    { "gpt-2", &GPT2 },          { "phi-2", &GPT2 },       { "mpt", &GPT2 },         { "olmo", &GPT2 },
    { "starcoder", &STARCODER }, { "refact", &STARCODER }, { "smollm", &STARCODER },
    { "command-r", &STARCODER }, { "default", &DEFAULT },
};
// clang-format on

pyllava_status pretokenizer_find(const pyllava_gguf * f, gguf_text name, const pretokenizer ** out) {
    char known[256] = "";
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        *out = NAMES[i].rule;
        if (gguf_text_is(name, NAMES[i].name)) return PYLLAVA_OK;
        hparams_list(known, sizeof known, NAMES[i].name);
    }
    return hparams_refuse(f, "tokenizer.ggml.pre", name, known);
}

bool pretokenizer_next(const pretokenizer * p, piece_cutter * c, gguf_text * out_piece) {
    if (c->at == c->text.size) return false;
    const uint64_t end = p->piece_end(c);
    *out_piece = (gguf_text) { c->text.data + c->at, end - c->at };
    c->at = end;
    return true;
}
