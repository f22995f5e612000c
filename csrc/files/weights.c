// weights.c - see weights.h.
#include "weights.h"

#include "context.h"
#include "guard.h"
#include "memory.h"

#include <ggml-cpu.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ENGINE_ALIGNMENT 32  // what ggml's CPU buffers ask of a tensor's address
#define MANY_TOKENS      512 // of a typical prefill step

// A tensor that is to be copied to a device.
struct upload {
    struct ggml_tensor * tensor;
    const gguf_tensor * from;
    const uint8_t * data;
};

// ------------------------------------------------------------------------------------------- files

// "<prefix>-00001-of-00003.gguf" -> the name of file i, or false where the name is of another form.
static bool split_name(const char * first, int32_t i, int32_t n, char * out, size_t out_size) {
    char tail[40];
    snprintf(tail, sizeof tail, "-%05d-of-%05d.gguf", 1, n);
    size_t length = strlen(first), tail_length = strlen(tail);
    if (length < tail_length || strcmp(first + length - tail_length, tail)) return false;
    return (size_t) snprintf(out, out_size, "%.*s-%05d-of-%05d.gguf", (int) (length - tail_length), first,
                             i + 1, n) < out_size;
}

// What the files say of how they were split. A single one may say nothing, or that it is all there is: merged
// files say that they are the first of 0.
static pyllava_status check_split(const weights * w, int32_t n) {
    uint64_t n_tensors = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t no = i, count = n;
        TRY(gguf_get_int(w->files[i], "split.no", n > 1, (gguf_range) { i, i }, &no));
        TRY(gguf_get_int(w->files[i], "split.count", n > 1, (gguf_range) { n > 1 ? n : 0, n }, &count));
        n_tensors += w->files[i]->n_tensors;
    }
    int32_t need = (int32_t) n_tensors;
    TRY(gguf_get_int(w->files[0], "split.tensors.count", false, (gguf_range) { 0, INT32_MAX }, &need));
    if ((uint64_t) need != n_tensors) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: split.tensors.count is %d, the %d files hold %llu", w->files[0]->path,
             need, n, (unsigned long long) n_tensors);
    }
    return PYLLAVA_OK;
}

static pyllava_status open_rest(weights * w, const char * path, int32_t n, bool use_mmap,
                                const logger * log) {
    for (int32_t i = 1; i < n; i++) {
        char name[4096];
        if (!split_name(path, i, n, name, sizeof name)) {
            FAIL(PYLLAVA_ERR_MISMATCH, "%s: first of %d files, its name must end in -00001-of-%05d.gguf",
                 path, n, n);
        }
        TRY(gguf_open(&w->files[i], name, use_mmap, NULL, log));
        w->n_files = i + 1;
    }
    return check_split(w, n);
}

static bool has_quantised(const weights * w) {
    for (int32_t i = 0; i < w->n_files; i++) {
        for (uint64_t j = 0; j < w->files[i]->n_tensors; j++) {
            if (ggml_is_quantized((enum ggml_type) w->files[i]->tensors[j].type)) return true;
        }
    }
    return false;
}

// Blocks of another version have the names of ours, but mean other numbers.
static pyllava_status check_quantisation(const weights * w, const logger * log) {
    const char * path = w->files[0]->path;
    int32_t version = GGML_QNT_VERSION;
    TRY(gguf_get_int(w->files[0], "general.quantization_version", false, (gguf_range) { 0, INT32_MAX },
                     &version));
    if (version == GGML_QNT_VERSION) return PYLLAVA_OK;
    if (has_quantised(w)) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: general.quantization_version: %d, this version reads %d", path,
             version, GGML_QNT_VERSION);
    }
    log_text(log, PYLLAVA_LOG_WARNING,
             "%s: general.quantization_version: %d is unknown; no tensor of the file is quantised", path,
             version);
    return PYLLAVA_OK;
}

