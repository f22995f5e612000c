// file.c - see file.h.
#if !defined(_WIN32)
#define _FILE_OFFSET_BITS 64
#define _POSIX_C_SOURCE   200809L
#endif
#include "file.h"

#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#if defined(_WIN32)
#include <io.h>
#define open      _open
#define close     _close
#define O_CLOEXEC _O_BINARY
typedef struct _stat64 file_stat;
#define fstat _fstat64
#if !defined(S_ISREG) // MinGW has it
#define S_ISREG(m) (((m) & _S_IFMT) == _S_IFREG)
#endif
#else
#include <sys/mman.h>
#include <unistd.h>
typedef struct stat file_stat;
#endif

#define READ_STEP ((size_t) 16 << 20)

static pyllava_status read_all(file_bytes * out, int fd, const char * path, pyllava_progress_fn progress,
                               void * user) {
    TRY(memory_check(out->size, path));
    uint8_t * data = aligned_new(out->size);
    TRY_ALLOC(data, out->size);
    out->data = data;
    for (size_t done = 0; done < out->size;) {
        if (progress && !progress("load", (float) done / (float) out->size, user)) {
            FAIL(PYLLAVA_ERR_CANCELLED, "loading was cancelled");
        }
        size_t step = out->size - done < READ_STEP ? out->size - done : READ_STEP;
#if defined(_WIN32)
        int n = _read(fd, data + done, (unsigned) step);
#else
        ssize_t n = read(fd, data + done, step);
#endif
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) FAIL(PYLLAVA_ERR_IO, "%s: read at byte %zu: %s", path, done, strerror(errno));
        if (n == 0)
            FAIL(PYLLAVA_ERR_IO, "%s: ends at byte %zu, need %zu (it became shorter)", path, done, out->size);
        done += (size_t) n;
    }
    return PYLLAVA_OK;
}

static pyllava_status load(file_bytes * out, int fd, const char * path, bool use_mmap,
                           pyllava_progress_fn progress, void * user) {
    file_stat st;
    if (fstat(fd, &st)) FAIL(PYLLAVA_ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) FAIL(PYLLAVA_ERR_FILE, "%s: not a regular file", path);
    if ((uint64_t) st.st_size > SIZE_MAX / 2)
        FAIL(PYLLAVA_ERR_MEMORY, "%s: larger than the address space", path);
    out->size = (size_t) st.st_size;
    if (out->size == 0) FAIL(PYLLAVA_ERR_FILE, "%s: empty file, need a GGUF file of at least 24 bytes", path);
#if !defined(_WIN32)
    if (use_mmap) {
        void * data = mmap(NULL, out->size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == MAP_FAILED)
            FAIL(errno == ENOMEM ? PYLLAVA_ERR_MEMORY : PYLLAVA_ERR_IO, "%s: mmap of %zu bytes: %s", path,
                 out->size, strerror(errno));
        out->data = data;
        out->mapped = true;
        return PYLLAVA_OK;
    }
#else
    (void) use_mmap;
#endif
    return read_all(out, fd, path, progress, user);
}

pyllava_status file_open(file_bytes * out, const char * path, bool use_mmap, pyllava_progress_fn progress,
                         void * user) {
    file_bytes file = { 0 };
#if defined(O_NONBLOCK)
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a FIFO must not hang
#else
    int fd = open(path, O_RDONLY | O_CLOEXEC);
#endif
    if (fd < 0) {
        bool missing = errno == ENOENT || errno == ENOTDIR;
        FAIL(missing ? PYLLAVA_ERR_NOT_FOUND : PYLLAVA_ERR_IO, "%s: %s", path, strerror(errno));
    }
    pyllava_status status = load(&file, fd, path, use_mmap, progress, user);
    close(fd);
    if (status != PYLLAVA_OK) {
        file_close(&file);
        return status;
    }
    *out = file;
    return PYLLAVA_OK;
}

void file_close(file_bytes * file) {
#if !defined(_WIN32)
    if (file->mapped) munmap((void *) (uintptr_t) file->data, file->size);
#endif
    if (!file->mapped) aligned_free((void *) (uintptr_t) file->data);
    memset(file, 0, sizeof *file);
}
