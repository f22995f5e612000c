// simd_neon.h - the vector operations of micro_code.h on NEON (64-bit Arm), with its dot products of bytes
// and its products of matrices of bytes where the file is compiled for them. 32 registers, but compilers load
// and multiply so far ahead that with more than 8 rows by 8 tokens (6 without dot products) accumulators are
// spilled.
#pragma once

#include <arm_neon.h>

#define ROWS     8
#define LANES    4
#define W_OFFSET 0
#if defined(__ARM_FEATURE_DOTPROD)
#define TOKENS        8
#define EACH_TOKEN(F) F(0, 0) F(0, 1) F(0, 2) F(1, 3) F(1, 4) F(1, 5) F(2, 6) F(2, 7)
#else
#define TOKENS        6
#define EACH_TOKEN(F) F(0, 0) F(0, 1) F(0, 2) F(1, 3) F(1, 4) F(1, 5)
#endif

typedef float32x4_t vf; // 4 floats
typedef int32x4_t vi;   // 4 int32, or their bytes
typedef struct h32 {
    int16x8_t v[4];
} h32; // 32 int16
typedef struct b32 {
    uint8x16_t a, b;
} b32; // 32 bytes

// micro_code.h knows this conversion by its name on x86. ggml's is a call, for which registers are given up.
#define HAS_F16C
INLINE float _cvtsh_ss(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

INLINE vf vf_load(const float * p) { return vld1q_f32(p); }
INLINE void vf_store(float * p, vf x) { vst1q_f32(p, x); }
INLINE vf vf_set(float x) { return vdupq_n_f32(x); }
INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); } // c - a b
INLINE vf vf_of(vi x) { return vcvtq_f32_s32(x); }
INLINE vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
INLINE vf vf_min(vf a, vf b) { return vminq_f32(a, b); }
INLINE vf vf_max_abs(vf m, vf x) { return vmaxq_f32(m, vabsq_f32(x)); }
INLINE float vf_top(vf x) { return vmaxvq_f32(x); }
INLINE float vf_sum(vf x) { return vaddvq_f32(x); }
INLINE vf vf_of_f16(const void * p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
INLINE vf vf_of_bf16(const void * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
INLINE vf vf_of_i8(const void * p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
INLINE vi vi_zero(void) { return vdupq_n_s32(0); }
// The first lane, the others are 0: what is set is 0, or a group that DOT4 and DOT2 take by element. So one
// load is enough, where copying to all lanes would cost as much as a product. GCC sees that through 64 bits.
INLINE vi vi_set(int32_t x) {
    return vreinterpretq_s32_u64(vcombine_u64(vcreate_u64((uint32_t) x), vcreate_u64(0)));
}
INLINE uint64x1_t group_of(vi x) { return vget_low_u64(vreinterpretq_u64_s32(x)); }
INLINE vi vi_load(const void * p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
INLINE vi vi_round(vf x) { return vcvtnq_s32_f32(x); }
INLINE vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
// Of 2 LANES int16: a b / 2^15, rounded; the larger and the smaller one.
#define WORDS_2(f, a, b) vreinterpretq_s32_s16(f(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)))
INLINE vi vi_times16(vi a, vi b) { return WORDS_2(vqrdmulhq_s16, a, b); }
INLINE vi vi_max16(vi a, vi b) { return WORDS_2(vmaxq_s16, a, b); }
INLINE vi vi_min16(vi a, vi b) { return WORDS_2(vminq_s16, a, b); }
INLINE int32_t vi_sum(vi x) { return vaddvq_s32(x); }
INLINE void vi_store16(void * p, vi x) { vst1_u8(p, vreinterpret_u8_s16(vqmovn_s32(x))); }
INLINE void vi_store8(void * p, vi x) {
    const int16x4_t w = vqmovn_s32(x);
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(w, w))), 0);
    memcpy(p, &four, 4);
}

#if defined(__ARM_FEATURE_DOTPROD)
#define DOT4(acc, w, x)                                                                                      \
    acc = vdotq_lane_s32(acc, vreinterpretq_s8_s32(w), vreinterpret_s8_u64(group_of(x)), 0)
INLINE vi dot_small(vi acc, vi w, vi x) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
#else
INLINE vi dot_small(vi acc, vi w, vi x) { // two products, at most 2 * 128 * 127, fit into 16 bits
    const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
    return vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
}
#define DOT4(acc, w, x) acc = dot_small(acc, w, vdupq_lane_s32(vreinterpret_s32_u64(group_of(x)), 0))
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_PAIRS
INLINE vi dots_2x2(vi acc, vi a, vi b) { // a0 . b0, a0 . b1, a1 . b0, a1 . b1 of halves of 8 bytes
    return vmmlaq_s32(acc, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
INLINE vi two_eights(const char * p, const char * q) {
    return vreinterpretq_s32_s8(vcombine_s8(vld1_s8((const int8_t *) p), vld1_s8((const int8_t *) q)));
}
INLINE vi one_eight(const char * p) {
    return vreinterpretq_s32_s8(vcombine_s8(vld1_s8((const int8_t *) p), vdup_n_s8(0)));
}
INLINE vi first_halves(vi a, vi b) { return vcombine_s32(vget_low_s32(a), vget_low_s32(b)); }
INLINE vi second_halves(vi a, vi b) { return vcombine_s32(vget_high_s32(a), vget_high_s32(b)); }
#endif

INLINE vi dot2_pairs(vi acc, vi w, vi x) { // the halves of w are separated once for all tokens of a tile
    const int16x4_t pair = vreinterpret_s16_u64(group_of(x));
    acc = vmlal_lane_s16(acc, vmovn_s32(w), pair, 0);
    return vmlal_lane_s16(acc, vshrn_n_s32(w, 16), pair, 1);
}
#define DOT2(acc, w, x) acc = dot2_pairs(acc, w, x)

// 64 activations, where they lie.
typedef const int16_t * x64;
INLINE vi vi_shared(const void * x, const int n_rows) { return (void) n_rows, vi_load(x); }
INLINE x64 x64_load(const int16_t * x, const int n_rows) { return (void) n_rows, x; }
INLINE vi dot8(vi acc, int16x8_t w, const int16_t * x) {
    const int16x8_t v = vld1q_s16(x);
    return vmlal_high_s16(vmlal_s16(acc, vget_low_s16(w), vget_low_s16(v)), w, v);
}
// acc + first (products of the first 16s of each 32) + last (of the last).
INLINE vf dot64_scaled(vf acc, h32 a, h32 b, x64 x, float first, float last) {
    for (int h = 0; h < 2; h++) {
        vi sum = vi_zero();
        for (int i = 2 * h; i < 2 * h + 2; i++)
            sum = dot8(dot8(sum, a.v[i], x + 8 * i), b.v[i], x + 32 + 8 * i);
        acc = vf_fma(vf_of(sum), vf_set(h ? last : first), acc);
    }
    return acc;
}

INLINE b32 b32_load(const void * p) { return (b32) { vld1q_u8(p), vld1q_u8((const uint8_t *) p + 16) }; }
INLINE void b32_store(void * p, b32 x) {
    vst1q_u8(p, x.a);
    vst1q_u8((uint8_t *) p + 16, x.b);
}
INLINE b32 b32_low(b32 x) { return (b32) { vandq_u8(x.a, vdupq_n_u8(15)), vandq_u8(x.b, vdupq_n_u8(15)) }; }
INLINE b32 b32_high(b32 x) { return (b32) { vshrq_n_u8(x.a, 4), vshrq_n_u8(x.b, 4) }; }
INLINE b32 b32_or(b32 a, b32 b) { return (b32) { vorrq_u8(a.a, b.a), vorrq_u8(a.b, b.b) }; }
INLINE uint8x16_t bits_of(uint8x16_t x, int shift, int mask) {
    const uint8x16_t down = vshlq_u8(x, vdupq_n_s8((int8_t) -shift));
    return vshlq_n_u8(vandq_u8(down, vdupq_n_u8((uint8_t) mask)), 4);
}
INLINE b32 b32_bits(b32 x, int shift, int mask) {
    return (b32) { bits_of(x.a, shift, mask), bits_of(x.b, shift, mask) };
}
INLINE b32 b32_less(b32 x, int y) {
    return (b32) { vsubq_u8(x.a, vdupq_n_u8((uint8_t) y)), vsubq_u8(x.b, vdupq_n_u8((uint8_t) y)) };
}
INLINE b32 b32_two(const void * p) { return (b32) { vld1q_u8(p), vld1q_u8(p) }; }
INLINE b32 b32_halves(b32 low, b32 high) { return (b32) { low.a, high.b }; }
INLINE vi vi_bytes(vi a, vi b, vi c, vi d) { // 4 LANES numbers
    const int16x8_t first = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b));
    const int16x8_t last = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
    return vreinterpretq_s32_s8(vcombine_s8(vqmovn_s16(first), vqmovn_s16(last)));
}
INLINE void vi_store(void * p, vi x) { vst1q_u8(p, vreinterpretq_u8_s32(x)); }

// 32 numbers of 16 bits: the words of a, then of b.
#define EACH_EIGHT for (int i = 0; i < 4; i++)
INLINE h32 h32_two(b32 a, b32 b) {
    return (h32) { { vreinterpretq_s16_u8(a.a), vreinterpretq_s16_u8(a.b), vreinterpretq_s16_u8(b.a),
                     vreinterpretq_s16_u8(b.b) } };
}
INLINE h32 h32_up(h32 x, int n) {
    EACH_EIGHT x.v[i] = vshlq_s16(x.v[i], vdupq_n_s16((int16_t) n));
    return x;
}
INLINE h32 h32_down_signed(h32 x, int n) {
    EACH_EIGHT x.v[i] = vshlq_s16(x.v[i], vdupq_n_s16((int16_t) -n));
    return x;
}
INLINE vf vf_of_part(b32 x, int i) { // numbers LANES i to LANES (i + 1) - 1
    uint8_t q[32];
    b32_store(q, x);
    return vf_of_i8(q + LANES * i);
}
// For blocks of K types (micro_code.h).
typedef struct scales_k {
    vf scale[2][4], low[4];
} scales_k;

INLINE void deal(const void * p, vi * even, vi * odd) {
    *even = vi_load(p);
    *odd = vi_load((const char *) p + 16);
}
INLINE void vf_stream(float * p, vf x) { vf_store(p, x); }
INLINE vi to_all(const void * p) { return vi_load(p); }
INLINE vi twice(const void * p, int stride, int part) {
    return vi_load((const char *) p + part / 2 * stride);
}
INLINE vi swap(vi x) { return vextq_s32(x, x, 2); }
INLINE vi outer(vi a, vi b) { return vcombine_s32(vget_low_s32(a), vget_high_s32(b)); }
INLINE vi inner(vi a, vi b) { return vextq_s32(a, b, 2); }

// 8 bytes times d, each twice.
INLINE void pairs_of(uint32_t low, uint32_t high, float d, vf * out) {
    const uint16x8_t words = vmovl_u8(vcreate_u8((uint64_t) high << 32 | low));
    const vf a = vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), d);
    const vf b = vmulq_n_f32(vcvtq_f32_u32(vmovl_high_u16(words)), d);
    out[0] = vzip1q_f32(a, a), out[1] = vzip2q_f32(a, a);
    out[2] = vzip1q_f32(b, b), out[3] = vzip2q_f32(b, b);
}
INLINE void scales_of_45(const void * block, scales_k * out) {
    uint32_t w[4]; // d, min, 12 bytes of 6-bit numbers
    memcpy(w, block, 16);
    const uint32_t six = 0x3F3F3F3F, four = 0x0F0F0F0F, two = 0x30303030;
    pairs_of(w[1] & six, (w[3] & four) | (w[1] >> 2 & two), _cvtsh_ss((uint16_t) w[0]), out->scale[0]);
    pairs_of(w[2] & six, (w[3] >> 4 & four) | (w[2] >> 2 & two), _cvtsh_ss((uint16_t) (w[0] >> 16)),
             out->low);
    for (int p = 0; p < 4; p++) out->scale[1][p] = out->scale[0][p];
}
INLINE void scales_of_6(const int8_t * scales, uint16_t d, scales_k * out) {
    for (int p = 0; p < 4; p++) {
        const vf s = vmulq_n_f32(vf_of_i8(scales + 4 * p), _cvtsh_ss(d));
        out->scale[0][p] = vtrn1q_f32(s, s);
        out->scale[1][p] = vtrn2q_f32(s, s);
        out->low[p] = vmulq_n_f32(s, 32.0f);
    }
}

