// vocab.c - see vocab.h.
#include "vocab.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Tokens with these texts are control tokens and end an answer, whatever the file says of them.
static const char * const END_TEXTS[] = {
    "<|eot_id|>", "<|im_end|>",         "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>",      "<|end_of_text|>",    "</s>",    "<eos>",         "[EOS]",         "[EOT]",
    "_<EOT>",     "<end_of_utterance>",
};
#define N_END_TEXTS (sizeof END_TEXTS / sizeof *END_TEXTS)

// -------------------------------------------------------------------------------------- hash table

static uint32_t slot_of(const vocab * v, const char * text, uint64_t size) {
    uint32_t slot = (uint32_t) hash_bytes(v->table_key, text, (size_t) size) & v->table_mask;
    for (;; slot = (slot + 1) & v->table_mask) {
        int32_t id = v->table[slot];
        if (id < 0 || (v->texts[id].size == size && !memcmp(v->texts[id].data, text, (size_t) size)))
            return slot;
    }
}

int32_t vocab_find(const vocab * v, const char * text, uint64_t size) {
    return size && size <= v->longest ? v->table[slot_of(v, text, size)] : -1;
}

bool vocab_is_word(const vocab * v, int32_t id) {
    const uint8_t kind = v->kinds[id];
    return kind == KIND_NORMAL || kind == KIND_USER || kind == KIND_UNUSED;
}

int32_t vocab_find_word(const vocab * v, const char * text, uint64_t size) {
    const int32_t id = vocab_find(v, text, size);
    return id >= 0 && vocab_is_word(v, id) ? id : -1;
}

static pyllava_status build_table(vocab * v, const pyllava_gguf * f) {
    uint32_t size = 1024;
    while (size < (uint32_t) v->n * 2) size *= 2;
    v->table = malloc(size * sizeof *v->table);
    TRY_ALLOC(v->table, size * sizeof *v->table);
    memset(v->table, 0xFF, size * sizeof *v->table);
    v->table_mask = size - 1;
    v->table_key = hash_key_new();
    for (int32_t id = 0; id < v->n; id++) {
        gguf_text t = v->texts[id];
        if (t.size > VOCAB_MAX_TOKEN)
            FAIL(PYLLAVA_ERR_FILE, "%s: token %d has %llu bytes, need at most %d", f->path, id,
                 (unsigned long long) t.size, VOCAB_MAX_TOKEN);
        if (t.size == 0) continue;
        uint32_t slot = slot_of(v, t.data, t.size);
        if (v->table[slot] >= 0)
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: tokens %d and %d have the same text", f->path, v->table[slot],
                 id);
        v->table[slot] = id;
        if (t.size > v->longest) v->longest = t.size;
    }
    return PYLLAVA_OK;
}

// ----------------------------------------------------------------------------------------- reading

// Whether a text is "[PAD7]" where 7 is the token's id: fills a vocabulary up to a model's rows. Files call
// these user-defined, unknown or unused.
static bool is_filler(gguf_text text, int32_t id) {
    char filler[24];
    if (text.size < 6 || memcmp(text.data, "[PAD", 4)) return false;
    snprintf(filler, sizeof filler, "[PAD%d]", id);
    return gguf_text_is(text, filler);
}

// Chat markers like "<|im_start|>" are control tokens, even where the file has them as normal or user-defined
// ones (Yi), which a user could type.
static bool is_marker(gguf_text t) {
    return t.size > 4 && !memcmp(t.data, "<|", 2) && !memcmp(t.data + t.size - 2, "|>", 2);
}

static uint8_t kind_of(gguf_text text, int32_t id, int32_t told) {
    if (is_filler(text, id)) return KIND_UNUSED;
    const bool ordinary = told == KIND_NORMAL || told == KIND_USER;
    return (uint8_t) (ordinary && is_marker(text) ? KIND_CONTROL : told);
}

static pyllava_status read_scores(vocab * v, const pyllava_gguf * f) {
    const gguf_key *scores = NULL, *kinds = NULL;
    TRY(gguf_get_array(f, "tokenizer.ggml.scores", GGUF_F32, &scores));
    if (scores && scores->n != (uint64_t) v->n) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: tokenizer.ggml.scores: %llu entries, need %d", f->path,
             (unsigned long long) scores->n, v->n);
    }
    if (scores) memcpy(v->scores, scores->data, (size_t) v->n * sizeof *v->scores);
    TRY(gguf_get_array(f, "tokenizer.ggml.token_type", GGUF_I32, &kinds));
    if (kinds && kinds->n != (uint64_t) v->n) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: tokenizer.ggml.token_type: %llu entries, need %d", f->path,
             (unsigned long long) kinds->n, v->n);
    }
    for (int32_t id = 0; id < v->n; id++) {
        int32_t kind = KIND_NORMAL;
        if (kinds) memcpy(&kind, (const char *) kinds->data + (size_t) id * 4, 4);
        if (kind < 0 || kind > KIND_BYTE)
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: tokenizer.ggml.token_type: entry %d is %d, need 0..6", f->path,
                 id, kind);
        if (!isfinite(v->scores[id]))
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: tokenizer.ggml.scores: entry %d is not finite", f->path, id);
        v->kinds[id] = kind_of(v->texts[id], id, kind);
    }
    return PYLLAVA_OK;
}

