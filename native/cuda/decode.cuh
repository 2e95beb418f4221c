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
// lanes meet in a bank. Entries are 256 bytes apart (the upper half of each is not used), so that one byte
// permutation makes an offset; the table is the first thing in dynamic shared memory, whose address is then part of
// the instruction. So these kernels have no static shared memory, and product_create checks the address.
constexpr int pair_table_bytes = 256 * 256;
constexpr int shared_start = 1024;  // before it is what the system keeps

__device__ inline uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline void fill_pair_table(uint8_t *table, const nf4_values &values, int threads) {
  for (int i = threadIdx.x; i < 256 * 8; i += threads) {
    int code = i / 8;
    __nv_bfloat162 pair = {values.value[code >> 4], values.value[code & 15]};
    uint32_t bits = *reinterpret_cast<uint32_t *>(&pair);
    *reinterpret_cast<uint4 *>(table + code * 256 + i % 8 * 16) = make_uint4(bits, bits, bits, bits);
  }
}

// `lane_entry`: the lane's place in the first entry, less shared_start (in a cluster an address names the block,
// too). Volatile, so that no lookup moves above the barrier after filling.
__device__ inline uint32_t look_up(uint32_t lane_entry, uint32_t word, int byte) {
  uint32_t at = __byte_perm(word, lane_entry, 0x7604 | byte << 4), pair;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(pair) : "r"(at), "n"(shared_start));
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
  uint32_t lane_entry;
  __device__ void step(const uint4 *codes, int s, uint32_t a[4]) const {
    for (int r = 0; r < 4; r++) a[r] = look_up(lane_entry, word_of(codes[0], s), r);
  }
};

template <>
struct decoder<weight_kind::int8> {
  static constexpr int vectors = 2;
  static constexpr bool scaled = true;
  uint32_t lane_entry;
  __device__ void step(const uint4 *codes, int s, uint32_t a[4]) const {
    for (int r = 0; r < 4; r++) a[r] = int8_pair(word_of(codes[s / 2], s % 2 * 2 + r / 2), r % 2);
  }
};

template <>
struct decoder<weight_kind::bf16> {
  static constexpr int vectors = 4;
  static constexpr bool scaled = false;
  uint32_t lane_entry;
  __device__ void step(const uint4 *codes, int s, uint32_t a[4]) const {
    for (int r = 0; r < 4; r++) a[r] = word_of(codes[s], r);
  }
};

__device__ inline uint32_t scaled_pair(uint32_t pair, __nv_bfloat162 by) {
  __nv_bfloat162 product = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&pair), by);
  return *reinterpret_cast<uint32_t *>(&product);
}

// A tile of 16 rows by 64 columns, scaled (but for the matrix's unit), as the operand of four steps.
template <weight_kind kind>
__device__ void decode_tile(uint32_t (&a)[4][4], const uint4 *codes, __half2 scales, const decoder<kind> &decode) {
  __nv_bfloat162 upper = __float2bfloat162_rn(__low2float(scales)), lower = __float2bfloat162_rn(__high2float(scales));
#pragma unroll
  for (int step = 0; step < 4; step++) {
    decode.step(codes, step, a[step]);
    if constexpr (decoder<kind>::scaled)
      for (int r = 0; r < 4; r++) a[step][r] = scaled_pair(a[step][r], r % 2 ? lower : upper);
  }
}

__device__ inline uint4 load_vector(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// Four matrices of 8 rows of 16 bytes in shared memory, whose rows the lanes name in turn: lane 4g + t has the pair of bf16
// number t of row g of each.
__device__ inline uint4 load_matrices(uint32_t row_address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(row_address)
               : "memory");
  return v;
}

__device__ inline __half2 load_half2(uint32_t address) {
  uint32_t bits;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address));
  return *reinterpret_cast<__half2 *>(&bits);
}

// Weights on their way into registers, past L1. Volatile, so that they are on their way where it says so.
__device__ inline uint4 load_weights(const void *from, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(policy));
  return v;
}

__device__ inline __half2 load_scales(const __half2 *from, uint64_t policy) {
  uint32_t bits;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(bits) : "l"(from), "l"(policy));
  return *reinterpret_cast<__half2 *>(&bits);
}

// 16 bytes of weights, past L1 to shared memory.
__device__ inline void copy_async(uint32_t to, const void *from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}

// 16 bytes of what kernels before have written.
__device__ inline void copy_async(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Eight columns of a token to shared memory, zeros where there are none.
__device__ inline void copy_columns(uint32_t to, const __nv_bfloat16 *row, int col, int cols) {
  int bytes = max(min(cols - col, 8), 0) * 2;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(row + (bytes ? col : 0)), "r"(bytes)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int still_on_their_way>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(still_on_their_way) : "memory");
}

// Weights are read once: they are the first to leave L2, where tokens and keys should stay.
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

// Stores sums, times a unit: `for_each` is called once with what takes an element's place and its sum, so that what kind of
// output it is is not asked for each of them.
template <typename callable>
__device__ void store_sums(const product_output &out, float unit, const callable &for_each) {
  float *y = static_cast<float *>(out.y);
  __nv_bfloat16 *rounded = static_cast<__nv_bfloat16 *>(out.y);
  if (out.bf16)
    for_each([&](int64_t i, float sum) { rounded[i] = __float2bfloat16(sum * unit); });
  else if (out.accumulate)
    for_each([&](int64_t i, float sum) { y[i] += sum * unit; });
  else
    for_each([&](int64_t i, float sum) { y[i] = sum * unit; });
}

// ---- kernels that overlap ----

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
