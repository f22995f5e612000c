// cores.c - see cores.h.
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
// The lowest number among the hardware threads of a core, or the thread's own where that is unknown. The
// second name of the list is that of kernels before 5.3.
static int first_sibling(const char * root, int cpu) {
    static const char * const LISTS[] = { "core_cpus_list", "thread_siblings_list" };
    char path[512];
    int first = -1;
    for (int i = 0; i < 2 && first < 0; i++) {
        snprintf(path, sizeof path, "%s/sys/devices/system/cpu/cpu%d/topology/%s", root, cpu, LISTS[i]);
        FILE * file = fopen(path, "r");
        if (file && fscanf(file, "%d", &first) != 1) first = -1;
        if (file) fclose(file);
    }
    return first < 0 || first > cpu ? cpu : first;
}

int32_t cores_among(const char * root, const bool * allowed, int32_t n_cpus) {
    bool * seen = calloc((size_t) n_cpus, sizeof *seen);
    int32_t n = 0;
    for (int cpu = 0; seen && cpu < n_cpus; cpu++) {
        if (!allowed[cpu]) continue;
        const int first = first_sibling(root, cpu);
        n += !seen[first];
        seen[first] = true;
    }
    free(seen);
    return n;
}

static int32_t count_physical(void) {
    bool allowed[MAX_CPUS];
    return cpus_allowed(allowed) ? cores_among("", allowed, MAX_CPUS) : cpu_count();
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
