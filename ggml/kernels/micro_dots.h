// micro_dots.h - part of micro_code.h, few tokens: dot products with weights as the file has them.
#pragma once

// BY_COUNT defines a table's function from a loop for a constant number of rows and tokens. Inputs are read
// in chunks that stay in the L1 cache for a few rows. With more than two tokens, as many rows share each load
// of activations as there are registers for: of quantised weights for a block, of floats for their sums. The
// sums of a row are kept in memory between chunks: their order is that of one token alone. The last macro
// arguments are passed to the loop.
#if LANES == 16
#define QUANTISED_ROWS(count) 2
#define DOT_GROUPS            8 // of 32 numbers of q8_0 and q4_0: their weights are in registers
#else
#define QUANTISED_ROWS(count) 1
#define DOT_GROUPS            4
#endif
#define FLOAT_ROWS(count) (LANES != 8 || (count) <= 4 ? 2 : 1) // 8 lanes: 16 registers
#define SOME_ROWS         16
#define X_CHUNK           8192 // numbers of all tokens
#define PREFETCH          4096 // bytes ahead: hardware prefetch stops at each page
#define AHEAD             4    // rows ahead, in the order in which chunks are read
#define ROWS_OF(loop, together, count, ...)                                                                  \
    for (int r0 = 0; r0 < n_rows; r0 += SOME_ROWS) {                                                         \
        const int n_here = n_rows - r0 < SOME_ROWS ? n_rows - r0 : SOME_ROWS;                                \
        const int64_t chunk = chunk_of(count, n_in);                                                         \
        vf acc[SOME_ROWS][FEW_TOKENS] = { 0 };                                                               \
        for (int64_t k = 0; k < n_in; k += chunk) {                                                          \
            dots_part p = { k, n_in - k < chunk ? n_in : k + chunk, n_in, row_size, x, stride, PREFETCH };   \
            const char * row = w + (size_t) r0 * row_size;                                                   \
            int r = 0;                                                                                       \
            for (; (count) > 2 && r + (together) <= n_here; r += (together), row += (together) * row_size) { \
                p.ahead = bytes_ahead(&p, chunk, r, n_here);                                                 \
                loop(together, count, &p, row, acc + r, __VA_ARGS__);                                        \
            }                                                                                                \
            for (; r < n_here; r++, row += row_size) loop(1, count, &p, row, acc + r, __VA_ARGS__);          \
        }                                                                                                    \
        for (int r = 0; r < n_here; r++)                                                                     \
            for (int i = 0; i < (count); i++) out[(r0 + r) * FEW_TOKENS + i] = vf_sum(acc[r][i]);            \
    }

typedef struct dots_part { // inputs first to end - 1 of n_in, tokens of stride bytes
    int64_t first, end, n_in;
    size_t row_size;
    const char * x;
    size_t stride;
    ptrdiff_t ahead; // bytes to prefetch ahead
} dots_part;

// Inputs of a chunk: all chunks of a row are about equally long.
INLINE int64_t chunk_of(int n_tokens, int64_t n_in) {
    const int64_t most = X_CHUNK / n_tokens / BLOCK * BLOCK, n = n_tokens < 3 ? 1 : (n_in + most - 1) / most;
    return (n_in + n * BLOCK - 1) / (n * BLOCK) * BLOCK;
}

// From the chunk of row r to that of the row that is read AHEAD rows later: with the same inputs, with the
// next ones, or, after the last ones, with the first ones of rows that follow these n.
INLINE ptrdiff_t bytes_ahead(const dots_part * p, int64_t chunk, int r, int n) {
    const ptrdiff_t row = (ptrdiff_t) p->row_size;
    if (r + AHEAD < n) return AHEAD * row;
    if (p->end < p->n_in) return (AHEAD - n) * row + (ptrdiff_t) (row * chunk / p->n_in);
    return AHEAD * row - (ptrdiff_t) (row * p->first / p->n_in);
}