pyllava_status weights_open(weights * w, const char * path, bool use_mmap, pyllava_progress_fn progress,
                            const logger * log) {
    pyllava_gguf * first = NULL;
    TRY(gguf_open(&first, path, use_mmap, progress, log));
    int32_t n = 1;
    pyllava_status status = gguf_get_int(first, "split.count", false, (gguf_range) { 0, 999 }, &n);
    n = n < 1 ? 1 : n;
    w->files = status == PYLLAVA_OK ? calloc((size_t) n, sizeof *w->files) : NULL;
    if (!w->files) {
        gguf_close(first);
        return status != PYLLAVA_OK ? status : error_set(PYLLAVA_ERR_MEMORY, "out of memory");
    }
    w->files[0] = first;
    w->n_files = 1;
    TRY(open_rest(w, path, n, use_mmap, log));
    return check_quantisation(w, log);
}

static ggml_backend_buffer_t wrap(const void * data, size_t size) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_buffer_t buffer =
        ggml_backend_dev_buffer_from_host_ptr(cpu, (void *) (uintptr_t) data, size, size);
    if (buffer) ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    return buffer;
}

pyllava_status weights_prepare(weights * w) {
    int32_t n_max = 1;
    for (int32_t i = 0; i < w->n_files; i++) n_max += (int32_t) w->files[i]->n_tensors;
    w->n_max = n_max;
    w->ctx = context_new(ggml_tensor_overhead() * (size_t) (n_max + 1));
    TRY_ALLOC(w->ctx, ggml_tensor_overhead() * (size_t) n_max);
    w->buffers = calloc((size_t) (w->n_files + n_max), sizeof *w->buffers);
    w->blocks = calloc((size_t) n_max, sizeof *w->blocks);
    w->used = calloc((size_t) w->n_files, sizeof *w->used);
    w->uploads = calloc((size_t) n_max, sizeof *w->uploads);
    if (!w->buffers || !w->blocks || !w->used || !w->uploads) FAIL(PYLLAVA_ERR_MEMORY, "out of memory");
    for (int32_t i = 0; i < w->n_files; i++) {
        w->used[i] = calloc((size_t) w->files[i]->n_tensors + 1, 1);
        TRY_ALLOC(w->used[i], w->files[i]->n_tensors);
        w->buffers[i] = wrap(w->files[i]->file.data, w->files[i]->file.size);
        if (!w->buffers[i])
            FAIL(PYLLAVA_ERR_DEVICE, "%s: no CPU back end to hold the weights", w->files[i]->path);
    }
    return PYLLAVA_OK;
}

void weights_close(weights * w) {
    context_free(w->ctx);
    for (int32_t i = 0; i < w->n_stores; i++) {
        ggml_backend_buffer_free(w->stores[i].buffer);
        context_free(w->stores[i].ctx);
    }
    for (int32_t i = 0; w->buffers && i < w->n_files + w->n_blocks; i++)
        ggml_backend_buffer_free(w->buffers[i]);
    for (int32_t i = 0; i < w->n_blocks; i++) aligned_free(w->blocks[i]);
    for (int32_t i = 0; w->used && i < w->n_files; i++) free(w->used[i]);
    for (int32_t i = 0; i < w->n_files; i++) gguf_close(w->files[i]);
    free(w->used);
    free(w->uploads);
    free(w->blocks);
    free(w->buffers);
    free(w->files);
    memset(w, 0, sizeof *w);
}

// ----------------------------------------------------------------------------------------- binding

const gguf_tensor * weights_find(const weights * w, const char * name, int32_t * out_file) {
    for (int32_t i = 0; i < w->n_files; i++) {
        const gguf_tensor * t = gguf_find_tensor(w->files[i], name);
        if (!t) continue;
        if (out_file) *out_file = i;
        return t;
    }
    return NULL;
}

// A request: what the model needs under one name.
typedef struct request {
    char name[GGML_MAX_NAME];
    int64_t n_out, n_in; // n_out = 0: a vector
    bool unfolded, f32;
} request;

static void describe(const int64_t * ne, int n_dims, char * out, size_t size) {
    size_t used = (size_t) snprintf(out, size, "[");
    for (int d = n_dims - 1; d >= 0 && used < size; d--) {
        used += (size_t) snprintf(out + used, size - used, d ? "%lld, " : "%lld]", (long long) ne[d]);
    }
}

