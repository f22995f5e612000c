// guard.cpp - see guard.h. It is C++ because it catches C++ exceptions.
#include "guard.h"

#include <ggml.h>

#include <atomic>
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif
#if defined(PYLLAVA_CHECKED)
#include <checked.h>
#endif

namespace {

std::atomic<bool> failed { false };
thread_local int depth = 0; // guards that this thread is in

struct entered {
    entered() { depth++; }
    ~entered() { depth--; }
};

// The engine ends the process when this returns.
void on_abort(const char * text) {
    if (depth > 0) throw std::runtime_error(text);
    std::fprintf(stderr, "%s\n", text);
}

#if defined(PYLLAVA_CHECKED)
void on_no_memory() {
    if (depth > 0) throw std::bad_alloc();
}
#endif

void watch() {
    ggml_set_abort_callback(on_abort);
#if defined(PYLLAVA_CHECKED)
    checked_watch(on_no_memory);
#endif
}

} // namespace

pyllava_status guarded(pyllava_status (*fn)(void * user), void * user) {
    watch();
    const entered here;
    try {
        return fn(user);
    } catch (const std::bad_alloc &) {
        return error_set(PYLLAVA_ERR_MEMORY, "out of memory in the engine");
    } catch (const std::exception & error) {
        failed = true;
        return error_set(PYLLAVA_ERR_DEVICE, "the back end failed: %s", error.what());
#if defined(__GLIBCXX__)
    } catch (const abi::__forced_unwind &) { // the end of this thread, which nothing may stop
        failed = true;
        throw;
#endif
    } catch (...) {
        failed = true;
        return error_set(PYLLAVA_ERR_DEVICE, "the back end failed");
    }
}

bool guard_has_failed(void) { return failed; }
