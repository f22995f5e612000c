// micro_columns.h - part of micro_code.h, many tokens: weights of quantised types become rotated panels of
// int8, in integers. A vector holds a column of LANES rows, four inputs of each as bytes or two of them as
// words, so that no number changes its lane, and the result has the panel's layout.
//
// Within a group of 32 inputs, those that are rotated together are summed with signs while they are still the
// file's small integers, which is exact. Only these sums are multiplied with the group's step and rounded to
// words; the offset of a group is added to its first sum. In words, weights are at most WORD_TOP on average
// over the groups, so that the sums over all groups fit into words and are exact again. The last step rounds
// to bytes, between a row's smallest and largest sum; the rounding to words adds a fiftieth of that error.
#pragma once

#define WORD_TOP 511.0f // 64 of them fit

typedef uint8_t vu8 __attribute__((vector_size(4 * LANES)));
typedef uint16_t vu16 __attribute__((vector_size(4 * LANES)));
typedef int16_t vs16 __attribute__((vector_size(4 * LANES)));

typedef struct columns {
    const char * rows[LANES];
    vi raw[BLOCK / 4];        // the block as the file has it, but for the scales of q4_0 and q8_0
    vf step[16], low[8];      // of the groups: q6_k has 16, others 8; low: of q4_k and q5_k
    vf top, factor;           // the number that becomes WORD_TOP, and the factor for that
    vu16 words[BLOCK / 4][2]; // of four bytes the even ones, the odd ones
} columns;

static __attribute__((noinline)) void load_columns(const columns * c, size_t at, size_t size, vi * out) {
    for (size_t i = 0; i < size / 4; i += 4) columns4(c->rows, at + 4 * i, out + i);
}

INLINE vf halves_at(const columns * c, size_t at) {
    uint16_t d[LANES];
    for (int r = 0; r < LANES; r++) memcpy(d + r, c->rows[r] + at, sizeof *d);
    return vf_of_f16(d);
}

INLINE vf vf_of_byte(vu x, int i) { return vf_of((vi) ((vl) (x << (24 - 8 * i)) >> 24)); }
INLINE vf vf_of_word(vi x, int i) { return vf_of((vi) ((vl) ((vu) x << (16 - 16 * i)) >> 16)); }

// Rounded, in both words of each lane.
INLINE vu16 in_both(vf x) {
    const vu q = (vu) vi_round(x);
    return (vu16) ((q & 0xFFFF) | q << 16);
}

INLINE vu16 times(vu16 x, vu16 y) { return (vu16) vi_times16((vi) x, (vi) y); }

// ------------------------------------------------------------------------------------ steps of groups

// The largest weights of n groups: the maximum, and the sum.
typedef struct group_tops {
    vf most, sum;
} group_tops;

INLINE group_tops no_tops(void) { return (group_tops) { vf_set(0.0f), vf_set(0.0f) }; }

INLINE void add_top(group_tops * t, vf top) {
    t->most = vf_max(t->most, top);
    t->sum = t->sum + top;
}

// No sum is larger than 64 times the mean. A group's own may be three times that: more would not fit into a
// step. NaN stays NaN.
INLINE void set_top(columns * c, group_tops t, float n, float unit) {
    c->top = vf_mul(vf_max(vf_mul(t.most, vf_set(1 / 3.0f)), vf_mul(t.sum, vf_set(1 / n))), vf_set(unit));
    c->factor = vf_choose((vl) (c->top >= 0x1p-100f), vf_set(WORD_TOP) / c->top, vf_set(0.0f));
}

// A group's step for numbers that come multiplied with 2^15 / unit.
INLINE vu16 step_of(const columns * c, int g, float unit) {
    return in_both(vf_mul(vf_mul(c->step[g], vf_set(unit)), c->factor));
}

// Of q4_k and q5_k, the latter's numbers less 16.
INLINE void find_steps_45(columns * c, const int bits) {
    const vf d = halves_at(c, 0), min = halves_at(c, 2);
    const vu a = (vu) c->raw[1], b = (vu) c->raw[2], last = (vu) c->raw[3];
    const vu scales[] = { a & 0x3F3F3F3F, (last & 0x0F0F0F0F) | (a >> 2 & 0x30303030) };
    const vu mins[] = { b & 0x3F3F3F3F, (last >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030) };
    group_tops tops = no_tops();
    for (int g = 0; g < 8; g++) {
        const vf step = vf_mul(vf_of_byte(scales[g / 4], g % 4), d);
        const vf low = vf_mul(vf_of_byte(mins[g / 4], g % 4), min); // is subtracted
        const vf high = vf_fnma(step, vf_set(bits == 5 ? 31.0f : 15.0f), low);
        c->step[g] = step;
        c->low[g] = vf_fnma(step, vf_set(bits == 5 ? 16.0f : 0.0f), low);
        add_top(&tops, vf_max_abs(vf_max_abs(vf_set(0.0f), low), high));
    }
    set_top(c, tops, 8.0f, 1.0f);
}

