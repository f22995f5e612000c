// gguf.c - see gguf.h. One cursor walks the file once; every length is compared with the bytes that are left
// before anything is allocated from it.
#include "gguf.h"

#include <ggml.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS "tokenizer.ggml.tokens" // pieces of text: some cut a character

typedef struct cursor {
    pyllava_gguf * f;
    uint64_t pos;
    uint64_t n_texts;
    const logger * log;
} cursor;

static const struct {
    const char * name;
    uint8_t size;
} TYPES[GGUF_N_TYPES] = {
    [GGUF_U8] = { "u8", 1 },       [GGUF_I8] = { "i8", 1 },     [GGUF_U16] = { "u16", 2 },
    [GGUF_I16] = { "i16", 2 },     [GGUF_U32] = { "u32", 4 },   [GGUF_I32] = { "i32", 4 },
    [GGUF_F32] = { "f32", 4 },     [GGUF_BOOL] = { "bool", 1 }, [GGUF_U64] = { "u64", 8 },
    [GGUF_I64] = { "i64", 8 },     [GGUF_F64] = { "f64", 8 },   [GGUF_STRING] = { "string", 0 },
    [GGUF_ARRAY] = { "array", 0 },
};

// ----------------------------------------------------------------------------------------- parsing

static uint64_t left(const cursor * c) { return c->f->file.size - c->pos; }

static pyllava_status take(cursor * c, void * out, uint64_t size, const char * what) {
    if (size > left(c)) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s (byte %llu): file has %zu bytes, need %llu more", c->f->path, what,
             (unsigned long long) c->pos, c->f->file.size, (unsigned long long) (size - left(c)));
    }
    memcpy(out, c->f->file.data + c->pos, (size_t) size);
    c->pos += size;
    return PYLLAVA_OK;
}

bool text_is_utf8(const char * text, uint64_t n) {
    const uint8_t * s = (const uint8_t *) text;
    for (uint64_t i = 0; i < n;) {
        uint8_t b = s[i];
        uint64_t len = b < 0x80                ? 1
                       : b >= 0xC2 && b < 0xE0 ? 2
                       : b >= 0xE0 && b < 0xF0 ? 3
                       : b >= 0xF0 && b < 0xF5 ? 4
                                               : 0;
        if (len == 0 || len > n - i) return false;
        for (uint64_t j = 1; j < len; j++) {
            if ((s[i + j] & 0xC0) != 0x80) return false;
        }
        if ((b == 0xE0 && s[i + 1] < 0xA0) || (b == 0xED && s[i + 1] > 0x9F)) return false;
        if ((b == 0xF0 && s[i + 1] < 0x90) || (b == 0xF4 && s[i + 1] > 0x8F)) return false;
        i += len;
    }
    return true;
}

static pyllava_status take_text(cursor * c, gguf_text * out, uint64_t max, const char * what) {
    uint64_t size = 0, at = c->pos;
    TRY(take(c, &size, 8, what));
    if (size > left(c)) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s (byte %llu): string of %llu bytes, file has %llu left", c->f->path,
             what, (unsigned long long) at, (unsigned long long) size, (unsigned long long) left(c));
    }
    if (size > max) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s (byte %llu): string of %llu bytes, need at most %llu", c->f->path,
             what, (unsigned long long) at, (unsigned long long) size, (unsigned long long) max);
    }
    *out = (gguf_text) { (const char *) c->f->file.data + c->pos, size };
    c->pos += size;
    return PYLLAVA_OK;
}

// Whether the metadata are still of a reasonable size with `size` bytes more.
static pyllava_status check_room(const cursor * c, uint64_t size, const char * name) {
    if (size <= GGUF_MAX_META && c->pos <= GGUF_MAX_META - size) return PYLLAVA_OK;
    FAIL(PYLLAVA_ERR_FILE, "%s: %s: metadata up to byte %llu, need at most %llu", c->f->path, name,
         (unsigned long long) (c->pos + size), (unsigned long long) GGUF_MAX_META);
}

