// attention.c - scaled dot-product attention over rows of a KV cache (or of an image), tiled, with a running
// softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax"). A task is one block of query
// tokens and one key/value head, so the heads that share it (GQA) are computed together. Keys come in tiles
// of 32, counted from position 0: what one query computes does not depend on the queries beside it.
#include "micro.h"
#include "tile.h"

#include <math.h>

#define KEYS KERNEL_PANEL

typedef struct attention_task {
    const attention_env * env;
    const attention_block * block;
    const struct ggml_tensor *k, *v;
    int head_kv, group, n_rows, d, dp; // dp: head_dim rounded up to 32
    const float * q;                   // [n_tokens][n_head * d]
    float * y;
    float *queries, *out;      // [n_rows][d], [n_rows][dp]
    float * scores;            // [n_rows][KEYS]
    float *key_panel, *values; // [d][KEYS], [KEYS][dp]
    float * unpacked;          // [KEYS][d]
    float *max, *sum;          // [n_rows]
} attention_task;

static int padded(int d) { return (d + KERNEL_PANEL - 1) / KERNEL_PANEL * KERNEL_PANEL; }

static int rows_for(int group) { return group > KERNEL_QUERIES ? group : KERNEL_QUERIES; }

#if defined(KERNEL_SIZES)
size_t attention_scratch_size(int32_t n_head, int32_t n_head_kv, int32_t d) {
    size_t rows = (size_t) rows_for(n_head / n_head_kv), dp = (size_t) padded(d);
    return (rows * (d + dp + KEYS + 2) + KEYS * (2 * (size_t) d + dp) + 64) * sizeof(float);
}
#endif

static void lay_out(attention_task * t, float * scratch) {
    size_t rows = (size_t) rows_for(t->group);
    t->queries = scratch;
    t->out = t->queries + rows * t->d;
    t->scores = t->out + rows * t->dp;
    t->max = t->scores + rows * KEYS;
    t->sum = t->max + rows;
    t->key_panel = t->sum + rows;
    t->values = t->key_panel + (size_t) t->d * KEYS;
    t->unpacked = t->values + (size_t) KEYS * t->dp;
}

static size_t head_offset(const attention_task * t, const struct ggml_tensor * cache) {
    return (size_t) (t->head_kv * t->d) / ggml_blck_size(cache->type) * ggml_type_size(cache->type);
}

static const float * cache_row(const attention_task * t, const struct ggml_tensor * cache, int position,
                               float * to) {
    const attention_block * b = t->block;
    int64_t row = b->cells ? b->cells[position] : b->first_row + position;
    return unpack((const char *) cache->data + row * cache->nb[1] + head_offset(t, cache), cache->type,
                  ggml_get_type_traits(cache->type)->to_float, to, t->d);
}

static void load_tile(attention_task * t, int p0, int n_keys) {
    const float * rows[KEYS];
    for (int j = 0; j < KEYS; j++)
        rows[j] = cache_row(t, t->k, p0 + (j < n_keys ? j : 0), t->unpacked + j * t->d);
    for (int c = 0; c < t->d; c++) {
        for (int j = 0; j < KEYS; j++) t->key_panel[c * KEYS + j] = rows[j][c];
    }
    for (int j = 0; j < n_keys; j++) {
        const float * v = cache_row(t, t->v, p0 + j, t->unpacked);
        memcpy(t->values + j * t->dp, v, t->d * sizeof *v);
        memset(t->values + j * t->dp + t->d, 0, (t->dp - t->d) * sizeof *v);
    }
}

// Folds the scores of one tile into row r: new maximum, old output rescaled, scores replaced by weights.
static void fold_scores(attention_task * t, int r, int n_seen) {
    float *s = t->scores + r * KEYS, m = t->max[r];
    for (int j = 0; j < n_seen; j++) m = s[j] > m ? s[j] : m;
    for (int j = n_seen; j < KEYS; j++) s[j] = -INFINITY;
    float rescale = t->max[r] == m ? 1.0f : t->sum[r] > 0.0f ? expf(t->max[r] - m) : 0.0f;
    exp_all(s, m, KEYS);
    t->sum[r] = t->sum[r] * rescale + v16_sum(v16_load(s) + v16_load(s + 16));
    t->max[r] = m;
    if (rescale == 1.0f) return;
    for (int c = 0; c < t->dp; c++) t->out[r * t->dp + c] *= rescale;
}

static int visible(const attention_task * t, int r) {
    return t->env->n_visible[t->block->first + r / t->group];
}

static void run_tile(attention_task * t, int p0, int n_keys) {
    load_tile(t, p0, n_keys);
    memset(t->scores, 0, (size_t) t->n_rows * KEYS * sizeof(float));
    tile(t->n_rows, t->scores, KEYS, t->queries, t->d, t->key_panel, KEYS, t->d);
    for (int r = 0; r < t->n_rows; r++) {
        int n_seen = visible(t, r) - p0;
        if (n_seen <= 0) memset(t->scores + r * KEYS, 0, KEYS * sizeof(float));
        else fold_scores(t, r, n_seen < n_keys ? n_seen : n_keys);
    }
    for (int c = 0; c < t->dp; c += KERNEL_PANEL) {
        tile(t->n_rows, t->out + c, t->dp, t->scores, KEYS, t->values + c, t->dp, n_keys);
    }
}

static void run_task(attention_task * t) {
    const attention_block * b = t->block;
    const int width = t->env->n_head * t->d, head0 = t->head_kv * t->group;
    const float scale = 1.0f / sqrtf((float) t->d);
    t->n_rows = b->n * t->group;
    int n_keys = 0;
    for (int r = 0; r < t->n_rows; r++) {
        const float * q = t->q + (int64_t) (b->first + r / t->group) * width + (head0 + r % t->group) * t->d;
        for (int c = 0; c < t->d; c++) t->queries[r * t->d + c] = q[c] * scale;
        t->max[r] = -INFINITY;
        t->sum[r] = 0.0f;
        n_keys = visible(t, r) > n_keys ? visible(t, r) : n_keys;
    }
    memset(t->out, 0, (size_t) t->n_rows * t->dp * sizeof(float));
    for (int p0 = 0; p0 < n_keys; p0 += KEYS) run_tile(t, p0, n_keys - p0 < KEYS ? n_keys - p0 : KEYS);
    for (int r = 0; r < t->n_rows; r++) {
        float * y = t->y + (int64_t) (b->first + r / t->group) * width + (head0 + r % t->group) * t->d;
        for (int c = 0; c < t->d; c++) y[c] = t->out[r * t->dp + c] / t->sum[r];
    }
}

static attention_task new_task(const attention_env * env, const struct ggml_tensor * dst, int ith) {
    attention_task t = {
        .env = env,
        .k = dst->src[1],
        .v = dst->src[2],
        .group = env->n_head / env->n_head_kv,
        .d = env->head_dim,
        .dp = padded(env->head_dim),
        .q = dst->src[0]->data,
        .y = dst->data,
    };
    lay_out(&t, (float *) (env->env.scratch + ith * env->env.scratch_size));
    return t;
}

void KERNEL(attention)(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const attention_env * env = userdata;
    attention_task t = new_task(env, dst, ith);
    for (int64_t task = ith; task < (int64_t) env->n_blocks * env->n_head_kv; task += nth) {
        if (atomic_load_explicit(env->env.cancel, memory_order_relaxed)) return;
        t.block = &env->blocks[task / env->n_head_kv];
        t.head_kv = (int) (task % env->n_head_kv);
        run_task(&t);
    }
}