#if defined(COMPACT) // one loop for any number of tokens: small and quickly compiled
#define BY_COUNT(name, loop, together, ...)                                                                  \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        ROWS_OF(loop, together(n), n, __VA_ARGS__)                                                           \
    }
#else
#define CASE_OF(loop, together, count, ...)                                                                  \
    case count: ROWS_OF(loop, together(count), count, __VA_ARGS__) break;
#define BY_COUNT(name, loop, together, ...)                                                                  \
    static void name(int n_rows, int n, int64_t n_in, const char * w, size_t row_size, const char * x,       \
                     size_t stride, float * out) {                                                           \
        switch (n) {                                                                                         \
            CASE_OF(loop, together, 1, __VA_ARGS__)                                                          \
            CASE_OF(loop, together, 2, __VA_ARGS__)                                                          \
            CASE_OF(loop, together, 3, __VA_ARGS__)                                                          \
            CASE_OF(loop, together, 4, __VA_ARGS__)                                                          \
            CASE_OF(loop, together, 5, __VA_ARGS__)                                                          \
            CASE_OF(loop, together, 6, __VA_ARGS__)                                                          \
            CASE_OF(loop, together, 7, __VA_ARGS__)                                                          \
            CASE_OF(loop, together, 8, __VA_ARGS__)                                                          \
        }                                                                                                    \
    }
#endif
// The sums of two rows need more registers than there are: compilers would spill other values for them.
#define LEAVE_IN_MEMORY(n_rows)                                                                              \
    if (n_rows > 1) __asm__ volatile("" ::: "memory")
#define EACH_ROW(r) _Pragma("GCC unroll 2") for (int r = 0; r < n_rows; r++)
#define EACH(i)     _Pragma("GCC unroll 8") for (int i = 0; i < n && i < FEW_TOKENS; i++)
#define IN_TURN(i)  _Pragma("GCC unroll 1") for (int i = 0; i < n; i++) // processors decode short loops once

// K types: a block's 256 weights q of at most 6 bits as four vectors of 64 bytes, dealt so that the lanes of
// vectors 0 and 1 belong to the same groups of 16, and those of 2 and 3, so that their products can be added
// before they are scaled. In each 16 bytes i of a vector lie 8 weights from 64 i + first and 8 from 64 i +
// second (DEALT), as the quantised activations do. Those have 14 bits, in two bytes. With low_p the constant
// of group p,
//   w . x = x_scale sum_p scale_p (q . x)_p - sum_p low_p sum(x)_p .
// q4_k and q5_k have one scale and constant for two groups of 16: all four vectors share theirs.
#define PARTS (16 / LANES) // vectors that 64 bytes take

typedef struct weights_k {
    vi q[4][PARTS];
    scales_k s;
} weights_k;

static const uint32_t NIBBLE_45[16] = { 0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4 };
static const uint32_t NIBBLE_6[16] = { 0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4 };
static const uint32_t BIT_5[16] = { 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7 };
static const uint32_t BITS_6[16] = { 0, 0, 2, 2, 4, 4, 6, 6, 0, 0, 2, 2, 4, 4, 6, 6 };

INLINE vu vu_load(const void * p) { return *(const vu *) p; }
INLINE vu each_byte(vu x, uint32_t mask) { return x & (mask * 0x01010101u); }

INLINE void unpack_45(const char * w, const int bits, weights_k * out) {
    const block_q4_k * b4 = (const void *) w;
    const block_q5_k * b5 = (const void *) w;
    scales_of_45(w, &out->s);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const vu nibble = vu_load(NIBBLE_45 + LANES * p), bit = vu_load(BIT_5 + LANES * p);
        vi dealt[2];
        deal((bits == 4 ? b4->q : b5->q) + 8 * LANES * p, &dealt[0], &dealt[1]);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vu a = each_byte((vu) dealt[j] >> nibble, 15), b = each_byte((vu) swap(dealt[j]) >> nibble, 15);
            if (bits == 5) {
                const vi fifth = to_all(b5->high + 16 * j);
                a |= each_byte((vu) fifth >> bit, 1) << 4;
                b |= each_byte((vu) swap(fifth) >> bit, 1) << 4;
            }
            out->q[2 * j][p] = (vi) a;
            out->q[2 * j + 1][p] = (vi) b;
        }
    }
}