// Text i of a key. What is not UTF-8 is counted where it is allowed.
static pyllava_status check_text(const cursor * c, const gguf_key * key, uint64_t i, uint64_t * n_odd) {
    const gguf_text s = key->strings[i];
    if (s.size && memchr(s.data, 0, (size_t) s.size)) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s: zero byte inside text %llu", c->f->path, key->name,
             (unsigned long long) i);
    }
    if (text_is_utf8(s.data, s.size)) return PYLLAVA_OK;
    if (strcmp(key->name, TOKENS))
        FAIL(PYLLAVA_ERR_FILE, "%s: %s: text %llu is not valid UTF-8", c->f->path, key->name,
             (unsigned long long) i);
    ++*n_odd;
    return PYLLAVA_OK;
}

static pyllava_status parse_strings(cursor * c, gguf_key * key) {
    if (key->n > left(c) / 8) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s (byte %llu): %llu strings cannot lie in %llu bytes", c->f->path,
             key->name, (unsigned long long) c->pos, (unsigned long long) key->n,
             (unsigned long long) left(c));
    }
    c->n_texts += key->n;
    if (c->n_texts > GGUF_MAX_TEXTS) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s (byte %llu): %llu texts, need at most %llu in all keys", c->f->path,
             key->name, (unsigned long long) c->pos, (unsigned long long) key->n,
             (unsigned long long) GGUF_MAX_TEXTS);
    }
    key->strings = calloc((size_t) key->n + 1, sizeof *key->strings);
    TRY_ALLOC(key->strings, key->n * sizeof *key->strings);
    uint64_t n_odd = 0;
    for (uint64_t i = 0; i < key->n; i++) {
        TRY(take_text(c, &key->strings[i], GGUF_MAX_STRING, key->name));
        TRY(check_room(c, 0, key->name));
        TRY(check_text(c, key, i, &n_odd));
    }
    if (n_odd)
        log_text(c->log, PYLLAVA_LOG_WARNING, "%s: %s: %llu of %llu texts are not valid UTF-8", c->f->path,
                 key->name, (unsigned long long) n_odd, (unsigned long long) key->n);
    return PYLLAVA_OK;
}

static pyllava_status parse_value(cursor * c, gguf_key * key) {
    pyllava_gguf * f = c->f;
    if (key->item_type == GGUF_STRING) return parse_strings(c, key);
    uint64_t size = TYPES[key->item_type].size;
    if (key->n > left(c) / size) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s (byte %llu): %llu items of %s need more than the %llu bytes left",
             f->path, key->name, (unsigned long long) c->pos, (unsigned long long) key->n,
             TYPES[key->item_type].name, (unsigned long long) left(c));
    }
    TRY(check_room(c, key->n * size, key->name));
    key->data = f->file.data + c->pos;
    c->pos += key->n * size;
    for (uint64_t i = 0; key->item_type == GGUF_BOOL && i < key->n; i++) {
        if (((const uint8_t *) key->data)[i] > 1)
            FAIL(PYLLAVA_ERR_FILE, "%s: %s: bool is neither 0 nor 1", f->path, key->name);
    }
    return PYLLAVA_OK;
}

