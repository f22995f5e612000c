// memory.h - what the machine offers.
#pragma once

#include <stdint.h>

uint64_t memory_available(void); // bytes that can be taken without swapping; UINT64_MAX where unknown
int32_t  cpu_count(void);                 // cores this process may use, at least 1
