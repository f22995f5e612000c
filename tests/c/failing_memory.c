// failing_memory.c - preloaded into a process (LD_PRELOAD) whose memory is to run out: the n-th request of
// our libraries fails, or every one from the n-th on. Which it was is told by its place in its library.
// Requests of operator new come from libstdc++, which throws where malloc gives nothing. glibc only.
#define _GNU_SOURCE
#include <errno.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_PARTS 64

void * __libc_malloc(size_t size);
void * __libc_calloc(size_t n, size_t size);
void * __libc_realloc(void * p, size_t size);
void * __libc_memalign(size_t alignment, size_t size);

static struct part {
    uintptr_t begin, end, base;
} parts[MAX_PARTS]; // of memory, that hold code of ours
static int n_parts;
static atomic_bool armed;
static atomic_long n_asked, first_failing; // requests since armed
static bool and_all_after;
static atomic_uintptr_t failed_at; // the first one's place

static bool is_ours(const char * path) {
    const char * name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    return !strncmp(name, "libpyllava", 10) || !strncmp(name, "libggml", 7) || !strncmp(name, "libstdc++", 9);
}

static int note(struct dl_phdr_info * info, size_t size, void * unused) {
    (void) size, (void) unused;
    for (int i = 0; is_ours(info->dlpi_name) && i < info->dlpi_phnum && n_parts < MAX_PARTS; i++) {
        const ElfW(Phdr) * p = &info->dlpi_phdr[i];
        if (p->p_type != PT_LOAD || !(p->p_flags & PF_X)) continue;
        const uintptr_t begin = info->dlpi_addr + p->p_vaddr;
        parts[n_parts++] = (struct part) { begin, begin + p->p_memsz, info->dlpi_addr };
    }
    return 0;
}

// Lets the n-th request from now on fail, and, if `all_after`, those after it. n = 0: none does.
__attribute__((visibility("default"))) void failing_memory_arm(long n, bool all_after) {
    n_parts = 0;
    dl_iterate_phdr(note, NULL);
    atomic_store(&n_asked, 0);
    atomic_store(&first_failing, n);
    atomic_store(&failed_at, 0);
    and_all_after = all_after;
    atomic_store(&armed, true);
}

// Lets all requests succeed again. Returns their number since they were armed.
__attribute__((visibility("default"))) long failing_memory_disarm(void) {
    atomic_store(&armed, false);
    return atomic_load(&n_asked);
}

// Where the first request that failed returned to, in its library; 0 if none has failed.
__attribute__((visibility("default"))) uintptr_t failing_memory_place(void) {
    return atomic_load(&failed_at);
}

static bool fails(void * caller) {
    if (!atomic_load_explicit(&armed, memory_order_relaxed)) return false;
    const uintptr_t at = (uintptr_t) caller;
    for (int i = 0; i < n_parts; i++) {
        if (at < parts[i].begin || at >= parts[i].end) continue;
        const long n = atomic_fetch_add(&n_asked, 1) + 1, first = atomic_load(&first_failing);
        if (first == 0 || n < first || (n > first && !and_all_after)) return false;
        if (n == first) atomic_store(&failed_at, at - parts[i].base);
        errno = ENOMEM;
        return true;
    }
    return false;
}

#define FAILS fails(__builtin_return_address(0))
#define SHOWN __attribute__((visibility("default")))

SHOWN void * malloc(size_t size) { return FAILS ? NULL : __libc_malloc(size); }
SHOWN void * calloc(size_t n, size_t size) { return FAILS ? NULL : __libc_calloc(n, size); }
SHOWN void * realloc(void * p, size_t size) { return FAILS ? NULL : __libc_realloc(p, size); }
SHOWN void * memalign(size_t alignment, size_t size) {
    return FAILS ? NULL : __libc_memalign(alignment, size);
}
SHOWN void * aligned_alloc(size_t alignment, size_t size) {
    return FAILS ? NULL : __libc_memalign(alignment, size);
}

SHOWN int posix_memalign(void ** out, size_t alignment, size_t size) {
    void * p = FAILS ? NULL : __libc_memalign(alignment, size);
    if (!p) return ENOMEM;
    *out = p;
    return 0;
}

SHOWN void * mmap(void * at, size_t size, int protection, int flags, int file, off_t offset) {
    if (FAILS) return MAP_FAILED;
    return (void *) syscall(SYS_mmap, at, size, protection, flags, file, offset); // NOLINT
}
SHOWN void * mmap64(void * at, size_t size, int protection, int flags, int file, off64_t offset) {
    if (FAILS) return MAP_FAILED;
    return (void *) syscall(SYS_mmap, at, size, protection, flags, file, offset); // NOLINT
}