// Phi-3's tokens take the white space behind them along, which its files do not say.
static void mark_phi3_strips(vocab * v) {
    const int32_t first = 32001, last = 32010, end = vocab_find(v, "</s>", 4);
    if (vocab_find(v, "<|user|>", 8) != last || vocab_find(v, "<|end|>", 7) != 32007) return;
    for (int32_t id = first; id <= last; id++) v->strips[id] |= STRIP_RIGHT;
    if (end >= 0) v->strips[end] |= STRIP_RIGHT;
}

static pyllava_status read_strips(vocab * v, const pyllava_gguf * f) {
    static const char * const KEYS[] = { "pyllava.tokens_lstrip", "pyllava.tokens_rstrip" };
    mark_phi3_strips(v);
    for (int side = 0; side < 2; side++) {
        const gguf_key * ids = NULL;
        TRY(gguf_get_array(f, KEYS[side], GGUF_I32, &ids));
        for (uint64_t i = 0; ids && i < ids->n; i++) {
            int32_t id;
            memcpy(&id, (const char *) ids->data + i * sizeof id, sizeof id);
            if (id < 0 || id >= v->n)
                FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s: entry %llu is %d, need 0..%d", f->path, KEYS[side],
                     (unsigned long long) i, id, v->n - 1);
            v->strips[id] |= (uint8_t) (side ? STRIP_RIGHT : STRIP_LEFT);
        }
    }
    return PYLLAVA_OK;
}

static void mark_end_texts(vocab * v) {
    for (size_t i = 0; i < N_END_TEXTS; i++) {
        const int32_t id = vocab_find(v, END_TEXTS[i], strlen(END_TEXTS[i]));
        if (id < 0) continue;
        v->ends[id] = true;
        v->kinds[id] = KIND_CONTROL;
    }
}

static pyllava_status read_special_id(const vocab * v, const pyllava_gguf * f, const char * key,
                                      int32_t * out) {
    return gguf_get_int(f, key, false, (gguf_range) { 0, v->n - 1 }, out);
}

// All ids that a file names are tokens of it, those that this version does not use too, such as the one for
// padding.
static pyllava_status check_special_ids(const vocab * v, const pyllava_gguf * f) {
    static const char PREFIX[] = "tokenizer.ggml.", TAIL[] = "_token_id";
    int32_t id;
    for (uint64_t i = 0; i < f->n_keys; i++) {
        const char * name = f->keys[i].name;
        const size_t size = strlen(name);
        if (size < sizeof PREFIX + sizeof TAIL || strncmp(name, PREFIX, sizeof PREFIX - 1)) continue;
        if (!strcmp(name + size - (sizeof TAIL - 1), TAIL)) TRY(read_special_id(v, f, name, &id));
    }
    return PYLLAVA_OK;
}

// Marks what the file says ends an answer. A vocabulary without eos has the first that ends one as its eos.
static pyllava_status read_ends(vocab * v, const pyllava_gguf * f) {
    static const char * const KEYS[] = { "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                         "tokenizer.ggml.eom_token_id" };
    v->eos = -1;
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
        int32_t id = -1;
        TRY(read_special_id(v, f, KEYS[i], &id));
        if (id >= 0) v->ends[id] = true;
        if (v->eos < 0) v->eos = id;
    }
    for (size_t i = 0; v->eos < 0 && i < N_END_TEXTS; i++)
        v->eos = vocab_find(v, END_TEXTS[i], strlen(END_TEXTS[i]));
    if (v->eos < 0)
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: key %s is missing, and no other token ends an answer", f->path,
             KEYS[0]);
    return PYLLAVA_OK;
}

pyllava_status vocab_read_ids(vocab * v, const pyllava_gguf * f) {
    static const char BOS[] = "tokenizer.ggml.bos_token_id";
    TRY(check_special_ids(v, f));
    TRY(read_special_id(v, f, BOS, &v->bos));
    TRY(read_special_id(v, f, "tokenizer.ggml.unknown_token_id", &v->unk));
    TRY(gguf_get_bool(f, "tokenizer.ggml.add_bos_token", &v->add_bos));
    if (v->add_bos && !gguf_find_key(f, BOS)) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: key %s is missing, but prompts are to begin with this token", f->path,
             BOS);
    }
    return read_ends(v, f);
}

pyllava_status vocab_read_tokens(vocab * v, const pyllava_gguf * f) {
    const gguf_key * tokens = NULL;
    TRY(gguf_get_array(f, "tokenizer.ggml.tokens", GGUF_STRING, &tokens));
    if (!tokens || !tokens->n)
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: key tokenizer.ggml.tokens is missing or empty", f->path);
    v->n = (int32_t) tokens->n;
    v->texts = tokens->strings;
    v->scores = calloc((size_t) v->n, sizeof *v->scores);
    v->kinds = calloc((size_t) v->n, 1);
    v->ends = calloc((size_t) v->n, sizeof *v->ends);
    v->strips = calloc((size_t) v->n, 1);
    if (!v->scores || !v->kinds || !v->ends || !v->strips) FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    if (v->n < 3) FAIL(PYLLAVA_ERR_MISMATCH, "%s: vocabulary of %d tokens", f->path, v->n);
    TRY(build_table(v, f));
    TRY(read_scores(v, f));
    mark_end_texts(v);
    return read_strips(v, f);
}

void vocab_free(vocab * v) {
    free(v->scores);
    free(v->kinds);
    free(v->ends);
    free(v->strips);
    free(v->table);
    memset(v, 0, sizeof *v);
}