INLINE void unpack_6(const char * w, weights_k * out) {
    const block_q6_k * b = (const void *) w;
    scales_of_6(b->scales, b->d, &out->s);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const vu nibble = vu_load(NIBBLE_6 + LANES * p), bits = vu_load(BITS_6 + LANES * p);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const vi top = twice(b->high + 16 * j, 32, p);
            const vi low = twice(b->low + 16 * j, 64, p), high = twice(b->low + 32 + 16 * j, 64, p);
            out->q[2 * j][p] =
                (vi) (each_byte((vu) outer(low, high) >> nibble, 15) | each_byte((vu) top >> bits, 3) << 4);
            out->q[2 * j + 1][p] = (vi) (each_byte((vu) inner(low, high) >> nibble, 15) |
                                         each_byte((vu) swap(top) >> bits, 3) << 4);
        }
    }
}

// sum_p scale_p (q . x)_p of a block, spread over lanes: x is 128 times what lies at x, plus what lies BLOCK
// bytes behind it.
#if defined(DIRECT) // in integers up to the block's own scale: see micro_direct.h

INLINE vi direct_products(const weights_k * k, const char * x, const int bits) {
    vi sum = vi_zero();
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const char * from = x + 4 * LANES * p;
        vi a = pairs(k->q[0][p], vi_load(from));
        ADD_PAIRS(a, k->q[1][p], vi_load(from + 64));
        if (bits == 6) { // more would not fit into 16 bits
            sum = dot_pairs(sum, a, k->s.scale[0][p]);
            a = pairs(k->q[2][p], vi_load(from + 128));
        } else {
            ADD_PAIRS(a, k->q[2][p], vi_load(from + 128));
        }
        ADD_PAIRS(a, k->q[3][p], vi_load(from + 192));
        sum = dot_pairs(sum, a, k->s.scale[1][p]);
    }
    return sum;
}

INLINE void scaled_products(const int n_rows, const weights_k * k, const char * x, const int bits, vf * out) {
    EACH_ROW(r) {
        const vf high = vf_of(direct_products(&k[r], x, bits)),
                 low = vf_of(direct_products(&k[r], x + BLOCK, bits));
        out[r] = vf_mul(vf_fma(high, vf_set(128.0f), low), vf_set(k[r].s.d));
    }
}

#else

INLINE void scaled_products(const int n_rows, const weights_k * k, const char * x, const int bits, vf * out) {
    EACH_ROW(r) out[r] = vf_set(0.0f);
    const int together = bits == 6 ? 2 : 4;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        const char * from = x + 4 * LANES * p;
#pragma GCC unroll 2
        for (int first = 0; first < 4; first += together) {
            vi high[2] = { vi_zero(), vi_zero() }, low[2] = { vi_zero(), vi_zero() };
#pragma GCC unroll 4
            for (int j = first; j < first + together; j++) {
                const vi v = vi_shared(from + 64 * j, n_rows), u = vi_shared(from + BLOCK + 64 * j, n_rows);
                EACH_ROW(r) high[r] = dot_small(high[r], k[r].q[j][p], v);
                EACH_ROW(r) low[r] = dot_small(low[r], k[r].q[j][p], u);
            }
            vi dots[2];
            EACH_ROW(r) dots[r] = vi_add((vi) ((vl) high[r] << 7), low[r]);
            EACH_ROW(r) out[r] = vf_fma(vf_of(dots[r]), k[r].s.scale[first / 2][p], out[r]);
        }
    }
}

#endif

