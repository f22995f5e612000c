// devices.c - see devices.h.
#if !defined(_WIN32)
#define _GNU_SOURCE
#endif
#include "devices.h"

#include "context.h"
#include "guard.h"
#include "memory.h"

#include <ggml.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void keep_quiet(enum ggml_log_level level, const char * text, void * user) {
    (void) level, (void) text, (void) user;
}

static void set_unset(const char * name, const char * value) {
#if defined(_WIN32)
    if (!getenv(name)) _putenv_s(name, value);
#else
    setenv(name, value, 0);
#endif
}

// ggml would print to stderr as soon as its devices are listed. CUDA's back end reads from the environment,
// once, in which precision to sum products of 16 bits.
void devices_set_up(void) {
    ggml_log_set(keep_quiet, NULL);
    set_unset("GGML_CUDA_FORCE_CUBLAS_COMPUTE_32F", "1");
}

static bool is_cuda(ggml_backend_dev_t d) {
    return !strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(d)), "CUDA");
}

bool device_sums_floats(ggml_backend_dev_t d) { return is_cuda(d); }
bool device_reads_ranges(ggml_backend_dev_t d) { return is_cuda(d); }

static pyllava_status count(void * n) {
    *(int32_t *) n = (int32_t) ggml_backend_dev_count();
    return PYLLAVA_OK;
}

pyllava_status devices_count(int32_t * out_n) { return guarded(count, out_n); }

static bool is_cpu(ggml_backend_dev_t d) { return ggml_backend_dev_type(d) == GGML_BACKEND_DEVICE_TYPE_CPU; }

static bool is_of(ggml_backend_dev_t d, enum ggml_backend_dev_type type) {
    return ggml_backend_dev_type(d) == type;
}

bool device_is_gpu(ggml_backend_dev_t d) { return is_of(d, GGML_BACKEND_DEVICE_TYPE_GPU); }

static bool is_usable(ggml_backend_dev_t d) {
    return is_of(d, GGML_BACKEND_DEVICE_TYPE_GPU) || is_of(d, GGML_BACKEND_DEVICE_TYPE_IGPU);
}

static pyllava_device_kind kind_of(ggml_backend_dev_t d) {
    return is_cpu(d)                                 ? PYLLAVA_DEVICE_CPU
           : device_is_gpu(d)                        ? PYLLAVA_DEVICE_GPU
           : is_of(d, GGML_BACKEND_DEVICE_TYPE_IGPU) ? PYLLAVA_DEVICE_INTEGRATED
                                                     : PYLLAVA_DEVICE_OTHER;
}

typedef struct memory_of {
    ggml_backend_dev_t device;
    size_t free, total;
} memory_of;

// ggml takes all of the machine's memory to be free, and knows no control groups.
static uint64_t least_free(const memory_of * m) {
    const uint64_t host = is_cpu(m->device) ? memory_available() : UINT64_MAX;
    return host < m->free ? host : m->free;
}

static pyllava_status ask_memory(void * memory_) {
    memory_of * m = memory_;
    ggml_backend_dev_memory(m->device, &m->free, &m->total);
    return PYLLAVA_OK;
}

void device_describe(ggml_backend_dev_t d, pyllava_device * out) {
    memory_of m = { .device = d };
    if (is_cpu(d) || !guard_has_failed()) guarded(ask_memory, &m);
    *out = (pyllava_device) {
        .name = ggml_backend_dev_name(d),
        .description = ggml_backend_dev_description(d),
        .backend = ggml_backend_reg_name(ggml_backend_dev_backend_reg(d)),
        .kind = kind_of(d),
        .memory_free = least_free(&m),
        .memory_total = m.total,
    };
}

ggml_backend_dev_t device_of(const struct ggml_tensor * t) {
    if (!t) return NULL;
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (!buffer || ggml_backend_buffer_is_host(buffer)) return NULL;
    return ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
}

pyllava_status devices_check(const device_list * devices) {
    if (devices->n && guard_has_failed())
        FAIL(PYLLAVA_ERR_DEVICE, "a device has failed in this process: " DEVICES_WAY_OUT);
    return PYLLAVA_OK;
}

bool devices_built_in(void) {
    for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
        if (strcmp(ggml_backend_reg_name(ggml_backend_reg_get(i)), "CPU")) return true;
    }
    return false;
}

