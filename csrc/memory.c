// memory.c - see memory.h.
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#endif
#include "memory.h"

#include <stdio.h>
#if defined(_WIN32)
#include <windows.h>
#else
#include <unistd.h>
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
#endif
    return kib == UINT64_MAX ? kib : kib * 1024;
}

int32_t cpu_count(void) {
    long n = 1;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
#elif defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    n = (long) info.dwNumberOfProcessors;
#else
    n = sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return n < 1 ? 1 : n > 512 ? 512 : (int32_t) n;
}
