// simd_avx512.h - the vector operations of micro_code.h on AVX-512 (F, BW, VL, DQ), with VNNI and BF16 where
// the file is compiled for them.
#pragma once

#include "simd_x86.h"

#define ROWS   32
#define TOKENS 12
#define EACH_TOKEN(F)                                                                                        \
    F(0, 0) F(0, 1) F(0, 2) F(1, 3) F(1, 4) F(1, 5) F(2, 6) F(2, 7) F(2, 8) F(3, 9) F(3, 10) F(3, 11)

typedef __m512 vf;   // 16 floats
typedef __m512i vi;  // 16 int32, or their bytes
typedef __m512i h32; // 32 int16
typedef __m256i b32; // 32 bytes

#define LANES 16
#define HAS_F16C

INLINE vf vf_load(const float * p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float * p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } // c - a b
INLINE vf vf_of(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); } // b where one is NaN
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_max_abs(vf m, vf x) { return _mm512_max_ps(m, _mm512_abs_ps(x)); }
INLINE float vf_top(vf x) { return _mm512_reduce_max_ps(x); }
INLINE float vf_sum(vf x) { return _mm512_reduce_add_ps(x); }
INLINE vf vf_of_f16(const void * p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE vf vf_of_bf16(const void * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
INLINE vf vf_of_i8(const void * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p))); }
INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_load(const void * p) { return _mm512_loadu_si512(p); }
INLINE vi vi_round(vf x) { return _mm512_cvtps_epi32(x); }
INLINE int32_t vi_sum(vi x) { return _mm512_reduce_add_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
// Of 2 LANES int16: a b / 2^15, rounded; the larger and the smaller one.
INLINE vi vi_times16(vi a, vi b) { return _mm512_mulhrs_epi16(a, b); }
INLINE vi vi_max16(vi a, vi b) { return _mm512_max_epi16(a, b); }
INLINE vi vi_min16(vi a, vi b) { return _mm512_min_epi16(a, b); }
INLINE void vi_store8(void * p, vi x) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8(x)); }
INLINE void vi_store16(void * p, vi x) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(x)); }

// acc += w . x in groups of 4 bytes.
#if defined(__AVX512VNNI__)
#define W_OFFSET        128 // weights are unsigned
#define DOT4(acc, w, x) ADD_DOT("vpdpbusd", _mm512_dpbusd_epi32, acc, w, x)
#else
#define W_OFFSET 0
INLINE vi dot4(vi acc, vi w, vi x) {
    __mmask64 negative = _mm512_movepi8_mask(w);
    vi signed_x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
    vi pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#define DOT4(acc, w, x)                                                                                      \
    acc = dot4(acc, w, x);                                                                                   \
    KEEP(acc)
#endif

// In groups of 2 int16.
#if defined(__AVX512VNNI__)
#define DOT2(acc, w, x) ADD_DOT("vpdpwssd", _mm512_dpwssd_epi32, acc, w, x)
#else
#define DOT2(acc, w, x)                                                                                      \
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(w, x));                                                    \
    KEEP(acc)
#endif

// 64 activations; what is loaded for several rows stays in registers.
typedef struct x64 {
    vi a, b;
} x64;
INLINE vi vi_shared(const void * x, const int n_rows) {
    vi v = vi_load(x);
    if (n_rows > 1) KEEP(v);
    return v;
}
INLINE x64 x64_load(const int16_t * x, const int n_rows) {
    return (x64) { vi_shared(x, n_rows), vi_shared(x + 32, n_rows) };
}
// acc + first (products of the first 16s of each 32) + last (of the last).
INLINE vf dot64_scaled(vf acc, h32 a, h32 b, x64 x, float first, float last) {
    const vf scale = _mm512_insertf32x8(vf_set(first), _mm256_set1_ps(last), 1);
#if defined(__AVX512VNNI__)
    const vi sum = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(vi_zero(), a, x.a), b, x.b);
#else
    const vi sum = _mm512_add_epi32(_mm512_madd_epi16(a, x.a), _mm512_madd_epi16(b, x.b));
#endif
    return vf_fma(vf_of(sum), scale, acc);
}

INLINE b32 b32_load(const void * p) { return _mm256_loadu_si256(p); }
INLINE void b32_store(void * p, b32 x) { _mm256_storeu_si256(p, x); }
INLINE b32 b32_low(b32 x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE b32 b32_high(b32 x) { return b32_low(_mm256_srli_epi16(x, 4)); }
INLINE b32 b32_or(b32 a, b32 b) { return _mm256_or_si256(a, b); }
// The bits of `mask`, after shifting right by `shift`, moved up by 4 places.
INLINE b32 b32_bits(b32 x, int shift, int mask) {
    b32 bits = _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char) mask));
    return _mm256_slli_epi16(bits, 4);
}
INLINE b32 b32_less(b32 x, int y) { return _mm256_sub_epi8(x, _mm256_set1_epi8((char) y)); }
INLINE b32 b32_two(const void * p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(p)); }
// The first 16 bytes of one, the last 16 of the other.
INLINE b32 b32_halves(b32 low, b32 high) { return _mm256_blend_epi32(low, high, 0xF0); }
INLINE vi vi_bytes(vi a, vi b, vi c, vi d) { // 4 LANES numbers
    const vi q = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                    q);
}
INLINE void vi_store(void * p, vi x) { _mm512_storeu_si512(p, x); }

