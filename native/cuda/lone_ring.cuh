// What the kernels of lone.cuh share: pieces of factors on their way into shared memory, and how they are decoded.
#ifndef ADAPTRT_CUDA_LONE_RING_CUH
#define ADAPTRT_CUDA_LONE_RING_CUH
#include "lone.cuh"
#include "panels.cuh"
#include "quant_tables.h"

namespace adaptrt {

// Shared memory begins with the table that nf4 is decoded with; then each warp has its own part.
template <weight_kind kind>
constexpr int table_bytes = kind == weight_kind::nf4 ? pair_table_bytes : 0;

__device__ inline int lane_index() { return threadIdx.x % warp_size; }
__device__ inline int warp_index() { return threadIdx.x / warp_size; }

// A warp's ring of so many slots in shared memory, each with a piece of a factor and what the piece meets: `line_bytes` of
// inputs or outputs. Copies of a slot that follow each other are a group (commit_copies).
template <weight_kind kind, int depth, int line_bytes>
struct piece_ring {
  static constexpr int scales_at = tile_bytes(kind);
  static constexpr int lines_at = scales_at + (decoder<kind>::scaled ? panel_ranks * int(sizeof(float)) : 0);
  static constexpr int slot_bytes = lines_at + line_bytes, bytes = depth * slot_bytes;
  uint32_t start;
  uint64_t policy = evict_first_policy();

  __device__ explicit piece_ring(uint32_t start) : start(start) {}
  __device__ uint32_t slot(int i) const { return start + i % depth * slot_bytes; }

  __device__ void fetch_factor(int i, const uint8_t *pieces, const float *scales, int piece) const {
    uint32_t to = slot(i) + lane_index() * 16;
    const uint8_t *from = pieces + int64_t(piece) * tile_bytes(kind) + lane_index() * 16;
#pragma unroll
    for (int v = 0; v < decoder<kind>::vectors; v++) copy_async(to + v * 512, from + v * 512, policy);
    if (decoder<kind>::scaled && lane_index() < panel_ranks / 4)
      copy_async(to + scales_at, scales + piece * panel_ranks + lane_index() * 4, policy);
  }
  // From the first item of a line, of which there are so many bytes.
  template <typename item>
  __device__ void fetch_line(int i, const item *from, int there) const {
    int at = lane_index() * 16;
    if (at < there) copy_async(slot(i) + lines_at + at, from + at / int(sizeof(item)));
  }
  // For slot i's copies, where a group was committed for each of the `depth` slots from it on.
  __device__ void wait_for_slot() const {
    wait_for_copies<depth - 1>();
    __syncwarp();
  }
  __device__ void load_codes(int i, uint4 (&codes)[decoder<kind>::vectors]) const {
#pragma unroll
    for (int v = 0; v < decoder<kind>::vectors; v++) codes[v] = load_vector(slot(i) + lane_index() * 16 + v * 512);
  }
};

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
      : warps((device.shared_bytes - table) / warp_bytes < most_warps ? (device.shared_bytes - table) / warp_bytes
                                                                     : most_warps),
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
