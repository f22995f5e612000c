// immintrin.h - the AVX-512 and AVX-VNNI operations that ggml/kernels use, by means of AVX2: for
// `make test-avx512`, on machines without them. Found before the compiler's own header, which has the types
// and everything of 256 bits. After Intel's instruction reference; most work on two halves. EMULATE_VNNI
// and EMULATE_AVXVNNI say what the file that includes this is compiled for.
#pragma once

#include_next <immintrin.h>

#include <stdint.h>

#if defined(__AVX512F__)
#error "compile for x86-64-v3: here the real instructions would be tested, and in part"
#endif

#define ADD_DOT(instruction, intrinsic, acc, w, x) acc = intrinsic(acc, w, x)
#define KEEP(acc)                                  (void) (acc)
#if defined(EMULATE_VNNI)
#define __AVX512VNNI__ 1
#endif
#if defined(EMULATE_AVXVNNI)
#define __AVXVNNI__ 1
#endif

#define EMULATED static inline __attribute__((always_inline, unused))

typedef union emulated {
    __m512 f;
    __m512d d;
    __m512i i;
    __m256 f256[2];
    __m256d d256[2];
    __m256i i256[2];
    __m128 f128[4];
    __m128i i128[4];
    float f32[16];
    int32_t i32[16];
    int16_t i16[32];
    uint16_t u16[32];
    int8_t i8[64];
    int64_t i64[8];
} emulated;

// The compiler's header declares functions of these names, or macros; neither can be used here.
#undef _mm512_insertf32x8
#undef _mm512_inserti64x4
#undef _mm512_setr_epi32
#undef _mm512_shuffle_epi32
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_i64x2
#undef _mm512_shuffle_pd
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi16
#define _mm512_abs_epi8             emulated_abs_epi8
#define _mm512_abs_ps               emulated_abs_ps
#define _mm512_add_epi16            emulated_add_epi16
#define _mm512_add_epi32            emulated_add_epi32
#define _mm512_broadcast_i32x4      emulated_broadcast_i32x4
#define _mm512_castpd_si512         emulated_castpd_si512
#define _mm512_castsi256_si512      emulated_castsi256_si512
#define _mm512_castps128_ps512      emulated_castps128_ps512
#define _mm512_castsi512_pd         emulated_castsi512_pd
#define _mm512_castsi512_ps         emulated_castsi512_ps
#define _mm512_cvtepi32_epi16       emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi8        emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps          emulated_cvtepi32_ps
#define _mm512_cvtepi8_epi32        emulated_cvtepi8_epi32
#define _mm512_cvtepu16_epi32       emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi32        emulated_cvtepu8_epi32
#define _mm512_cvtph_ps             emulated_cvtph_ps
#define _mm512_cvtps_epi32          emulated_cvtps_epi32
#define _mm512_dpbusd_epi32         emulated_dpbusd_epi32
#define _mm512_dpwssd_epi32         emulated_dpwssd_epi32
#define _mm512_fmadd_ps             emulated_fmadd_ps
#define _mm512_fnmadd_ps            emulated_fnmadd_ps
#define _mm512_insertf32x8          emulated_insertf32x8
#define _mm512_inserti64x4          emulated_inserti64x4
#define _mm512_loadu_ps             emulated_loadu_ps
#define _mm512_loadu_si512          emulated_loadu_si512
#define _mm512_madd_epi16           emulated_madd_epi16
#define _mm512_maddubs_epi16        emulated_maddubs_epi16
#define _mm512_mask_broadcast_i32x4 emulated_mask_broadcast_i32x4
#define _mm512_mask_sub_epi8        emulated_mask_sub_epi8
#define _mm512_max_ps               emulated_max_ps
#define _mm512_min_ps               emulated_min_ps
#define _mm512_movepi8_mask         emulated_movepi8_mask
#define _mm512_max_epi16            emulated_max_epi16
#define _mm512_min_epi16            emulated_min_epi16
#define _mm512_mul_ps               emulated_mul_ps
#define _mm512_mulhrs_epi16         emulated_mulhrs_epi16
#define _mm512_packs_epi16          emulated_packs_epi16
#define _mm512_packs_epi32          emulated_packs_epi32
#define _mm512_permutexvar_epi32    emulated_permutexvar_epi32
#define _mm512_permutexvar_ps       emulated_permutexvar_ps
#define _mm512_reduce_add_epi32     emulated_reduce_add_epi32
#define _mm512_reduce_add_ps        emulated_reduce_add_ps
#define _mm512_reduce_max_ps        emulated_reduce_max_ps
#define _mm512_set1_epi16           emulated_set1_epi16
#define _mm512_set1_epi32           emulated_set1_epi32
#define _mm512_set1_ps              emulated_set1_ps
#define _mm512_setr_epi32           emulated_setr_epi32
#define _mm512_setzero_si512        emulated_setzero_si512
#define _mm512_shuffle_epi32        emulated_shuffle_epi32
#define _mm512_shuffle_i32x4        emulated_shuffle_i32x4
#define _mm512_shuffle_i64x2        emulated_shuffle_i64x2
#define _mm512_shuffle_pd           emulated_shuffle_pd
#define _mm512_slli_epi16           emulated_slli_epi16
#define _mm512_slli_epi32           emulated_slli_epi32
#define _mm512_srai_epi16           emulated_srai_epi16
#define _mm512_storeu_ps            emulated_storeu_ps
#define _mm512_storeu_si512         emulated_storeu_si512
#define _mm512_stream_ps            emulated_stream_ps
#define _mm512_unpackhi_epi32       emulated_unpackhi_epi32
#define _mm512_unpackhi_epi64       emulated_unpackhi_epi64
#define _mm512_unpacklo_epi32       emulated_unpacklo_epi32
#define _mm512_unpacklo_epi64       emulated_unpacklo_epi64
#define _mm256_dpbusd_avx_epi32     emulated_dpbusd_avx
#define _mm256_dpwssd_avx_epi32     emulated_dpwssd_avx

