// engine.c - see engine.h.
#include "engine.h"

#include "guard.h"
#include "thread.h"

#include <ggml-cpu.h>
#include <stdio.h>
#include <string.h>

// ------------------------------------------------------------------------------------------- start

static pyllava_status start_cpu(engine * e) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_t backend = cpu ? ggml_backend_dev_init(cpu, NULL) : NULL;
    if (!backend) FAIL(PYLLAVA_ERR_DEVICE, "the CPU back end could not be started");
    e->memory[e->n] = ggml_backend_get_default_buffer_type(backend);
    e->backends[e->n++] = backend;
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(cpu);
    e->threads_new = (struct ggml_threadpool * (*) (struct ggml_threadpool_params *) )
        ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_new");
    e->threads_free =
        (void (*)(struct ggml_threadpool *)) ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_free");
    e->set_threads = (void (*)(ggml_backend_t, struct ggml_threadpool *)) ggml_backend_reg_get_proc_address(
        reg, "ggml_backend_cpu_set_threadpool");
    e->set_n =
        (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    ggml_backend_set_abort_callback_t set_abort =
        (ggml_backend_set_abort_callback_t) ggml_backend_reg_get_proc_address(
            reg, "ggml_backend_set_abort_callback");
    if (!e->threads_new || !e->threads_free || !e->set_threads || !e->set_n || !set_abort)
        FAIL(PYLLAVA_ERR_DEVICE, "the CPU back end is too old");
    set_abort(backend, e->has_to_stop, e->user);
    return PYLLAVA_OK;
}

typedef struct starting {
    ggml_backend_dev_t device;
    ggml_backend_t backend;
} starting;

static pyllava_status start(void * starting_) {
    starting * s = starting_;
    s->backend = ggml_backend_dev_init(s->device, NULL);
    if (!s->backend) FAIL(PYLLAVA_ERR_DEVICE, "%s could not be started", ggml_backend_dev_name(s->device));
    return PYLLAVA_OK;
}

static pyllava_status start_transfer(void * engine_) {
    engine * e = engine_;
    transfer_start(&e->transfer, ggml_backend_get_device(e->backends[0]));
    return PYLLAVA_OK;
}

pyllava_status engine_start(engine * e, const placement * p, ggml_abort_callback has_to_stop, void * user) {
    TRY(devices_check(&p->devices));
    e->has_to_stop = has_to_stop;
    e->user = user;
    for (int32_t i = 0; i < p->devices.n; i++) {
        ggml_backend_dev_t device = p->devices.items[i];
        starting s = { device, NULL };
        TRY(guarded(start, &s));
        e->memory[e->n] = ggml_backend_dev_buffer_type(device);
        e->backends[e->n++] = s.backend;
    }
    if (e->n) TRY(guarded(start_transfer, e));
    // The CPU's buffers are not in pinned memory, which the device would read directly: the scheduler lets
    // the CPU overwrite them too early.
    return start_cpu(e);
}

static pyllava_status stop(void * engine_) {
    engine * e = engine_;
    if (e->sched && !e->broken) ggml_backend_sched_free(e->sched);
    transfer_stop(&e->transfer);
    for (int32_t i = 0; i < e->n && !e->broken; i++) ggml_backend_free(e->backends[i]);
    if (e->threads) e->threads_free(e->threads);
    return PYLLAVA_OK;
}

void engine_stop(engine * e) {
    if (e->n <= 1 || !guard_has_failed()) guarded(stop, e); // else freed with the process
    *e = (engine) { 0 };
}

ggml_backend_buffer_type_t engine_memory(const engine * e, const placement * p, int32_t place) {
    if (place != ON_HOST && !p->kv_on_host) return e->memory[place];
    return ggml_backend_get_default_buffer_type(e->backends[e->n - 1]);
}

static pyllava_status start_sched(engine * e) {
    e->sched = ggml_backend_sched_new(e->backends, e->memory, e->n, (size_t) e->n_nodes, false, e->offload);
    if (!e->sched) FAIL(PYLLAVA_ERR_DEVICE, "the scheduler could not be started");
    ggml_backend_sched_set_eval_callback(e->sched, e->observer, e->observer_user);
    return PYLLAVA_OK;
}

pyllava_status engine_schedule(engine * e, int32_t n_nodes, bool offload) {
    e->n_nodes = n_nodes;
    e->offload = offload;
    return start_sched(e);
}

void engine_observe(engine * e, ggml_backend_sched_eval_callback fn, void * user) {
    e->observer = fn;
    e->observer_user = fn ? user : NULL;
    if (!e->broken) ggml_backend_sched_set_eval_callback(e->sched, fn, e->observer_user);
}

