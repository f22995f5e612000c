// checked.c - see checked.h. A name in parentheses is the C library's.
#include "checked.h"

#include <stdatomic.h>

#define LARGE ((size_t) 1 << 16)

void * ggml_aligned_malloc(size_t size);

static _Atomic(void (*)(void)) watcher;

void checked_watch(void (*on_failure)(void)) { atomic_store(&watcher, on_failure); }

static void * checked(void * pointer) {
    void (*on_failure)(void) = pointer ? NULL : atomic_load(&watcher);
    if (on_failure) on_failure();
    return pointer;
}

void * checked_malloc(size_t size) {
    void * pointer = (malloc) (size);
    return size ? checked(pointer) : pointer;
}

void * checked_calloc(size_t n, size_t size) {
    void * pointer = (calloc) (n, size);
    return n && size ? checked(pointer) : pointer;
}

void * checked_realloc(void * pointer, size_t size) {
    void * moved = (realloc) (pointer, size);
    return size ? checked(moved) : moved;
}

// Large ones are buffers, and whether there is one is looked at.
int checked_posix_memalign(void ** out, size_t alignment, size_t size) {
    const int error = (posix_memalign) (out, alignment, size);
    if (error && size < LARGE) checked(NULL);
    return error;
}

void * checked_aligned_malloc(size_t size) {
    void * pointer = ggml_aligned_malloc(size);
    return size ? checked(pointer) : pointer;
}
