// memory.c - see memory.h.
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#endif
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <malloc.h>
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#if !defined(MAP_ANONYMOUS)
#define MAP_ANONYMOUS MAP_ANON
#endif
#if !defined(MAP_NORESERVE)
#define MAP_NORESERVE 0
#endif
#if defined(__linux__)
#define GIVE_BACK MADV_DONTNEED // at once
#elif defined(MADV_FREE)
#define GIVE_BACK MADV_FREE // when others need them
#endif
#endif

#define MAX_THREADS 512

#if defined(__linux__)
// The first one or two numbers of a file of a control group; "max" reads as UINT64_MAX.
static bool read_numbers(const char * path, uint64_t * a, uint64_t * b) {
    FILE * file = fopen(path, "r");
    if (!file) return false;
    char words[2][32] = { "", "" };
    int n = fscanf(file, "%31s %31s", words[0], words[1]);
    fclose(file);
    unsigned long long value = 0;
    for (int i = 0; i < n; i++) {
        uint64_t * out = i ? b : a;
        if (!out) break;
        if (!strcmp(words[i], "max")) *out = UINT64_MAX;
        else if (sscanf(words[i], "%llu", &value) == 1) *out = value;
    }
    return n > 0;
}

// Bytes of cached file pages in a control group, which the system can reclaim.
static uint64_t group_cached(void) {
    FILE * file = fopen("/sys/fs/cgroup/memory.stat", "r");
    if (!file) return 0;
    char line[128];
    unsigned long long value;
    uint64_t sum = 0;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "active_file %llu", &value) == 1 || sscanf(line, "inactive_file %llu", &value) == 1)
            sum += value;
    }
    fclose(file);
    return sum;
}

// Bytes that the control group of a container leaves free.
static uint64_t group_available(void) {
    uint64_t limit = UINT64_MAX, used = 0;
    if (!read_numbers("/sys/fs/cgroup/memory.max", &limit, NULL)) return UINT64_MAX;
    if (limit == UINT64_MAX || !read_numbers("/sys/fs/cgroup/memory.current", &used, NULL)) return UINT64_MAX;
    const uint64_t cached = group_cached();
    used -= cached < used ? cached : used;
    return used < limit ? limit - used : 0;
}
#endif

uint64_t memory_available(void) {
    uint64_t kib = UINT64_MAX;
#if defined(__linux__)
    FILE * file = fopen("/proc/meminfo", "r");
    if (!file) return UINT64_MAX;
    char line[128];
    unsigned long long value;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "MemAvailable: %llu kB", &value) == 1) kib = value;
    }
    fclose(file);
    const uint64_t group = group_available(), machine = kib == UINT64_MAX ? kib : kib * 1024;
    return group < machine ? group : machine;
#else
    return kib;
#endif
}

pyllava_status memory_check(uint64_t size, const char * what) {
    const uint64_t have = memory_available();
    if (size <= have) return PYLLAVA_OK;
    FAIL(PYLLAVA_ERR_MEMORY, "%s: needs %.2f GiB of memory, %.2f GiB are free", what,
         (double) size / (1 << 30), (double) have / (1 << 30));
}

int32_t cpu_count(void) {
    long n = 1;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
    uint64_t quota = UINT64_MAX, period = 0;
    if (read_numbers("/sys/fs/cgroup/cpu.max", &quota, &period) && quota != UINT64_MAX && period > 0) {
        const long share = (long) ((quota + period - 1) / period);
        if (share < n) n = share;
    }
#elif defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    n = (long) info.dwNumberOfProcessors;
#else
    n = sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : (int32_t) n;
}

void * aligned_new(size_t size) {
    size_t rounded = (size + MEMORY_ALIGNMENT - 1) / MEMORY_ALIGNMENT * MEMORY_ALIGNMENT;
    if (rounded < size) return NULL;
#if defined(_WIN32)
    return _aligned_malloc(rounded ? rounded : MEMORY_ALIGNMENT, MEMORY_ALIGNMENT);
#else
    return aligned_alloc(MEMORY_ALIGNMENT, rounded ? rounded : MEMORY_ALIGNMENT);
#endif
}

void aligned_free(void * pointer) {
#if defined(_WIN32)
    _aligned_free(pointer);
#else
    free(pointer);
#endif
}

void * pages_new(size_t size) {
#if defined(_WIN32)
    return VirtualAlloc(NULL, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
    const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void * pages = mmap(NULL, size, PROT_READ | PROT_WRITE, kind, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
#endif
}

void pages_free(void * pages, size_t size) {
    if (!pages) return;
#if defined(_WIN32)
    (void) size;
    VirtualFree(pages, 0, MEM_RELEASE);
#else
    munmap(pages, size);
#endif
}

void pages_give_back(void * part, size_t size) {
#if defined(GIVE_BACK)
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE), at = (uintptr_t) part;
    const uintptr_t first = (at + page - 1) / page * page, end = (at + size) / page * page;
    if (first < end) madvise((char *) part + (first - at), end - first, GIVE_BACK);
#else
    (void) part;
    (void) size;
#endif
}
