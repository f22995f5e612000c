// simd_avx2.h - the vector operations of micro_code.h on AVX2 with FMA and F16C, and AVX-VNNI where the file
// is compiled for it. Sixteen registers: tiles are 16 rows by 6 tokens, or 4 (micro_direct.h).
#pragma once

#include "simd_x86.h"

#define ROWS          16
#define LANES         8
#define TOKENS        6
#define EACH_TOKEN(F) F(0, 0) F(0, 1) F(0, 2) F(1, 3) F(1, 4) F(1, 5)
#define HAS_F16C

typedef __m256 vf;  // 8 floats
typedef __m256i vi; // 8 int32, or their bytes
typedef struct h32 {
    __m256i a, b;
} h32;               // 32 int16
typedef __m256i b32; // 32 bytes

INLINE vf vf_load(const float * p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float * p, vf x) { _mm256_storeu_ps(p, x); }
INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); } // c - a b
INLINE vf vf_of(vi x) { return _mm256_cvtepi32_ps(x); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); } // b where one is NaN
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_max_abs(vf m, vf x) { return _mm256_max_ps(m, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x)); }
INLINE float vf_top(vf x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
INLINE float vf_sum(vf x) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
INLINE vf vf_of_f16(const void * p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE vf vf_of_bf16(const void * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
INLINE vf vf_of_i8(const void * p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p))); }
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi vi_load(const void * p) { return _mm256_loadu_si256(p); }
INLINE vi vi_round(vf x) { return _mm256_cvtps_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
// Of 2 LANES int16: a b / 2^15, rounded; the larger and the smaller one.
INLINE vi vi_times16(vi a, vi b) { return _mm256_mulhrs_epi16(a, b); }
INLINE vi vi_max16(vi a, vi b) { return _mm256_max_epi16(a, b); }
INLINE vi vi_min16(vi a, vi b) { return _mm256_min_epi16(a, b); }
INLINE int32_t vi_sum(vi x) {
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_add_epi32(m, _mm_unpackhi_epi64(m, m));
    return _mm_cvtsi128_si32(m) + _mm_extract_epi32(m, 1);
}
INLINE __m128i words_of(vi x) {
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
INLINE void vi_store16(void * p, vi x) { _mm_storeu_si128(p, words_of(x)); }
INLINE void vi_store8(void * p, vi x) {
    __m128i w = words_of(x);
#if defined(__AVXVNNI__) // up to 255 in weights: the low bytes
    w = _mm_and_si128(w, _mm_set1_epi16(255));
    _mm_storel_epi64(p, _mm_packus_epi16(w, w));
#else
    _mm_storel_epi64(p, _mm_packs_epi16(w, w));
#endif
}

// acc += w . x in groups of 2 int16 and of 4 bytes. In asm, since compilers reorder sums of integers and then
// have more of them at once than there are registers (half the speed).
#if defined(__AVXVNNI__)
#define W_OFFSET        128 // weights are unsigned
#define DOT2(acc, w, x) ADD_DOT("%{vex%} vpdpwssd", _mm256_dpwssd_avx_epi32, acc, w, x)
#define DOT4(acc, w, x) ADD_DOT("%{vex%} vpdpbusd", _mm256_dpbusd_avx_epi32, acc, w, x)
#else
#define W_OFFSET 0
// Products of bytes: |w| and sign(x), at most 2 * 127 * 127 fits into 16 bits.
#define DOT4(acc, w, x)                                                                                      \
    {                                                                                                        \
        vi t_ = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));                            \
        __asm__("vpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0"                                                   \
                : "+x"(acc), "+x"(t_)                                                                        \
                : "x"(_mm256_set1_epi16(1)));                                                                \
    }
#define DOT2(acc, w, x)                                                                                      \
    {                                                                                                        \
        vi t_;                                                                                               \
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(t_) : "x"(w), "x"(x));         \
    }
// Both vectors of a tile's rows at once: leaves compilers no reason to move the accumulators about.
#define DOTS2(a, b, w0, w1, p)                                                                               \
    {                                                                                                        \
        vi v_, t_;                                                                                           \
        __asm__("vpbroadcastd %6, %3\n\tvpmaddwd %3, %4, %2\n\tvpmaddwd %3, %5, %3\n\t"                      \
                "vpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"                                                     \
                : "+x"(a), "+x"(b), "=&x"(t_), "=&x"(v_)                                                     \
                : "x"(w0), "x"(w1), "m"(*(const int32_t *) (const void *) (p)));                             \
    }
