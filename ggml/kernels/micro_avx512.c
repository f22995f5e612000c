// micro_avx512.c - see micro_code.h; the flags that this file is compiled with are in ../CMakeLists.txt.
#include "tile.h"

#include "simd_avx512.h"

#define MICRO      micro_avx512
#define MICRO_NAME "avx512"
#include "micro_code.h"
