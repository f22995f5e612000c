// tile.h - the one inner loop of all our kernels, and the vector arithmetic around it. GCC and Clang vector
// types: the compiler turns them into whatever the target has.
#pragma once

#include "kernels.h"

#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi16 __attribute__((vector_size(64), aligned(4), may_alias));

// linear.c, attention.c, gelu.c and rope.c are compiled once per instruction set, which their kernels' names
// end in; shared.c chooses among them.
#define KERNEL_JOIN(name, set) kernel_##name##_##set
#define KERNEL_NAME(name, set) KERNEL_JOIN(name, set)
#define KERNEL(name)           KERNEL_NAME(name, KERNEL_SET)

#define INLINE static inline __attribute__((always_inline))

INLINE v16 v16_load(const float * p) { return *(const v16 *) p; }
INLINE void v16_store(float * p, v16 x) { *(v16 *) p = x; }
INLINE v16 v16_set(float x) { return (v16) { x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x }; }

INLINE float v16_sum(v16 x) {
    float s = 0.0f;
    for (int i = 0; i < 8; i++) s += x[i] + x[i + 8];
    return s;
}

// e^x, relative error below 2e-7; 0 below -87. Range reduction to |r| <= ln2 / 2 and a Taylor polynomial of
// degree 7. For any vector type and that of its integers: compilers take comparisons of vectors that are
// wider than the machine's apart, element by element.
#define DEFINE_EXP(name, floats, integers)                                                                   \
    INLINE floats name(floats x) {                                                                           \
        integers alive = ~(x <= -87.0f); /* NaN stays NaN */                                                 \
        x = (floats) ((integers) x & alive);                                                                 \
        floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* round to nearest */                     \
        floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;   /* ln2 in two parts */                     \
        floats p = r * (1.0f / 5040) + 1.0f / 720;                                                           \
        p = p * r + 1.0f / 120;                                                                              \
        p = p * r + 1.0f / 24;                                                                               \
        p = p * r + 1.0f / 6;                                                                                \
        p = p * r + 0.5f;                                                                                    \
        p = p * r + 1.0f;                                                                                    \
        p = p * r + 1.0f;                                                                                    \
        integers power = (__builtin_convertvector(n, integers) + 127) << 23;                                 \
        return (floats) ((integers) (p * (floats) power) & alive);                                           \
    }

// The machine's own vectors.
#if defined(__AVX512F__)
#define VN 16
#elif defined(__AVX__)
#define VN 8
#else
#define VN 4
#endif
typedef float vn __attribute__((vector_size(4 * VN), aligned(4), may_alias));
typedef int32_t vin __attribute__((vector_size(4 * VN), aligned(4), may_alias));
DEFINE_EXP(vn_exp, vn, vin)

// x[i] = e^(x[i] - m), i < n (a multiple of 16).
INLINE void exp_all(float * x, float m, int n) {
    for (int i = 0; i < n; i += VN) *(vn *) (x + i) = vn_exp(*(const vn *) (x + i) - m);
}

// out[i][0..32) += sum over k of x[i][k] * panel[k][0..32), i < n <= 8: 16 accumulators, two panel vectors a
// step.
INLINE void tile_n(const int n, float * out, size_t out_stride, const float * x, size_t x_stride,
                   const float * panel, size_t panel_stride, int n_k) {
    v16 lo[8], hi[8];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        lo[i] = v16_load(out + i * out_stride);
        hi[i] = v16_load(out + i * out_stride + 16);
    }
    for (int k = 0; k < n_k; k++) {
        v16 a = v16_load(panel + k * panel_stride), b = v16_load(panel + k * panel_stride + 16);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            v16 v = v16_set(x[i * x_stride + k]);
            lo[i] += a * v;
            hi[i] += b * v;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        v16_store(out + i * out_stride, lo[i]);
        v16_store(out + i * out_stride + 16, hi[i]);
    }
}

// The same for any n: an output's arithmetic does not depend on which others are computed with it.
INLINE void tile(int n, float * out, size_t out_stride, const float * x, size_t x_stride, const float * panel,
                 size_t panel_stride, int n_k) {
    for (; n >= 8; n -= 8, out += 8 * out_stride, x += 8 * x_stride)
        tile_n(8, out, out_stride, x, x_stride, panel, panel_stride, n_k);
    if (n >= 4) {
        tile_n(4, out, out_stride, x, x_stride, panel, panel_stride, n_k);
        n -= 4, out += 4 * out_stride, x += 4 * x_stride;
    }
    for (; n > 0; n--, out += out_stride, x += x_stride)
        tile_n(1, out, out_stride, x, x_stride, panel, panel_stride, n_k);
}

INLINE float dot(const float * a, const float * b, int n) {
    v16 s0 = v16_set(0.0f), s1 = s0, s2 = s0, s3 = s0;
    int i = 0;
    for (; i + 64 <= n; i += 64) {
        s0 += v16_load(a + i) * v16_load(b + i);
        s1 += v16_load(a + i + 16) * v16_load(b + i + 16);
        s2 += v16_load(a + i + 32) * v16_load(b + i + 32);
        s3 += v16_load(a + i + 48) * v16_load(b + i + 48);
    }
    for (; i + 16 <= n; i += 16) s0 += v16_load(a + i) * v16_load(b + i);
    float s = v16_sum((s0 + s1) + (s2 + s3));
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

// n elements (whole blocks) of a ggml type to f32; a pointer to the elements themselves where they are f32
// already.
INLINE const float * unpack(const void * from, enum ggml_type type, ggml_to_float_t to_float, float * to,
                            int64_t n) {
    if (type == GGML_TYPE_F32) return from;
    if (type == GGML_TYPE_F16) { // by shifting the fields; ggml's own row function is scalar
        const uint16_t * h = from;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t) (h[i] & 0x7FFF) << 13, sign = (uint32_t) (h[i] & 0x8000) << 16;
            float scaled, two112 = 0x1p112f;
            memcpy(&scaled, &bits, 4);
            scaled *= two112; // re-biases the exponent, denormals included
            memcpy(&bits, &scaled, 4);
            bits |= sign | ((h[i] & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u);
            memcpy(&to[i], &bits, 4);
        }
        return to;
    }
    to_float(from, to, n);
    return to;
}
