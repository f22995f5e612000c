// guard.h - calls into the engine that may fail in its own way: back ends throw C++ exceptions, and a check
// of the engine that fails ends the process. On the calling thread, here both become a status.
#pragma once

#include "error.h"

#ifdef __cplusplus
extern "C" {
#endif

// What fn gives, or PYLLAVA_ERR_DEVICE with the engine's own words where that did not come to its end: what
// it worked on may then be freed, inside a guard, but not used. A thread that ends within fn (Python's daemon
// threads do, in a callback, when the interpreter ends) is not kept from it.
pyllava_status guarded(pyllava_status (*fn)(void * user), void * user);
// Whether that has happened in this process: devices are then left alone, since their back ends are still in
// the middle of what they were doing.
bool guard_has_failed(void);

#ifdef __cplusplus
}
#endif
