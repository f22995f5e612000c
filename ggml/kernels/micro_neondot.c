// micro_neondot.c - see micro_code.h; the flags that this file is compiled with are in ../CMakeLists.txt.
#include "tile.h"

#include "simd_neon.h"

#define MICRO      micro_neondot
#define MICRO_NAME "neondot"
#include "micro_code.h"
