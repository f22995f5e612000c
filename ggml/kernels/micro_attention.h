// micro_attention.h - part of micro_code.h: softmax(q k^T / sqrt(d)) v, for a few and for many rows of
// queries.
#pragma once

INLINE const char * key_row(const attention_work * a, const char * rows, size_t stride, int position) {
    return rows + (size_t) (a->cells ? a->cells[position] : a->first_row + position) * stride;
}

// Turns scores into weights with the running maximum and sum; returns the factor for what has been added up
// so far.
INLINE float fold(float * s, int n_seen, int n_keys, float * max, float * sum) {
    for (int j = n_seen; j < n_keys; j++) s[j] = -INFINITY;
    vf top = vf_load(s);
    for (int j = LANES; j < n_keys; j += LANES) top = vf_max(top, vf_load(s + j));
    float tops[LANES], m = *max;
    vf_store(tops, top);
    for (int i = 0; i < LANES; i++) m = tops[i] > m ? tops[i] : m;
    const float rescale = *max == m ? 1.0f : *sum > 0.0f ? expf(*max - m) : 0.0f;
    vf total = vf_set(0.0f);
    for (int j = 0; j < n_keys; j += LANES) {
        const vf p = vf_exp(vf_load(s + j) - vf_set(m));
        vf_store(s + j, p);
        total = total + p;
    }
    *sum = *sum * rescale + vf_sum(total);
    *max = m;
    return rescale;
}

INLINE int seen_by(const attention_work * a, int row, int p0, int n_keys) {
    const int n = a->n_visible[row / a->group] - p0;
    return n < 0 ? 0 : n < n_keys ? n : n_keys;
}

INLINE const float * query_row(const attention_work * a, int row) {
    return a->q + (size_t) (row / a->group) * a->q_stride + (size_t) (row % a->group * a->d);
}

INLINE void write_row(const attention_work * a, int row, const float * out, int at, int n, float sum) {
    float * y = a->y + (size_t) (row / a->group) * a->q_stride + (size_t) (row % a->group * a->d) + at;
    for (int c = 0; c < n; c++) y[c] = out[c] / sum;
}

INLINE int most_visible(const attention_work * a) {
    int most = 0;
    for (int t = 0; t < a->n; t++) most = a->n_visible[t] > most ? a->n_visible[t] : most;
    return most;
}

// The sums of LANES vectors.
#if LANES == 16
#define EVERY_SECOND(a, b, i)                                                                                \
    __builtin_shufflevector(a, b, i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18,     \
                            i + 20, i + 22, i + 24, i + 26, i + 28, i + 30)
#elif LANES == 8
#define EVERY_SECOND(a, b, i)                                                                                \
    __builtin_shufflevector(a, b, i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14)
#else
#define EVERY_SECOND(a, b, i) __builtin_shufflevector(a, b, i, i + 2, i + 4, i + 6)
#endif
INLINE vf sums_of(vf * v) {
#pragma GCC unroll 4
    for (int n = LANES / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < n; i++)
            v[i] = EVERY_SECOND(v[2 * i], v[2 * i + 1], 0) + EVERY_SECOND(v[2 * i], v[2 * i + 1], 1);
    }
    return v[0];
}

typedef struct few_rows { // keys or values
    const char * rows;
    size_t stride, size; // size: bytes of a head
    enum ggml_type type;
} few_rows;