INLINE void dot_k_n(const int n_rows, const int n, const dots_part * p, const char * w,
                    vf (*sums)[FEW_TOKENS], const int bits, const size_t size) {
    const rounded at = rounded_k_of(p->n_in);
    w += p->first / BLOCK * (int64_t) size;
    for (int64_t b = p->first / BLOCK; b < p->end / BLOCK; b++, w += size) {
        weights_k k[2];
        LEAVE_IN_MEMORY(n_rows);
        EACH_ROW(r) {
            const char * row = w + (size_t) r * p->row_size;
            for (size_t line = 0; line < size; line += 64) __builtin_prefetch(row + p->ahead + line);
            if (bits == 6) unpack_6(row, &k[r]);
            else unpack_45(row, bits, &k[r]);
        }
        IN_TURN(i) {
            const char * x = p->x + i * p->stride;
            const vf scale = vf_set(float_at(x + at.scales + 4 * b));
            vf dots[2];
            scaled_products(n_rows, k, x + 2 * BLOCK * b, bits, dots);
            EACH_ROW(r) {
                vf acc = vf_fma(dots[r], scale, sums[r][i]);
#pragma GCC unroll 4
                for (int q = 0; q < PARTS; q++) {
                    const float * parts = (const float *) (const void *) (x + at.sums + 64 * b) + LANES * q;
                    acc = vf_fnma(k[r].s.low[q], vf_load(parts), acc);
                }
                sums[r][i] = acc;
            }
        }
    }
}

// q8_0 and q4_0: two groups of 32 bytes as words, even bytes apart from odd ones. Activations are dealt
// likewise (round_dots): of each 64 the even ones of the first 32, the even ones of the last 32, the odd ones
// of the first, the odd ones of the last.
INLINE b32 group_of_0(const char * block, const int bits) {
    if (bits == 8) return b32_load(((const block_q8_0 *) (const void *) block)->q);
    const b32 two = b32_two(((const block_q4_0 *) (const void *) block)->q);
    return b32_less(b32_halves(b32_low(two), b32_high(two)), 8);
}

#define EACH_PAIR(j) _Pragma("GCC unroll 4") for (int j = 0; j < DOT_GROUPS / 2; j++)

// A block of rows, from input k on: the groups whose weights there are registers for, after each other. The
// file's blocks begin with their scale.
INLINE void dot_0_block(const int n_rows, const int n, const dots_part * p, const char * w, size_t row_size,
                        int64_t k, vf (*sums)[FEW_TOKENS], const int bits, const size_t size) {
    const rounded at = rounded16_of(p->n_in);
    vf parts[2][FEW_TOKENS];
    EACH_ROW(r) EACH(i) parts[r][i] = vf_set(0.0f);
#pragma GCC unroll 2
    for (int g = 0; g < BLOCK / GROUP; g += DOT_GROUPS) {
        h32 even[2][4], odd[2][4];
        float d[2][4][2];
        LEAVE_IN_MEMORY(n_rows);
        EACH_ROW(r) EACH_PAIR(j) {
            const char * block = w + (size_t) r * row_size + (size_t) (g + 2 * j) * size;
            const h32 q = h32_two(group_of_0(block, bits), group_of_0(block + size, bits));
            even[r][j] = h32_down_signed(h32_up(q, 8), 8), odd[r][j] = h32_down_signed(q, 8);
            d[r][j][0] = half(((const block_q8_0 *) (const void *) block)->d);
            d[r][j][1] = half(((const block_q8_0 *) (const void *) (block + size))->d);
            __builtin_prefetch(block + p->ahead);
            __builtin_prefetch(block + p->ahead + size);
        }
        IN_TURN(i) {
            const char * x = p->x + i * p->stride;
            vf part[2];
            EACH_ROW(r) part[r] = g ? parts[r][i] : vf_set(0.0f);
            EACH_PAIR(j) {
                const x64 v = x64_load((const int16_t *) (const void *) x + k + 32 * g + 64 * j, n_rows);
                EACH_ROW(r)
                part[r] = dot64_scaled(part[r], even[r][j], odd[r][j], v, d[r][j][0], d[r][j][1]);
            }
            const vf scale = vf_set(float_at(x + at.scales + k / BLOCK * 4));
            EACH_ROW(r) {
                if (g + DOT_GROUPS < BLOCK / GROUP) parts[r][i] = part[r];
                else sums[r][i] = vf_fma(part[r], scale, sums[r][i]);
            }
        }
    }
}

