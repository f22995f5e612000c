// shared_avx2.c - the kernels of shared_code.h for AVX2 and FMA.
#define KERNEL_SET avx2
#include "shared_code.h"