// ------------------------------------------------------------------- what AVX2 does to each half

#define FLOATS_2(name, half)                                                                                 \
    EMULATED __m512 name(__m512 a, __m512 b) {                                                               \
        emulated x = { .f = a }, y = { .f = b };                                                             \
        return (emulated) { .f256 = { half(x.f256[0], y.f256[0]), half(x.f256[1], y.f256[1]) } }.f;          \
    }
#define FLOATS_3(name, half)                                                                                 \
    EMULATED __m512 name(__m512 a, __m512 b, __m512 c) {                                                     \
        emulated x = { .f = a }, y = { .f = b }, z = { .f = c };                                             \
        return (emulated) {                                                                                  \
            .f256 = { half(x.f256[0], y.f256[0], z.f256[0]), half(x.f256[1], y.f256[1], z.f256[1]) }         \
        }.f;                                                                                                 \
    }
#define INTS_1(name, half)                                                                                   \
    EMULATED __m512i name(__m512i a) {                                                                       \
        emulated x = { .i = a };                                                                             \
        return (emulated) { .i256 = { half(x.i256[0]), half(x.i256[1]) } }.i;                                \
    }
#define INTS_2(name, half)                                                                                   \
    EMULATED __m512i name(__m512i a, __m512i b) {                                                            \
        emulated x = { .i = a }, y = { .i = b };                                                             \
        return (emulated) { .i256 = { half(x.i256[0], y.i256[0]), half(x.i256[1], y.i256[1]) } }.i;          \
    }
#define INTS_3(name, half)                                                                                   \
    EMULATED __m512i name(__m512i a, __m512i b, __m512i c) {                                                 \
        emulated x = { .i = a }, y = { .i = b }, z = { .i = c };                                             \
        return (emulated) {                                                                                  \
            .i256 = { half(x.i256[0], y.i256[0], z.i256[0]), half(x.i256[1], y.i256[1], z.i256[1]) }         \
        }.i;                                                                                                 \
    }