static bool shape_fits(const request * r, const gguf_tensor * t) {
    if (r->unfolded) {
        int64_t n_in = 1;
        for (int d = 0; d < t->n_dims - 1; d++) n_in *= t->ne[d];
        return n_in == r->n_in && t->n_dims >= 2 && t->ne[t->n_dims - 1] == r->n_out;
    }
    bool tail = t->ne[2] == 1 && t->ne[3] == 1;
    return tail && t->ne[0] == r->n_in && t->ne[1] == (r->n_out ? r->n_out : 1) && t->n_dims <= 2;
}

static pyllava_status check(const request * r, const gguf_tensor * t, const char * path) {
    enum ggml_type type = (enum ggml_type) t->type;
    if (!shape_fits(r, t)) {
        char found[100], need[100];
        describe(t->ne, t->n_dims, found, sizeof found);
        describe((int64_t[]) { r->n_in, r->n_out }, r->n_out ? 2 : 1, need, sizeof need);
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %s: shape %s, need %s", path, r->name, found, need);
    }
    if (type != GGML_TYPE_F32 && !ggml_get_type_traits(type)->to_float) {
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: %s: type %s cannot hold weights", path, r->name,
             ggml_type_name(type));
    }
    return PYLLAVA_OK;
}

// f32 [n] of a tensor's data, which may stand at any address.
static pyllava_status widen_to(float * out, const gguf_tensor * t, const uint8_t * from, int64_t n) {
    if (t->type == GGML_TYPE_F32) {
        memcpy(out, from, (size_t) n * sizeof *out);
        return PYLLAVA_OK;
    }
    void * aligned = NULL;
    if ((uintptr_t) from % ENGINE_ALIGNMENT) { // quantised blocks are read as structures
        aligned = aligned_new((size_t) t->size);
        TRY_ALLOC(aligned, t->size);
        memcpy(aligned, from, (size_t) t->size);
    }
    ggml_get_type_traits((enum ggml_type) t->type)->to_float(aligned ? aligned : from, out, n);
    aligned_free(aligned);
    return PYLLAVA_OK;
}

static int64_t n_elements(const gguf_tensor * t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }

// Copies a tensor into memory of our own, widened to f32 where asked for.
static pyllava_status own(weights * w, const gguf_tensor * t, const uint8_t * from, bool f32,
                          ggml_backend_buffer_t * out_buffer, void ** out_data) {
    const int64_t n = n_elements(t);
    const size_t size = f32 ? (size_t) n * sizeof(float) : (size_t) t->size;
    TRY(memory_check(size, t->name));
    void * data = aligned_new(size);
    TRY_ALLOC(data, size);
    w->blocks[w->n_blocks] = data;
    *out_buffer = w->buffers[w->n_files + w->n_blocks++] = wrap(data, size);
    *out_data = data;
    if (f32) return widen_to(data, t, from, n);
    memcpy(data, from, size);
    return PYLLAVA_OK;
}

// The tensor of a request in host memory: the file's bytes, or a copy of them.
static pyllava_status bind_host(weights * w, struct ggml_tensor * tensor, const gguf_tensor * t, int32_t file,
                                bool widen) {
    const uint8_t * from = w->files[file]->file.data + t->offset;
    void * data = (void *) (uintptr_t) from;
    ggml_backend_buffer_t buffer = w->buffers[file];
    if (widen || (uintptr_t) from % ENGINE_ALIGNMENT) TRY(own(w, t, from, widen, &buffer, &data));
    if (ggml_backend_tensor_alloc(buffer, tensor, data) != GGML_STATUS_SUCCESS)
        FAIL(PYLLAVA_ERR_DEVICE, "%s: the back end refused its memory", t->name);
    return PYLLAVA_OK;
}

// Where headers of tensors for a place are kept.
static pyllava_status ctx_of(weights * w, ggml_backend_dev_t place, struct ggml_context ** out) {
    *out = w->ctx;
    if (!place) return PYLLAVA_OK;
    int32_t i = 0;
    while (i < w->n_stores && w->stores[i].device != place) i++;
    if (i == w->n_stores) {
        const size_t size = ggml_tensor_overhead() * (size_t) (w->n_max + 1);
        struct ggml_context * ctx = context_new(size);
        TRY_ALLOC(ctx, size);
        w->stores[w->n_stores].device = place;
        w->stores[w->n_stores++].ctx = ctx;
    }
    *out = w->stores[i].ctx;
    return PYLLAVA_OK;
}