static pyllava_status parse_key(cursor * c, gguf_key * key) {
    pyllava_gguf * f = c->f;
    key->offset = c->pos;
    gguf_text name = { 0 };
    TRY(take_text(c, &name, 65535, "key"));
    if (name.size == 0)
        FAIL(PYLLAVA_ERR_FILE, "%s: key (byte %llu): empty", f->path, (unsigned long long) key->offset);
    for (uint64_t i = 0; i < name.size; i++) {
        if (name.data[i] <= 0x20 || name.data[i] >= 0x7F) {
            FAIL(PYLLAVA_ERR_FILE, "%s: key (byte %llu): character 0x%02X, need printable ASCII", f->path,
                 (unsigned long long) key->offset, (uint8_t) name.data[i]);
        }
    }
    key->name = malloc((size_t) name.size + 1);
    TRY_ALLOC(key->name, name.size + 1);
    memcpy(key->name, name.data, (size_t) name.size);
    key->name[name.size] = 0;

    int32_t type = 0;
    TRY(take(c, &type, 4, key->name));
    if (type < 0 || type >= GGUF_N_TYPES)
        FAIL(PYLLAVA_ERR_FILE, "%s: %s: value type %d, need 0..12", f->path, key->name, type);
    key->type = key->item_type = (gguf_type) type;
    key->n = 1;
    if (key->type == GGUF_ARRAY) {
        TRY(take(c, &type, 4, key->name));
        if (type == GGUF_ARRAY)
            FAIL(PYLLAVA_ERR_FILE, "%s: %s: array of arrays, need an array of numbers or texts", f->path,
                 key->name);
        if (type < 0 || type >= GGUF_N_TYPES) {
            FAIL(PYLLAVA_ERR_FILE, "%s: %s: item type %d, need 0..12", f->path, key->name, type);
        }
        key->item_type = (gguf_type) type;
        TRY(take(c, &key->n, 8, key->name));
    }
    return parse_value(c, key);
}

static pyllava_status tensor_size(const pyllava_gguf * f, gguf_tensor * t) {
    if (t->type < 0 || t->type >= GGML_TYPE_COUNT || ggml_blck_size((enum ggml_type) t->type) <= 0 ||
        ggml_type_size((enum ggml_type) t->type) == 0) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s: tensor type %d is unknown to or was removed from ggml %s", f->path,
             t->name, t->type, ggml_version());
    }
    int64_t block = ggml_blck_size((enum ggml_type) t->type);
    if (t->ne[0] % block) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s: rows of %lld, %s needs a multiple of %lld", f->path, t->name,
             (long long) t->ne[0], ggml_type_name((enum ggml_type) t->type), (long long) block);
    }
    uint64_t size = ggml_type_size((enum ggml_type) t->type);
    const uint64_t blocks[4] = { (uint64_t) (t->ne[0] / block), (uint64_t) t->ne[1], (uint64_t) t->ne[2],
                                 (uint64_t) t->ne[3] };
    for (int d = 0; d < 4; d++) {
        if (size > (uint64_t) INT64_MAX / 4 / blocks[d])
            FAIL(PYLLAVA_ERR_FILE, "%s: %s: too many elements", f->path, t->name);
        size *= blocks[d];
    }
    t->size = size;
    return PYLLAVA_OK;
}

static pyllava_status parse_tensor(cursor * c, gguf_tensor * t) {
    pyllava_gguf * f = c->f;
    unsigned long long at = c->pos;
    gguf_text name = { 0 };
    TRY(take_text(c, &name, GGUF_MAX_NAME, "tensor name"));
    bool printable = name.size > 0;
    for (uint64_t i = 0; i < name.size; i++)
        printable = printable && name.data[i] > 0x20 && name.data[i] < 0x7F;
    if (!printable) {
        FAIL(PYLLAVA_ERR_FILE, "%s: tensor name (byte %llu): empty or not printable ASCII", f->path, at);
    }
    memcpy(t->name, name.data, (size_t) name.size);
    uint32_t n_dims = 0;
    TRY(take(c, &n_dims, 4, t->name));
    if (n_dims < 1 || n_dims > 4)
        FAIL(PYLLAVA_ERR_FILE, "%s: %s: %u dimensions, need 1..4", f->path, t->name, n_dims);
    t->n_dims = (int32_t) n_dims;
    for (int d = 0; d < 4; d++) {
        t->ne[d] = 1;
        if (d < t->n_dims) TRY(take(c, &t->ne[d], 8, t->name));
        if (t->ne[d] <= 0)
            FAIL(PYLLAVA_ERR_FILE, "%s: %s: dimension %d is %lld, need at least 1", f->path, t->name, d,
                 (long long) t->ne[d]);
    }
    TRY(take(c, &t->type, 4, t->name));
    TRY(take(c, &t->offset, 8, t->name));
    return tensor_size(f, t);
}

