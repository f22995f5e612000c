// cpu.c - see cpu.h; it also chooses the micro table.
#include "cpu.h"

#include "micro.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

bool cpu_has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool cpu_has_avx512(void) {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static bool has_avx2(void) {
    unsigned a, b, c, d;
    return cpu_has_avx2() && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1); // F16C
}

static bool has_avxvnni(void) {
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static bool has_avx512(void) { return has_avx2() && cpu_has_avx512(); }

static bool has_avx512vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static bool has_feature(const char * name) {
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname(name, &has, &size, NULL, 0) == 0 && has;
}

static bool has_dotprod(void) { return has_feature("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm(void) { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static bool has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }                  // HWCAP_ASIMDDP
static bool has_i8mm(void) { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); } // HWCAP2_I8MM
#elif defined(__aarch64__)
static bool has_dotprod(void) { return false; }
static bool has_i8mm(void) { return false; }
#endif

static bool has_any(void) { return true; }

typedef struct candidate {
    const micro * table;
    bool (*runs)(void);
} candidate;

const micro * micro_choose(const char * wanted) {
    const candidate candidates[] = {
    // the best first
#if defined(__x86_64__)
        { &micro_avx512vnni, has_avx512vnni },
        { &micro_avx512, has_avx512 },
        { &micro_avxvnni, has_avxvnni },
        { &micro_avx2, has_avx2 },
#elif defined(__aarch64__)
        { &micro_neoni8mm, has_i8mm },
        { &micro_neondot, has_dotprod },
        { &micro_neon, has_any },
#endif
        { &micro_plain, has_any },
    };
    for (size_t i = 0; i < sizeof candidates / sizeof *candidates; i++) {
        if ((!wanted || !strcmp(wanted, candidates[i].table->name)) && candidates[i].runs())
            return candidates[i].table;
    }
    return NULL;
}
