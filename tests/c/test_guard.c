// test_guard.c - a check of the engine that fails, in a graph that is being computed, becomes a status; and
// the engine goes on working. A thread that ends inside a guard, by itself or because it is cancelled, does
// end.
#include "guard.h"

#include <ggml-backend.h>
#include <ggml.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(PYLLAVA_CHECKED)
#include <checked.h>
#endif

typedef struct work {
    ggml_backend_t backend;
    bool gives_up;
    int n_computed;
    enum ggml_status status;
} work;

static void node(struct ggml_tensor * dst, int ith, int nth, void * work_) {
    work * w = work_;
    (void) dst, (void) ith, (void) nth;
    if (w->gives_up) GGML_ABORT("out of memory, %d bytes", 7);
    w->n_computed++;
}

static pyllava_status compute(void * work_) {
    work * w = work_;
    struct ggml_context * ctx = ggml_init((struct ggml_init_params) { .mem_size = 1 << 20 });
    struct ggml_tensor * x = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 4);
    struct ggml_tensor * y = ggml_custom_4d(ctx, GGML_TYPE_F32, 4, 1, 1, 1, &x, 1, node, 1, w);
    struct ggml_cgraph * g = ggml_new_graph(ctx);
    ggml_build_forward_expand(g, y);
    w->status = ggml_backend_graph_compute(w->backend, g);
    ggml_free(ctx);
    return PYLLAVA_OK;
}

#if defined(PYLLAVA_CHECKED)
static pyllava_status ask_for_too_much(void * user) {
    (void) user;
    free(checked_malloc(SIZE_MAX / 2));
    return PYLLAVA_OK;
}

// In a guard, what ggml's sources ask for is there, or they do not go on.
static int test_memory(void) {
    int n_wrong = guarded(ask_for_too_much, NULL) != PYLLAVA_ERR_MEMORY;
    n_wrong += ask_for_too_much(NULL) != PYLLAVA_OK; // elsewhere they get NULL
    if (n_wrong) printf("guard: memory that is not there: %d wrong\n", n_wrong);
    return n_wrong;
}
#else
static int test_memory(void) { return 0; }
#endif

#if defined(__linux__)
// How a thread ends: depth guards deep, inside a graph or not.
typedef struct ending {
    int depth;
    bool cancelled, in_graph;
    work * work;
    int n_returned; // guards that came back
} ending;

static void end(const ending * e) {
    if (e->cancelled) pthread_cancel(pthread_self());
    else pthread_exit((void *) e);
    for (;;) pause(); // a point where a thread is cancelled
}

static void last_node(struct ggml_tensor * dst, int ith, int nth, void * ending_) {
    (void) dst, (void) ith, (void) nth;
    end(ending_);
}

static pyllava_status enter(void * ending_) {
    ending * e = ending_;
    if (e->depth-- > 0) {
        guarded(enter, e);
        e->n_returned++;
        return PYLLAVA_OK;
    }
    if (!e->in_graph) end(e);
    struct ggml_context * ctx = ggml_init((struct ggml_init_params) { .mem_size = 1 << 20 });
    struct ggml_tensor * x = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 4);
    struct ggml_cgraph * g = ggml_new_graph(ctx);
    ggml_build_forward_expand(g, ggml_custom_4d(ctx, GGML_TYPE_F32, 4, 1, 1, 1, &x, 1, last_node, 1, e));
    ggml_backend_graph_compute(e->work->backend, g);
    return PYLLAVA_OK;
}

static void * begin(void * ending_) {
    guarded(enter, ending_);
    ((ending *) ending_)->n_returned++;
    return NULL;
}

static int test_endings(work * w) {
    int n_wrong = 0;
    for (int i = 0; i < 12; i++) {
        ending e = { .depth = i / 4, .cancelled = i % 2, .in_graph = i / 2 % 2, .work = w };
        pthread_t thread;
        void * result = NULL;
        if (pthread_create(&thread, NULL, begin, &e) || pthread_join(thread, &result)) return 1;
        const bool right = result == (e.cancelled ? PTHREAD_CANCELED : (void *) &e) && e.n_returned == 0;
        if (!right) printf("guard: ending %d gave %p, %d came back\n", i, result, e.n_returned);
        n_wrong += !right;
    }
    return n_wrong;
}
#else
static int test_endings(work * w) { return w->backend == NULL; }
#endif

int main(void) {
    work w = { .backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL) };
    int n_wrong = 0;
    for (int i = 0; i < 4; i++) {
        w.gives_up = i % 2;
        pyllava_status status = guarded(compute, &w);
        const bool right = status == (w.gives_up ? PYLLAVA_ERR_DEVICE : PYLLAVA_OK) &&
                           (!w.gives_up || strstr(error_text(), "out of memory, 7 bytes"));
        if (!right) printf("guard: run %d gave %d, %s\n", i, (int) status, error_text());
        n_wrong += !right;
    }
    n_wrong += w.n_computed != 2;
    n_wrong += test_memory();
    n_wrong += test_endings(&w);
    w.gives_up = false;
    n_wrong += guarded(compute, &w) != PYLLAVA_OK || w.n_computed != 3;
    ggml_backend_free(w.backend);
    printf("guard: %d failed\n", n_wrong);
    return n_wrong != 0;
}