// Offsets in the table count from the data section and are dense; turns them into offsets in the file. Every
// byte of that section belongs to a tensor or aligns the next one: a count that is too small would otherwise
// begin the section too early and shift all weights.
static pyllava_status place_tensors(cursor * c) {
    pyllava_gguf * f = c->f;
    uint64_t a = f->alignment, start = (c->pos + a - 1) / a * a, next = 0;
    for (uint64_t i = 0; i < f->n_tensors; i++) {
        gguf_tensor * t = &f->tensors[i];
        if (t->offset != next) {
            FAIL(PYLLAVA_ERR_FILE,
                 "%s: %s: data at %llu, need %llu (tensors lie one after the other, aligned to %u)", f->path,
                 t->name, (unsigned long long) t->offset, (unsigned long long) next, f->alignment);
        }
        if (start > f->file.size || t->offset > f->file.size - start ||
            t->size > f->file.size - start - t->offset) {
            FAIL(PYLLAVA_ERR_FILE, "%s: file has %zu bytes, needs at least %llu (tensor %s; is it cut off?)",
                 f->path, f->file.size, (unsigned long long) (start + t->offset + t->size), t->name);
        }
        next = (t->offset + t->size + a - 1) / a * a;
        t->offset += start;
    }
    if (f->file.size > start + next) {
        FAIL(PYLLAVA_ERR_FILE,
             "%s: %llu bytes after byte %llu belong to no tensor: does the table name all %llu?", f->path,
             (unsigned long long) (f->file.size - start - next), (unsigned long long) (start + next),
             (unsigned long long) f->n_tensors);
    }
    return PYLLAVA_OK;
}

typedef struct sort_entry {
    const char * name;
    uint32_t i;
} sort_entry;

static int compare_entries(const void * a, const void * b) {
    return strcmp(((const sort_entry *) a)->name, ((const sort_entry *) b)->name);
}

static pyllava_status sort_names(const pyllava_gguf * f, sort_entry * e, uint64_t n, const char * what,
                                 uint32_t ** out) {
    *out = malloc((n + 1) * sizeof **out);
    TRY_ALLOC(*out, n * sizeof **out);
    qsort(e, (size_t) n, sizeof *e, compare_entries);
    for (uint64_t i = 0; i < n; i++) {
        if (i && !strcmp(e[i - 1].name, e[i].name))
            FAIL(PYLLAVA_ERR_FILE, "%s: %s %.80s stands twice", f->path, what, e[i].name);
        (*out)[i] = e[i].i;
    }
    return PYLLAVA_OK;
}

static pyllava_status build_indices(pyllava_gguf * f) {
    uint64_t n = f->n_keys > f->n_tensors ? f->n_keys : f->n_tensors;
    sort_entry * e = malloc((n + 1) * sizeof *e);
    TRY_ALLOC(e, n * sizeof *e);
    for (uint64_t i = 0; i < f->n_keys; i++) e[i] = (sort_entry) { f->keys[i].name, (uint32_t) i };
    pyllava_status status = sort_names(f, e, f->n_keys, "key", &f->by_key);
    for (uint64_t i = 0; i < f->n_tensors; i++) e[i] = (sort_entry) { f->tensors[i].name, (uint32_t) i };
    if (status == PYLLAVA_OK) status = sort_names(f, e, f->n_tensors, "tensor", &f->by_name);
    free(e);
    return status;
}

// Says what a file that does not begin with "GGUF" probably is.
static const char * magic_hint(const uint8_t * m, size_t size) {
    if (size >= 4 && (!memcmp(m, "lmgg", 4) || !memcmp(m, "fmgg", 4) || !memcmp(m, "tjgg", 4))) {
        return "a file of the time before GGUF: convert the model again";
    }
    if (size >= 4 && !memcmp(m, "PK\3\4", 4)) return "a PyTorch checkpoint: convert it first";
    if (size >= 9 && m[8] == '{') return "probably safetensors: convert it first";
    if (size >= 7 && !memcmp(m, "version", 7))
        return "a Git LFS pointer: fetch the real file with 'git lfs pull'";
    if (size >= 4 && (!memcmp(m, "\x89PNG", 4) || !memcmp(m, "\xFF\xD8\xFF", 3)))
        return "a picture, need a GGUF model";
    if (size >= 1 && m[0] == '<') return "a web page: the download went wrong";
    return "not a GGUF file";
}

