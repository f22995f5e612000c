// error.h - status codes and the one-line text that goes with them, kept per thread.
#pragma once

#include "pyllava.h"

#define PYLLAVA_ERROR_MAX 5120 // room for a path of 4096 bytes and what is wrong with it

#if defined(__GNUC__)
#define PYLLAVA_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define PYLLAVA_PRINTF(f, a)
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Remembers the text (cut at PYLLAVA_ERROR_MAX bytes) and returns status.
pyllava_status error_set(pyllava_status status, const char * format, ...) PYLLAVA_PRINTF(2, 3);
const char * error_text(void);

#ifdef __cplusplus
}
#endif

#define FAIL(status, ...) return error_set(status, __VA_ARGS__)
#define TRY(expr)                                                                                            \
    do {                                                                                                     \
        pyllava_status try_status_ = (expr);                                                                 \
        if (try_status_ != PYLLAVA_OK) return try_status_;                                                   \
    } while (0)
#define TRY_ALLOC(pointer, size)                                                                             \
    do {                                                                                                     \
        if (!(pointer)) FAIL(PYLLAVA_ERR_MEMORY, "out of memory: %zu bytes needed", (size_t) (size));        \
    } while (0)
