// shared_plain.c - the kernels of shared_code.h for every machine of this architecture, and the sizes, which
// all sets share.
#define KERNEL_SET plain
#define KERNEL_SIZES
#include "shared_code.h"