static pyllava_status parse_header(cursor * c) {
    pyllava_gguf * f = c->f;
    if (f->file.size < 4 || memcmp(f->file.data, "GGUF", 4)) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %s", f->path, magic_hint(f->file.data, f->file.size));
    }
    if (f->file.size < 24)
        FAIL(PYLLAVA_ERR_FILE, "%s: header needs 24 bytes, file has %zu", f->path, f->file.size);
    c->pos = 4;
    TRY(take(c, &f->version, 4, "version"));
    if (f->version && (f->version & 0xFFFF) == 0)
        FAIL(PYLLAVA_ERR_FILE, "%s: big-endian file, need little-endian", f->path);
    if (f->version < 2 || f->version > 3)
        FAIL(PYLLAVA_ERR_FILE, "%s: GGUF version %u, need 2 or 3", f->path, f->version);
    TRY(take(c, &f->n_tensors, 8, "tensor count"));
    TRY(take(c, &f->n_keys, 8, "key count"));
    if (f->n_tensors > GGUF_MAX_TENSORS || f->n_tensors > left(c) / 33) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %llu tensors, more than %llu bytes hold", f->path,
             (unsigned long long) f->n_tensors, (unsigned long long) left(c));
    }
    if (f->n_keys > GGUF_MAX_KEYS || f->n_keys > left(c) / 13) {
        FAIL(PYLLAVA_ERR_FILE, "%s: %llu keys, more than %llu bytes hold", f->path,
             (unsigned long long) f->n_keys, (unsigned long long) left(c));
    }
    return PYLLAVA_OK;
}

static pyllava_status parse_alignment(pyllava_gguf * f) {
    f->alignment = 32;
    const gguf_key * key = gguf_find_key(f, "general.alignment");
    if (!key) return PYLLAVA_OK;
    if (key->type != GGUF_U32)
        FAIL(PYLLAVA_ERR_FILE, "%s: general.alignment: is %s, need u32", f->path, TYPES[key->type].name);
    memcpy(&f->alignment, key->data, 4);
    if (f->alignment < 8 || f->alignment > 65536 || (f->alignment & (f->alignment - 1))) {
        FAIL(PYLLAVA_ERR_FILE, "%s: general.alignment: %u, need a power of two in 8..65536", f->path,
             f->alignment);
    }
    return PYLLAVA_OK;
}

static pyllava_status parse(pyllava_gguf * f, const logger * log) {
    cursor c = { .f = f, .log = log };
    TRY(parse_header(&c));
    f->keys = calloc((size_t) f->n_keys + 1, sizeof *f->keys);
    TRY_ALLOC(f->keys, f->n_keys * sizeof *f->keys);
    f->tensors = calloc((size_t) f->n_tensors + 1, sizeof *f->tensors);
    TRY_ALLOC(f->tensors, f->n_tensors * sizeof *f->tensors);
    for (uint64_t i = 0; i < f->n_keys; i++) {
        TRY(parse_key(&c, &f->keys[i]));
        f->keys[i].size = c.pos - f->keys[i].offset;
    }
    for (uint64_t i = 0; i < f->n_tensors; i++) TRY(parse_tensor(&c, &f->tensors[i]));
    TRY(build_indices(f));
    TRY(parse_alignment(f));
    return place_tensors(&c);
}

pyllava_status gguf_open(pyllava_gguf ** out, const char * path, bool use_mmap, pyllava_progress_fn progress,
                         const logger * log) {
    pyllava_gguf * f = calloc(1, sizeof *f);
    TRY_ALLOC(f, sizeof *f);
    f->path = malloc(strlen(path) + 1);
    pyllava_status status = PYLLAVA_OK;
    if (!f->path) status = error_set(PYLLAVA_ERR_MEMORY, "out of memory");
    if (f->path) strcpy(f->path, path);
    if (status == PYLLAVA_OK) status = file_open(&f->file, path, use_mmap, progress, log ? log->user : NULL);
    if (status == PYLLAVA_OK) status = parse(f, log);
    if (status != PYLLAVA_OK) {
        gguf_close(f);
        return status;
    }
    *out = f;
    return PYLLAVA_OK;
}

