// pretokenizer.h - cuts a text into the pieces within which byte-level BPE merges. The rules are the regular
// expressions that models were trained with, written out as code that takes time linear in any text.
#pragma once

#include "unicode_classes.h"

typedef struct piece_cutter {
    gguf_text text;
    uint64_t at;                         // where the next piece begins
    uint64_t stretch_end, stretch_end_2; // of what earlier passes of a rule have cut around it
} piece_cutter;

// A rule, and what goes with it.
typedef struct pretokenizer {
    uint64_t (*piece_end)(piece_cutter * c); // of the piece at c->at, which is before the end of the text
    bool ignore_merges;                      // a piece that is a token is not merged
    bool add_bos;                            // whether prompts begin with BOS, where the file does not say
    bool nfc;                                // trained on texts in Unicode's normalisation form C
} pretokenizer;

// By the name in the key tokenizer.ggml.pre. PYLLAVA_ERR_UNSUPPORTED, with the names there are, for another.
pyllava_status pretokenizer_find(const pyllava_gguf * file, gguf_text name, const pretokenizer ** out);
// The next piece of the text; false at its end.
bool pretokenizer_next(const pretokenizer * p, piece_cutter * c, gguf_text * out_piece);
