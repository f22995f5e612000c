// thread.h - threads, locks and conditions, of POSIX or of Windows.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#endif

#if defined(_WIN32)
typedef CRITICAL_SECTION lock;
typedef CONDITION_VARIABLE condition;
typedef HANDLE thread_handle;
#else
typedef pthread_mutex_t lock;
typedef pthread_cond_t condition;
typedef pthread_t thread_handle;
#endif

typedef struct thread {
    thread_handle handle;
    void (*run)(void * arg);
    void * arg;
} thread;

void lock_init(lock * l);
void lock_free(lock * l);
void lock_take(lock * l);
void lock_give(lock * l);

void condition_init(condition * c);
void condition_free(condition * c);
void condition_wait(condition * c, lock * l);                // may also wake for no reason
void condition_wait_ms(condition * c, lock * l, int32_t ms); // at most so long
void condition_wake_one(condition * c);
void condition_wake_all(condition * c);

// Runs run(arg) in a thread that signal handlers leave alone; false: the system gives no more threads. t must
// not move before thread_join, which waits for the end.
bool thread_start(thread * t, void (*run)(void * arg), void * arg);
void thread_join(thread * t);
bool threads_can_start(int32_t n); // tries to start n - 1 at once, beside the caller

void thread_relax(void);     // for the body of a spin loop
int64_t thread_now_us(void); // a clock that only goes forward
