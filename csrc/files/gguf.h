// gguf.h - reader of GGUF version 2 and 3 files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
// The bytes are hostile until gguf_open has returned: afterwards every key is unique, every length lies
// inside the file, every tensor has 1-4 dimensions > 0, a known type, whole blocks, and an extent inside the
// file.
#pragma once

#include "file.h"
#include "log.h"

typedef enum gguf_type {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_N_TYPES,
} gguf_type;

#define GGUF_MAX_KEYS    65536
#define GGUF_MAX_TENSORS 65536
#define GGUF_MAX_STRING  ((uint64_t) 16 << 20)
#define GGUF_MAX_NAME    63
#define GGUF_MAX_TEXTS   ((uint64_t) 4 << 20)   // in arrays of all keys: 64 MiB of gguf_text
#define GGUF_MAX_META    ((uint64_t) 256 << 20) // bytes of all keys

typedef struct gguf_text {
    const char * data;
    uint64_t size;
} gguf_text;

typedef struct gguf_key {
    char * name; // zero-terminated copy
    gguf_type type, item_type;
    uint64_t n;
    const void * data;     // packed items in the file, unaligned; NULL for strings
    gguf_text * strings;   // [n] where item_type is GGUF_STRING
    uint64_t offset, size; // of the record in the file
} gguf_key;

typedef struct gguf_tensor {
    char name[GGUF_MAX_NAME + 1];
    int32_t type; // enum ggml_type
    int32_t n_dims;
    int64_t ne[4];         // ggml order: fastest first; 1 beyond n_dims
    uint64_t offset, size; // from the start of the file
} gguf_tensor;

struct pyllava_gguf {
    char * path;
    file_bytes file;
    uint32_t version, alignment;
    uint64_t n_keys, n_tensors;
    gguf_key * keys; // in file order
    gguf_tensor * tensors;
    uint32_t * by_key; // indices, sorted by name
    uint32_t * by_name;
};

pyllava_status gguf_open(pyllava_gguf ** out, const char * path, bool use_mmap, pyllava_progress_fn progress,
                         const logger * log);
void gguf_close(pyllava_gguf * file);

const gguf_key * gguf_find_key(const pyllava_gguf * file, const char * name); // NULL if absent
const gguf_tensor * gguf_find_tensor(const pyllava_gguf * file, const char * name);

// Typed access. A key of another type is PYLLAVA_ERR_MISMATCH; an absent one leaves *out as it was (the
// default) unless it is required. Integers of any width are accepted and must lie in [min, max].
typedef struct gguf_range {
    int64_t min, max;
} gguf_range;
pyllava_status gguf_get_int(const pyllava_gguf * file, const char * key, bool required, gguf_range range,
                            int32_t * out);
pyllava_status gguf_get_float(const pyllava_gguf * file, const char * key, bool required, double min,
                              double max, float * out);
pyllava_status gguf_get_bool(const pyllava_gguf * file, const char * key, bool * out);
pyllava_status gguf_get_text(const pyllava_gguf * file, const char * key, bool required, gguf_text * out);
// Array of n_max items at most; out_n = 0 where absent.
pyllava_status gguf_get_ints(const pyllava_gguf * file, const char * key, int32_t * out, uint64_t n_max,
                             uint64_t * out_n);
pyllava_status gguf_get_floats(const pyllava_gguf * file, const char * key, float * out, uint64_t n_max,
                               uint64_t * out_n);
pyllava_status gguf_get_array(const pyllava_gguf * file, const char * key, gguf_type item_type,
                              const gguf_key ** out);
bool text_is_utf8(const char * text, uint64_t size);
bool gguf_text_is(gguf_text text, const char * other);
