// micro_avx2.c - see micro_code.h; the flags that this file is compiled with are in ../CMakeLists.txt.
#include "tile.h"

#include "simd_avx2.h"

#define MICRO      micro_avx2
#define MICRO_NAME "avx2"
#include "micro_code.h"
