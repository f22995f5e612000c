// exact_avx2.c - the kernels of exact_code.h for AVX2 and FMA.
#define KERNEL_SET avx2
#include "exact_code.h"
