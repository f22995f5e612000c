// guard.h - guards calls into ggml, whose back ends throw C++ exceptions and whose failed assertions end the
// process. On the calling thread, both become a status here.
#pragma once

#include "error.h"

#ifdef __cplusplus
extern "C" {
#endif

// Returns what fn returns. If fn did not return: PYLLAVA_ERR_MEMORY where memory ran out, else
// PYLLAVA_ERR_DEVICE with ggml's message. Objects of ggml that fn was changing may then neither be used nor
// freed. A thread that ends within fn is not kept from it (Python's daemon threads end so, in a callback,
// when the interpreter ends).
pyllava_status guarded(pyllava_status (*fn)(void * user), void * user);
// Whether a guarded call has failed so in this process, for another reason than memory. Devices are then no
// longer used: the state of their back ends is unknown.
bool guard_has_failed(void);

#ifdef __cplusplus
}
#endif
