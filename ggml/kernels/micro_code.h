// micro_code.h - the loops of a micro table over the vector operations of one simd_*.h: this file has what
// they share, the loops are in the parts that it includes. A file that includes it names its table with
// MICRO and is compiled for its instruction set. Functions are static: the same names exist once per set.
#pragma once

#include "micro.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define ROUND8_TOP  127.0f
#define ROUND16_TOP 2000.0f  // times the largest weight (q6_k: 32 * 127) times 256 inputs: below 2^31
#define ROUND_K_TOP 16256.0f // 128 times 127
#define PANEL16_TOP 4190.0f  // likewise

// As operands of C's own operators.
typedef int32_t vl __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
DEFINE_EXP(vf_exp, vf, vl)

INLINE vf vf_choose(vl where, vf a, vf b) { return (vf) ((where & (vl) a) | (~where & (vl) b)); }

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));

// Blocks as the file has them.
typedef struct block_q4_0 {
    uint16_t d;
    uint8_t q[16];
} block_q4_0;
typedef struct block_q8_0 {
    uint16_t d;
    int8_t q[32];
} block_q8_0;
typedef struct block_q4_k {
    uint16_t d, min;
    uint8_t scales[12], q[128];
} block_q4_k;
typedef struct block_q5_k {
    uint16_t d, min;
    uint8_t scales[12], high[32], q[128];
} block_q5_k;
typedef struct block_q6_k {
    uint8_t low[128], high[64];
    int8_t scales[16];
    uint16_t d;
} block_q6_k;

INLINE float half(uint16_t h) {
#if defined(HAS_F16C)
    return _cvtsh_ss(h);
#else
    return ggml_fp16_to_fp32(h);
#endif
}

INLINE int32_t int_at(const char * p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

INLINE float float_at(const char * p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}

// The factor that maps numbers up to `top` to numbers up to `most`; 0 for a `top` so small that it would be
// infinite.
INLINE float inverse_of(float top, float most) { return top >= 0x1p-100f ? most / top : 0.0f; }

// The 8 scales and 8 minima of 6 bits each in a q4_k or q5_k block, which begins with d, min and 12 bytes.
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef struct bytes_k {
    u8x16 scale, min;
} bytes_k; // each byte twice

INLINE bytes_k bytes_of(const void * block) {
    u32x4 v;
    memcpy(&v, block, sizeof v);
    const u32x4 first = { 0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F };
    const u32x4 top = { 0, 0x30303030, 0, 0x30303030 };
    const u32x4 low = __builtin_shufflevector(v, v, 1, 3, 2, 3) >> (u32x4) { 0, 0, 0, 4 };
    const u8x16 all = (u8x16) ((low & first) | (__builtin_shufflevector(v, v, 1, 1, 2, 2) >> 2 & top));
    return (bytes_k) { __builtin_shufflevector(all, all, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                       __builtin_shufflevector(all, all, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14,
                                               15, 15) };
}

INLINE void bytes_times(u8x16 bytes, float d, float * out) {
    uint8_t in[16];
    memcpy(in, &bytes, sizeof bytes);
    for (int i = 0; i < 16; i += LANES) vf_store(out + i, vf_mul(vf_of_i8(in + i), vf_set(d)));
}

// 32 numbers of q6_k: part j (0..3) of half h.
INLINE b32 q6_k_part(const block_q6_k * b, int h, int j) {
    b32 low = b32_load(b->low + 64 * h + 32 * (j & 1));
    return b32_or(j < 2 ? b32_low(low) : b32_high(low), b32_bits(b32_load(b->high + 32 * h), 2 * j, 3));
}

INLINE b32 q5_k_part(const block_q5_k * b, int g) { // group g (0..7)
    const b32 q = b32_load(b->q + 16 * (g & ~1));
    return b32_or(g & 1 ? b32_high(q) : b32_low(q), b32_bits(b32_load(b->high), g, 1));
}

// Converts d numbers of a type to f32; for f32, returns a pointer to them.
INLINE const float * floats_of(const char * from, enum ggml_type type, int d, float * to) {
    if (type == GGML_TYPE_F32) return (const float *) (const void *) from;
    if (type == GGML_TYPE_F16 && d % LANES == 0) {
        for (int k = 0; k < d; k += LANES) vf_store(to + k, vf_of_f16(from + 2 * k));
        return to;
    }
    if (type == GGML_TYPE_Q8_0) {
        for (int g = 0; g < d / GROUP; g++) {
            const block_q8_0 * b = (const block_q8_0 *) (const void *) from + g;
            const vf scale = vf_set(half(b->d));
            for (int k = 0; k < GROUP; k += LANES)
                vf_store(to + g * GROUP + k, vf_mul(vf_of_i8(b->q + k), scale));
        }
        return to;
    }
    ggml_get_type_traits(type)->to_float(from, to, d);
    return to;
}

#include "micro_round.h"
#include "micro_columns.h"
#include "micro_panels.h"
#include "micro_direct.h"
#include "micro_dots.h"
#include "micro_attention.h"

const micro MICRO = {
    .name = MICRO_NAME,
    .rows = ROWS,
    .tokens = TOKENS,
    .round8 = round8,
    .round16 = round16,
    .round_dots = round_dots,
    .round_k = round_k,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .end_tile = end_tile,
    .pack8 = pack8,
    .multiply8 = multiply8,
    .pack16 = pack16,
    .multiply16 = multiply16,
#if defined(DIRECT)
    .direct_size = sizeof(direct_panel),
    .round_direct = round_direct,
    .pack_direct = pack_direct,
    .multiply_direct = multiply_direct,
#endif
    .attend_few = attend_few,
    .attend_many = attend_many,
    .dot = { [GGML_TYPE_Q4_K] = dot_q4_k,
             [GGML_TYPE_Q5_K] = dot_q5_k,
             [GGML_TYPE_Q6_K] = dot_q6_k,
             [GGML_TYPE_Q8_0] = dot_q8_0,
             [GGML_TYPE_Q4_0] = dot_q4_0,
             [GGML_TYPE_F32] = dot_f32,
             [GGML_TYPE_F16] = dot_f16,
             [GGML_TYPE_BF16] = dot_bf16 },
};
