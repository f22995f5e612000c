// limits.c - what this machine can do at most: int8, 16-bit and f32 products and reading from memory, on N
// threads at once. Prints one JSON object (GOP/s, GFLOP/s and GB/s of all threads together).
// cc -O2 -march=native -pthread bench/limits.c -o limits && ./limits 2
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define SECONDS 0.5
#define MEMORY  ((size_t) 512 << 20)      // of one thread: far more than the last cache

typedef double (*work_fn)(const char * memory);                          // one round; gives the operations done

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

// Independent chains, enough to hide the latency of each.
#if defined(__AVX512F__)
#define REGISTERS "zmm"
#define LANES     16
#elif defined(__AVX2__)
#define REGISTERS "ymm"
#define LANES     8
#endif
#define REGISTER_BYTES (4 * LANES)
#define CHAINS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define N_CHAINS  12

#if defined(REGISTERS)
#define SOURCES "%%" REGISTERS "14,%%" REGISTERS "15,%%" REGISTERS
#define DEFINE_PEAK(name, instruction, operations)                                                           \
    static double name(const char * memory) {                                                                \
        (void) memory;                                                                                       \
        for (int i = 0; i < 100000; i++) __asm__ volatile(CHAINS(instruction) ::: "memory");                 \
        return 1e5 * N_CHAINS * LANES * (operations);                                                        \
    }
#define FMA(i) "vfmadd231ps " SOURCES #i "\n"
DEFINE_PEAK(fma_f32, FMA, 2)
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define BYTES(i) "vpdpbusd " SOURCES #i "\n"
DEFINE_PEAK(dot_int8, BYTES, 8)
#define SHORTS(i) "vpdpwssd " SOURCES #i "\n"
DEFINE_PEAK(dot_int16, SHORTS, 4)
#elif REGISTER_BYTES == 32                // two instructions: the peak that they reach together
#define BYTES(i) "vpmaddubsw %%ymm14,%%ymm15,%%ymm13\nvpaddw %%ymm13,%%ymm" #i ",%%ymm" #i "\n"
DEFINE_PEAK(dot_int8, BYTES, 8)
#define SHORTS(i) "vpmaddwd %%ymm14,%%ymm15,%%ymm13\nvpaddd %%ymm13,%%ymm" #i ",%%ymm" #i "\n"
DEFINE_PEAK(dot_int16, SHORTS, 4)
#endif
#if defined(__AVX512BF16__)
#define BF16(i) "vdpbf16ps " SOURCES #i "\n"
DEFINE_PEAK(dot_bf16, BF16, 4)
#endif
#endif

static double read_memory(const char * memory) {
    typedef uint64_t words __attribute__((vector_size(64), aligned(64), may_alias));
    const words * p = (const words *) (const void *) memory;
    words sum[4] = { { 0 }, { 0 }, { 0 }, { 0 } };
    for (size_t i = 0; i < MEMORY / sizeof *p; i += 4) {
        for (int j = 0; j < 4; j++) sum[j] += p[i + (size_t) j];
    }
    for (int j = 0; j < 4; j++) __asm__ volatile("" ::"m"(sum[j]));
    return (double) MEMORY;
}

typedef struct task {
    work_fn      work;
    const char * memory;
    double       rate;
    pthread_barrier_t * start;
} task;

static void * run(void * arg) {
    task * t = arg;
    pthread_barrier_wait(t->start);
    const double t0 = now();
    double done = 0, seconds;
    do done += t->work(t->memory), seconds = now() - t0;
    while (seconds < SECONDS);
    t->rate = done / seconds;
    return NULL;
}

static double measure(work_fn work, int n, char ** memory) {
    pthread_t threads[n];
    task tasks[n];
    pthread_barrier_t start;
    double best = 0;
    for (int round = 0; round < 3; round++) {
        pthread_barrier_init(&start, NULL, (unsigned) n);
        for (int i = 0; i < n; i++) {
            tasks[i] = (task) { work, memory[i], 0, &start };
            pthread_create(&threads[i], NULL, run, &tasks[i]);
        }
        double sum = 0;
        for (int i = 0; i < n; i++) pthread_join(threads[i], NULL), sum += tasks[i].rate;
        best = sum > best ? sum : best;
        pthread_barrier_destroy(&start);
    }
    return best / 1e9;
}

int main(int argc, char ** argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 1;
    if (n < 1 || n > 64) return fprintf(stderr, "usage: limits THREADS (1..64)\n"), 2;
    char * memory[n];
    for (int i = 0; i < n; i++) {
        memory[i] = aligned_alloc(64, MEMORY);
        if (!memory[i]) return fprintf(stderr, "limits: no %zu MiB for thread %d\n", MEMORY >> 20, i), 1;
        uint64_t * words = (uint64_t *) (void *) memory[i], x = (uint64_t) i;    // no two pages alike
        for (size_t j = 0; j < MEMORY / sizeof *words; j++) words[j] = x = x * 6364136223846793005u + 1442695040888963407u;
    }
    printf("{\"threads\": %d", n);
#if defined(REGISTERS)
    printf(", \"f32_gflops\": %.0f", measure(fma_f32, n, memory));
#if defined(SHORTS)
    printf(", \"int8_gops\": %.0f", measure(dot_int8, n, memory));
    printf(", \"int16_gops\": %.0f", measure(dot_int16, n, memory));
#endif
#if defined(__AVX512BF16__)
    printf(", \"bf16_gflops\": %.0f", measure(dot_bf16, n, memory));
#endif
#endif
    printf(", \"read_gb_s\": %.1f}\n", measure(read_memory, n, memory));
    for (int i = 0; i < n; i++) free(memory[i]);
    return 0;
}
