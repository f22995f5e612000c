// micro_round.h - part of micro_code.h: activations are normalised and rounded.
#pragma once

// NaN where a number of the block is not finite (their difference is), so that the result is, too.
INLINE float top_of(const float * x, int n) {
    vf top = vf_set(0.0f), wrong = vf_set(0.0f);
    for (int k = 0; k < n; k += LANES) {
        top = vf_max_abs(top, vf_load(x + k));
        wrong = vf_fma(vf_load(x + k), vf_set(0.0f), wrong);
    }
    return vf_top(top) + vf_sum(wrong);
}

// direct: sums for direct_panel in place of rounded8's parts: of a block 16 of parts of 16 numbers and 8 of
// groups of 32, int16, every DIRECT_SUMS bytes.
#define DIRECT_SUMS 64

INLINE void round_bytes(const float * x, int64_t n_in, char * out, const bool direct) {
    const rounded8 at = rounded8_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const int n = (int) (n_in - k0 < BLOCK ? n_in - k0 : BLOCK);
        const float top = top_of(x + k0, n), inverse = inverse_of(top, ROUND8_TOP);
        const float scale = top / ROUND8_TOP;
        int32_t total = 0;
        int16_t sums[24] = { 0 };
        for (int part = 0; part < n; part += 16) {
            vi sum = vi_zero();
            for (int k = part; k < part + 16; k += LANES) {
                vi q = vi_round(vf_mul(vf_load(x + k0 + k), vf_set(inverse)));
                vi_store8(out + k0 + k, q);
                sum = vi_add(sum, q);
            }
            const int32_t n_here = vi_sum(sum);
            const float scaled = (float) n_here * scale;
            if (!direct) memcpy(out + at.parts + (k0 + part) / 16 * 4, &scaled, 4);
            sums[part / 16] = (int16_t) n_here;
            sums[16 + part / 32] = (int16_t) (sums[16 + part / 32] + n_here);
            total += n_here;
        }
        if (direct) memcpy(out + at.parts + k0 / BLOCK * DIRECT_SUMS, sums, sizeof sums);
        memcpy(out + at.scales + k0 / BLOCK * 4, &scale, 4);
        memcpy(out + at.sums + k0 / BLOCK * 4, &total, 4);
    }
}

static void round8(const float * x, int64_t n_in, char * out) { round_bytes(x, n_in, out, false); }

// As round8 for whole blocks, in the order of K types' dots (dot_k_n): of each 64, 8 from here, 8 from there.
static const uint8_t DEALT[4][2] = { { 0, 40 }, { 8, 32 }, { 16, 56 }, { 24, 48 } };

static void round_k(const float * x, int64_t n_in, char * out) {
    round8(x, n_in, out);
    for (int64_t b = 0; b < n_in / BLOCK; b++) {
        char natural[BLOCK];
        memcpy(natural, out + b * BLOCK, BLOCK);
        for (int i = 0; i < 32; i++)
            memcpy(out + b * BLOCK + 8 * i, natural + 64 * (i / 2 % 4) + DEALT[i / 8][i % 2], 8);
    }
}

#if defined(DIRECT)

static void round_direct(const float * x, int64_t n_in, char * out) { round_bytes(x, n_in, out, true); }

#endif

// n numbers as int16 up to most; their scale.
INLINE float round_words(const float * x, int n, float most, char * out) {
    const float top = top_of(x, n), inverse = inverse_of(top, most);
    for (int k = 0; k < n; k += LANES)
        vi_store16(out + 2 * k, vi_round(vf_mul(vf_load(x + k), vf_set(inverse))));
    return top / most;
}

static void round16(const float * x, int64_t n_in, char * out) {
    const rounded16 at = rounded16_of(n_in);
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        const int n = (int) (n_in - k0 < BLOCK ? n_in - k0 : BLOCK);
        const float top = top_of(x + k0, n), inverse = inverse_of(top, ROUND16_TOP);
        const float scale = top / ROUND16_TOP;
        for (int g = 0; g < n; g += GROUP) {
            vi sum = vi_zero();
            for (int k = g; k < g + GROUP; k += LANES) {
                vi q = vi_round(vf_mul(vf_load(x + k0 + k), vf_set(inverse)));
                vi_store16(out + 2 * (k0 + k), q);
                sum = vi_add(sum, q);
            }
            const float total = (float) vi_sum(sum) * scale;
            memcpy(out + at.sums + (k0 + g) / GROUP * 4, &total, 4);
        }
        memcpy(out + at.scales + k0 / BLOCK * 4, &scale, 4);
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
