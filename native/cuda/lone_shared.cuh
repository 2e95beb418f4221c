// What the kernels of lone.cuh share: how they are launched, decode and read shared memory.
#ifndef ADAPTRT_CUDA_LONE_SHARED_CUH
#define ADAPTRT_CUDA_LONE_SHARED_CUH
#include <algorithm>

#include "lone.cuh"
#include "panels.cuh"
#include "quant_tables.h"

namespace adaptrt {

// Shared memory begins with the table that nf4 is decoded with; then each warp has its own part.
template <weight_kind kind>
constexpr int table_bytes = kind == weight_kind::nf4 ? pair_table_bytes : 0;

__device__ inline int lane_index() { return threadIdx.x % warp_size; }
__device__ inline int warp_index() { return threadIdx.x / warp_size; }

__device__ inline float load_float(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}
__device__ inline float2 load_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

template <weight_kind kind>
__device__ decoder<kind> make_decoder(uint8_t *shared, const nf4_values &codebook) {
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, codebook, blockDim.x);
  __syncthreads();
  return {shared_address(shared) - shared_start + lane_index() * 4};
}

inline nf4_values nf4_codebook() {
  nf4_values codebook;
  for (int i = 0; i < 16; i++) codebook.value[i] = __float2bfloat16(NF4_CODEBOOK[i]);
  return codebook;
}

// A kernel whose warps have so many bytes of shared memory each, on as many warps as there is room for.
struct lone_launch {
  int warps, shared_bytes;
  lone_launch(const lone_device &device, int table, int warp_bytes, int most_warps)
      : warps(std::min((device.shared_bytes - table) / warp_bytes, most_warps)),
        shared_bytes(table + warps * warp_bytes) {}
};

template <typename callable>
void with_lone_kind(weight_kind kind, const callable &call) {
  switch (kind) {
    case weight_kind::nf4: return call(std::integral_constant<weight_kind, weight_kind::nf4>());
    case weight_kind::int8: return call(std::integral_constant<weight_kind, weight_kind::int8>());
    default: return call(std::integral_constant<weight_kind, weight_kind::bf16>());
  }
}

}  // namespace adaptrt
#endif
