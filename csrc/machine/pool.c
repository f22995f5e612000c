// pool.c - see pool.h. Threads, the caller among them, claim the parts of a run one by one from an atomic
// number that also counts the runs: a late thread finds no part, and cannot claim one of a run that it has
// not seen. At the end the caller waits only for parts that a thread has begun. A waiting thread spins for a
// moment (a step of decoding is some 200 runs, too many for a system call each) and then sleeps, to leave the
// core to a thread that has a part.
#include "pool.h"

#include "thread.h"

#include <stdatomic.h>
#include <stdlib.h>

#define SPIN_US 50
#define LEFT    POOL_MAX_PARTS // the bits of `claims` that count the parts left; above: the run

struct pool {
    pool_fn fn; // of this run: read only by threads that hold a part of it
    void * arg;
    int32_t n_parts;

    int32_t n_helpers;
    thread * helpers; // [n_helpers]
    lock lock;
    condition started, finished;

    char apart1[64]; // spinning threads read the next two: a cache line of their own
    atomic_ullong claims;
    atomic_bool stop;
    char apart2[64];
    atomic_int unfinished; // parts of this run
    atomic_int n_asleep;   // helpers
    atomic_bool caller_asleep;
};

static bool is_work(pool * p) { return (atomic_load(&p->claims) & LEFT) != 0; }

static bool claim(pool * p, int32_t * part) {
    unsigned long long c = atomic_load(&p->claims);
    while (c & LEFT) {
        if (!atomic_compare_exchange_weak(&p->claims, &c, c - 1)) continue;
        *part = (int32_t) (c & LEFT) - 1;
        return true;
    }
    return false;
}

// Once the last part is finished the caller may start the next run, or free the pool as soon as its threads
// have ended: nothing of this run is read after that.
static void do_parts(pool * p) {
    for (int32_t part; claim(p, &part);) {
        p->fn(p->arg, part, p->n_parts);
        if (atomic_fetch_sub(&p->unfinished, 1) > 1 || !atomic_load(&p->caller_asleep)) continue;
        lock_take(&p->lock);
        lock_give(&p->lock);
        condition_wake_one(&p->finished);
    }
}

static bool ready(pool * p, bool caller) {
    return caller ? atomic_load(&p->unfinished) == 0 : is_work(p) || atomic_load(&p->stop);
}

static bool spin(pool * p, bool caller) {
    for (const int64_t end = thread_now_us() + SPIN_US; thread_now_us() < end;) {
        for (int i = 0; i < 32; i++) {
            if (ready(p, caller)) return true;
            thread_relax();
        }
    }
    return false;
}

static void sleep_until_work(pool * p) {
    lock_take(&p->lock);
    atomic_fetch_add(&p->n_asleep, 1);
    if (!ready(p, false)) condition_wait(&p->started, &p->lock); // woken, it spins again: more may come
    atomic_fetch_sub(&p->n_asleep, 1);
    lock_give(&p->lock);
}

static void help(void * pool_) {
    pool * p = pool_;
    while (!atomic_load(&p->stop)) {
        do_parts(p);
        if (!spin(p, false)) sleep_until_work(p);
    }
}

static void wake_helpers(pool * p, int32_t n) {
    const int32_t n_asleep = atomic_load(&p->n_asleep);
    if (n_asleep == 0) return;
    lock_take(&p->lock); // a helper that has found nothing is asleep by now
    lock_give(&p->lock);
    if (n >= n_asleep) condition_wake_all(&p->started);
    else
        while (n-- > 0) condition_wake_one(&p->started);
}

static void wait_for_helpers(pool * p) {
    if (spin(p, true)) return;
    lock_take(&p->lock);
    atomic_store(&p->caller_asleep, true);
    while (!ready(p, true)) condition_wait(&p->finished, &p->lock);
    atomic_store(&p->caller_asleep, false);
    lock_give(&p->lock);
}

void pool_run(pool * p, pool_fn fn, void * arg, int32_t n_parts) {
    if (n_parts <= 1 || p->n_helpers == 0) {
        for (int32_t part = 0; part < n_parts; part++) fn(arg, part, n_parts);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->n_parts = n_parts;
    atomic_store(&p->unfinished, n_parts);
    const unsigned long long run = (atomic_load(&p->claims) / (LEFT + 1) + 1) * (LEFT + 1);
    atomic_store(&p->claims, run + (unsigned) n_parts);
    wake_helpers(p, n_parts - 1);
    do_parts(p);
    if (!ready(p, true)) wait_for_helpers(p);
}

int32_t pool_threads(const pool * p) { return p->n_helpers + 1; }

pyllava_status pool_create(int32_t n_threads, pool ** out) {
    pool * p = calloc(1, sizeof *p);
    TRY_ALLOC(p, sizeof *p);
    lock_init(&p->lock);
    condition_init(&p->started);
    condition_init(&p->finished);
    p->helpers = calloc((size_t) n_threads, sizeof *p->helpers);
    if (!p->helpers) {
        pool_free(p);
        FAIL(PYLLAVA_ERR_MEMORY, "out of memory for %d threads", n_threads);
    }
    while (p->n_helpers < n_threads - 1 && thread_start(&p->helpers[p->n_helpers], help, p)) p->n_helpers++;
    if (p->n_helpers < n_threads - 1) {
        pool_free(p);
        FAIL(PYLLAVA_ERR_DEVICE, "%d threads could not be started: try fewer", n_threads);
    }
    *out = p;
    return PYLLAVA_OK;
}

void pool_free(pool * p) {
    if (!p) return;
    atomic_store(&p->stop, true);
    lock_take(&p->lock);
    lock_give(&p->lock);
    condition_wake_all(&p->started);
    for (int32_t i = 0; i < p->n_helpers; i++) thread_join(&p->helpers[i]);
    condition_free(&p->finished);
    condition_free(&p->started);
    lock_free(&p->lock);
    free(p->helpers);
    free(p);
}