#define DIRECT // byte products are added in 16 bits: micro_direct.h
#define ADD_PAIRS(acc, w, x)                                                                                 \
    {                                                                                                        \
        vi t_;                                                                                               \
        __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(t_) : "x"(w), "x"(x));       \
    }
INLINE vi pairs(vi w, vi x) { return _mm256_maddubs_epi16(w, x); } // w unsigned; 16 int16
INLINE vi dot_pairs(vi acc, vi a, vi b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
#endif

// 64 activations, where they lie.
typedef const int16_t * x64;
INLINE vi vi_shared(const void * x, const int n_rows) { return (void) n_rows, vi_load(x); }
INLINE x64 x64_load(const int16_t * x, const int n_rows) { return (void) n_rows, x; }
INLINE vi add_dots(vi acc, __m256i w, const int16_t * x) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(acc, w, vi_load(x));
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, vi_load(x)));
#endif
}
// acc + first (products of the first 16s of each 32) + last (of the last).
INLINE vf dot64_scaled(vf acc, h32 a, h32 b, x64 x, float first, float last) {
    acc = vf_fma(vf_of(add_dots(add_dots(vi_zero(), a.a, x), b.a, x + 32)), vf_set(first), acc);
    return vf_fma(vf_of(add_dots(add_dots(vi_zero(), a.b, x + 16), b.b, x + 48)), vf_set(last), acc);
}

