// micro_round.h - part of micro_code.h: activations are normalised and quantised.
#pragma once

// The largest magnitude; NaN if a number of the block is not finite, so that the result is NaN, too.
INLINE float top_of(const float * x, int n) {
    vf top = vf_set(0.0f), wrong = vf_set(0.0f);
    for (int k = 0; k < n; k += LANES) {
        top = vf_max_abs(top, vf_load(x + k));
        wrong = vf_fma(vf_load(x + k), vf_set(0.0f), wrong);
    }
    return vf_top(top) + vf_sum(wrong);
}

// Real activations have a few channels tens of times larger than the rest: quantised with one scale, the rest
// would lose most of its bits. So a block of 256 inputs is rotated first, and weights with it: every fourth
// input, 64 of them, become 64 sums of them with signs, a Hadamard matrix (times 8), which is orthogonal, so
// that no product changes. One matrix of 256 would be no better (bench/RESULTS.md). Number 4 s + c is the sum
// of the inputs 4 i + c, with a minus where popcount(s & i) is odd.
#define ROTATION_GAIN 64.0f // the factor by which products of rotated numbers are too large

// n vectors, `apart` places from each other, become their sums with signs.
#define SUMS(type, v, n, apart)                                                                              \
    _Pragma("GCC unroll 4") for (int step_ = 1; step_ < (n); step_ *= 2) {                                   \
        _Pragma("GCC unroll 16") for (int i_ = 0; i_ < (n); i_++) {                                          \
            if (i_ & step_) continue;                                                                        \
            const type a_ = (v)[(apart) * i_], b_ = (v)[(apart) * (i_ + step_)];                             \
            (v)[(apart) * i_] = a_ + b_;                                                                     \
            (v)[(apart) * (i_ + step_)] = a_ - b_;                                                           \
        }                                                                                                    \
    }

typedef struct block_vf {
    vf v[BLOCK / LANES];
} block_vf;
typedef struct range {
    vf top, bottom;
} range;

#define LINE (16 / LANES) // vectors of 16 numbers

