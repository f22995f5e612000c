// cores.h - which cores compute, and a ledger of them: sessions of one model that together ask for more
// threads than there are cores take turns, step by step, since they would only push each other off the cores
// and out of the caches.
#pragma once

#include "error.h"

#include <stdatomic.h>
#include <stdbool.h>

typedef struct cores cores;

int32_t cores_physical(void); // that this process may use, at least 1
#if defined(__linux__)
// Cores with at least one hardware thread in allowed [n_cpus], as root/sys says; root "" is the machine.
int32_t cores_among(const char * root, const bool * allowed, int32_t n_cpus);
#endif
pyllava_status cores_create(cores ** out);
void cores_free(cores * c);

// Waits until n cores (or all there are, if that is less) are free, in the order of asking; gives up when
// *cancel is set. What was taken is given back with the same n.
pyllava_status cores_take(cores * c, int32_t n, const atomic_int * cancel);
void cores_give(cores * c, int32_t n);