INLINE void dot_0_n(const int n_rows, const int n, const dots_part * p, const char * w,
                    vf (*sums)[FEW_TOKENS], const int bits, const size_t size) {
    const size_t whole = BLOCK / GROUP * size;
    int64_t k = p->first;
    w += (size_t) (k / BLOCK) * whole;
    for (; k + BLOCK <= p->end; k += BLOCK, w += whole)
        dot_0_block(n_rows, n, p, w, p->row_size, k, sums, bits, size);
    if (k == p->end) return;
    char left[2 * BLOCK / GROUP * sizeof(block_q8_0)] = { 0 }; // what is left of the rows, then zeros
    EACH_ROW(r)
    memcpy(left + (size_t) r * whole, w + (size_t) r * p->row_size, (size_t) (p->end - k) / GROUP * size);
    dots_part last = *p;
    last.ahead = 0;
    dot_0_block(n_rows, n, &last, left, whole, k, sums, bits, size);
}

INLINE vf load_number(const char * w, int64_t k, const int bits) { // LANES of them
    return bits == 32   ? vf_load((const float *) (const void *) w + k)
           : bits == 16 ? vf_of_f16(w + 2 * k)
                        : vf_of_bf16(w + 2 * k);
}

// Floats: bits 32, 16 (f16) or 0 (bf16). What is left of a row ends in zeros.
INLINE void dot_floats_n(const int n_rows, const int n, const dots_part * p, const char * w,
                         vf (*sums)[FEW_TOKENS], const int bits) {
    const int64_t size = bits == 32 ? 4 : 2, whole = p->first + (p->end - p->first) / LANES * LANES;
    vf acc[2][FEW_TOKENS];
    EACH_ROW(r) EACH(i) acc[r][i] = sums[r][i];
    for (int64_t k = p->first; k < whole; k += LANES) {
        vf v[2];
        EACH_ROW(r) {
            const char * row = w + (size_t) r * p->row_size;
            __builtin_prefetch(row + k * size + p->ahead);
            v[r] = load_number(row, k, bits);
        }
        EACH(i) {
            const vf x = vf_load((const float *) (const void *) (p->x + i * p->stride) + k);
            EACH_ROW(r) acc[r][i] = vf_fma(v[r], x, acc[r][i]);
        }
    }
    EACH_ROW(r) EACH(i) sums[r][i] = acc[r][i];
    if (whole == p->end) return;
    EACH_ROW(r) {
        char left[4 * LANES] = { 0 };
        memcpy(left, w + (size_t) r * p->row_size + whole * size, (size_t) ((p->end - whole) * size));
        const vf v = load_number(left, 0, bits);
        EACH(i) {
            float y[LANES] = { 0.0f };
            memcpy(y, p->x + i * p->stride + 4 * whole, (size_t) (4 * (p->end - whole)));
            sums[r][i] = vf_fma(v, vf_load(y), sums[r][i]);
        }
    }
}

BY_COUNT(dot_q4_k, dot_k_n, QUANTISED_ROWS, 4, sizeof(block_q4_k))
BY_COUNT(dot_q5_k, dot_k_n, QUANTISED_ROWS, 5, sizeof(block_q5_k))
BY_COUNT(dot_q6_k, dot_k_n, QUANTISED_ROWS, 6, sizeof(block_q6_k))
BY_COUNT(dot_q8_0, dot_0_n, QUANTISED_ROWS, 8, sizeof(block_q8_0))
BY_COUNT(dot_q4_0, dot_0_n, QUANTISED_ROWS, 4, sizeof(block_q4_0))
BY_COUNT(dot_f32, dot_floats_n, FLOAT_ROWS, 32)
BY_COUNT(dot_f16, dot_floats_n, FLOAT_ROWS, 16)
BY_COUNT(dot_bf16, dot_floats_n, FLOAT_ROWS, 0)
