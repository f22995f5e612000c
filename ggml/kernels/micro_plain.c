// micro_plain.c - see micro_code.h; the flags that this file is compiled with are in ../CMakeLists.txt.
#include "tile.h"

#include "simd_plain.h"

#define MICRO      micro_plain
#define MICRO_NAME "plain"
#include "micro_code.h"
