// memory.h - memory and hardware threads: what the machine offers, and aligned blocks of it.
#pragma once

#include "error.h"

#define MEMORY_ALIGNMENT 64 // of blocks

uint64_t memory_available(void); // bytes that can be taken without swapping; UINT64_MAX where unknown
pyllava_status memory_check(uint64_t size, const char * what); // fails where size is more than that
int32_t cpu_count(void); // hardware threads this process may use, at least 1

void * aligned_new(size_t size); // MEMORY_ALIGNMENT, not zeroed, NULL on failure
void aligned_free(void * pointer);