INLINE void find_steps_6(columns * c) {
    const vf d = halves_at(c, offsetof(block_q6_k, d));
    const vi * scales = c->raw + offsetof(block_q6_k, scales) / 4;
    group_tops tops = no_tops();
    for (int g = 0; g < 16; g++) {
        c->step[g] = vf_mul(vf_of_byte((vu) scales[g / 4], g % 4), d);
        add_top(&tops, vf_max_abs(vf_set(0.0f), c->step[g]));
    }
    set_top(c, tops, 16.0f, 32.0f);
}

// Of q4_0 and q8_0: blocks of a group, which begin with its step.
INLINE void find_steps_0(columns * c, size_t size, float most) {
    group_tops tops = no_tops();
    for (int g = 0; g < 8; g++) {
        c->step[g] = halves_at(c, (size_t) g * size);
        add_top(&tops, vf_max_abs(vf_set(0.0f), c->step[g]));
    }
    set_top(c, tops, 8.0f, most);
}

// ------------------------------------------------------------------------------------- sums of groups

#define EACH_COLUMN(i) _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)

INLINE vu nibbles(vi x, int shift) { return (vu) x >> shift & 0x0F0F0F0F; }

// Signed bytes, 256 times, as words; times a step.
INLINE void scaled_words(const vu8 * q, int n, vu16 step, vu16 (*out)[2]) {
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        out[i][0] = times((vu16) q[i] << 8, step);
        out[i][1] = times((vu16) q[i] & 0xFF00, step);
    }
}

// Numbers q - centre.
INLINE void sum_8(columns * c, int g, vu8 * q, int centre) {
    SUMS(vu8, q, 8, 1)
    q[0] -= (uint8_t) (8 * centre);
    scaled_words(q, 8, step_of(c, g, 128.0f), c->words + 8 * g);
}

INLINE void sum_groups_45(columns * c, const int bits) {
    const vi * q = c->raw + (bits == 5 ? offsetof(block_q5_k, q) : offsetof(block_q4_k, q)) / 4;
    const vi * high = c->raw + offsetof(block_q5_k, high) / 4;
    for (int g = 0; g < 8; g++) {
        vu8 x[8];
        EACH_COLUMN(i) {
            vu n = nibbles(q[g / 2 * 8 + i], g % 2 * 4);
            if (bits == 5) n |= ((vu) high[i] >> g & 0x01010101) << 4;
            x[i] = (vu8) n;
        }
        sum_8(c, g, x, bits == 5 ? 16 : 0);
        const vu16 low = in_both(vf_mul(vf_mul(c->low[g], vf_set(-8.0f)), c->factor));
        for (int p = 0; p < 2; p++) c->words[8 * g][p] += low;
    }
}

// Two steps in a group: 4 numbers are summed before they are scaled.
INLINE void sum_groups_6(columns * c) {
    for (int g = 0; g < 8; g++) {
        const vi * low = c->raw + g / 4 * 16 + g % 2 * 8;
        const vi * high = c->raw + offsetof(block_q6_k, high) / 4 + g / 4 * 8;
        vu8 q[8];
        EACH_COLUMN(i) {
            const vu top = (vu) high[i] >> g % 4 * 2 & 0x03030303;
            q[i] = (vu8) (nibbles(low[i], g % 4 / 2 * 4) | top << 4);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            SUMS(vu8, q + 4 * i, 4, 1)
            q[4 * i] -= 4 * 32;
            scaled_words(q + 4 * i, 4, step_of(c, 2 * g + i, 128.0f), c->words + 8 * g + 4 * i);
        }
        EACH_COLUMN(i) SUMS(vu16, c->words[8 * g] + i, 2, 8)
    }
}

INLINE void sum_groups_4_0(columns * c) {
    for (int g = 0; g < 8; g++) {
        vu8 q[8];
        EACH_COLUMN(i) q[i] = (vu8) nibbles(c->raw[4 * g + i % 4], i / 4 * 4);
        sum_8(c, g, q, 8);
    }
}

// 32 times the numbers: as words, which their sums fill.
INLINE void sum_groups_8_0(columns * c) {
    for (int g = 0; g < 8; g++) {
        const vu16 step = step_of(c, g, 1024.0f);
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            vu16 x[8];
            EACH_COLUMN(i) {
                const vu16 q = (vu16) c->raw[8 * g + i];
                x[i] = (vu16) ((vs16) (p ? q & 0xFF00 : q << 8) >> 3);
            }
            SUMS(vu16, x, 8, 1)
            EACH_COLUMN(i) c->words[8 * g + i][p] = times(x[i], step);
        }
    }
}

