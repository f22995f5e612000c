// exact.c - the kernels of exact_code.h: each call goes to the best set that this machine runs. Asking is
// cheap: the compiler's library keeps the answer.
#include "kernels.h"

#define ARGS struct ggml_tensor * dst, int ith, int nth, void * userdata

#if defined(__x86_64__)
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#define CHOOSE(name)                                                                                         \
    void name##_plain(ARGS);                                                                                 \
    void name##_avx2(ARGS);                                                                                  \
    void name##_avx512(ARGS);                                                                                \
    void name(ARGS) {                                                                                        \
        (has_avx512() ? name##_avx512 : has_avx2() ? name##_avx2 : name##_plain)(dst, ith, nth, userdata);   \
    }
#else
#define CHOOSE(name)                                                                                         \
    void name##_plain(ARGS);                                                                                 \
    void name(ARGS) { name##_plain(dst, ith, nth, userdata); }
#endif

CHOOSE(kernel_linear)
CHOOSE(kernel_linear_answers)
CHOOSE(kernel_attention)
CHOOSE(kernel_fast_attention)
CHOOSE(kernel_turns)
CHOOSE(kernel_rope)
CHOOSE(kernel_rope_neox)
CHOOSE(kernel_store)
