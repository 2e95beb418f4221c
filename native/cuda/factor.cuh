// The factors of adapters (U, V, W1, W2) on the device: rows of values in the stored type.
#ifndef ADAPTRT_CUDA_FACTOR_CUH
#define ADAPTRT_CUDA_FACTOR_CUH
#include <type_traits>

#include "common.h"
#include "kernel.cuh"

namespace adaptrt {

// [rows, stride]: rows are filled up with zeros to a multiple of 64. A float U is kept transposed, [rank, out], as the
// quantized ones are stored, so that neighbouring outputs are neighbours in memory. An nf4 tensor whose rows are no
// multiple of 64 long becomes bf16, since its blocks run across the ends of rows.
struct factor {
  int32_t dtype;
  int64_t rows, cols, stride;
  const uint8_t *data;
  const float *scales;  // [rows, stride / 64] of int8 and nf4
};

// What a stored tensor becomes, its pointers still empty, and the bytes it needs.
factor describe_factor(const adrt_tensor &stored, bool transposed);
size_t factor_data_bytes(const factor &f);
size_t factor_bytes(const factor &f);
// `data` holds the tensor's bytes on the device; fills `to`, whose pointers are set.
void launch_pack_factor(const adrt_tensor &stored, const uint8_t *data, const factor &to, bool transposed,
                        cudaStream_t stream);

// 16 codes' values as f16, by byte: two of four registers hold the low bytes of 8 values, and two the high bytes.
struct nf4_bytes {
  uint32_t low[4], high[4];
};

// The values of four nf4 codes in the low half of `word`, as two pairs of f16 in storage order (high nibble first).
__device__ inline void decode_nf4(uint32_t word, const nf4_bytes &values, __half2 out[2]) {
  uint32_t eighth = word & 0x7777, half = (0x3210 | (word & 0x8888) >> 1);
  uint32_t low = __byte_perm(__byte_perm(values.low[0], values.low[1], eighth),
                             __byte_perm(values.low[2], values.low[3], eighth), half);
  uint32_t high = __byte_perm(__byte_perm(values.high[0], values.high[1], eighth),
                              __byte_perm(values.high[2], values.high[3], eighth), half);
  uint32_t first = __byte_perm(low, high, 0x4051), second = __byte_perm(low, high, 0x6273);
  out[0] = *reinterpret_cast<__half2 *>(&first);
  out[1] = *reinterpret_cast<__half2 *>(&second);
}

// The codebook of common/quant_tables.h, each value rounded to f16.
__device__ inline nf4_bytes make_nf4_bytes() {
  return {{0x52339200, 0x00d4ea8d, 0x68e02618, 0x00c9800d}, {0xb6b8b9bc, 0x00adb1b4, 0x3533312d, 0x3c393837}};
}

__device__ inline void widen(const uint4 &v, float out[8], bool bf16) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 pair = bf16 ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&words[i]))
                       : __half22float2(*reinterpret_cast<const __half2 *>(&words[i]));
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
  }
}

// Eight neighbouring values of a row; `col` is a multiple of 8.
template <int dtype>
__device__ inline void load8(const factor &f, int64_t row, int64_t col, const nf4_bytes &nf4, float out[8]) {
  int64_t at = row * f.stride + col;
  if constexpr (dtype == ADRT_F32) {
    float4 low = *reinterpret_cast<const float4 *>(f.data + 4 * at);
    float4 high = *reinterpret_cast<const float4 *>(f.data + 4 * at + 16);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  } else if constexpr (dtype == ADRT_F16 || dtype == ADRT_BF16) {
    widen(*reinterpret_cast<const uint4 *>(f.data + 2 * at), out, dtype == ADRT_BF16);
  } else {
    float scale = f.scales[at / BLOCK];
    if constexpr (dtype == ADRT_INT8) {
      uint2 codes = *reinterpret_cast<const uint2 *>(f.data + at);
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] = float(int8_t((i < 4 ? codes.x : codes.y) >> i % 4 * 8)) * scale;
    } else {
      uint32_t codes = *reinterpret_cast<const uint32_t *>(f.data + at / 2);
      __half2 pairs[4];
      decode_nf4(codes & 0xffff, nf4, pairs);
      decode_nf4(codes >> 16, nf4, pairs + 2);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float2 pair = __half22float2(pairs[i]);
        out[2 * i] = pair.x * scale, out[2 * i + 1] = pair.y * scale;
      }
    }
  }
}

__device__ inline int64_t bytes_of_values(int32_t dtype, int64_t n) {
  return dtype == ADRT_F32 ? 4 * n : dtype == ADRT_INT8 ? n : dtype == ADRT_NF4 ? n / 2 : 2 * n;
}

// Brings a part of some rows to the L2 while the kernel before still runs; all threads of a block together.
__device__ inline void prefetch(const factor &f, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  constexpr int64_t line = 128;
  int64_t lines = (bytes_of_values(f.dtype, cols) + line - 1) / line;
  for (int64_t i = threadIdx.x; i < rows * lines; i += blockDim.x) {
    const uint8_t *at = f.data + bytes_of_values(f.dtype, (row + i / lines) * f.stride + col) + i % lines * line;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
  }
}

// One value, of any type; for the rare paths.
__device__ inline float element(const factor &f, int64_t row, int64_t col) {
  int64_t at = row * f.stride + col;
  switch (f.dtype) {
    case ADRT_F32: return reinterpret_cast<const float *>(f.data)[at];
    case ADRT_F16: return __half2float(reinterpret_cast<const __half *>(f.data)[at]);
    case ADRT_BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(f.data)[at]);
    case ADRT_INT8: return float(int8_t(f.data[at])) * f.scales[at / BLOCK];
    default: {
      float values[8];
      load8<ADRT_NF4>(f, row, col / 8 * 8, make_nf4_bytes(), values);
      float found = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) found = i == col % 8 ? values[i] : found;
      return found;
    }
  }
}

// Calls `call` with the factor's dtype as a constant.
template <typename callable>
__device__ inline void with_dtype(int32_t dtype, const callable &call) {
  switch (dtype) {
    case ADRT_F32: return call(std::integral_constant<int, ADRT_F32>());
    case ADRT_F16: return call(std::integral_constant<int, ADRT_F16>());
    case ADRT_BF16: return call(std::integral_constant<int, ADRT_BF16>());
    case ADRT_INT8: return call(std::integral_constant<int, ADRT_INT8>());
    default: return call(std::integral_constant<int, ADRT_NF4>());
  }
}

}  // namespace adaptrt
#endif
