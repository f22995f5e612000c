// micro_avxvnni.c - see micro_code.h; the flags that this file is compiled with are in ../CMakeLists.txt.
#include "tile.h"

#include "simd_avx2.h"

#define MICRO      micro_avxvnni
#define MICRO_NAME "avxvnni"
#include "micro_code.h"
