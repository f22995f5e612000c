// vocab.h - the token table of a model: texts, scores, kinds, special ids, and how a text is cut at special
// tokens.
#pragma once

#include "gguf.h"

typedef enum token_kind {
    KIND_UNDEFINED,
    KIND_NORMAL,
    KIND_UNKNOWN,
    KIND_CONTROL,
    KIND_USER,
    KIND_UNUSED,
    KIND_BYTE,
} token_kind;

typedef struct vocab {
    int32_t n;
    gguf_text * texts;  // [n] into the file
    gguf_text * pieces; // [n] as they stand in an answer
    float * scores;     // [n]
    uint8_t * kinds;    // [n] token_kind
    bool * ends;        // [n] ends an answer
    int32_t * table;    // hash table of ids, -1 empty; size table_mask + 1
    uint32_t table_mask;
    int32_t * specials; // ids of control, unknown and user tokens, longest text first
    int32_t n_specials;
    bool starts_special[256]; // some special token begins with this byte
    int32_t byte_ids[256];
    char * arena; // bytes of pieces that differ from their texts
    int32_t bos, eos, unk;
    bool add_bos, add_space_prefix;
} vocab;

pyllava_status vocab_read(vocab * v, const pyllava_gguf * file);
void vocab_free(vocab * v);
int32_t vocab_find(const vocab * v, const char * text, uint64_t size); // -1 where there is none
// The longest special token that begins at text[at], or -1. Control tokens are not seen where they touch a
// plain range.
int32_t vocab_special_at(const vocab * v, gguf_text text, uint64_t at, const pyllava_range * plain,
                         uint64_t n_plain);
