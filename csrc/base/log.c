// log.c - see log.h.
#include "log.h"

#include <stdarg.h>
#include <stdio.h>

void log_text(const logger * log, pyllava_log_level level, const char * format, ...) {
    if (!log || !log->fn) return;
    char text[PYLLAVA_ERROR_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    log->fn(level, text, log->user);
}
