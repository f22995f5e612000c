// cpuid.h - for cpu.c, where immintrin.h beside this stands in for AVX-512 and AVX-VNNI: this machine has
// them.
#pragma once

#include_next <cpuid.h>

// avx512f, avx512bw, ...
#define __builtin_cpu_supports(name) ((name)[3] == '5' || __builtin_cpu_supports(name))

static inline int emulated_cpuid_count(unsigned leaf, unsigned part, unsigned * a, unsigned * b, unsigned * c,
                                       unsigned * d) {
    __cpuid_count(leaf, part, *a, *b, *c, *d);
    if (leaf == 7 && part == 1) *a |= 1u << 4 | 1u << 5; // AVX-VNNI, AVX512-BF16
    return 1;
}
#define __get_cpuid_count emulated_cpuid_count