INLINE b32 b32_load(const void * p) { return _mm256_loadu_si256(p); }
INLINE void b32_store(void * p, b32 x) { _mm256_storeu_si256(p, x); }
INLINE b32 b32_low(b32 x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE b32 b32_high(b32 x) { return b32_low(_mm256_srli_epi16(x, 4)); }
INLINE b32 b32_or(b32 a, b32 b) { return _mm256_or_si256(a, b); }
INLINE b32 b32_bits(b32 x, int shift, int mask) {
    b32 bits = _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char) mask));
    return _mm256_slli_epi16(bits, 4);
}
INLINE b32 b32_less(b32 x, int y) { return _mm256_sub_epi8(x, _mm256_set1_epi8((char) y)); }
INLINE b32 b32_two(const void * p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(p)); }
INLINE b32 b32_halves(b32 low, b32 high) { return _mm256_blend_epi32(low, high, 0xF0); }
INLINE vi vi_bytes(vi a, vi b, vi c, vi d) { // 4 LANES numbers
    const vi q = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(q, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
INLINE void vi_store(void * p, vi x) { _mm256_storeu_si256(p, x); }

// 32 numbers of 16 bits: the words of a, then of b.
INLINE h32 h32_two(b32 a, b32 b) { return (h32) { a, b }; }
INLINE h32 h32_up(h32 x, int n) { return (h32) { _mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n) }; }
INLINE h32 h32_down_signed(h32 x, int n) {
    return (h32) { _mm256_srai_epi16(x.a, n), _mm256_srai_epi16(x.b, n) };
}
INLINE vf vf_of_part(b32 x, int i) { // numbers LANES i to LANES (i + 1) - 1
    __m128i half = i < 2 ? _mm256_castsi256_si128(x) : _mm256_extracti128_si256(x, 1);
    if (i % 2) half = _mm_srli_si128(half, 8);
    return vf_of(_mm256_cvtepi8_epi32(half));
}
// For blocks of K types (micro_code.h).
#if defined(DIRECT)
typedef vi scales_2; // int16, each of a pair, to be multiplied with d
#else
typedef vf scales_2;
#endif
typedef struct scales_k {
    scales_2 scale[2][2];
    vf low[2];
    float d;
} scales_k;

INLINE void deal(const void * p, vi * even, vi * odd) { // of 4 times 16 bytes
    const vi a = vi_load(p), b = vi_load((const char *) p + 32);
    *even = _mm256_permute2x128_si256(a, b, 0x20);
    *odd = _mm256_permute2x128_si256(a, b, 0x31);
}
INLINE void vf_stream(float * p, vf x) { _mm256_stream_ps(p, x); }
INLINE vi to_all(const void * p) { return b32_two(p); }
INLINE vi twice(const void * p, int stride, int part) { return b32_two((const char *) p + stride * part); }
INLINE vi swap(vi x) { return _mm256_shuffle_epi32(x, 0x4E); } // halves of each 16 bytes
INLINE vi outer(vi a, vi b) { // of each 16 bytes the first half of a, the second of b
    return _mm256_castpd_si256(_mm256_shuffle_pd(_mm256_castsi256_pd(a), _mm256_castsi256_pd(b), 10));
}
INLINE vi inner(vi a, vi b) { // the second half of a, the first of b
    return _mm256_castpd_si256(_mm256_shuffle_pd(_mm256_castsi256_pd(a), _mm256_castsi256_pd(b), 5));
}
INLINE vi pair_lanes(int first, int step) { // first, first, first + step, first + step, ...
    const __m256i each = _mm256_mullo_epi32(_mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), vi_set(step));
    return vi_add(each, vi_set(first));
}
INLINE vf pairs_of(vf x, int first, int step) { return _mm256_permutevar8x32_ps(x, pair_lanes(first, step)); }
#if defined(DIRECT)
INLINE scales_2 scale_pairs(vi x, float d, int first, int step) {
    const vi low = _mm256_and_si256(_mm256_permutevar8x32_epi32(x, pair_lanes(first, step)), vi_set(0xFFFF));
    (void) d;
    return _mm256_or_si256(low, _mm256_slli_epi32(low, 16));
}
#else
INLINE scales_2 scale_pairs(vi x, float d, int first, int step) {
    return pairs_of(vf_mul(vf_of(x), vf_set(d)), first, step);
}
INLINE vi dot_small(vi acc, vi w, vi x) { return _mm256_dpbusd_avx_epi32(acc, w, x); } // w: 0 .. 63
#endif
INLINE void scales_of_45(const void * block, scales_k * out) {
    const __m128i v = _mm_loadu_si128(block), bytes = bytes_of_45(v);
    const __m128 d = _mm_cvtph_ps(v);
    const vi scale = _mm256_cvtepu8_epi32(bytes);
    const vf min = vf_mul(vf_of(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))),
                          _mm256_broadcastss_ps(_mm_movehdup_ps(d)));
    out->d = _mm_cvtss_f32(d);
    for (int p = 0; p < 2; p++) {
        out->scale[0][p] = out->scale[1][p] = scale_pairs(scale, out->d, 4 * p, 1);
        out->low[p] = pairs_of(min, 4 * p, 1);
    }
}
INLINE void scales_of_6(const int8_t * scales, uint16_t d, scales_k * out) {
    out->d = _cvtsh_ss(d);
    for (int p = 0; p < 2; p++) {
        const vi s = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *) (scales + 8 * p)));
        for (int j = 0; j < 2; j++) out->scale[j][p] = scale_pairs(s, out->d, j, 2);
        out->low[p] = vf_mul(vf_of(s), vf_set(32.0f * out->d));
    }
}

// Four dwords, `at` bytes into LANES rows.
INLINE void columns4(const char * const * rows, size_t at, vi * out) {
    vi a[4], b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_inserti128_si256(to_all(rows[i] + at),
                                       _mm_loadu_si128((const void *) (rows[4 + i] + at)), 1);
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        out[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        out[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    }
}

INLINE void transpose8(const char * rows, size_t stride, char * out) {
    vi a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = vi_load(rows + i * stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i *) (out + (size_t) i * 4 * ROWS),
                            _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
        _mm256_storeu_si256((__m256i *) (out + (size_t) (i + 4) * 4 * ROWS),
                            _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
    }
}

INLINE void transpose(const char * rows, size_t stride, int n, char * out) {
    for (int k = 0; k < n; k += 8) {
        transpose8(rows + 4 * k, stride, out + (size_t) k * 4 * ROWS);
        transpose8(rows + 8 * stride + 4 * k, stride, out + (size_t) k * 4 * ROWS + 32);
    }
}
