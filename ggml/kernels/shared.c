// shared.c - the kernels of shared_code.h, of both modes: each call goes to the best instruction set of this
// machine.
#include "cpu.h"
#include "kernels.h"

#define ARGS struct ggml_tensor *dst, int ith, int nth, void *userdata

#if defined(__x86_64__)
#define CHOOSE(name)                                                                                         \
    void name##_plain(ARGS);                                                                                 \
    void name##_avx2(ARGS);                                                                                  \
    void name##_avx512(ARGS);                                                                                \
    void name(ARGS) {                                                                                        \
        (cpu_has_avx512() ? name##_avx512                                                                    \
         : cpu_has_avx2() ? name##_avx2                                                                      \
                          : name##_plain)(dst, ith, nth, userdata);                                          \
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
CHOOSE(kernel_rope_table)
CHOOSE(kernel_rope)
CHOOSE(kernel_rope_neox)
CHOOSE(kernel_store)
CHOOSE(kernel_gelu_tanh)
