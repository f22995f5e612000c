// memory.h - what the machine offers.
#pragma once

#include "error.h"

uint64_t memory_available(void);    // bytes that can be taken without swapping; UINT64_MAX where unknown
pyllava_status memory_check(uint64_t size, const char * what);           // fails where size is more than that
int32_t        cpu_count(void);           // hardware threads this process may use, at least 1
