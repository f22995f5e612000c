// simd_x86.h - what the vector operations of AVX2 and AVX-512 share.
#pragma once

#include <immintrin.h>

// acc = intrinsic(acc, w, x), which adds up products. The accumulators of a tile stay in registers only if
// the compiler cannot reorder the products: hence asm. (tests/c/emulated/immintrin.h has its own.)
#if !defined(ADD_DOT)
#define ADD_DOT(instruction, intrinsic, acc, w, x)                                                           \
    __asm__(instruction " %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x))
#endif

// Likewise, after a sum that is no single instruction.
#if !defined(KEEP)
#define KEEP(acc) __asm__("" : "+v"(acc))
#endif

// The 8 scales and 8 minima of 6 bits each in a q4_k or q5_k block that begins with v: d, min, 12 bytes.
INLINE __m128i bytes_of_45(__m128i v) {
    const __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(v, 0xED), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(v, 0xA5), 2);
    return _mm_or_si128(_mm_and_si128(low, _mm_setr_epi32(0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F)),
                        _mm_and_si128(high, _mm_setr_epi32(0, 0x30303030, 0, 0x30303030)));
}
