// error.c - see error.h.
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[PYLLAVA_ERROR_MAX];

pyllava_status error_set(pyllava_status status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

const char * error_text(void) { return last_error; }
