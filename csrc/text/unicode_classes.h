// unicode_classes.h - UTF-8 texts character by character, with the classes that tokenizers tell apart.
#pragma once

#include "gguf.h"

typedef enum char_class { // bits, so that they make sets
    CHAR_LETTER = 1,      // \p{L} in regular expressions
    CHAR_NUMBER = 2,      // \p{N}
    CHAR_SPACE = 4,       // \s
    CHAR_PUNCTUATION = 8, // \p{P}
    CHAR_OTHER = 16,      // bytes that are not UTF-8, too
} char_class;

typedef struct unicode_range {
    uint32_t first, last;
    char_class class;
} unicode_range;

extern const unicode_range UNICODE_RANGES[]; // in order and apart from each other; unicode_ranges.c
extern const int32_t N_UNICODE_RANGES;
extern const uint8_t ASCII_CLASSES[128]; // the same of these, found at once

typedef struct character {
    char_class class;
    uint32_t size; // bytes
} character;

// The code point of a text's character at byte `at`, and its size; a byte that begins none is one by itself,
// with a code beyond Unicode's.
uint32_t text_code(gguf_text text, uint64_t at, uint32_t * out_size);
character text_character(gguf_text text, uint64_t at); // at < text.size
// The end of the characters from `at` on whose classes are in a set; `at` where there is none.
uint64_t text_run(gguf_text text, uint64_t at, unsigned classes);
// Where the character begins that ends at byte `end` > 0.
uint64_t text_character_before(gguf_text text, uint64_t end);
