// What the warps beside a product (beside_warps.cuh) are made of: the barriers that they and the others meet at, what they
// leave to them, and words of factors.
#ifndef ADAPTRT_CUDA_BESIDE_PARTS_CUH
#define ADAPTRT_CUDA_BESIDE_PARTS_CUH
#include "beside.cuh"
#include "panels.cuh"

namespace adaptrt {

// ---- barriers ----

__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Of the warps that multiply, when the tokens are staged; of those of U, of all beside, and of these when hidden values are
// there; of all, when changes are.
constexpr int multipliers_barrier = 1, terms_barrier = 2, beside_barrier = 3, hidden_barrier = 4, changes_barrier = 5;

// y = gain * y + delta, [tiles, tokens, 16] of each; gains only with vectors.
struct changes {
  float *delta, *gain;
  __device__ void step(int items) { delta += items, gain += items; }
};
__device__ inline changes changes_of(uint8_t *shared, const beside_call &c, int tiles, int tokens) {
  float *delta = reinterpret_cast<float *>(shared + c.plan.changes);
  return {delta, delta + tiles * tokens * tile_rows};
}

// What is worked out here and not, as compilers like it, once more where it is needed: after a wait, where it would count.
template <typename value>
__device__ value kept(value v) {
  static_assert(sizeof v == 4 || sizeof v == 8, "a register or two");
  if constexpr (sizeof v == 8) asm volatile("" : "+l"(v));
  else asm volatile("" : "+r"(v));
  return v;
}

__device__ inline uint2 load_two(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ inline float2 load_float2(uint32_t address) {
  uint2 v = load_two(address);
  return {__uint_as_float(v.x), __uint_as_float(v.y)};
}

__device__ inline void store_two(uint32_t address, const uint2 &v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
__device__ inline void store_float2(uint32_t address, const float2 &v) {
  store_two(address, {__float_as_uint(v.x), __float_as_uint(v.y)});
}

__device__ inline void copy_16(const void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// ---- a step's operand: 16 ranks by 16 inputs or outputs of a piece, of which a lane has some words ----

template <weight_kind kind>
struct step_words {
  static constexpr int bytes = tile_bytes(kind) / 4 / warp_size;
  union {
    uint32_t word[bytes / 4];
    std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, uint32_t>> all;
  };

  // Where the lane's are in a piece.
  static __device__ int place(int step) {
    int vector = threadIdx.x % warp_size * 16;
    return bytes == 16 ? step * 512 + vector : bytes == 8 ? step / 2 * 512 + vector + step % 2 * 8 : vector + step * 4;
  }
  __device__ void load(const uint8_t *from) { all = *reinterpret_cast<const decltype(all) *>(from); }
  __device__ void load(uint32_t shared) {
    if constexpr (bytes == 16) all = load_vector(shared);
    else if constexpr (bytes == 8) all = load_two(shared);
    else asm volatile("ld.shared.u32 %0, [%1];" : "=r"(all) : "r"(shared));
  }
  __device__ void operand(uint32_t a[4]) const {
    if constexpr (kind == weight_kind::nf4) {
      nf4_bytes values = nf4_as_bf16();
      decode_nf4(word[0], values, a[0], a[1]);
      decode_nf4(word[0] >> 16, values, a[2], a[3]);
    } else if constexpr (kind == weight_kind::int8) {
      for (int r = 0; r < 4; r++) a[r] = int8_pair(word[r / 2], r % 2);
    } else {
      for (int r = 0; r < 4; r++) a[r] = word[r];
    }
  }
  static __device__ void copy(const uint8_t *to, const uint8_t *from) {
    if constexpr (bytes == 16)
      copy_16(to, from);
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(bytes)
                   : "memory");
  }
};

}  // namespace adaptrt
#endif
