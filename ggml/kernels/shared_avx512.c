// shared_avx512.c - the kernels of shared_code.h for AVX-512 (F, BW, DQ, VL).
#define KERNEL_SET avx512
#include "shared_code.h"
