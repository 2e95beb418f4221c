// From packed codes to the bf16 registers of a tensor core's operand, a step of 16 columns at a time (tile.cuh).
#ifndef ADAPTRT_CUDA_DECODE_CUH
#define ADAPTRT_CUDA_DECODE_CUH
#include "tile.cuh"

namespace adaptrt {

// The 16 values of a 4-bit code, as a kernel's argument.
struct nf4_values {
  __nv_bfloat16 value[16];
};

// A byte of two codes is looked up in shared memory: 256 pairs of bf16, each repeated for every lane so that no two
// lanes meet in a bank. Entries are 256 bytes apart (the upper half of each is not used) and the table starts at a
// multiple of 64 KiB, so that one byte permutation puts a code into an address.
constexpr int pair_table_bytes = 256 * 256;

__device__ inline uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline void fill_pair_table(uint8_t *table, const nf4_values &values, int threads) {
  for (int i = threadIdx.x; i < 256 * 8; i += threads) {
    int code = i / 8;
    __nv_bfloat162 pair = {values.value[code >> 4], values.value[code & 15]};
    uint32_t bits = *reinterpret_cast<uint32_t *>(&pair);
    *reinterpret_cast<uint4 *>(table + code * 256 + i % 8 * 16) = make_uint4(bits, bits, bits, bits);
  }
}

// `entry`: the lane's place in the table's first entry.
__device__ inline uint32_t look_up(uint32_t entry, uint32_t word, int byte) {
  uint32_t at = __byte_perm(word, entry, 0x7604 | byte << 4), pair;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at));  // volatile: not above the barrier after filling
  return pair;
}

__device__ inline uint32_t word_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Two signed bytes, made exact bf16: low 7 bits as 128 + low, the sign as 128 or 256, and the difference.
__device__ inline uint32_t int8_pair(uint32_t word, bool upper) {
  uint32_t bytes = __byte_perm(word, 0, upper ? 0x4342 : 0x4140);
  uint32_t low = (bytes & 0x007f007f) | 0x43004300, sign = (bytes & 0x00800080) | 0x43004300;
  __nv_bfloat162 difference =
      __hsub2(*reinterpret_cast<__nv_bfloat162 *>(&low), *reinterpret_cast<__nv_bfloat162 *>(&sign));
  return *reinterpret_cast<uint32_t *>(&difference);
}

// `vectors` 16-byte loads of a lane hold a tile; `step` makes the four registers of one of its four steps.
template <weight_kind kind>
struct decoder;

template <>
struct decoder<weight_kind::nf4> {
  static constexpr int vectors = 1;
  static constexpr bool scaled = true;
  uint32_t table_entry;
  __device__ void step(const uint4 *codes, int s, uint32_t a[4]) const {
    for (int r = 0; r < 4; r++) a[r] = look_up(table_entry, word_of(codes[0], s), r);
  }
};

template <>
struct decoder<weight_kind::int8> {
  static constexpr int vectors = 2;
  static constexpr bool scaled = true;
  uint32_t table_entry;
  __device__ void step(const uint4 *codes, int s, uint32_t a[4]) const {
    for (int r = 0; r < 4; r++) a[r] = int8_pair(word_of(codes[s / 2], s % 2 * 2 + r / 2), r % 2);
  }
};

template <>
struct decoder<weight_kind::bf16> {
  static constexpr int vectors = 4;
  static constexpr bool scaled = false;
  uint32_t table_entry;
  __device__ void step(const uint4 *codes, int s, uint32_t a[4]) const {
    for (int r = 0; r < 4; r++) a[r] = word_of(codes[s], r);
  }
};

// 16 bytes of weights, read once: past L1, and first to leave L2, where tokens and keys should stay.
__device__ inline uint4 load_once(const void *p, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(policy));
  return v;
}

__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void store_result(const product_output &out, int64_t token, int64_t row, float v) {
  int64_t i = token * out.stride + row;
  if (out.bf16) {
    static_cast<__nv_bfloat16 *>(out.y)[i] = __float2bfloat16(v);
    return;
  }
  float *y = static_cast<float *>(out.y) + i;
  *y = out.accumulate ? *y + v : v;
}

// Everything before this may run while the kernel before still does; nothing of what that kernel writes is read or
// overwritten before it.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace adaptrt
#endif
