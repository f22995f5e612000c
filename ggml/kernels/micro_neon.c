// micro_neon.c - see micro_code.h; the flags that this file is compiled with are in ../CMakeLists.txt.
#include "tile.h"

#include "simd_neon.h"

#define MICRO      micro_neon
#define MICRO_NAME "neon"
#include "micro_code.h"