static pyllava_status start_again(void * engine_) {
    engine * e = engine_;
    TRY(start_cpu(e));
    if (e->threads) e->set_threads(e->backends[0], e->threads);
    return start_sched(e);
}

// Where the CPU alone computes, what a call left that failed, mostly for want of memory, is abandoned for a
// new start. A device is in an unknown state.
static pyllava_status mend(engine * e) {
    if (!e->broken) return PYLLAVA_OK;
    if (e->n > 1) FAIL(PYLLAVA_ERR_DEVICE, "the back end has failed before: " DEVICES_WAY_OUT);
    engine fresh = *e;
    fresh.n = 0;
    fresh.sched = NULL;
    fresh.broken = false;
    TRY(guarded(start_again, &fresh));
    *e = fresh;
    return PYLLAVA_OK;
}

// ------------------------------------------------------------------------------------------ graphs

// Arguments and results of a guarded call of the scheduler.
typedef struct sched_call {
    engine * e;
    struct ggml_cgraph * nodes;
    size_t sizes[MAX_DEVICES + 1];
    bool done;
    enum ggml_status status;
} sched_call;

static pyllava_status call_sched(sched_call * c, pyllava_status (*fn)(void *)) {
    TRY(mend(c->e));
    pyllava_status status = guarded(fn, c);
    if (status != PYLLAVA_OK) c->e->broken = true;
    return status;
}

// The scheduler's table has no room for two graphs, so it is emptied before each.
static pyllava_status measure(void * call_) {
    sched_call * c = call_;
    ggml_backend_sched_reset(c->e->sched);
    ggml_backend_sched_reserve_size(c->e->sched, c->nodes, c->sizes);
    return PYLLAVA_OK;
}

static pyllava_status reserve(void * call_) {
    sched_call * c = call_;
    ggml_backend_sched_reset(c->e->sched);
    c->done = ggml_backend_sched_reserve(c->e->sched, c->nodes);
    return PYLLAVA_OK;
}

static pyllava_status load(void * call_) {
    sched_call * c = call_;
    ggml_backend_sched_reset(c->e->sched);
    c->done = ggml_backend_sched_alloc_graph(c->e->sched, c->nodes);
    return PYLLAVA_OK;
}

static pyllava_status compute(void * call_) {
    sched_call * c = call_;
    transfer_send(&c->e->transfer);
    c->status = ggml_backend_sched_graph_compute(c->e->sched, c->nodes);
    return PYLLAVA_OK;
}

pyllava_status engine_measure(engine * e, graph * g, engine_size * out) {
    sched_call c = { .e = e, .nodes = g->nodes };
    TRY(call_sched(&c, measure));
    *out = (engine_size) { .host = c.sizes[e->n - 1] };
    for (int32_t i = 0; i < e->n; i++) out->all += c.sizes[i];
    return PYLLAVA_OK;
}

static pyllava_status no_buffer(const engine * e) {
    if (e->n == 1) FAIL(PYLLAVA_ERR_MEMORY, "no memory for the compute buffer: try a smaller n_batch");
    char free[512] = "";
    size_t used = 0;
    for (int32_t i = 0; i < e->n - 1 && used < sizeof free; i++) {
        pyllava_device about;
        device_describe(ggml_backend_get_device(e->backends[i]), &about);
        used += (size_t) snprintf(free + used, sizeof free - used, "%s%s has %.2f GiB free", i ? ", " : "",
                                  about.name, (double) about.memory_free / (1 << 30));
    }
    FAIL(PYLLAVA_ERR_MEMORY, "no memory for the compute buffer (%s): try a smaller n_gpu_layers or n_batch",
         free);
}

pyllava_status engine_reserve(engine * e, graph * g) {
    sched_call c = { .e = e, .nodes = g->nodes };
    TRY(call_sched(&c, reserve));
    return c.done ? PYLLAVA_OK : no_buffer(e);
}

pyllava_status engine_load(engine * e, graph * g) {
    sched_call c = { .e = e, .nodes = g->nodes };
    TRY(call_sched(&c, load));
    return c.done ? PYLLAVA_OK : no_buffer(e);
}

// Arguments of guarded calls that concern the CPU's threads.
typedef struct threads_call {
    engine * e;
    int32_t n;
    struct ggml_threadpool * threads;
} threads_call;

