// What the kernels of a step share: how they are launched, and how they read and write activations.
#ifndef ADAPTRT_CUDA_KERNEL_CUH
#define ADAPTRT_CUDA_KERNEL_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "failure.cuh"

namespace adaptrt {

// A register as kernels read it: [tokens, stride] float32.
struct source {
  const float *data;
  int64_t stride;
};

// A register as kernels write it: float32 for element-wise operations, bfloat16 for products; NULL where nobody reads.
struct destination {
  float *wide;
  int64_t wide_stride;
  __nv_bfloat16 *narrow;
  int64_t narrow_stride;

  __device__ void put(int64_t token, int64_t column, float value) const {
    if (wide) wide[token * wide_stride + column] = value;
    if (narrow) narrow[token * narrow_stride + column] = __float2bfloat16(value);
  }
  // Two neighbours, aligned as such.
  __device__ void put_two(int64_t token, int64_t column, const float2 &v) const {
    if (wide) *reinterpret_cast<float2 *>(wide + token * wide_stride + column) = v;
    __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
    if (narrow) *reinterpret_cast<__nv_bfloat162 *>(narrow + token * narrow_stride + column) = pair;
  }
  // Four neighbours, aligned as such.
  __device__ void put_four(int64_t token, int64_t column, const float4 &v) const {
    if (wide) *reinterpret_cast<float4 *>(wide + token * wide_stride + column) = v;
    __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
    if (narrow) *reinterpret_cast<uint2 *>(narrow + token * narrow_stride + column) = *reinterpret_cast<uint2 *>(pairs);
  }
};

// Programmatic dependent launch. Before this a kernel may read what no kernel of the step writes (weights, the plan,
// adapters), everything else after. The next kernel may start as soon as all blocks of this one have: it takes what
// multiprocessors have room. A product's block leaves no room for a second one, so its blocks stay one to each.
__device__ inline void wait_for_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The same for a kernel whose next one need not wait for it, but for what is before both (launch_product: `ready`).
__device__ inline void wait_and_let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct queue {
  cudaStream_t stream;
  bool overlap;  // kernels may start before the ones before them end
};

template <typename... parameters, typename... arguments>
void launch(const queue &q, void (*kernel)(parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const arguments &...values) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = q.stream;
  config.attrs = &overlap;
  config.numAttrs = q.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters(values)...), "launch of a kernel");
}

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

__device__ inline float warp_sum(float v) {
  for (int step = warp_size / 2; step; step /= 2) v += __shfl_xor_sync(all_lanes, v, step);
  return v;
}

inline unsigned blocks_of(int64_t count, int64_t per_block) { return unsigned((count + per_block - 1) / per_block); }

}  // namespace adaptrt
#endif
