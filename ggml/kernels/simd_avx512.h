// simd_avx512.h - the vector operations of micro_code.h on AVX-512 (F, BW, VL, DQ), with VNNI and BF16 where
// the file is compiled for them.
#pragma once

#include "simd_x86.h"

#define ROWS   32
#define TOKENS 12
#define EACH_TOKEN(F)                                                                                        \
    F(0, 0) F(0, 1) F(0, 2) F(1, 3) F(1, 4) F(1, 5) F(2, 6) F(2, 7) F(2, 8) F(3, 9) F(3, 10) F(3, 11)

typedef __m512  vf;                       // 16 floats
typedef __m512i vi;                       // 16 int32, or their bytes
typedef __m512i h32;                      // 32 int16
typedef __m256i b32;                      // 32 bytes

#define LANES 16
#define HAS_F16C

INLINE vf vf_load(const float * p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float * p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }            // c - a b
INLINE vf vf_of(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }             // b where one is NaN
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_max_abs(vf m, vf x) { return _mm512_range_ps(m, x, 0x0B); } // the larger size
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
INLINE void vi_store8(void * p, vi x) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8(x)); }
INLINE void vi_store16(void * p, vi x) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(x)); }

// acc += w . x in groups of 4 bytes.
#if defined(__AVX512VNNI__)
#define W_OFFSET 128                      // weights are unsigned
#define DOT4(acc, w, x) ADD_DOT("vpdpbusd", _mm512_dpbusd_epi32, acc, w, x)
#else
#define W_OFFSET 0
INLINE vi dot4(vi acc, vi w, vi x) {
    __mmask64 negative = _mm512_movepi8_mask(w);
    vi signed_x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
    vi pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#define DOT4(acc, w, x) acc = dot4(acc, w, x); KEEP(acc)
#endif

// In groups of 2 int16.
#if defined(__AVX512VNNI__)
#define DOT2(acc, w, x) ADD_DOT("vpdpwssd", _mm512_dpwssd_epi32, acc, w, x)
#else
#define DOT2(acc, w, x) acc = _mm512_add_epi32(acc, _mm512_madd_epi16(w, x)); KEEP(acc)
#endif

#if defined(__AVX512BF16__)
#define HAS_BF16 true
#define DOT_BF16(acc, w, x) ADD_DOT("vdpbf16ps", _mm512_dpbf16_ps, acc, w, x)
INLINE void store_bf16(uint16_t * p, vf a, vf b) {                       // 32 numbers
    _mm512_storeu_si512(p, (__m512i) _mm512_cvtne2ps_pbh(b, a));
}
#endif

// 64 activations; what is loaded for several rows stays in registers.
typedef struct x64 { vi a, b; } x64;
INLINE x64 x64_load(const int16_t * x, const int n_rows) {
    x64 v = { vi_load(x), vi_load(x + 32) };
    if (n_rows > 1) {
        KEEP(v.a);
        KEEP(v.b);
    }
    return v;
}
INLINE vi add_dots(vi acc, vi w, vi x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(acc, w, x);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(w, x));
#endif
}
INLINE vi dot64(vi acc, h32 a, h32 b, x64 x) { return add_dots(add_dots(acc, a, x.a), b, x.b); }
// acc + first (products of the first 16s of each 32) + last (of the last).
INLINE vf dot64_scaled(vf acc, h32 a, h32 b, x64 x, float first, float last) {
    const vf scale = _mm512_insertf32x8(vf_set(first), _mm256_set1_ps(last), 1);
    return vf_fma(vf_of(dot64(vi_zero(), a, b, x)), scale, acc);
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
// 4 LANES numbers as bytes, in an order of our own: 4 of a, 4 of b, 4 of c, 4 of d, and again.
INLINE vi vi_bytes(vi a, vi b, vi c, vi d) {
    return _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}
INLINE void vi_store(void * p, vi x) { _mm512_storeu_si512(p, x); }

// 32 numbers of 16 bits: the words of a, then of b. Where halves differ: the first and the last 16.
INLINE h32 h32_two(b32 a, b32 b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
INLINE h32 h32_each(int first, int last) {
    const __m512i a = _mm512_set1_epi16((short) first);
    return first == last ? a : _mm512_inserti64x4(a, _mm256_set1_epi16((short) last), 1);
}
INLINE h32 h32_and(h32 x, int mask) { return _mm512_and_si512(x, _mm512_set1_epi16((short) mask)); }
INLINE h32 h32_or(h32 x, h32 y) { return _mm512_or_si512(x, y); }
INLINE h32 h32_up(h32 x, int n) { return _mm512_sllv_epi16(x, _mm512_set1_epi16((short) n)); }
INLINE h32 h32_down(h32 x, h32 n) { return _mm512_srlv_epi16(x, n); }
INLINE h32 h32_down_signed(h32 x, int n) { return _mm512_srav_epi16(x, _mm512_set1_epi16((short) n)); }
INLINE h32 h32_times(h32 x, h32 y) { return _mm512_mullo_epi16(x, y); }
// n = 2 or 4 numbers, each 32 / n times.
INLINE h32 h32_spread(const int16_t * p, int n) {
    static const int16_t HALVES[32] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    static const int16_t QUARTERS[32] = { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                          2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3 };
    const __m512i numbers = _mm512_castsi128_si512(n == 2 ? _mm_loadu_si32(p) : _mm_loadl_epi64((const void *) p));
    return _mm512_permutexvar_epi16(vi_load(n == 2 ? HALVES : QUARTERS), numbers);
}
INLINE vf vf_of_part(b32 x, int i) { // numbers LANES i to LANES (i + 1) - 1
    return vf_of(_mm512_cvtepi8_epi32(i ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x)));
}
INLINE void vf_stream(float * p, vf x) { _mm512_stream_ps(p, x); }

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