// Whether the device multiplies with such a matrix.
static bool can_multiply(ggml_backend_dev_t device, enum ggml_type type, int64_t n_out, int64_t n_in) {
    const size_t size = 4 * ggml_tensor_overhead();
    struct ggml_context * ctx = context_new(size);
    if (!ctx) return false;
    struct ggml_tensor * m = ggml_new_tensor_2d(ctx, type, n_in, n_out);
    struct ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, MANY_TOKENS);
    const bool can = ggml_backend_dev_supports_op(device, ggml_mul_mat(ctx, m, x));
    context_free(ctx);
    return can;
}

static pyllava_status bind(weights * w, const request * r, struct ggml_tensor ** out) {
    int32_t file = 0;
    const gguf_tensor * t = weights_find(w, r->name, &file);
    if (!t) FAIL(PYLLAVA_ERR_MISMATCH, "%s: missing tensor %s", w->files[0]->path, r->name);
    TRY(check(r, t, w->files[file]->path));
    if (w->n_bound == w->n_max)
        FAIL(PYLLAVA_ERR_UNSUPPORTED, "%s: more than %d tensors", w->files[0]->path, w->n_max);
    w->n_bound++;
    w->used[file][t - w->files[file]->tensors] = true;

    const bool widen = r->f32 && t->type != GGML_TYPE_F32;
    const enum ggml_type type = widen ? GGML_TYPE_F32 : (enum ggml_type) t->type;
    const bool runs_there = !r->n_out || (w->place && can_multiply(w->place, type, r->n_out, r->n_in));
    ggml_backend_dev_t place = runs_there ? w->place : NULL;
    struct ggml_context * ctx = NULL;
    TRY(ctx_of(w, place, &ctx));
    struct ggml_tensor * tensor =
        r->n_out ? ggml_new_tensor_2d(ctx, type, r->n_in, r->n_out) : ggml_new_tensor_1d(ctx, type, r->n_in);
    ggml_set_name(tensor, r->name);
    if (!place) TRY(bind_host(w, tensor, t, file, widen));
    else w->uploads[w->n_uploads++] = (upload) { tensor, t, w->files[file]->file.data + t->offset };
    w->size += t->size;
    *out = tensor;
    return PYLLAVA_OK;
}

static struct ggml_tensor * ask(weights * w, request r, const char * format, va_list args) {
    if (w->status != PYLLAVA_OK) return NULL;
    vsnprintf(r.name, sizeof r.name, format, args);
    struct ggml_tensor * tensor = NULL;
    w->status = bind(w, &r, &tensor);
    return tensor;
}

#define ASK(...)                                                                                             \
    va_list args;                                                                                            \
    va_start(args, format);                                                                                  \
    struct ggml_tensor * tensor = ask(w, (request) { __VA_ARGS__ }, format, args);                           \
    va_end(args);                                                                                            \
    return tensor

struct ggml_tensor * weights_matrix(weights * w, int64_t n_out, int64_t n_in, const char * format, ...) {
    ASK(.n_out = n_out, .n_in = n_in);
}

struct ggml_tensor * weights_vector(weights * w, int64_t n, const char * format, ...) {
    ASK(.n_in = n, .f32 = true);
}

struct ggml_tensor * weights_table(weights * w, int64_t n_rows, int64_t n, const char * format, ...) {
    ASK(.n_out = n_rows, .n_in = n, .f32 = true);
}

struct ggml_tensor * weights_unfolded(weights * w, int64_t n_out, int64_t n_in, const char * format, ...) {
    ASK(.n_out = n_out, .n_in = n_in, .unfolded = true, .f32 = true);
}