// The sums of every fourth of 16 numbers.
INLINE void rotate_line(vf * v) {
#if LANES == 16
    static const float SIGNS[2][16] = { { 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1 },
                                        { 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1 } };
    const vf u =
        vf_fma(v[0], vf_load(SIGNS[0]),
               __builtin_shufflevector(v[0], v[0], 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v[0] = vf_fma(u, vf_load(SIGNS[1]),
                  __builtin_shufflevector(u, u, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
#else
#if LANES == 8
    static const float SIGNS[8] = { 1, 1, 1, 1, -1, -1, -1, -1 };
    for (int i = 0; i < 2; i++)
        v[i] = vf_fma(v[i], vf_load(SIGNS), __builtin_shufflevector(v[i], v[i], 4, 5, 6, 7, 0, 1, 2, 3));
#endif
    SUMS(vf, v, LINE, 1)
#endif
}

// Gives each lane's largest and smallest number; NaN among them where one of the block was not finite.
INLINE range rotate(block_vf * x) {
    vf top = vf_set(-INFINITY), bottom = vf_set(INFINITY);
#pragma GCC unroll 4
    for (int first = 0; first < LINE; first++) SUMS(vf, x->v + first, 16, LINE)
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK / LANES; i += LINE) {
        rotate_line(x->v + i);
#pragma GCC unroll 4
        for (int j = i; j < i + LINE; j++) {
            top = vf_max(top, x->v[j]);
            bottom = vf_min(bottom, x->v[j]);
        }
    }
    const vf wrong = vf_mul(x->v[0], vf_set(0.0f)); // in its first four numbers are all others
    return (range) { top + wrong, bottom + wrong };
}

// A rotated block as bytes factor x + offset; flip: these bits of each byte. Gives their sum, spread over
// lanes, before that.
INLINE vi put_bytes(const block_vf * x, float factor_, float offset_, int flip, char * out) {
    const vf factor = vf_set(factor_), offset = vf_set(offset_);
    const vi flips = vi_set((int32_t) ((uint32_t) flip * 0x01010101u));
    vi sum = vi_zero();
#pragma GCC unroll 4
    for (int k = 0; k < BLOCK; k += 4 * LANES) {
        vi q[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            q[i] = vi_round(vf_fma(x->v[k / LANES + i], factor, offset));
            sum = vi_add(sum, q[i]);
        }
        vi_store(out + k, vi_bytes(q[0], q[1], q[2], q[3]) ^ flips);
    }
    return sum;
}

// NaN stays NaN.
INLINE float top_lane(vf x) { return vf_top(x) + vf_sum(x) * 0.0f; }

// The largest magnitude.
INLINE float size_of(range r) { return top_lane(vf_max_abs(vf_max_abs(vf_set(0.0f), r.top), r.bottom)); }

// Numbers beyond n are 0.
INLINE block_vf load_block(const float * x, int64_t n) {
    float some[BLOCK];
    block_vf block;
    if (n < BLOCK) {
        memset(some, 0, sizeof some);
        x = memcpy(some, x, (size_t) n * sizeof *x);
    }
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK / LANES; i++) block.v[i] = vf_load(x + LANES * i);
    return block;
}

static void round8(const float * x, int64_t n_in, char * out) {
    const rounded at = rounded8_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        block_vf block = load_block(x + k0, n_in - k0);
        const float top = size_of(rotate(&block));
        const float scale = top / ROUND8_TOP;
        const vi sums = put_bytes(&block, inverse_of(top, ROUND8_TOP), 0.0f, 0, out + k0);
        const float total = (float) vi_sum(sums) * scale;
        memcpy(out + at.scales + k0 / BLOCK * 4, &scale, 4);
        memcpy(out + at.sums + k0 / BLOCK * 4, &total, 4);
    }
}

#if defined(DIRECT)

// One scale for each 32 numbers, so that an outlier affects only its own 32: weights are not rotated here.
static void round_direct(const float * x, int64_t n_in, char * out) {
    const rounded at = rounded_direct_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += GROUP) {
        const float top = top_of(x + k0, GROUP), inverse = inverse_of(top, ROUND8_TOP);
        const float scale = top / ROUND8_TOP;
        float sums[2];
        for (int h = 0; h < 2; h++) {
            vi sum = vi_zero();
            for (int64_t k = k0 + 16 * h; k < k0 + 16 * h + 16; k += LANES) {
                const vi q = vi_round(vf_mul(vf_load(x + k), vf_set(inverse)));
                vi_store8(out + k, q);
                sum = vi_add(sum, q);
            }
            sums[h] = (float) vi_sum(sum) * scale;
        }
        const float both = sums[0] + sums[1];
        char * block = out + at.sums + 4 * DIRECT_SUMS * (k0 / BLOCK);
        memcpy(block + k0 % BLOCK / 16 * 4, sums, sizeof sums);
        memcpy(block + 4 * DIRECT_PAIRS + k0 % BLOCK / GROUP * 4, &both, sizeof both);
        memcpy(out + at.scales + k0 / GROUP * 4, &scale, sizeof scale);
    }
}

#endif

// n numbers as int16 up to most; their scale.
INLINE float round_words(const float * x, int n, float most, char * out) {
    const float top = top_of(x, n), inverse = inverse_of(top, most);
    for (int k = 0; k < n; k += LANES)
        vi_store16(out + 2 * k, vi_round(vf_mul(vf_load(x + k), vf_set(inverse))));
    return top / most;
}

// A rotated block as int16 up to most.
INLINE void put_words(const block_vf * x, float top, float most, char * out) {
    const vf factor = vf_set(inverse_of(top, most));
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK / LANES; i++)
        vi_store16(out + 2 * LANES * i, vi_round(vf_mul(x->v[i], factor)));
}

static void round16(const float * x, int64_t n_in, char * out) {
    const rounded at = rounded16_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        block_vf block = load_block(x + k0, n_in - k0);
        const float top = size_of(rotate(&block)), scale = top / ROUND16_TOP;
        put_words(&block, top, ROUND16_TOP, out + 2 * k0);
        memcpy(out + at.scales + k0 / BLOCK * 4, &scale, 4);
    }
}

