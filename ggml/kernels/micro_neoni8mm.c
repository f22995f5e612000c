// micro_neoni8mm.c - see micro_code.h; the flags that this file is compiled with are in ../CMakeLists.txt.
#include "tile.h"

#include "simd_neon.h"

#define MICRO      micro_neoni8mm
#define MICRO_NAME "neoni8mm"
#include "micro_code.h"