// ---------------------------------------------------------------------------------------- choosing

static bool names_equal(const char * a, const char * b, size_t n) {
    if (strlen(b) != n) return false;
    for (size_t i = 0; i < n; i++) {
        const char x = a[i] >= 'A' && a[i] <= 'Z' ? (char) (a[i] + 32) : a[i];
        const char y = b[i] >= 'A' && b[i] <= 'Z' ? (char) (b[i] + 32) : b[i];
        if (x != y) return false;
    }
    return true;
}

static void add_all(device_list * out, enum ggml_backend_dev_type type) {
    for (size_t i = 0; i < ggml_backend_dev_count() && out->n < MAX_DEVICES; i++) {
        ggml_backend_dev_t d = ggml_backend_dev_get(i);
        if (is_of(d, type)) out->items[out->n++] = d;
    }
}

// "CPU, CUDA0, CUDA1"
static void list_names(char * out, size_t size) {
    size_t used = 0;
    for (size_t i = 0; i < ggml_backend_dev_count() && used < size; i++) {
        ggml_backend_dev_t d = ggml_backend_dev_get(i);
        if (!is_cpu(d) && !is_usable(d)) continue;
        used +=
            (size_t) snprintf(out + used, size - used, "%s%s", used ? ", " : "", ggml_backend_dev_name(d));
    }
}

static pyllava_status add_named(device_list * out, const char * what, const char * name, size_t n) {
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t d = ggml_backend_dev_get(i);
        if (!is_usable(d) || !names_equal(name, ggml_backend_dev_name(d), n)) continue;
        for (int32_t j = 0; j < out->n; j++) {
            if (out->items[j] == d)
                FAIL(PYLLAVA_ERR_ARGUMENT, "%s: '%.*s' stands twice", what, (int) n, name);
        }
        if (out->n == MAX_DEVICES) FAIL(PYLLAVA_ERR_ARGUMENT, "%s: more than %d", what, MAX_DEVICES);
        out->items[out->n++] = d;
        return PYLLAVA_OK;
    }
    char known[512] = "";
    list_names(known, sizeof known);
    FAIL(PYLLAVA_ERR_DEVICE, "%s: found '%.*s', there are: %s%s%s", what, (int) n, name, known,
         names_equal(name, "cpu", n) ? " (the CPU alone, or without it)" : "",
         devices_built_in() ? "" : " (this build has no GPU back end)");
}

bool device_is_named(const char * name, const char * other) { return names_equal(name, other, strlen(name)); }

bool device_has_flash(ggml_backend_dev_t device, int32_t n_head, int32_t n_head_kv, int32_t head_dim,
                      enum ggml_type k, enum ggml_type v) {
    if (head_dim % ggml_blck_size(k) || head_dim % ggml_blck_size(v)) return false;
    const size_t size = 8 * ggml_tensor_overhead();
    struct ggml_context * ctx = context_new(size);
    if (!ctx) return false;
    struct ggml_tensor * Q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, head_dim, 256, n_head);
    struct ggml_tensor * K = ggml_new_tensor_3d(ctx, k, head_dim, 256, n_head_kv);
    struct ggml_tensor * V = ggml_new_tensor_3d(ctx, v, head_dim, 256, n_head_kv);
    struct ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 256, 256);
    struct ggml_tensor * y = ggml_flash_attn_ext(ctx, Q, K, V, mask, 1.0f, 0.0f, 0.0f);
    ggml_flash_attn_ext_set_prec(y, GGML_PREC_F32);
    const bool has = ggml_backend_dev_supports_op(device, y);
    context_free(ctx);
    return has;
}

pyllava_status devices_choose(const char * what, const char * names, device_list * out) {
    *out = (device_list) { 0 };
    if (!names || device_is_named(names, "auto")) {
        add_all(out, GGML_BACKEND_DEVICE_TYPE_GPU);
        if (out->n == 0) add_all(out, GGML_BACKEND_DEVICE_TYPE_IGPU);
        return PYLLAVA_OK;
    }
    if (device_is_named(names, "cpu")) return PYLLAVA_OK;
    for (const char * p = names;; p++) {
        p += strspn(p, " ");
        const size_t n = strcspn(p, ",");
        TRY(add_named(out, what, p, n));
        p += n;
        if (!*p) return PYLLAVA_OK;
    }
}
