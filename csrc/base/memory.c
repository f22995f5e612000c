// memory.c - see memory.h.
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#endif
#include "memory.h"

#include "cgroup.h"

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
    const uint64_t group = cgroup_memory_available(""), machine = kib == UINT64_MAX ? kib : kib * 1024;
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

#if defined(__linux__)
int32_t cpus_allowed(bool allowed[MAX_CPUS]) {
    cpu_set_t sets[MAX_CPUS / CPU_SETSIZE];
    int32_t n = 0;
    memset(sets, 0, sizeof sets);
    memset(allowed, 0, MAX_CPUS * sizeof *allowed);
    if (sched_getaffinity(0, sizeof sets, sets)) return 0;
    for (int cpu = 0; cpu < MAX_CPUS; cpu++)
        n += allowed[cpu] = CPU_ISSET_S((size_t) cpu, sizeof sets, sets) != 0;
    return n;
}
#endif

int32_t cpu_count(void) {
    long n = 1;
#if defined(__linux__)
    bool allowed[MAX_CPUS];
    const int32_t share = cgroup_cpus("");
    n = cpus_allowed(allowed);
    if (n == 0) n = sysconf(_SC_NPROCESSORS_ONLN);
    if (share < n) n = share;
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
