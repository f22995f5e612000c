// thread.c - see thread.h.
#if !defined(_WIN32) && !defined(__APPLE__)
#define _GNU_SOURCE
#endif
#include "thread.h"

#include <stdlib.h>
#if !defined(_WIN32)
#include <signal.h>
#include <time.h>
#endif

#if defined(_WIN32)
void lock_init(lock * l) { InitializeCriticalSection(l); }
void lock_free(lock * l) { DeleteCriticalSection(l); }
void lock_take(lock * l) { EnterCriticalSection(l); }
void lock_give(lock * l) { LeaveCriticalSection(l); }

void condition_init(condition * c) { InitializeConditionVariable(c); }
void condition_free(condition * c) { (void) c; }
void condition_wait(condition * c, lock * l) { SleepConditionVariableCS(c, l, INFINITE); }
void condition_wait_ms(condition * c, lock * l, int32_t ms) { SleepConditionVariableCS(c, l, (DWORD) ms); }
void condition_wake_one(condition * c) { WakeConditionVariable(c); }
void condition_wake_all(condition * c) { WakeAllConditionVariable(c); }

static DWORD WINAPI entry(void * self) {
    thread * t = self;
    t->run(t->arg);
    return 0;
}

bool thread_start(thread * t, void (*run)(void * arg), void * arg) {
    *t = (thread) { .run = run, .arg = arg };
    t->handle = CreateThread(NULL, 0, entry, t, 0, NULL);
    return t->handle != NULL;
}

void thread_join(thread * t) {
    WaitForSingleObject(t->handle, INFINITE);
    CloseHandle(t->handle);
}

int64_t thread_now_us(void) {
    LARGE_INTEGER now, frequency;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&frequency);
    return (int64_t) ((double) now.QuadPart * 1e6 / (double) frequency.QuadPart);
}
#else
void lock_init(lock * l) { pthread_mutex_init(l, NULL); }
void lock_free(lock * l) { pthread_mutex_destroy(l); }
void lock_take(lock * l) { pthread_mutex_lock(l); }
void lock_give(lock * l) { pthread_mutex_unlock(l); }

void condition_init(condition * c) { pthread_cond_init(c, NULL); }
void condition_free(condition * c) { pthread_cond_destroy(c); }
void condition_wait(condition * c, lock * l) { pthread_cond_wait(c, l); }
void condition_wake_one(condition * c) { pthread_cond_signal(c); }
void condition_wake_all(condition * c) { pthread_cond_broadcast(c); }

void condition_wait_ms(condition * c, lock * l, int32_t ms) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
    pthread_cond_timedwait(c, l, &until);
}

static void * entry(void * self) {
    thread * t = self;
    t->run(t->arg);
    return NULL;
}

// Blocks all signals but those of a fault, which the faulting thread must handle.
static void block_signals(sigset_t * old) {
    static const int FAULTS[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL };
    sigset_t most;
    sigfillset(&most);
    for (int i = 0; i < 4; i++) sigdelset(&most, FAULTS[i]);
    pthread_sigmask(SIG_SETMASK, &most, old);
}

bool thread_start(thread * t, void (*run)(void * arg), void * arg) {
    *t = (thread) { .run = run, .arg = arg };
    sigset_t old;
    block_signals(&old); // inherited
    const bool started = pthread_create(&t->handle, NULL, entry, t) == 0;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return started;
}

void thread_join(thread * t) { pthread_join(t->handle, NULL); }

int64_t thread_now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}
#endif

static void pass_gate(void * gate) {
    lock_take(gate);
    lock_give(gate);
}

bool threads_can_start(int32_t n) {
    thread * threads = calloc((size_t) n, sizeof *threads);
    if (!threads) return false;
    lock gate;
    int32_t started = 0;
    lock_init(&gate);
    lock_take(&gate);
    while (started < n - 1 && thread_start(&threads[started], pass_gate, &gate)) started++;
    lock_give(&gate);
    for (int32_t i = 0; i < started; i++) thread_join(&threads[i]);
    lock_free(&gate);
    free(threads);
    return started == n - 1;
}

void thread_relax(void) {
#if defined(_WIN32)
    YieldProcessor();
#elif defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
