// plugins.c - see plugins.h. Only files that the caller names are opened: ggml's own search, which includes
// the current directory, is not used.
#include "plugins.h"

#if defined(PYLLAVA_PLUGINS)
#include "guard.h"

#include <ggml-backend.h>
#include <stdio.h>
#include <string.h>

typedef int (*score_fn)(void);

#if defined(_WIN32)
#include <windows.h>

#define PATH_MAX_WIDE 4096

static bool is_absolute(const char * path) { return path[0] && (path[1] == ':' || path[0] == '\\'); }

static void * open_file(const char * path) {
    wchar_t wide[PATH_MAX_WIDE];
    if (!MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, PATH_MAX_WIDE)) return NULL;
    const DWORD where = LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR | LOAD_LIBRARY_SEARCH_DEFAULT_DIRS;
    return (void *) LoadLibraryExW(wide, NULL, where);
}

static pyllava_status refuse(const char * path) {
    FAIL(PYLLAVA_ERR_DEVICE, "%s: Windows error %lu", path, GetLastError());
}

static void * find(void * file, const char * name) {
    return (void *) (uintptr_t) GetProcAddress((HMODULE) file, name);
}

static void close_file(void * file) { FreeLibrary((HMODULE) file); }
#else
#include <dlfcn.h>

static bool is_absolute(const char * path) { return path[0] == '/'; }

static void * open_file(const char * path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }

static pyllava_status refuse(const char * path) {
    const char * text = dlerror();
    if (text && !strncmp(text, path, strlen(path))) FAIL(PYLLAVA_ERR_DEVICE, "%s", text);
    FAIL(PYLLAVA_ERR_DEVICE, "%s: %s", path, text ? text : "cannot be loaded");
}

static void * find(void * file, const char * name) { return dlsym(file, name); }

static void close_file(void * file) { dlclose(file); }
#endif

typedef struct scoring {
    score_fn fn;
    int score;
} scoring;

static pyllava_status ask_score(void * scoring_) {
    scoring * s = scoring_;
    s->score = s->fn();
    return PYLLAVA_OK;
}

// Opens a file, if it is a back end that can run here; the higher its score, the better it suits this
// machine.
static pyllava_status open_plugin(const char * path, void ** out_file, int * out_score) {
    if (!is_absolute(path)) FAIL(PYLLAVA_ERR_ARGUMENT, "%s: need an absolute path", path);
    void * file = open_file(path);
    if (!file) return refuse(path);
    scoring s = { (score_fn) find(file, "ggml_backend_score"), 1 };
    const bool is_back_end = find(file, "ggml_backend_init");
    const pyllava_status status = s.fn ? guarded(ask_score, &s) : PYLLAVA_OK;
    *out_score = s.score;
    *out_file = file;
    if (status == PYLLAVA_OK && is_back_end && s.score > 0) return PYLLAVA_OK;
    close_file(file);
    TRY(status);
    if (!is_back_end) FAIL(PYLLAVA_ERR_DEVICE, "%s: not a back end of ggml", path);
    FAIL(PYLLAVA_ERR_DEVICE, "%s: built for another processor", path);
}

// Keeps ggml's last error message in `user`, unless it is NULL.
static void keep_error(enum ggml_log_level level, const char * text, void * user) {
    if (!user || level != GGML_LOG_LEVEL_ERROR) return;
    snprintf(user, PYLLAVA_ERROR_MAX, "%s", text);
    ((char *) user)[strcspn(user, "\r\n")] = '\0';
}

typedef struct loading {
    const char * path;
    bool done;
} loading;

// Where memory ran out before, ggml knows the back end without its devices, and would leave it so.
static pyllava_status load_guarded(void * loading_) {
    loading * l = loading_;
    ggml_backend_reg_t reg = ggml_backend_load(l->path);
    l->done = reg != NULL;
    for (size_t i = 0; reg && i < ggml_backend_reg_dev_count(reg); i++)
        ggml_backend_device_register(ggml_backend_reg_dev_get(reg, i));
    return PYLLAVA_OK;
}

static pyllava_status load(const char * path) {
    char text[PYLLAVA_ERROR_MAX] = "refused by ggml";
    loading l = { path, false };
    ggml_log_set(keep_error, text);
    const pyllava_status status = guarded(load_guarded, &l);
    ggml_log_set(keep_error, NULL);
    TRY(status);
    if (!l.done) FAIL(PYLLAVA_ERR_DEVICE, "%s: %s", path, text);
    return PYLLAVA_OK;
}

// The file that is loaded is never closed, not even for a moment. A CUDA plug-in tells CUDA's runtime about
// its kernels when it is opened; where PyTorch holds that runtime, kernels of a file that was closed and
// opened again are looked up in memory that has been freed, and the first product never ends.
pyllava_status plugin_load(const char * const * paths, int32_t n) {
    int best = 0, i_best = 0;
    void * best_file = NULL;
    pyllava_status status = PYLLAVA_OK;
    for (int32_t i = 0; i < n; i++) {
        int score = 0;
        void * file = NULL;
        const pyllava_status found = open_plugin(paths[i], &file, &score);
        if (found != PYLLAVA_OK) {
            status = found;
            continue;
        }
        void * other = file; // the one that is not needed
        if (score > best) {
            other = best_file;
            best = score, i_best = i, best_file = file;
        }
        if (other) close_file(other);
    }
    return best ? load(paths[i_best]) : status;
}
#else
pyllava_status plugin_load(const char * const * paths, int32_t n) {
    (void) n;
    FAIL(PYLLAVA_ERR_DEVICE, "%s: this libpyllava was built without PYLLAVA_PLUGINS", paths[0]);
}
#endif
