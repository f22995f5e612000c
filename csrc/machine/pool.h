// pool.h - threads that share the work of one caller, for machines whose cores other processes use too: a
// thread that gets no core takes no part and delays nobody. Between runs, all but the caller's sleep after a
// moment.
#pragma once

#include "error.h"

typedef struct pool pool; // one run at a time
typedef void (*pool_fn)(void * arg, int32_t part, int32_t n_parts);

pyllava_status pool_create(int32_t n_threads, pool ** out); // the caller is one of them
void pool_free(pool * p);                                   // returns when its threads have ended
int32_t pool_threads(const pool * p);

// fn(arg, part, n_parts) once for each part, n_parts <= POOL_MAX_PARTS, in any order and by any thread; all
// are done when it returns.
#define POOL_MAX_PARTS 65535
void pool_run(pool * p, pool_fn fn, void * arg, int32_t n_parts);
