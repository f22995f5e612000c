// cpu.h - what this processor can do.
#pragma once

#include <stdbool.h>

#if defined(__x86_64__)
// Cheap: the compiler's library keeps the answers.
bool cpu_has_avx2(void);   // and FMA
bool cpu_has_avx512(void); // F, BW, DQ and VL, besides
#endif
