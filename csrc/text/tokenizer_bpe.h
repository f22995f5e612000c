// tokenizer_bpe.h - byte-level BPE as GPT-2 has it (Radford et al., 2019): a row of the table in tokenizer.c.
#pragma once

#include "tokenizer.h"

// Needs the key tokenizer.ggml.merges, whose parts and unions are tokens.
pyllava_status bpe_check(tokenizer * t, vocab * v, const pyllava_gguf * file, const logger * log);
pyllava_status bpe_encode(const tokenizer * t, gguf_text text, token_list * out);
uint64_t bpe_decode(const tokenizer * t, int32_t id, char * out);