static pyllava_status start_threads(void * call_) {
    threads_call * c = call_;
    struct ggml_threadpool_params params = ggml_threadpool_params_default(c->n);
    params.poll = 0; // between graphs they sleep
    c->threads = c->e->threads_new(&params);
    return PYLLAVA_OK;
}

static pyllava_status set_threads(engine * e, int32_t n) {
    ggml_backend_t cpu = e->backends[e->n - 1];
    const int32_t n_now = e->n_threads > 1 ? e->n_threads : 1;
    if (n > n_now && !threads_can_start(n)) n = n_now; // ggml would abort: the threads it has must do
    if (n > e->n_threads) {
        threads_call c = { .e = e, .n = n };
        TRY(guarded(start_threads, &c));
        if (!c.threads) FAIL(PYLLAVA_ERR_DEVICE, "%d threads could not be started", n);
        e->set_threads(cpu, c.threads);
        if (e->threads) e->threads_free(e->threads);
        e->threads = c.threads;
        e->n_threads = n;
    }
    e->set_n(cpu, n);
    return PYLLAVA_OK;
}

pyllava_status engine_run(engine * e, graph * g, int32_t n_threads) {
    sched_call c = { .e = e, .nodes = g->nodes };
    TRY(set_threads(e, g->on_engine ? n_threads : 1));
    pyllava_status status = call_sched(&c, compute);
    if (e->broken) e->threads = NULL, e->n_threads = 0; // they may wait for one another within the graph
    TRY(status);
    if (c.status == GGML_STATUS_SUCCESS) return PYLLAVA_OK;
    if (c.status == GGML_STATUS_ABORTED) FAIL(PYLLAVA_ERR_CANCELLED, "cancelled");
    if (c.status == GGML_STATUS_ALLOC_FAILED) return no_buffer(e);
    FAIL(PYLLAVA_ERR_DEVICE, "the back end failed with status %d", (int) c.status);
}

// ------------------------------------------------------------------------------------------ memory

// Arguments of a guarded call that reads or writes a tensor, or places a graph's inputs.
typedef struct memory_call {
    engine * e;
    graph * g;
    tensor * t;
    size_t offset, size;
    const void * data;
    void * out;
} memory_call;

static pyllava_status call_memory(pyllava_status (*fn)(void *), memory_call c) {
    if (c.e->broken) FAIL(PYLLAVA_ERR_DEVICE, "the back end has failed before: " DEVICES_WAY_OUT);
    pyllava_status status = guarded(fn, &c);
    if (status != PYLLAVA_OK) c.e->broken = true;
    return status;
}

static pyllava_status place(void * call_) {
    const memory_call * c = call_;
    transfer_place(&c->e->transfer, c->g);
    return PYLLAVA_OK;
}

static pyllava_status put(void * call_) {
    const memory_call * c = call_;
    if (transfer_has(&c->e->transfer, c->t)) transfer_put(&c->e->transfer, c->t, c->offset, c->data, c->size);
    else ggml_backend_tensor_set(c->t, c->data, c->offset, c->size);
    return PYLLAVA_OK;
}

static pyllava_status get(void * call_) {
    const memory_call * c = call_;
    transfer_get(&c->e->transfer, c->t, c->offset, c->size, c->out);
    return PYLLAVA_OK;
}

static pyllava_status zero(void * call_) {
    const memory_call * c = call_;
    ggml_backend_tensor_memset(c->t, 0, c->offset, c->size);
    return PYLLAVA_OK;
}

pyllava_status engine_place_inputs(engine * e, graph * g) {
    return call_memory(place, (memory_call) { .e = e, .g = g });
}

pyllava_status engine_put(engine * e, tensor * t, size_t offset, const void * data, size_t size) {
    return call_memory(put, (memory_call) { .e = e, .t = t, .offset = offset, .size = size, .data = data });
}

pyllava_status engine_get_rows(engine * e, const tensor * t, int64_t first, int64_t n, void * out) {
    const size_t row = t->nb[1];
    return call_memory(get, (memory_call) { .e = e,
                                            .t = (tensor *) (uintptr_t) t,
                                            .offset = (size_t) first * row,
                                            .size = (size_t) n * row,
                                            .out = out });
}

pyllava_status engine_get(engine * e, const tensor * t, void * out) {
    return engine_get_rows(e, t, 0, ggml_nrows(t), out);
}

pyllava_status engine_zero(engine * e, tensor * t, int64_t first, int64_t n) {
    const size_t row = t->nb[1];
    return call_memory(
        zero, (memory_call) { .e = e, .t = t, .offset = (size_t) first * row, .size = (size_t) n * row });
}