#define INTS_BY(name, half)                                                                                  \
    EMULATED __m512i name(__m512i a, unsigned n) {                                                           \
        emulated x = { .i = a };                                                                             \
        return (emulated) { .i256 = { half(x.i256[0], (int) n), half(x.i256[1], (int) n) } }.i;              \
    }
#define WIDEN(name, half, from, part)                                                                        \
    EMULATED __m512i name(from a) { return (emulated) { .i256 = { half(part(a, 0)), half(part(a, 1)) } }.i; }
#define EIGHT_BYTES(a, i) _mm_srli_si128(a, 8 * (i))

FLOATS_2(_mm512_max_ps, _mm256_max_ps)
FLOATS_2(_mm512_min_ps, _mm256_min_ps)
FLOATS_2(_mm512_mul_ps, _mm256_mul_ps)
FLOATS_3(_mm512_fmadd_ps, _mm256_fmadd_ps)
FLOATS_3(_mm512_fnmadd_ps, _mm256_fnmadd_ps)
INTS_1(_mm512_abs_epi8, _mm256_abs_epi8)
INTS_2(_mm512_add_epi16, _mm256_add_epi16)
INTS_2(_mm512_add_epi32, _mm256_add_epi32)
INTS_2(_mm512_madd_epi16, _mm256_madd_epi16)
INTS_2(_mm512_maddubs_epi16, _mm256_maddubs_epi16)
INTS_2(_mm512_max_epi16, _mm256_max_epi16)
INTS_2(_mm512_min_epi16, _mm256_min_epi16)
INTS_2(_mm512_mulhrs_epi16, _mm256_mulhrs_epi16)
INTS_2(_mm512_packs_epi16, _mm256_packs_epi16)
INTS_2(_mm512_packs_epi32, _mm256_packs_epi32)
INTS_2(_mm512_unpackhi_epi32, _mm256_unpackhi_epi32)
INTS_2(_mm512_unpackhi_epi64, _mm256_unpackhi_epi64)
INTS_2(_mm512_unpacklo_epi32, _mm256_unpacklo_epi32)
INTS_2(_mm512_unpacklo_epi64, _mm256_unpacklo_epi64)
INTS_BY(_mm512_slli_epi16, _mm256_slli_epi16)
INTS_BY(_mm512_slli_epi32, _mm256_slli_epi32)
INTS_BY(_mm512_srai_epi16, _mm256_srai_epi16)
WIDEN(_mm512_cvtepu16_epi32, _mm256_cvtepu16_epi32, __m256i, _mm256_extracti128_si256)
WIDEN(_mm512_cvtepi8_epi32, _mm256_cvtepi8_epi32, __m128i, EIGHT_BYTES)
WIDEN(_mm512_cvtepu8_epi32, _mm256_cvtepu8_epi32, __m128i, EIGHT_BYTES)

EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
    emulated x = { .i = a };
    return (emulated) { .f256 = { _mm256_cvtepi32_ps(x.i256[0]), _mm256_cvtepi32_ps(x.i256[1]) } }.f;
}
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) {
    emulated x = { .f = a };
    return (emulated) { .i256 = { _mm256_cvtps_epi32(x.f256[0]), _mm256_cvtps_epi32(x.f256[1]) } }.i;
}
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
    return (emulated) {
        .f256 = { _mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                  _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)) }
    }.f;
}
EMULATED __m512 _mm512_abs_ps(__m512 a) {
    emulated x = { .f = a };
    for (int i = 0; i < 16; i++) x.i32[i] &= 0x7FFFFFFF;
    return x.f;
}

// ------------------------------------------------------------------------ constants, casts, memory

