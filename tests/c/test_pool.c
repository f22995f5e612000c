// test_pool.c - the thread pool: each part of each run exactly once, whatever the threads and however long
// the parts; nothing left running when it is idle or gone; and, on Linux, helpers that get no core.
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#endif
#include "pool.h"
#include "thread.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_PARTS 200

static void fail(const char * format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "test-pool: FAILED: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static uint64_t mix(uint64_t x) { // SplitMix64
    x = (x + 0x9E3779B97F4A7C15u) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static pool * new_pool(int32_t n_threads) {
    pool * p = NULL;
    if (pool_create(n_threads, &p) != PYLLAVA_OK) fail("%d threads: %s", n_threads, error_text());
    if (pool_threads(p) != n_threads) fail("%d threads, need %d", pool_threads(p), n_threads);
    return p;
}

typedef struct work {
    uint64_t run;
    int32_t n_parts, longest; // spins of a part
    int done[MAX_PARTS];      // not atomic: of who does the part, then of the caller
    atomic_int inside;
} work;

static void do_part(void * work_, int32_t part, int32_t n_parts) {
    work * w = work_;
    if (n_parts != w->n_parts || part < 0 || part >= n_parts)
        fail("part %d of %d, need %d", part, n_parts, w->n_parts);
    atomic_fetch_add(&w->inside, 1);
    const uint64_t length = mix(w->run * MAX_PARTS + (uint64_t) part) % (uint64_t) w->longest;
    for (uint64_t i = 0; i < length; i++) thread_relax();
    w->done[part]++;
    atomic_fetch_sub(&w->inside, 1);
}

static void run_once(pool * p, work * w, int32_t n_parts) {
    w->n_parts = n_parts;
    memset(w->done, 0, sizeof w->done);
    pool_run(p, do_part, w, n_parts);
    if (atomic_load(&w->inside)) fail("run %llu: returned too early", (unsigned long long) w->run);
    for (int32_t i = 0; i < n_parts; i++) {
        if (w->done[i] != 1)
            fail("run %llu: part %d of %d done %d times", (unsigned long long) w->run, i, n_parts,
                 w->done[i]);
    }
    w->run++;
}

// Short parts, now and then long ones and pauses, in which helpers fall asleep.
static void test_runs(int32_t n_threads, int n_runs) {
    pool * p = new_pool(n_threads);
    work w = { 0 };
    for (int i = 0; i < n_runs; i++) {
        const uint64_t r = mix((uint64_t) i);
        w.longest = r % 64 == 0 ? 20000 : r % 8 == 0 ? 500 : 10;
        run_once(p, &w, i % 7 == 0 ? (int32_t) (r >> 20) % MAX_PARTS : n_threads);
        const int64_t pause = r % 256 == 0 ? thread_now_us() + 200 : 0;
        while (thread_now_us() < pause) thread_relax();
    }
    pool_free(p);
}

// Freed at once, after one run, and some time after it.
static void test_free(void) {
    for (int i = 0; i < 300; i++) {
        pool * p = new_pool(1 + i % 5);
        work w = { .longest = 100 };
        if (i % 3) run_once(p, &w, 5);
        const int64_t pause = i % 3 == 2 ? thread_now_us() + 300 : 0;
        while (thread_now_us() < pause) thread_relax();
        pool_free(p);
    }
    pool_free(NULL);
}

static void rest_ms(int ms) { // without the processor
    lock l;
    condition never;
    lock_init(&l);
    condition_init(&never);
    lock_take(&l);
    for (const int64_t end = thread_now_us() + ms * 1000; thread_now_us() < end;)
        condition_wait_ms(&never, &l, (int32_t) ((end - thread_now_us()) / 1000 + 1));
    lock_give(&l);
    condition_free(&never);
    lock_free(&l);
}

static void test_idle(void) {
    pool * p = new_pool(4);
    work w = { .longest = 10 };
    run_once(p, &w, 4);
    rest_ms(20);
    const clock_t before = clock();
    rest_ms(500);
    const double used = (double) (clock() - before) / CLOCKS_PER_SEC;
    if (used > 0.1) fail("an idle pool used %.3f s of processor time in half a second", used);
    pool_free(p);
}

#if defined(__linux__)
static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) fail("cannot pin to core %d", cpu);
}

// Seconds of 2000 runs whose helpers share one core with three busy processes, the caller on another if there
// is one: at best a helper runs a quarter of the time, for milliseconds, so that waiting for it in each run
// would take many seconds.
static double test_no_core(void) {
    cpu_set_t all;
    int cpus[2] = { -1, -1 }, n = 0;
    if (sched_getaffinity(0, sizeof all, &all)) fail("the cores are unknown");
    for (int cpu = 0; cpu < CPU_SETSIZE && n < 2; cpu++) {
        if (CPU_ISSET(cpu, &all)) cpus[n++] = cpu;
    }
    pid_t busy[3];
    pin(cpus[0]);
    for (int i = 0; i < 3; i++) {
        busy[i] = fork();
        if (busy[i] < 0) fail("cannot fork");
        while (busy[i] == 0 && getppid() != 1) thread_relax();
        if (busy[i] == 0) _exit(0);
    }
    pool * p = new_pool(4); // its helpers stay on this core
    if (n == 2) pin(cpus[1]);
    work w = { .longest = 100 };
    const int64_t start = thread_now_us();
    for (int i = 0; i < 2000; i++) run_once(p, &w, 4);
    const double seconds = (double) (thread_now_us() - start) * 1e-6;
    pool_free(p);
    for (int i = 0; i < 3; i++) {
        kill(busy[i], SIGKILL);
        waitpid(busy[i], NULL, 0);
    }
    sched_setaffinity(0, sizeof all, &all);
    if (seconds > 10) fail("2000 runs beside busy processes took %.1f s", seconds);
    return seconds;
}
#else
static double test_no_core(void) { return 0; }
#endif

int main(int argc, char ** argv) {
    const int n_runs = argc > 1 ? atoi(argv[1]) : 100000;
    test_runs(1, n_runs / 10);
    test_runs(2, n_runs);
    test_runs(3, n_runs);
    test_runs(64, n_runs / 100);
    test_free();
    test_idle();
    const double seconds = test_no_core();
    printf("test-pool: ok: %d runs; 2000 beside busy processes took %.2f s\n",
           2 * n_runs + n_runs / 10 + n_runs / 100, seconds);
    return 0;
}
