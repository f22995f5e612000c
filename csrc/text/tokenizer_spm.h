// tokenizer_spm.h - SentencePiece BPE as LLaMA uses it (Kudo and Richardson, 2018): a row of the table in
// tokenizer.c.
#pragma once

#include "tokenizer.h"

// Needs a token "<0x00>" to "<0xFF>" for each byte, whatever kind the file says it has.
pyllava_status spm_check(tokenizer * t, vocab * v, const pyllava_gguf * file, const logger * log);
pyllava_status spm_encode(const tokenizer * t, gguf_text text, token_list * out);
uint64_t spm_decode(const tokenizer * t, int32_t id, char * out);
