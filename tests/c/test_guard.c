// test_guard.c - a check of the engine that fails, in a graph that is being computed, becomes a status; and
// the engine goes on working.
#include "guard.h"

#include <ggml-backend.h>
#include <ggml.h>
#include <stdio.h>
#include <string.h>

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
    ggml_backend_free(w.backend);
    printf("guard: %d failed\n", n_wrong);
    return n_wrong != 0;
}