void gguf_close(pyllava_gguf * f) {
    if (!f) return;
    for (uint64_t i = 0; f->keys && i < f->n_keys; i++) {
        free(f->keys[i].name);
        free(f->keys[i].strings);
    }
    free(f->keys);
    free(f->tensors);
    free(f->by_key);
    free(f->by_name);
    file_close(&f->file);
    free(f->path);
    free(f);
}

// ----------------------------------------------------------------------------------------- look-up

const gguf_key * gguf_find_key(const pyllava_gguf * f, const char * name) {
    for (uint64_t lo = 0, hi = f->n_keys; lo < hi;) {
        uint64_t mid = (lo + hi) / 2;
        int order = strcmp(name, f->keys[f->by_key[mid]].name);
        if (order == 0) return &f->keys[f->by_key[mid]];
        if (order < 0) hi = mid;
        else lo = mid + 1;
    }
    return NULL;
}

const gguf_tensor * gguf_find_tensor(const pyllava_gguf * f, const char * name) {
    for (uint64_t lo = 0, hi = f->n_tensors; lo < hi;) {
        uint64_t mid = (lo + hi) / 2;
        int order = strcmp(name, f->tensors[f->by_name[mid]].name);
        if (order == 0) return &f->tensors[f->by_name[mid]];
        if (order < 0) hi = mid;
        else lo = mid + 1;
    }
    return NULL;
}

bool gguf_text_is(gguf_text text, const char * other) {
    return text.size == strlen(other) && !memcmp(text.data, other, (size_t) text.size);
}

// ------------------------------------------------------------------------------------ typed access

static pyllava_status find_typed(const pyllava_gguf * f, const char * name, bool required,
                                 const gguf_key ** out) {
    *out = gguf_find_key(f, name);
    if (!*out && required) FAIL(PYLLAVA_ERR_MISMATCH, "%s: key %s is missing", f->path, name);
    return PYLLAVA_OK;
}

static pyllava_status wrong_type(const pyllava_gguf * f, const gguf_key * key, const char * need) {
    bool array = key->type == GGUF_ARRAY;
    FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s (byte %llu): is %s%s, need %s", f->path, key->name,
         (unsigned long long) key->offset, array ? "array of " : "", TYPES[key->item_type].name, need);
}

// Item i as an integer, if its type is one; u64 beyond i64 saturate, which every range check rejects.
static bool int_at(const gguf_key * key, uint64_t i, int64_t * out) {
    const uint8_t * p = (const uint8_t *) key->data + i * TYPES[key->item_type].size;
    union {
        int8_t i8;
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
        uint64_t u64;
        int64_t i64;
    } v;
    memcpy(&v, p, TYPES[key->item_type].size);
    switch (key->item_type) {
        case GGUF_U8:  *out = *p; return true;
        case GGUF_I8:  *out = v.i8; return true;
        case GGUF_U16: *out = v.u16; return true;
        case GGUF_I16: *out = v.i16; return true;
        case GGUF_U32: *out = v.u32; return true;
        case GGUF_I32: *out = v.i32; return true;
        case GGUF_U64: *out = v.u64 > INT64_MAX ? INT64_MAX : (int64_t) v.u64; return true;
        case GGUF_I64: *out = v.i64; return true;
        default:       return false;
    }
}

static bool is_number_array_of(const gguf_key * key, gguf_type item) {
    return key->type == GGUF_ARRAY && key->item_type == item;
}