EMULATED __m512i _mm512_setzero_si512(void) { return (__m512i) { 0 }; }
EMULATED __m512i _mm512_set1_epi16(int16_t a) {
    return (emulated) { .i256 = { _mm256_set1_epi16(a), _mm256_set1_epi16(a) } }.i;
}
EMULATED __m512i _mm512_set1_epi32(int32_t a) {
    return (emulated) { .i256 = { _mm256_set1_epi32(a), _mm256_set1_epi32(a) } }.i;
}
EMULATED __m512 _mm512_set1_ps(float a) {
    return (emulated) { .f256 = { _mm256_set1_ps(a), _mm256_set1_ps(a) } }.f;
}
#define emulated_setr_epi32(...) ((emulated) { .i32 = { __VA_ARGS__ } }.i)
#define emulated_setr_ps(...)    ((emulated) { .f32 = { __VA_ARGS__ } }.f)

EMULATED __m512d _mm512_castsi512_pd(__m512i a) { return (__m512d) a; }
EMULATED __m512i _mm512_castpd_si512(__m512d a) { return (__m512i) a; }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return (__m512) a; }
EMULATED __m512 _mm512_castps128_ps512(__m128 a) { // what lies above is undefined: here NaN
    emulated x = { .i = _mm512_set1_epi32(-1) };
    x.f128[0] = a;
    return x.f;
}

EMULATED __m512 _mm512_loadu_ps(const void * p) {
    return (emulated) { .f256 = { _mm256_loadu_ps(p), _mm256_loadu_ps((const float *) p + 8) } }.f;
}
EMULATED __m512i _mm512_loadu_si512(const void * p) {
    const __m256i * q = p;
    return (emulated) { .i256 = { _mm256_loadu_si256(q), _mm256_loadu_si256(q + 1) } }.i;
}
EMULATED void _mm512_storeu_ps(void * p, __m512 a) {
    const emulated x = { .f = a };
    _mm256_storeu_ps(p, x.f256[0]);
    _mm256_storeu_ps((float *) p + 8, x.f256[1]);
}
EMULATED void _mm512_storeu_si512(void * p, __m512i a) {
    const emulated x = { .i = a };
    _mm256_storeu_si256(p, x.i256[0]);
    _mm256_storeu_si256((__m256i *) p + 1, x.i256[1]);
}
EMULATED void _mm512_stream_ps(void * p, __m512 a) { // faults where the address is no multiple of 64
    if ((uintptr_t) p % 64) __builtin_trap();
    _mm512_storeu_ps(p, a);
}

// ------------------------------------------------------------------- from lane to lane, and masks

