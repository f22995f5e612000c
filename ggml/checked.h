// checked.h - memory for ggml, which uses much of what it asks for without looking whether it got it.
// CMakeLists.txt has ggml-base's sources include this before anything else: they then call the functions
// below, which tell the one who watches of a failure before they return NULL. The watcher
// (csrc/base/guard.cpp) throws an exception.
#pragma once

#include <malloc.h>
#include <stdlib.h>

#define CHECKED_API __attribute__((visibility("default"))) // ggml-base may be a library of its own

#ifdef __cplusplus
extern "C" {
#endif

// Sets the watcher of this process. It is called on the thread whose memory ran out.
CHECKED_API void checked_watch(void (*on_failure)(void));
CHECKED_API void * checked_malloc(size_t size);
void * checked_calloc(size_t n, size_t size);
void * checked_realloc(void * pointer, size_t size);
int checked_posix_memalign(void ** out, size_t alignment, size_t size);
CHECKED_API void * checked_aligned_malloc(size_t size); // ggml_aligned_malloc, for ggml-cpu's threads

#ifdef __cplusplus
}
#endif

#define malloc(size)                         checked_malloc(size)
#define calloc(n, size)                      checked_calloc(n, size)
#define realloc(pointer, size)               checked_realloc(pointer, size)
#define posix_memalign(out, alignment, size) checked_posix_memalign(out, alignment, size)