// In the order that the dot products of q8_0 and q4_0 read.
static void round_dots(const float * x, int64_t n_in, char * out) {
    const rounded at = rounded16_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const int n = (int) (n_in - k0 < BLOCK ? n_in - k0 : BLOCK);
        int16_t q[BLOCK] = { 0 }, *to = (int16_t *) (void *) (out + 2 * k0);
        const float scale = round_words(x + k0, n, ROUND16_TOP, (char *) q);
        memcpy(out + at.scales + k0 / BLOCK * 4, &scale, 4);
        for (int u = 0; u < n; u += 64) {
            for (int i = 0; i < 32; i++) to[u + i] = q[u + 2 * i], to[u + 32 + i] = q[u + 2 * i + 1];
        }
    }
}

// For the dot products of K types: of each 64 numbers, 8 from the first offset and 8 from the second; of each
// 256, the high bytes, then the low ones.
static const uint8_t DEALT[4][2] = { { 0, 40 }, { 8, 32 }, { 16, 56 }, { 24, 48 } };

static void round_k(const float * x, int64_t n_in, char * out) {
    const rounded at = rounded_k_of(n_in);
    for (int64_t b = 0; b < n_in / BLOCK; b++) {
        int16_t q[BLOCK];
        int8_t * to = (int8_t *) out + 2 * BLOCK * b;
        const float scale = round_words(x + b * BLOCK, BLOCK, ROUND_K_TOP, (char *) q);
        memcpy(out + at.scales + 4 * b, &scale, 4);
        int8_t bytes[2][BLOCK]; // high and low ones
        for (int i = 0; i < BLOCK; i++) {
            const int16_t high = (int16_t) ((q[i] + 64) >> 7);
            bytes[0][i] = (int8_t) high;
            bytes[1][i] = (int8_t) (q[i] - 128 * high);
        }
        for (int i = 0; i < 2 * BLOCK; i += 8) {
            const int at = i % BLOCK;
            memcpy(to + i, bytes[i / BLOCK] + 64 * (at / 16 % 4) + DEALT[at / 64][at / 8 % 2], 8);
        }
        for (int g = 0; g < 16; g++) {
            int32_t sum = 0;
            for (int i = 0; i < 16; i++) sum += q[16 * g + i];
            const float total = (float) sum * scale;
            memcpy(out + at.sums + (16 * b + g) * 4, &total, 4);
        }
    }
}

// ------------------------------------------------------------------------------------------- norms

static void rms_norm(const float * x, const float * w, float eps, int64_t n, float * out) {
    vf squares = vf_set(0.0f);
    for (int64_t k = 0; k < n; k += LANES) squares = vf_fma(vf_load(x + k), vf_load(x + k), squares);
    const vf scale = vf_set(1.0f / sqrtf(vf_sum(squares) / (float) n + eps));
    for (int64_t k = 0; k < n; k += LANES)
        vf_store(out + k, vf_mul(vf_mul(vf_load(x + k), scale), vf_load(w + k)));
}

static void layer_norm(const float * x, const float * w, const float * b, float eps, int64_t n, float * out) {
    const vf one = vf_set(1.0f);
    vf sum = vf_set(0.0f), squares = sum;
    for (int64_t k = 0; k < n; k += LANES) sum = vf_fma(vf_load(x + k), one, sum);
    const vf mean = vf_set(vf_sum(sum) / (float) n);
    for (int64_t k = 0; k < n; k += LANES) {
        const vf centred = vf_fnma(mean, one, vf_load(x + k));
        squares = vf_fma(centred, centred, squares);
        vf_store(out + k, centred);
    }
    const vf scale = vf_set(1.0f / sqrtf(vf_sum(squares) / (float) n + eps));
    for (int64_t k = 0; k < n; k += LANES)
        vf_store(out + k, vf_fma(vf_mul(vf_load(out + k), scale), vf_load(w + k), vf_load(b + k)));
}