bool weights_has(const weights * w, const char * format, ...) {
    char name[GGML_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return weights_find(w, name, NULL) != NULL;
}

// ----------------------------------------------------------------------------------------- devices

void weights_place(weights * w, ggml_backend_dev_t device) { w->place = device; }

uint64_t weights_size(const weights * w, const char * prefix) {
    uint64_t size = 0;
    for (int32_t i = 0; i < w->n_files; i++) {
        for (uint64_t j = 0; j < w->files[i]->n_tensors; j++) {
            const gguf_tensor * t = &w->files[i]->tensors[j];
            if (!strncmp(t->name, prefix, strlen(prefix))) size += t->size;
        }
    }
    return size;
}

// Memory on each device for the tensors that go there.
static pyllava_status take_places(weights * w) {
    for (int32_t i = 0; i < w->n_stores; i++) {
        ggml_backend_dev_t d = w->stores[i].device;
        uint64_t need = 0;
        for (struct ggml_tensor * t = ggml_get_first_tensor(w->stores[i].ctx); t;
             t = ggml_get_next_tensor(w->stores[i].ctx, t))
            need += ggml_nbytes(t);
        w->stores[i].buffer =
            ggml_backend_alloc_ctx_tensors_from_buft(w->stores[i].ctx, ggml_backend_dev_buffer_type(d));
        if (!w->stores[i].buffer) {
            pyllava_device about;
            device_describe(d, &about);
            FAIL(PYLLAVA_ERR_MEMORY,
                 "%s: the weights need %.2f GiB, %.2f GiB are free: try a smaller n_gpu_layers (-1: all that "
                 "fit)",
                 about.name, (double) need / (1 << 30), (double) about.memory_free / (1 << 30));
        }
        ggml_backend_buffer_set_usage(w->stores[i].buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    return PYLLAVA_OK;
}

static pyllava_status copy_to_device(void * upload_) {
    const upload * u = upload_;
    ggml_backend_tensor_set(u->tensor, u->data, 0, ggml_nbytes(u->tensor));
    return PYLLAVA_OK;
}

static pyllava_status upload_one(upload * u) {
    if ((enum ggml_type) u->from->type == u->tensor->type) return guarded(copy_to_device, u);
    const size_t size = ggml_nbytes(u->tensor);
    float * wide = malloc(size);
    TRY_ALLOC(wide, size);
    pyllava_status status = widen_to(wide, u->from, u->data, n_elements(u->from));
    upload widened = { u->tensor, u->from, (const uint8_t *) wide };
    if (status == PYLLAVA_OK) status = guarded(copy_to_device, &widened);
    free(wide);
    return status;
}

static pyllava_status upload_all(weights * w, pyllava_progress_fn progress, void * user) {
    uint64_t size = 0, done = 0;
    for (int32_t i = 0; i < w->n_uploads; i++) size += w->uploads[i].from->size;
    TRY(take_places(w));
    for (int32_t i = 0; i < w->n_uploads; i++) {
        if (progress && !progress("upload", (float) ((double) done / (double) size), user))
            FAIL(PYLLAVA_ERR_CANCELLED, "loading was cancelled");
        TRY(upload_one(&w->uploads[i]));
        done += w->uploads[i].from->size;
    }
    if (w->n_uploads && progress && !progress("upload", 1.0f, user))
        FAIL(PYLLAVA_ERR_CANCELLED, "loading was cancelled");
    return PYLLAVA_OK;
}

// ------------------------------------------------------------------------------- closing the books

void weights_ignore(weights * w, const char * prefix) {
    for (int32_t i = 0; i < w->n_files; i++) {
        for (uint64_t j = 0; j < w->files[i]->n_tensors; j++) {
            if (!strncmp(w->files[i]->tensors[j].name, prefix, strlen(prefix))) w->used[i][j] = true;
        }
    }
}

pyllava_status weights_finish(weights * w, pyllava_progress_fn progress, void * user) {
    TRY(w->status);
    uint64_t n = 0;
    const char * example = NULL;
    for (int32_t i = 0; i < w->n_files; i++) {
        for (uint64_t j = 0; j < w->files[i]->n_tensors; j++) {
            if (w->used[i][j]) continue;
            if (!example) example = w->files[i]->tensors[j].name;
            n++;
        }
    }
    if (n) {
        FAIL(PYLLAVA_ERR_MISMATCH, "%s: %llu tensors unused, such as %s: the metadata describe another model",
             w->files[0]->path, (unsigned long long) n, example);
    }
    return upload_all(w, progress, user);
}
