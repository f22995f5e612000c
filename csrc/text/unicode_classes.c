// unicode_classes.c - see unicode_classes.h.
#include "unicode_classes.h"

#define NO_CODE 0x110000u

static char_class class_of(uint32_t code) {
    if (code < 128) return (char_class) ASCII_CLASSES[code];
    int32_t low = 0, high = N_UNICODE_RANGES; // the first range that does not end before code
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (UNICODE_RANGES[middle].last < code) low = middle + 1;
        else high = middle;
    }
    const bool inside = low < N_UNICODE_RANGES && UNICODE_RANGES[low].first <= code;
    return inside ? UNICODE_RANGES[low].class : CHAR_OTHER;
}

uint32_t text_code(gguf_text text, uint64_t at, uint32_t * out_size) {
    const uint8_t * p = (const uint8_t *) text.data + at;
    const uint32_t size = p[0] < 0x80 ? 1 : p[0] < 0xC0 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    *out_size = 1;
    if (size == 1) return p[0];
    if (size == 0 || size > text.size - at) return NO_CODE;
    uint32_t code = p[0] & (0x7Fu >> size);
    for (uint32_t i = 1; i < size; i++) {
        if ((p[i] & 0xC0) != 0x80) return NO_CODE;
        code = code << 6 | (p[i] & 0x3Fu);
    }
    *out_size = size;
    return code;
}

character text_character(gguf_text text, uint64_t at) {
    character c;
    c.class = class_of(text_code(text, at, &c.size));
    return c;
}

uint64_t text_run(gguf_text text, uint64_t at, unsigned classes) {
    while (at < text.size) {
        const character c = text_character(text, at);
        if (!(c.class & classes)) break;
        at += c.size;
    }
    return at;
}

uint64_t text_character_before(gguf_text text, uint64_t end) {
    uint64_t at = end - 1;
    while (at > 0 && end - at < 4 && ((uint8_t) text.data[at] & 0xC0) == 0x80) at--;
    uint32_t size;
    text_code(text, at, &size);
    return at + size == end ? at : end - 1;
}
