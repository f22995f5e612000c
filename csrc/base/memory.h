// memory.h - memory and hardware threads: what the machine offers, aligned blocks of it, and address space
// whose pages are taken as they are used.
#pragma once

#include "error.h"

#include <stdbool.h>

#define MEMORY_ALIGNMENT 64 // of blocks

uint64_t memory_available(void); // bytes that can be taken without swapping; UINT64_MAX where unknown
pyllava_status memory_check(uint64_t size, const char * what); // fails where size is more than that
int32_t cpu_count(void); // hardware threads this process may use, or whole CPUs' worth of time, at least 1
#if defined(__linux__)
#define MAX_CPUS 8192
int32_t cpus_allowed(
    bool allowed[MAX_CPUS]); // the hardware threads it may run on, and their number; 0: unknown
#endif

void * aligned_new(size_t size); // MEMORY_ALIGNMENT, not zeroed, NULL on failure
void aligned_free(void * pointer);

// Zeroed address space, aligned to pages, each of which takes memory from its first use on (on Windows it is
// promised all of its memory at once). NULL on failure.
void * pages_new(size_t size);
void pages_free(void * pages, size_t size);
// Part of such space whose contents are no longer needed: its whole pages go back to the system, where it can
// take them, and are there again when they are used, with any contents.
void pages_give_back(void * part, size_t size);
