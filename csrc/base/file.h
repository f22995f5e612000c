// file.h - the bytes of a regular file, mapped read-only or read into owned, aligned memory.
#pragma once

#include "error.h"

typedef struct file_bytes {
    const uint8_t * data;
    size_t size;
    bool mapped;
} file_bytes;

// progress may be NULL; it is called with stage "load" while the file is read (not when it is mapped).
pyllava_status file_open(file_bytes * out, const char * path, bool use_mmap, pyllava_progress_fn progress,
                         void * user);
void file_close(file_bytes * file);
