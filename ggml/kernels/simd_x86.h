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
