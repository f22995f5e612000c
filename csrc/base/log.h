// log.h - messages to the caller's callback; the library itself never prints.
#pragma once

#include "error.h"

typedef struct logger {
    pyllava_log_fn fn; // may be NULL
    void * user;
} logger;

void log_text(const logger * log, pyllava_log_level level, const char * format, ...) PYLLAVA_PRINTF(3, 4);