// n rows of a head as floats, filled up with zeros to `wide`, and rows of zeros to whole vectors of rows.
// Rows of the cache are far from each other, which the hardware does not foresee: while those of all heads
// are loaded, n_next rows of `next`, from position p_next on, are fetched into the cache, all heads of a row.
INLINE void load_few(const attention_work * a, few_rows from, int p, int n, int head, int wide, few_rows next,
                     int p_next, int n_next, float * out) {
    for (int j = 0; j < n; j++, out += wide) {
        const int row = (head * n + j) / a->heads;
        if (row * a->heads == head * n + j && row < n_next) {
            const char * first = key_row(a, next.rows, next.stride, p_next + row);
            for (size_t at = 0; at < (size_t) a->heads * next.size; at += 64) __builtin_prefetch(first + at);
        }
        const char * here = key_row(a, from.rows, from.stride, p + j) + (size_t) head * from.size;
        const float * x = floats_of(here, from.type, a->d, out);
        if (x != out) memcpy(out, x, (size_t) a->d * sizeof *out);
        for (int c = a->d; c < wide; c++) out[c] = 0.0f;
    }
    memset(out, 0, (round_up((size_t) n, LANES) - (size_t) n) * (size_t) wide * sizeof *out);
}

// s[j] = q . k[j] for LANES keys.
INLINE void score_few(const float * q, const float * k, int wide, float * s) {
    vf dots[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) dots[j] = vf_set(0.0f);
    for (int c = 0; c < wide; c += LANES) {
        const vf x = vf_load(q + c);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) dots[j] = vf_fma(x, vf_load(k + j * wide + c), dots[j]);
    }
    vf_store(s, sums_of(dots));
}

// out = rescale out + sum_j s[j] v[j], m vectors.
INLINE void add_few(const int m, int n, const float * s, const float * v, int wide, float rescale,
                    float * out) {
    vf sums[8];
#pragma GCC unroll 8
    for (int c = 0; c < m; c++) sums[c] = vf_mul(vf_load(out + LANES * c), vf_set(rescale));
    for (int j = 0; j < n; j++) {
        const vf weight = vf_set(s[j]);
#pragma GCC unroll 8
        for (int c = 0; c < m; c++) sums[c] = vf_fma(weight, vf_load(v + j * wide + LANES * c), sums[c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < m; c++) vf_store(out + LANES * c, sums[c]);
}

// The heads of one token: each key and value is read once, as the cache has it.
static void attend_few(const attention_work * a) {
    const int n = a->heads * a->group, d = a->d, n_keys = *a->n_visible;
    const int wide = (int) round_up((size_t) d, LANES);
    const float scale = 1.0f / sqrtf((float) d);
    const few_rows k = { a->k, a->k_stride, ggml_row_size(a->k_type, d), a->k_type },
                   v = { a->v, a->v_stride, ggml_row_size(a->v_type, d), a->v_type };
    _Alignas(64) float q[FEW_TOKENS][MAX_HEAD], out[FEW_TOKENS][MAX_HEAD], rows[GROUP * MAX_HEAD],
        s[FEW_TOKENS][GROUP];
    float max[FEW_TOKENS], sum[FEW_TOKENS];
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < wide; c++) q[i][c] = c < d ? a->q[i * d + c] * scale : 0.0f;
        memset(out[i], 0, (size_t) wide * sizeof(float));
        max[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    for (int p = 0; p < n_keys; p += GROUP) {
        const int n_here = n_keys - p < GROUP ? n_keys - p : GROUP, left = n_keys - p - n_here;
        for (int head = 0; head < a->heads; head++) {
            load_few(a, k, p, n_here, head, wide, v, p, n_here, rows);
            for (int i = head * a->group; i < (head + 1) * a->group; i++) {
                for (int j = 0; j < n_here; j += LANES) score_few(q[i], rows + j * wide, wide, s[i] + j);
            }
        }
        for (int head = 0; head < a->heads; head++) {
            load_few(a, v, p, n_here, head, wide, k, p + GROUP, left, rows);
            for (int i = head * a->group; i < (head + 1) * a->group; i++) {
                const float rescale = fold(s[i], n_here, GROUP, &max[i], &sum[i]);
                int c = 0;
                for (; c + 8 * LANES <= wide; c += 8 * LANES)
                    add_few(8, n_here, s[i], rows + c, wide, rescale, out[i] + c);
                for (; c + 4 * LANES <= wide; c += 4 * LANES)
                    add_few(4, n_here, s[i], rows + c, wide, rescale, out[i] + c);
                for (; c < wide; c += LANES) add_few(1, n_here, s[i], rows + c, wide, rescale, out[i] + c);
            }
        }
    }
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < d; c++) a->y[i * d + c] = out[i][c] / sum[i];
    }
}

