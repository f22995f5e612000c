// simd_plain.h - the vector operations of micro_code.h in plain C: the reference that every other set is
// tested against, and the fallback where there is no other.
#pragma once

#include <math.h>

#define ROWS  16
#define LANES 8
#define COMPACT
#define TOKENS        4
#define EACH_TOKEN(F) F(0, 0) F(0, 1) F(0, 2) F(1, 3)
#define W_OFFSET      0

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(32)));
typedef struct h32 {
    int16_t v[32];
} h32;
typedef uint8_t b32 __attribute__((vector_size(32)));

INLINE vf vf_load(const float * p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vf_store(float * p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf vf_set(float x) { return (vf) { x, x, x, x, x, x, x, x }; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_fnma(vf a, vf b, vf c) { return c - a * b; }
INLINE vf vf_of(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf vf_max(vf a, vf b) { // b where one is NaN
    for (int i = 0; i < LANES; i++) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
}
INLINE vf vf_min(vf a, vf b) {
    for (int i = 0; i < LANES; i++) b[i] = a[i] < b[i] ? a[i] : b[i];
    return b;
}
INLINE vf vf_max_abs(vf m, vf x) {
    for (int i = 0; i < LANES; i++) m[i] = m[i] > fabsf(x[i]) ? m[i] : fabsf(x[i]); // NaN where x is
    return m;
}
INLINE float vf_top(vf x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}
INLINE float vf_sum(vf x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE vf vf_of_f16(const void * p) {
    uint16_t h[LANES];
    vf x;
    memcpy(h, p, sizeof h);
    for (int i = 0; i < LANES; i++) x[i] = ggml_fp16_to_fp32(h[i]);
    return x;
}
INLINE vf vf_of_bf16(const void * p) {
    uint16_t h[LANES];
    vi bits;
    memcpy(h, p, sizeof h);
    for (int i = 0; i < LANES; i++) bits[i] = (int32_t) ((uint32_t) h[i] << 16);
    return (vf) bits;
}
INLINE vf vf_of_i8(const void * p) {
    vf x;
    for (int i = 0; i < LANES; i++) x[i] = ((const int8_t *) p)[i];
    return x;
}
INLINE vi vi_zero(void) { return (vi) { 0 }; }
INLINE vi vi_set(int32_t x) { return (vi) { x, x, x, x, x, x, x, x }; }
INLINE vi vi_load(const void * p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE vi vi_round(vf x) {
    vi n;
    for (int i = 0; i < LANES; i++) n[i] = (int32_t) nearbyintf(x[i]);
    return n;
}
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE int32_t vi_sum(vi x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }
// Of 2 LANES int16: a b / 2^15, rounded; the larger and the smaller one.
typedef int16_t words __attribute__((vector_size(32)));
INLINE vi vi_times16(vi a, vi b) {
    words x = (words) a;
    const words y = (words) b;
    for (int i = 0; i < 2 * LANES; i++) x[i] = (int16_t) ((x[i] * y[i] + 0x4000) >> 15);
    return (vi) x;
}
INLINE vi vi_max16(vi a, vi b) {
    const words x = (words) a, y = (words) b, where = x > y;
    return (vi) ((x & where) | (y & ~where));
}
INLINE vi vi_min16(vi a, vi b) {
    const words x = (words) a, y = (words) b, where = x < y;
    return (vi) ((x & where) | (y & ~where));
}
INLINE void vi_store8(void * p, vi x) {
    for (int i = 0; i < LANES; i++) ((int8_t *) p)[i] = (int8_t) x[i];
}
INLINE void vi_store16(void * p, vi x) {
    for (int i = 0; i < LANES; i++) ((int16_t *) p)[i] = (int16_t) x[i];
}

INLINE vi dot4(vi acc, vi w, vi x) {
    vb a = (vb) w, b = (vb) x;
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < 4; j++) acc[i] += a[4 * i + j] * b[4 * i + j];
    }
    return acc;
}
#define DOT4(acc, w, x) acc = dot4(acc, w, x)

INLINE vi dot2_pairs(vi acc, vi w, vi x) {
    int16_t a[2 * LANES], b[2 * LANES];
    memcpy(a, &w, sizeof a);
    memcpy(b, &x, sizeof b);
    for (int i = 0; i < 2 * LANES; i++) acc[i / 2] += a[i] * b[i];
    return acc;
}
#define DOT2(acc, w, x) acc = dot2_pairs(acc, w, x)

// 64 activations, where they lie.
typedef const int16_t * x64;
INLINE vi vi_shared(const void * x, const int n_rows) { return (void) n_rows, vi_load(x); }
INLINE x64 x64_load(const int16_t * x, const int n_rows) { return (void) n_rows, x; }
// acc + first (products of the first 16s of each 32) + last (of the last).
INLINE vf dot64_scaled(vf acc, h32 a, h32 b, x64 x, float first, float last) {
    vi sums[2] = { vi_zero(), vi_zero() };
    for (int i = 0; i < 32; i++) sums[i / 16][i / 2 % LANES] += a.v[i] * x[i] + b.v[i] * x[32 + i];
    return vf_fma(vf_of(sums[1]), vf_set(last), vf_fma(vf_of(sums[0]), vf_set(first), acc));
}

INLINE b32 b32_load(const void * p) {
    b32 x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void b32_store(void * p, b32 x) { memcpy(p, &x, sizeof x); }
INLINE b32 b32_low(b32 x) { return x & 15; }
INLINE b32 b32_high(b32 x) { return x >> 4; }
INLINE b32 b32_or(b32 a, b32 b) { return a | b; }
INLINE b32 b32_bits(b32 x, int shift, int mask) {
    for (int i = 0; i < 32; i++) x[i] = (uint8_t) (((x[i] >> shift) & mask) << 4);
    return x;
}
INLINE b32 b32_less(b32 x, int y) { return x - (uint8_t) y; }
INLINE b32 b32_two(const void * p) {
    b32 x;
    for (int i = 0; i < 32; i++) x[i] = ((const uint8_t *) p)[i % 16];
    return x;
}
INLINE b32 b32_halves(b32 low, b32 high) {
    for (int i = 16; i < 32; i++) low[i] = high[i];
    return low;
}
INLINE vi vi_bytes(vi a, vi b, vi c, vi d) { // 4 LANES numbers
    const vi all[] = { a, b, c, d };
    int8_t q[4 * LANES];
    for (int i = 0; i < 4; i++) vi_store8(q + LANES * i, all[i]);
    return vi_load(q);
}
INLINE void vi_store(void * p, vi x) { memcpy(p, &x, sizeof x); }

// 32 numbers of 16 bits: the words of a, then of b.
#define EACH_WORD for (int i = 0; i < 32; i++)
INLINE h32 h32_two(b32 a, b32 b) {
    h32 x;
    memcpy(x.v, &a, 32);
    memcpy(x.v + 16, &b, 32);
    return x;
}
INLINE h32 h32_up(h32 x, int n) {
    EACH_WORD x.v[i] = (int16_t) ((uint16_t) x.v[i] << n);
    return x;
}
INLINE h32 h32_down_signed(h32 x, int n) {
    EACH_WORD x.v[i] = (int16_t) (x.v[i] >> n);
    return x;
}
INLINE vf vf_of_part(b32 x, int i) { // numbers LANES i to LANES (i + 1) - 1
    int8_t q[32];
    memcpy(q, &x, sizeof q);
    return vf_of_i8(q + LANES * i);
}
// For blocks of K types (micro_code.h).
typedef struct scales_k {
    vf scale[2][16 / LANES], low[16 / LANES];
} scales_k;

INLINE void gather(const char * p, int stride, int repeat, vi * out) { // LANES / 4 times 16 bytes
    for (int i = 0; i < LANES / 4; i++) memcpy((char *) out + 16 * i, p + i / repeat * stride, 16);
}
INLINE void deal(const void * p, vi * even, vi * odd) {
    gather(p, 32, 1, even);
    gather((const char *) p + 16, 32, 1, odd);
}
INLINE void vf_stream(float * p, vf x) { vf_store(p, x); }
INLINE vi to_all(const void * p) {
    vi x;
    gather(p, 0, 1, &x);
    return x;
}
INLINE vi twice(const void * p, int stride, int part) {
    vi x;
    gather((const char *) p + part * (LANES / 8) * stride, stride, 2, &x);
    return x;
}
INLINE vi swap(vi x) { return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5); } // halves of 16 bytes
INLINE vi outer(vi a, vi b) { return __builtin_shufflevector(a, b, 0, 1, 10, 11, 4, 5, 14, 15); }
INLINE vi inner(vi a, vi b) { return __builtin_shufflevector(a, b, 2, 3, 8, 9, 6, 7, 12, 13); }
INLINE vi dot_small(vi acc, vi w, vi x) { return dot4(acc, w, x); }
INLINE void scales_of_45(const void * block, scales_k * out) {
    const uint8_t * s = (const uint8_t *) block + 4;
    uint16_t d[2];
    memcpy(d, block, 4);
    const float step = ggml_fp16_to_fp32(d[0]), min = ggml_fp16_to_fp32(d[1]);
    for (int g = 0; g < 8; g++) {
        const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        const int low = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4;
        for (int i = 2 * g; i < 2 * g + 2; i++) {
            for (int j = 0; j < 2; j++) out->scale[j][i / LANES][i % LANES] = step * (float) scale;
            out->low[i / LANES][i % LANES] = min * (float) low;
        }
    }
}
INLINE void scales_of_6(const int8_t * scales, uint16_t d, scales_k * out) {
    const float step = ggml_fp16_to_fp32(d);
    for (int g = 0; g < 16; g++) {
        for (int i = g / 2 * 2; i < g / 2 * 2 + 2; i++)
            out->scale[g % 2][i / LANES][i % LANES] = step * (float) scales[g];
        out->low[g / LANES][g % LANES] = 32.0f * step * (float) scales[g];
    }
}

// Four dwords, `at` bytes into LANES rows.
INLINE void columns4(const char * const * rows, size_t at, vi * out) {
    for (int r = 0; r < LANES; r++) {
        for (int i = 0; i < 4; i++) memcpy((char *) (out + i) + 4 * r, rows[r] + at + 4 * i, 4);
    }
}

INLINE void transpose(const char * rows, size_t stride, int n, char * out) {
    for (int k = 0; k < n; k++) {
        for (int r = 0; r < ROWS; r++)
            memcpy(out + 4 * (k * ROWS + r), rows + (size_t) r * stride + 4 * k, 4);
    }
}
