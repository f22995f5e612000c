// tokenizer_spm.h - SentencePiece BPE as LLaMA uses it (Kudo and Richardson, 2018).
#pragma once

#include "vocab.h"

// Ids of a text, at most n_max of them; *out_n is the full count. See pyllava_tokenize.
pyllava_status spm_tokenize(const vocab * v, gguf_text text, const pyllava_range * plain, uint64_t n_plain,
                            bool add_bos, int32_t * out_ids, uint64_t n_max, uint64_t * out_n);