// Many rows of queries: both products over TILE_KEYS keys at a time, of int16 with a scale for each row of
// queries, keys, values and weights (a weight is multiplied with the scale of its value, since the sum runs
// over values). Products of bfloat16 lose more; where the CPU has them, attention is a few percent faster at
// best, and on some processors they are four times slower.
#define ROW_SCALE 64 // bytes behind a row of queries or weights, for its scale

typedef struct many_scratch {
    _Alignas(64) char q[MAX_QUERIES * (2 * MAX_HEAD + ROW_SCALE)];
    char weights[MAX_QUERIES * (2 * TILE_KEYS + ROW_SCALE)];
    uint16_t rows[TILE_KEYS * MAX_HEAD]; // keys or values, and their scales
    float row_scales[TILE_KEYS], ones[MAX_ROWS];
    char panel[2 * TILE_KEYS * MAX_ROWS > 2 * MAX_HEAD * MAX_ROWS ? 2 * TILE_KEYS * MAX_ROWS
                                                                  : 2 * MAX_HEAD * MAX_ROWS];
    float s[TILE_KEYS / ROWS][MAX_QUERIES * ROWS], out[MAX_HEAD / ROWS][MAX_QUERIES * ROWS];
    float row[MAX_HEAD > TILE_KEYS ? MAX_HEAD : TILE_KEYS], max[MAX_QUERIES], sum[MAX_QUERIES];
} many_scratch;

_Static_assert(sizeof(many_scratch) <= ATTEND_SCRATCH, "scratch of attend_many");

static size_t row_size(int n) { return 2 * (size_t) n + ROW_SCALE; }

// Rows are filled up with zeros to whole panels: they add nothing to a product.
static int filled(int d) { return (int) round_up((size_t) d, ROWS); }

INLINE void round_row(const float * x, int n, char * to) {
    const float scale = round_words(x, n, ROUND16_TOP, to);
    memcpy(to + 2 * n, &scale, sizeof scale);
}
INLINE float load_row(const char * from, enum ggml_type type, int d, uint16_t * to) {
    float row[MAX_HEAD];
    const float * x = floats_of(from, type, d, row);
    if (filled(d) > d) {
        if (x != row) memcpy(row, x, (size_t) d * sizeof *x);
        memset(row + d, 0, (size_t) (filled(d) - d) * sizeof *row);
        x = row;
    }
    return round_words(x, filled(d), PANEL16_TOP, (char *) to);
}
INLINE void multiply_rows(int n, int n_k, const char * panel, const float * scales, const char * x,
                          float * y) {
    multiply16(n, n_k, panel, scales, x, x + 2 * n_k, NULL, row_size(n_k), y);
}

// TILE_KEYS rows of the cache; rows beyond n_keys are zero.
INLINE void load_rows(const attention_work * a, const char * from, size_t stride, enum ggml_type type, int p0,
                      int n_keys, many_scratch * s) {
    const int d = filled(a->d);
    for (int j = 0; j < TILE_KEYS; j++) {
        uint16_t * to = s->rows + j * d;
        s->row_scales[j] = 0.0f;
        if (j >= n_keys) memset(to, 0, 2 * (size_t) d);
        else s->row_scales[j] = load_row(key_row(a, from, stride, p0 + j), type, a->d, to);
    }
}

