// exact_avx512.c - the kernels of exact_code.h for AVX-512 (F, BW, DQ, VL).
#define KERNEL_SET avx512
#include "exact_code.h"
