// tokenizer.h - text to token ids, and an id to its bytes: the one door. Special tokens are cut out of a text
// here, for tokenizers of all kinds; what is particular to one kind is a row of KINDS in tokenizer.c and a
// file of its own, such as tokenizer_spm.c. Texts are UTF-8, sizes and ranges are in bytes.
#pragma once

#include "vocab.h"

// The ids of a text. The caller owns the array and has room for n_max; n counts those without room too.
typedef struct token_list {
    int32_t * ids;
    uint64_t n, n_max;
} token_list;

static inline void token_list_add(token_list * list, int32_t id) {
    if (list->n < list->n_max) list->ids[list->n] = id;
    list->n++;
}

// Immutable once read. Points into a vocabulary, which must outlive it and stay where it is.
typedef struct tokenizer {
    const struct tokenizer_kind * kind;
    const vocab * vocab;
    void * own;         // what only its kind reads: one block of malloc, NULL if there is nothing
    bool space_prefix;  // texts get a space in front
    bool nfc;           // texts are to be in Unicode's normalisation form C, which the caller sees to
    int32_t * specials; // [n_specials] ids of control, unknown and user-defined tokens, in the order of texts
    int32_t n_specials;
    int32_t first_special[257]; // the first in specials that begins with this byte or a greater one
    gguf_text * pieces;         // [vocab->n] bytes of each token as they stand in an answer, in arena
    char * arena;
} tokenizer;

#define TOKENIZER_MAX_TEXT ((uint64_t) 64 << 20) // bytes between two special tokens

// What is particular to a kind of tokenizer: a row of the table.
typedef struct tokenizer_kind {
    const char * name; // as in the key tokenizer.ggml.model
    // Fails with PYLLAVA_ERR_MISMATCH where v, which has no ids yet, lacks what this kind needs. Gives the
    // ids of v and add_bos the values of a file that does not say, may change the kinds of tokens, and sets
    // what belongs to this kind in t, which has no special tokens and pieces yet.
    pyllava_status (*check)(tokenizer * t, vocab * v, const pyllava_gguf * file, const logger * log);
    // Appends the ids of 1..TOKENIZER_MAX_TEXT bytes without special tokens, which begin the whole text or
    // follow a special token. Fails with PYLLAVA_ERR_MEMORY.
    pyllava_status (*encode)(const tokenizer * t, gguf_text text, token_list * out);
    // Writes the bytes that a token stands for, and returns how many: at most as many as its text has.
    uint64_t (*decode)(const tokenizer * t, int32_t id, char * out);
} tokenizer_kind;

// Reads the vocabulary v of a file and the tokenizer over it, both zeroed before. PYLLAVA_ERR_UNSUPPORTED for
// a kind that has no row, otherwise as vocab_read_tokens, check and vocab_read_ids. Both are to be freed,
// after a failure too.
pyllava_status tokenizer_read(tokenizer * t, vocab * v, const pyllava_gguf * file, const logger * log);
void tokenizer_free(tokenizer * t); // not its vocabulary

// Appends the ids of a text, after BOS if add_bos. See pyllava_tokenize for plain. PYLLAVA_ERR_ARGUMENT where
// there are more than TOKENIZER_MAX_TEXT bytes between special tokens, or no BOS for add_bos; what out->ids
// holds on failure is undefined. A list without enough room is no error.
pyllava_status tokenizer_encode(const tokenizer * t, gguf_text text, const pyllava_range * plain,
                                uint64_t n_plain, bool add_bos, token_list * out);
// The bytes of a token, id in 0..vocab->n - 1; they may be part of a character. None for control and unknown
// tokens unless with_special. Valid as long as t. They include a space that encoding puts in front of a text:
// the caller, who knows where a text begins, takes it away.
gguf_text tokenizer_piece(const tokenizer * t, int32_t id, bool with_special);
