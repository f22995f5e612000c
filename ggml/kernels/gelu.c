// gelu.c - GELU in its tanh form (Hendrycks and Gimpel, "Gaussian Error Linear Units"), with which SigLIP was
// trained. ggml's own goes through a table of f16 values.
#include "tile.h"

// (1 + tanh(u)) / 2 is sigmoid(2 u). The exponential is of a number that is not positive, so both tails keep
// their relative precision.
INLINE vn gelu_tanh(vn x) {
    const vn u2 = x * (x * x * 0.0713548163f + 1.5957691216f); // 2 sqrt(2 / pi) (x + 0.044715 x^3)
    const vin below = u2 < 0.0f;
    const vn e = vn_exp((vn) ((vin) u2 | INT32_MIN)); // of -|2 u|
    const vn above = (vn) (((vin) e & below) | ((vin) (e * 0.0f + 1.0f) & ~below));
    return x * above / (e + 1.0f);
}

void KERNEL(gelu_tanh)(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    const float * from = dst->src[0]->data;
    float * to = dst->data;
    const int64_t n = ggml_nelements(dst), n_vectors = (n + VN - 1) / VN;
    for (int64_t i = n_vectors * ith / nth * VN; i < n_vectors * (ith + 1) / nth * VN; i += VN) {
        float some[VN] = { 0.0f };
        const size_t size = (size_t) (n - i < VN ? n - i : VN) * sizeof *some;
        memcpy(some, from + i, size);
        const vn y = gelu_tanh(*(const vn *) some);
        memcpy(to + i, &y, size);
    }
}