// Four dwords, `at` bytes into LANES rows.
INLINE void columns4(const char * const * rows, size_t at, vi * out) {
    const vi r0 = vi_load(rows[0] + at), r1 = vi_load(rows[1] + at), r2 = vi_load(rows[2] + at),
             r3 = vi_load(rows[3] + at);
    const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r0, r1)),
                    b = vreinterpretq_s64_s32(vtrn2q_s32(r0, r1)),
                    c = vreinterpretq_s64_s32(vtrn1q_s32(r2, r3)),
                    d = vreinterpretq_s64_s32(vtrn2q_s32(r2, r3));
    out[0] = vreinterpretq_s32_s64(vtrn1q_s64(a, c)), out[1] = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
    out[2] = vreinterpretq_s32_s64(vtrn2q_s64(a, c)), out[3] = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
}

// rows[ROWS] of n dwords (stride bytes apart) to out[n][ROWS], four by four.
INLINE void transpose4(const char * rows, size_t stride, char * out) {
    const char * each[] = { rows, rows + stride, rows + 2 * stride, rows + 3 * stride };
    vi columns[4];
    columns4(each, 0, columns);
    for (int i = 0; i < 4; i++) vi_store(out + 4 * ROWS * i, columns[i]);
}
INLINE void transpose(const char * rows, size_t stride, int n, char * out) {
    for (int k = 0; k < n; k += 4) {
        transpose4(rows + 4 * k, stride, out + 4 * ROWS * k);
        transpose4(rows + 4 * stride + 4 * k, stride, out + 4 * ROWS * k + 16);
    }
}

// The panels of dots_2x2: rows[ROWS] of n dwords to out[n / 2][ROWS][2].
#if defined(HAS_PAIRS)
#define TRANSPOSE8 transpose_eights
INLINE void transpose_eights(const char * rows, size_t stride, int n, char * out) {
    for (int k = 0; k < n; k += 4) {
        for (int r = 0; r < ROWS; r += 2) {
            const vi a = vi_load(rows + r * stride + 4 * k), b = vi_load(rows + (r + 1) * stride + 4 * k);
            char * to = out + 4 * ROWS * k + 8 * r;
            vst1q_u8((uint8_t *) to, vreinterpretq_u8_s32(first_halves(a, b)));
            vst1q_u8((uint8_t *) to + 8 * ROWS, vreinterpretq_u8_s32(second_halves(a, b)));
        }
    }
}
#endif
