// Norms, gates, sums: one pass over registers.
#ifndef ADAPTRT_CUDA_ELEMENTWISE_CUH
#define ADAPTRT_CUDA_ELEMENTWISE_CUH
#include "kernel.cuh"

namespace adaptrt {

// out = x / sqrt(mean(x^2) + eps) * weight, where x = a, or x = a + b, which is then kept in `sum`.
struct norm_call {
  source a, b;       // b.data NULL: x = a
  destination sum;
  destination out;
  const float *weight;
  int64_t width;
  float eps;
};
void launch_norm(const queue &q, const norm_call &call, int tokens);

enum class combination : int32_t { add, silu, gelu_tanh, scale };
// add: a + b; silu, gelu_tanh: activation(a) * b; scale: a * factor, capped when cap > 0
__device__ inline float gated(combination kind, float a, float b) {
  if (kind == combination::silu) return __fdividef(a, 1.f + __expf(-a)) * b;
  float inner = 0.79788456f * (a + 0.044715f * a * a * a);  // sqrt(2 / pi)
  return 0.5f * a * (1.f + tanhf(inner)) * b;
}

struct combine_call {
  combination kind;
  source a, b;
  destination out;
  int64_t width;
  float factor, cap;
};
void launch_combine(const queue &q, const combine_call &call, int tokens);

// out[i] = x[rows[i]] for rows of bfloat16
void launch_gather(const queue &q, const __nv_bfloat16 *x, int64_t stride, const int32_t *rows, int n,
                   __nv_bfloat16 *out);

}  // namespace adaptrt
#endif