// 32 numbers of 16 bits: the words of a, then of b.
INLINE h32 h32_two(b32 a, b32 b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
INLINE h32 h32_up(h32 x, int n) { return _mm512_slli_epi16(x, (unsigned) n); }
INLINE h32 h32_down_signed(h32 x, int n) { return _mm512_srai_epi16(x, (unsigned) n); }
INLINE vf vf_of_part(b32 x, int i) { // numbers LANES i to LANES (i + 1) - 1
    return vf_of(_mm512_cvtepi8_epi32(i ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x)));
}
// For blocks of K types (micro_code.h).
typedef struct scales_k {
    vf scale[2][1], low[1];
} scales_k;

INLINE void deal(const void * p, vi * even, vi * odd) { // of 8 times 16 bytes
    const vi a = vi_load(p), b = vi_load((const char *) p + 64);
    *even = _mm512_shuffle_i64x2(a, b, 0x88);
    *odd = _mm512_shuffle_i64x2(a, b, 0xDD);
}
INLINE void vf_stream(float * p, vf x) { _mm512_stream_ps(p, x); }
INLINE vi to_all(const void * p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(p)); }
INLINE vi twice(const void * p, int stride, int part) { // p p q q, q = p + stride
    (void) part;
    const void * q = (const char *) p + stride;
    return _mm512_mask_broadcast_i32x4(to_all(p), 0xFF00, _mm_loadu_si128(q));
}
INLINE vi swap(vi x) { return _mm512_shuffle_epi32(x, 0x4E); } // halves of each 16 bytes
INLINE vi outer(vi a, vi b) { // of each 16 bytes the first half of a, the second of b
    return _mm512_castpd_si512(_mm512_shuffle_pd(_mm512_castsi512_pd(a), _mm512_castsi512_pd(b), 0xAA));
}
INLINE vi inner(vi a, vi b) { // the second half of a, the first of b
    return _mm512_castpd_si512(_mm512_shuffle_pd(_mm512_castsi512_pd(a), _mm512_castsi512_pd(b), 0x55));
}
INLINE vi dot_small(vi acc, vi w, vi x) { // w: 0 .. 63
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, w, x);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
#endif
}
INLINE void scales_of_45(const void * block, scales_k * out) {
    const __m128i v = _mm_loadu_si128(block), bytes = bytes_of_45(v);
    const vi which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const vf unit = _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_cvtph_ps(v)));
    const vf all = vf_mul(vf_of(_mm512_cvtepu8_epi32(bytes)), unit); // 8 scales, 8 minima
    const vi each = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    out->scale[0][0] = out->scale[1][0] = _mm512_permutexvar_ps(each, all);
    out->low[0] = _mm512_permutexvar_ps(_mm512_add_epi32(each, vi_set(8)), all);
}
INLINE void scales_of_6(const int8_t * scales, uint16_t d, scales_k * out) {
    const vf all = vf_mul(vf_of_i8(scales), vf_set(_cvtsh_ss(d)));
    const vi first = _mm512_setr_epi32(0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
    for (int j = 0; j < 2; j++)
        out->scale[j][0] = _mm512_permutexvar_ps(_mm512_add_epi32(first, vi_set(j)), all);
    out->low[0] = vf_mul(all, vf_set(32.0f));
}

// Four dwords, `at` bytes into LANES rows.
INLINE void columns4(const char * const * rows, size_t at, vi * out) {
    vi a[4], b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = to_all(rows[i] + at);
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00F0, _mm_loadu_si128((const void *) (rows[4 + i] + at)));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0F00, _mm_loadu_si128((const void *) (rows[8 + i] + at)));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xF000, _mm_loadu_si128((const void *) (rows[12 + i] + at)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        out[2 * i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        out[2 * i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    }
}

// rows[ROWS] of n dwords (stride bytes apart) to out[n][ROWS].
INLINE void transpose16(const char * rows, size_t stride, char * out) {
    vi a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = vi_load(rows + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { // column i of each quarter, from four groups of four rows
        vi lo0 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), hi0 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
        vi lo1 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        vi hi1 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
        _mm512_storeu_si512(out + (size_t) (i + 0) * 4 * ROWS, _mm512_shuffle_i32x4(lo0, lo1, 0x88));
        _mm512_storeu_si512(out + (size_t) (i + 4) * 4 * ROWS, _mm512_shuffle_i32x4(hi0, hi1, 0x88));
        _mm512_storeu_si512(out + (size_t) (i + 8) * 4 * ROWS, _mm512_shuffle_i32x4(lo0, lo1, 0xDD));
        _mm512_storeu_si512(out + (size_t) (i + 12) * 4 * ROWS, _mm512_shuffle_i32x4(hi0, hi1, 0xDD));
    }
}

INLINE void transpose(const char * rows, size_t stride, int n, char * out) {
    for (int k = 0; k < n; k += 16) {
        transpose16(rows + 4 * k, stride, out + (size_t) k * 4 * ROWS);
        transpose16(rows + 16 * stride + 4 * k, stride, out + (size_t) k * 4 * ROWS + 64);
    }
}