static void sum_groups(enum ggml_type type, columns * c) {
    switch (type) {
        case GGML_TYPE_Q4_K:
            load_columns(c, 0, sizeof(block_q4_k), c->raw);
            find_steps_45(c, 4);
            sum_groups_45(c, 4);
            return;
        case GGML_TYPE_Q5_K:
            load_columns(c, 0, sizeof(block_q5_k), c->raw);
            find_steps_45(c, 5);
            sum_groups_45(c, 5);
            return;
        case GGML_TYPE_Q6_K:
            load_columns(c, 0, offsetof(block_q6_k, d), c->raw);
            find_steps_6(c);
            sum_groups_6(c);
            return;
        case GGML_TYPE_Q4_0:
            for (size_t g = 0; g < 8; g++) load_columns(c, g * sizeof(block_q4_0) + 2, 16, c->raw + 4 * g);
            find_steps_0(c, sizeof(block_q4_0), 8.0f);
            sum_groups_4_0(c);
            return;
        default:
            for (size_t g = 0; g < 8; g++) load_columns(c, g * sizeof(block_q8_0) + 2, 32, c->raw + 8 * g);
            find_steps_0(c, sizeof(block_q8_0), 128.0f);
            sum_groups_8_0(c);
    }
}

// ---------------------------------------------------------------------------------------- to a panel

typedef struct range16 {
    vi top, bottom;
} range16;

// Their sums over the groups, 0 among them.
INLINE range16 rotate_columns(columns * c) {
    range16 r = { vi_zero(), vi_zero() };
    for (int i = 0; i < 16; i++) {
        vu16 *words = c->words[0] + i, x[8];
        EACH_COLUMN(g) x[g] = words[16 * g];
        SUMS(vu16, x, 8, 1)
        EACH_COLUMN(g) {
            words[16 * g] = x[g];
            if (g % 2) continue;
            r.top = vi_max16(r.top, vi_max16((vi) x[g], (vi) x[g + 1]));
            r.bottom = vi_min16(r.bottom, vi_min16((vi) x[g], (vi) x[g + 1]));
        }
    }
    return r;
}

// Four bytes: times the factor / 2^15, the even ones and the odd ones, less the smallest.
INLINE vi column_of(const vu16 * words, vu16 factor, vu16 least) {
    const vu16 both = times(words[0], factor) + (times(words[1], factor) << 8);
    return (vi) ((both - least) ^ (W_OFFSET ? 0 : 0x8080));
}

// LANES rows of two columns of a panel, which follow each other.
#if defined(HAS_PAIRS)
#define COLUMN_OF_ROW 8
INLINE void put_columns(vi a, vi b, char * to) {
    vi_store(to, __builtin_shufflevector(a, b, 0, 4, 1, 5));
    vi_store(to + 4 * LANES, __builtin_shufflevector(a, b, 2, 6, 3, 7));
}
#else
#define COLUMN_OF_ROW 4
INLINE void put_columns(vi a, vi b, char * to) {
    vi_store(to, a);
    vi_store(to + 4 * ROWS, b);
}
#endif

INLINE void put_panel(const columns * c, range16 r, char * panel, float * scales) {
    const vf top = vf_max(vf_of_word(r.top, 0), vf_of_word(r.top, 1));
    const vf bottom = vf_min(vf_of_word(r.bottom, 0), vf_of_word(r.bottom, 1));
    // Down to an integer, so that from the smallest to the largest there are no more than 255.
    const vf exact = vf_set(255.0f * 0x1p15f) / (top - bottom) - vf_set(0.501f);
    const vf rounded = vf_of(vi_round(vf_min(exact, vf_set(32767.0f))));
    const vu16 factor = in_both(rounded), least = times(in_both(bottom), factor);
#pragma GCC unroll 2
    for (int s = 0; s < BLOCK / 4; s += 2) {
        const vi a = column_of(c->words[s], factor, least + (least << 8));
        put_columns(a, column_of(c->words[s + 1], factor, least + (least << 8)), panel + 4 * ROWS * s);
    }
    const vf scale = vf_mul(c->top, vf_set(0x1p15f / (WORD_TOP * ROTATION_GAIN))) / rounded;
    vf_store(scales, scale);
    vf_store(scales + ROWS, vf_mul(vf_of_word((vi) least, 0) + vf_set(128.0f - W_OFFSET), scale));
}

INLINE bool has_columns(enum ggml_type type) {
    return type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K || type == GGML_TYPE_Q6_K ||
           type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q8_0;
}

// Of types that has_columns names.
static void pack_columns(enum ggml_type type, const char * w, size_t row_size, int n_rows, char * panel,
                         float * scales) {
    columns c;
    for (int first = 0; first < ROWS; first += LANES) {
        for (int r = first; r < first + LANES; r++)
            c.rows[r - first] = w + (r < n_rows ? (size_t) r * row_size : 0);
        sum_groups(type, &c);
        put_panel(&c, rotate_columns(&c), panel + COLUMN_OF_ROW * first, scales + first);
    }
}
