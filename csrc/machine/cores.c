// cores.c - see cores.h.
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#endif
#include "cores.h"

#include "memory.h"
#include "thread.h"

#include <stdio.h>
#include <stdlib.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define WAIT_MS 20 // between looks at the cancel flag

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
    const int32_t physical = count_physical(), most = cpu_count(); // a container's share may be less
    return physical < 1 || physical > most ? most : physical;
}

struct cores {
    int32_t n, n_free;
    uint64_t next, serving; // tickets: who asked first is served first
    lock lock;
    condition changed;
};

pyllava_status cores_create(cores ** out) {
    cores * c = calloc(1, sizeof *c);
    TRY_ALLOC(c, sizeof *c);
    c->n = c->n_free = cpu_count();
    lock_init(&c->lock);
    condition_init(&c->changed);
    *out = c;
    return PYLLAVA_OK;
}

void cores_free(cores * c) {
    if (!c) return;
    condition_free(&c->changed);
    lock_free(&c->lock);
    free(c);
}

pyllava_status cores_take(cores * c, int32_t n, const atomic_int * cancel) {
    lock_take(&c->lock);
    const int32_t need = n < c->n ? n : c->n;
    const uint64_t ticket = c->next++;
    bool cancelled = false;
    while (c->serving != ticket || (c->n_free < need && !cancelled)) {
        cancelled = atomic_load(cancel) != 0;
        if (c->serving != ticket || !cancelled) condition_wait_ms(&c->changed, &c->lock, WAIT_MS);
    }
    c->serving++;
    if (!cancelled) c->n_free -= need;
    condition_wake_all(&c->changed);
    lock_give(&c->lock);
    if (cancelled) FAIL(PYLLAVA_ERR_CANCELLED, "cancelled");
    return PYLLAVA_OK;
}

void cores_give(cores * c, int32_t n) {
    lock_take(&c->lock);
    c->n_free += n < c->n ? n : c->n;
    condition_wake_all(&c->changed);
    lock_give(&c->lock);
}
