// vocab.h - the token table of a model: texts, scores, kinds and special ids.
#pragma once

#include "gguf.h"
#include "hash.h"

typedef enum token_kind { // the numbers of tokenizer.ggml.token_type
    KIND_UNDEFINED,
    KIND_NORMAL,
    KIND_UNKNOWN,
    KIND_CONTROL,
    KIND_USER, // user-defined: one token wherever it stands, in a user's words too
    KIND_UNUSED,
    KIND_BYTE,
} token_kind;

typedef enum vocab_strip { STRIP_LEFT = 1, STRIP_RIGHT = 2 } vocab_strip; // bits: white space on that side

#define VOCAB_MAX_TOKEN 4096 // bytes of a token's text

typedef struct vocab {
    int32_t n;
    gguf_text * texts; // [n] into the file
    float * scores;    // [n]
    uint8_t * kinds;   // [n] token_kind
    bool * ends;       // [n] whether the token ends an answer
    uint8_t * strips;  // [n] vocab_strip: what a special token takes with it
    int32_t * table;   // [table_mask + 1] hash table of ids, -1 where empty
    uint32_t table_mask;
    hash_key table_key;
    uint64_t longest;      // bytes of the longest text
    int32_t bos, eos, unk; // ids; bos and unk may be -1: none
    bool add_bos;          // whether a prompt begins with bos
} vocab;

// Both fail with PYLLAVA_ERR_MISMATCH or PYLLAVA_ERR_FILE where the file's keys tokenizer.ggml.* contradict
// each other; what one kind of tokenizer needs is checked by tokenizer_read. v points into the file.
pyllava_status vocab_read_tokens(vocab * v, const pyllava_gguf * file);
// Then bos, eos, unk and add_bos: v has the values of those that the file may leave out.
pyllava_status vocab_read_ids(vocab * v, const pyllava_gguf * file);
void vocab_free(vocab * v);
int32_t vocab_find(const vocab * v, const char * text, uint64_t size); // the id; -1 where there is none
// Whether letters may become this token: not a control token, "<s>" typed by a user stays letters; nor one
// for a byte.
bool vocab_is_word(const vocab * v, int32_t id);
// As vocab_find, among such tokens.
int32_t vocab_find_word(const vocab * v, const char * text, uint64_t size);