pyllava_status gguf_get_int(const pyllava_gguf * f, const char * name, bool required, gguf_range range,
                            int32_t * out) {
    const gguf_key * key;
    TRY(find_typed(f, name, required, &key));
    if (!key) return PYLLAVA_OK;
    int64_t v;
    if (key->type == GGUF_ARRAY || key->type == GGUF_STRING || !int_at(key, 0, &v))
        return wrong_type(f, key, "an integer");
    if (v < range.min || v > range.max) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s (byte %llu): found %lld, need %lld..%lld", f->path, name,
             (unsigned long long) key->offset, (long long) v, (long long) range.min, (long long) range.max);
    }
    *out = (int32_t) v;
    return PYLLAVA_OK;
}

pyllava_status gguf_get_float(const pyllava_gguf * f, const char * name, bool required, double min,
                              double max, float * out) {
    const gguf_key * key;
    TRY(find_typed(f, name, required, &key));
    if (!key) return PYLLAVA_OK;
    double v = 0;
    float v32 = 0;
    if (key->type == GGUF_F32) {
        memcpy(&v32, key->data, 4);
        v = v32;
    } else if (key->type == GGUF_F64) {
        memcpy(&v, key->data, 8);
    } else {
        return wrong_type(f, key, "f32");
    }
    if (!isfinite(v) || v < min || v > max) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s (byte %llu): found %g, need %g..%g", f->path, name,
             (unsigned long long) key->offset, v, min, max);
    }
    *out = (float) v;
    return PYLLAVA_OK;
}

pyllava_status gguf_get_bool(const pyllava_gguf * f, const char * name, bool * out) {
    const gguf_key * key = gguf_find_key(f, name);
    if (!key) return PYLLAVA_OK;
    if (key->type != GGUF_BOOL) return wrong_type(f, key, "bool");
    *out = *(const uint8_t *) key->data;
    return PYLLAVA_OK;
}

pyllava_status gguf_get_text(const pyllava_gguf * f, const char * name, bool required, gguf_text * out) {
    const gguf_key * key;
    TRY(find_typed(f, name, required, &key));
    if (!key) return PYLLAVA_OK;
    if (key->type != GGUF_STRING) return wrong_type(f, key, "string");
    *out = key->strings[0];
    return PYLLAVA_OK;
}

pyllava_status gguf_get_array(const pyllava_gguf * f, const char * name, gguf_type item,
                              const gguf_key ** out) {
    *out = gguf_find_key(f, name);
    if (*out && !is_number_array_of(*out, item)) {
        return wrong_type(f, *out,
                          item == GGUF_STRING ? "array of string"
                          : item == GGUF_F32  ? "array of f32"
                                              : "array of i32");
    }
    return PYLLAVA_OK;
}

pyllava_status gguf_get_ints(const pyllava_gguf * f, const char * name, int32_t * out, uint64_t n_max,
                             uint64_t * out_n) {
    *out_n = 0;
    const gguf_key * key = gguf_find_key(f, name);
    if (!key) return PYLLAVA_OK;
    int64_t v = 0;
    if (key->type != GGUF_ARRAY || key->item_type == GGUF_STRING) return wrong_type(f, key, "array of i32");
    if (key->n > n_max) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s: %llu items, need at most %llu", f->path, name,
             (unsigned long long) key->n, (unsigned long long) n_max);
    }
    for (uint64_t i = 0; i < key->n; i++) {
        if (!int_at(key, i, &v)) return wrong_type(f, key, "array of i32");
        if (v < INT32_MIN || v > INT32_MAX)
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s: item %llu out of range, need 32 bits", f->path, name,
                 (unsigned long long) i);
        out[i] = (int32_t) v;
    }
    *out_n = key->n;
    return PYLLAVA_OK;
}

pyllava_status gguf_get_floats(const pyllava_gguf * f, const char * name, float * out, uint64_t n_max,
                               uint64_t * out_n) {
    *out_n = 0;
    const gguf_key * key;
    TRY(gguf_get_array(f, name, GGUF_F32, &key));
    if (!key) return PYLLAVA_OK;
    if (key->n > n_max) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s: %llu items, need at most %llu", f->path, name,
             (unsigned long long) key->n, (unsigned long long) n_max);
    }
    memcpy(out, key->data, (size_t) key->n * sizeof *out);
    *out_n = key->n;
    return PYLLAVA_OK;
}
