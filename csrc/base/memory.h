// memory.h - free memory and hardware threads of the machine, aligned blocks, and address space whose pages
// are allocated when they are used.
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

// Zeroed address space, aligned to pages; a page takes memory when it is first used (Windows commits all of
// it at once). NULL on failure.
void * pages_new(size_t size);
void pages_free(void * pages, size_t size);
// Gives the whole pages in a part of such space back to the system, if it supports that. They may be used
// again; their contents are then undefined.
void pages_give_back(void * part, size_t size);
