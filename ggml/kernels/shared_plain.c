// shared_plain.c - the kernels of shared_code.h for every machine of this kind, and the sizes of all sets.
#define KERNEL_SET plain
#define KERNEL_SIZES
#include "shared_code.h"
