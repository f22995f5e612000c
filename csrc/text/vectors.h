// vectors.h - four floats at once, as the candidates of a sampler are read. GCC's and Clang's vector types:
// every operation is one of IEEE 754 on each float, whatever the machine has for it.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define STEP 16 // numbers that a loop takes at once

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef double d4 __attribute__((vector_size(32)));

static inline f4 load(const float * x) {
    f4 v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline f4 pick(i4 which, f4 a, f4 b) { return (f4) ((which & (i4) a) | (~which & (i4) b)); }

static inline f4 magnitude(f4 x) { return (f4) ((i4) x & 0x7FFFFFFF); }

static inline bool any(i4 which) {
    int64_t halves[2];
    memcpy(halves, &which, sizeof halves);
    return (halves[0] | halves[1]) != 0;
}

// Numbers of the steps that hold n. A step is four vectors: one running sum or extreme would wait for itself.
static inline int32_t whole(int32_t n) { return (n + STEP - 1) / STEP * STEP; }

// The largest of n numbers, or the smallest. There is room for whole steps: what lies behind them is
// overwritten.
static inline float extreme_of(float * x, int32_t n, bool smallest) {
    const i4 flip = (i4) { 0 } - (int32_t) smallest;
    f4 found[4];
    for (int32_t i = n; i < whole(n); i++) x[i] = x[0];
    for (int32_t j = 0; j < 4; j++) found[j] = load(x + 4 * j);
    for (int32_t i = STEP; i < n; i += STEP) {
        for (int32_t j = 0; j < 4; j++) {
            const f4 v = load(x + i + 4 * j);
            found[j] = pick((v > found[j]) ^ flip, v, found[j]);
        }
    }
    float best = x[0];
    for (int32_t j = 0; j < STEP; j++) {
        const float v = found[j / 4][j % 4];
        if (smallest ? v < best : v > best) best = v;
    }
    return best;
}