EMULATED __m512i _mm512_broadcast_i32x4(__m128i a) { return (emulated) { .i128 = { a, a, a, a } }.i; }
EMULATED __m512i _mm512_mask_broadcast_i32x4(__m512i other, __mmask16 mask, __m128i a) {
    emulated x = { .i = _mm512_broadcast_i32x4(a) }, y = { .i = other };
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) y.i32[i] = x.i32[i];
    return y.i;
}
EMULATED __mmask64 _mm512_movepi8_mask(__m512i a) { // the signs
    const emulated x = { .i = a };
    return (uint32_t) _mm256_movemask_epi8(x.i256[0]) | (uint64_t) (uint32_t) _mm256_movemask_epi8(x.i256[1])
                                                            << 32;
}
EMULATED __m512i _mm512_mask_sub_epi8(__m512i other, __mmask64 mask, __m512i a, __m512i b) {
    emulated x = { .i = a }, y = { .i = b }, z = { .i = other };
    for (int i = 0; i < 64; i++) z.i8[i] = mask >> i & 1 ? (int8_t) (x.i8[i] - y.i8[i]) : z.i8[i];
    return z.i;
}
EMULATED __m512i _mm512_inserti64x4(__m512i a, __m256i b, int at) {
    emulated x = { .i = a };
    x.i256[at & 1] = b;
    return x.i;
}
EMULATED __m512 _mm512_insertf32x8(__m512 a, __m256 b, int at) {
    emulated x = { .f = a };
    x.f256[at & 1] = b;
    return x.f;
}
EMULATED __m512i _mm512_castsi256_si512(__m256i a) { return (emulated) { .i256 = { a, a } }.i; }
EMULATED __m512 _mm512_permutexvar_ps(__m512i which, __m512 a) {
    const emulated w = { .i = which }, x = { .f = a };
    emulated y;
    for (int i = 0; i < 16; i++) y.f32[i] = x.f32[w.i32[i] & 15];
    return y.f;
}
EMULATED __m512i _mm512_permutexvar_epi32(__m512i which, __m512i a) {
    return (__m512i) _mm512_permutexvar_ps(which, (__m512) a);
}
EMULATED __m512i _mm512_shuffle_epi32(__m512i a, int order) { // within each 16 bytes
    const emulated x = { .i = a };
    emulated y;
    for (int i = 0; i < 16; i++) y.i32[i] = x.i32[(i & ~3) + (order >> 2 * (i & 3) & 3)];
    return y.i;
}
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) { // two quarters of a, two of b
    const emulated x = { .i = a }, y = { .i = b };
    return (emulated) {
        .i128 = { x.i128[order & 3], x.i128[order >> 2 & 3], y.i128[order >> 4 & 3], y.i128[order >> 6 & 3] }
    }.i;
}
#define emulated_shuffle_i64x2 emulated_shuffle_i32x4
EMULATED __m512d _mm512_shuffle_pd(__m512d a, __m512d b, int order) { // in each 16 bytes one of a, one of b
    const emulated x = { .d = a }, y = { .d = b };
    emulated z;
    for (int i = 0; i < 8; i += 2) {
        z.i64[i] = x.i64[i + (order >> i & 1)];
        z.i64[i + 1] = y.i64[i + (order >> (i + 1) & 1)];
    }
    return z.d;
}

// ------------------------------------------------------------------------- narrowing, reductions

EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) { // the low bytes
    const emulated x = { .i = a };
    emulated y;
    for (int i = 0; i < 16; i++) y.i8[i] = (int8_t) x.i32[i];
    return y.i128[0];
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
    const emulated x = { .i = a };
    emulated y;
    for (int i = 0; i < 16; i++) y.i16[i] = (int16_t) x.i32[i];
    return y.i256[0];
}
EMULATED int32_t _mm512_reduce_add_epi32(__m512i a) {
    const emulated x = { .i = a };
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += (uint32_t) x.i32[i];
    return (int32_t) sum;
}
EMULATED float _mm512_reduce_add_ps(__m512 a) { // halves, again and again, as compilers do it
    emulated x = { .f = a };
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x.f32[i] = x.f32[i + n] + x.f32[i];
    return x.f32[0];
}
EMULATED float _mm512_reduce_max_ps(__m512 a) {
    emulated x = { .f = a };
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x.f32[i] = x.f32[i + n] > x.f32[i] ? x.f32[i + n] : x.f32[i];
    return x.f32[0];
}

// ----------------------------------------------------------------------------------- VNNI, BF16

// acc + w . x in groups of 4 bytes, w unsigned and x signed, exact: bytes of even place, then of odd.
EMULATED __m256i _mm256_dpbusd_avx_epi32(__m256i acc, __m256i w, __m256i x) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
EMULATED __m256i _mm256_dpwssd_avx_epi32(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
}
INTS_3(_mm512_dpbusd_epi32, _mm256_dpbusd_avx_epi32)
INTS_3(_mm512_dpwssd_epi32, _mm256_dpwssd_avx_epi32)

#undef FLOATS_2
#undef FLOATS_3
#undef INTS_1
#undef INTS_2
#undef INTS_3
#undef INTS_BY
#undef WIDEN
#undef EIGHT_BYTES
#undef EMULATED
