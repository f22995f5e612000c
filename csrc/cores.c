// cores.c - see cores.h.
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#endif
#include "cores.h"

#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#include <time.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define WAIT_MS 20                        // between looks at the cancel flag

#if defined(__linux__)
// The lowest number among the hardware threads of a core, or the thread's own where that is unknown.
static int first_sibling(int cpu) {
    char path[96];
    int first = cpu;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE * file = fopen(path, "r");
    if (!file) return cpu;
    if (fscanf(file, "%d", &first) != 1 || first < 0 || first > cpu) first = cpu;
    fclose(file);
    return first;
}

static int32_t count_physical(void) {
    cpu_set_t allowed, seen;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return cpu_count();
    CPU_ZERO(&seen);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &allowed)) CPU_SET(first_sibling(cpu), &seen);
    }
    return CPU_COUNT(&seen);
}
#elif defined(__APPLE__)
static int32_t count_physical(void) {
    int32_t n = 0;
    size_t size = sizeof n;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &n, &size, NULL, 0) == 0 && n > 0) return n;
    size = sizeof n;
    return sysctlbyname("hw.physicalcpu", &n, &size, NULL, 0) == 0 && n > 0 ? n : cpu_count();
}
#else
static int32_t count_physical(void) { return cpu_count(); }
#endif

int32_t cores_physical(void) {
    const int32_t physical = count_physical(), most = cpu_count();       // a container's share may be less
    return physical < 1 || physical > most ? most : physical;
}

struct cores {
    int32_t n, n_free;
    uint64_t next, serving;               // tickets: who asked first is served first
#if defined(_WIN32)
    CRITICAL_SECTION lock;
    CONDITION_VARIABLE changed;
#else
    pthread_mutex_t lock;
    pthread_cond_t changed;
#endif
};

#if defined(_WIN32)
static void lock(cores * c) { EnterCriticalSection(&c->lock); }
static void unlock(cores * c) { LeaveCriticalSection(&c->lock); }
static void tell(cores * c) { WakeAllConditionVariable(&c->changed); }
static void wait_a_little(cores * c) { SleepConditionVariableCS(&c->changed, &c->lock, WAIT_MS); }
#else
static void lock(cores * c) { pthread_mutex_lock(&c->lock); }
static void unlock(cores * c) { pthread_mutex_unlock(&c->lock); }
static void tell(cores * c) { pthread_cond_broadcast(&c->changed); }
static void wait_a_little(cores * c) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += WAIT_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
    pthread_cond_timedwait(&c->changed, &c->lock, &until);
}
#endif

pyllava_status cores_create(cores ** out) {
    cores * c = calloc(1, sizeof *c);
    TRY_ALLOC(c, sizeof *c);
    c->n = c->n_free = cpu_count();
#if defined(_WIN32)
    InitializeCriticalSection(&c->lock);
    InitializeConditionVariable(&c->changed);
#else
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
#endif
    *out = c;
    return PYLLAVA_OK;
}

void cores_free(cores * c) {
    if (!c) return;
#if defined(_WIN32)
    DeleteCriticalSection(&c->lock);
#else
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->lock);
#endif
    free(c);
}

pyllava_status cores_take(cores * c, int32_t n, const atomic_int * cancel) {
    lock(c);
    const int32_t need = n < c->n ? n : c->n;
    const uint64_t ticket = c->next++;
    bool cancelled = false;
    while (c->serving != ticket || (c->n_free < need && !cancelled)) {
        cancelled = atomic_load(cancel) != 0;
        if (c->serving != ticket || !cancelled) wait_a_little(c);
    }
    c->serving++;
    if (!cancelled) c->n_free -= need;
    tell(c);
    unlock(c);
    if (cancelled) FAIL(PYLLAVA_ERR_CANCELLED, "cancelled");
    return PYLLAVA_OK;
}

void cores_give(cores * c, int32_t n) {
    lock(c);
    c->n_free += n < c->n ? n : c->n;
    tell(c);
    unlock(c);
}