INLINE void fold_rows(const attention_work * a, int first, int n_rows, int p0, int n_keys, many_scratch * s) {
    for (int r = first; r < n_rows; r++) {
        char * weights = s->weights + (size_t) r * row_size(TILE_KEYS);
        const int n_seen = seen_by(a, r, p0, n_keys);
        if (n_seen == 0) {
            memset(weights, 0, row_size(TILE_KEYS));
            continue;
        }
        for (int h = 0; h < TILE_KEYS / ROWS; h++)
            memcpy(s->row + h * ROWS, s->s[h] + r * ROWS, ROWS * sizeof(float));
        const float rescale = fold(s->row, n_seen, TILE_KEYS, &s->max[r], &s->sum[r]);
        for (int j = 0; j < TILE_KEYS; j += LANES)
            vf_store(s->row + j, vf_mul(vf_load(s->row + j), vf_load(s->row_scales + j)));
        round_row(s->row, TILE_KEYS, weights);
        for (int c = 0; rescale != 1.0f && c < filled(a->d) / ROWS; c++) {
            float * out = s->out[c] + r * ROWS;
            for (int j = 0; j < ROWS; j += LANES)
                vf_store(out + j, vf_mul(vf_load(out + j), vf_set(rescale)));
        }
    }
}

// panel[k / 2][ROWS][2] of columns c .. c + ROWS - 1 of TILE_KEYS rows: neighbouring rows interleaved.
INLINE void value_panel(const many_scratch * s, int d, int c, char * panel) {
    for (int k = 0; k < TILE_KEYS; k += 2) {
        const uint16_t *a = s->rows + k * d + c, *b = a + d;
        uint16_t * out = (uint16_t *) (void *) panel + k * ROWS;
        for (int j = 0; j < ROWS; j++) out[2 * j] = a[j], out[2 * j + 1] = b[j];
    }
}

static void attend_many(const attention_work * a) {
    many_scratch * s = (many_scratch *) (void *) a->scratch;
    const int d = filled(a->d), n_rows = a->n * a->group, n_keys = most_visible(a);
    const float scale = 1.0f / sqrtf((float) a->d);
    memset(s->row, 0, (size_t) d * sizeof *s->row);
    for (int r = 0; r < n_rows; r++) {
        for (int c = 0; c < a->d; c++) s->row[c] = query_row(a, r)[c] * scale;
        round_row(s->row, d, s->q + (size_t) r * row_size(d));
        s->max[r] = -INFINITY;
        s->sum[r] = 0.0f;
    }
    for (int j = 0; j < ROWS; j++) s->ones[j] = 1.0f;
    for (int c = 0; c < d / ROWS; c++) memset(s->out[c], 0, (size_t) n_rows * ROWS * sizeof(float));
    for (int p0 = 0; p0 < n_keys; p0 += TILE_KEYS) {
        const int n_here = n_keys - p0 < TILE_KEYS ? n_keys - p0 : TILE_KEYS;
        int first = 0; // rows before it see nothing here
        while (first < n_rows && seen_by(a, first, p0, n_here) == 0) first++;
        const int n = n_rows - first;
        load_rows(a, a->k, a->k_stride, a->k_type, p0, n_here, s);
        for (int h = 0; h < TILE_KEYS / ROWS; h++) {
            transpose((const char *) (s->rows + h * ROWS * d), 2 * (size_t) d, d / 2, s->panel);
            memset(s->s[h] + first * ROWS, 0, (size_t) n * ROWS * sizeof(float));
            multiply_rows(n, d, s->panel, s->row_scales + h * ROWS, s->q + (size_t) first * row_size(d),
                          s->s[h] + first * ROWS);
        }
        load_rows(a, a->v, a->v_stride, a->v_type, p0, n_here, s);
        fold_rows(a, first, n_rows, p0, n_here, s);
        for (int c = 0; c < d / ROWS; c++) {
            value_panel(s, d, c * ROWS, s->panel);
            multiply_rows(n, TILE_KEYS, s->panel, s->ones, s->weights + (size_t) first * row_size(TILE_KEYS),
                          s->out[c] + first * ROWS);
        }
    }
    for (int r = 0; r < n_rows; r++) {
        for (int c = 0; c < a->d; c += ROWS)
            write_row(a, r, s->out[c / ROWS] + r * ROWS, c, a->d - c < ROWS ? a->d - c : ROWS, s->sum[r]);
    }
}
