// The factors of adapters (U, V, W1, W2) on the device: rows of values in the stored type.
#ifndef ADAPTRT_CUDA_FACTOR_CUH
#define ADAPTRT_CUDA_FACTOR_CUH
#include "common.h"
#include "kernel.cuh"

namespace adaptrt {

// How a factor lies in memory.
//   rows       [rows, stride], rows filled up with zeros to a multiple of 64: for kernels that are seldom used, which
//              take single values. An nf4 tensor whose rows are no multiple of 64 long becomes bf16, since its blocks
//              run across the ends of rows
//   v_panels,  for tensor cores (panels.cuh): V and U of low-rank terms, in pieces of 16 ranks by 64 inputs or outputs;
//   u_panels   f32 and f16 become bf16
// U is [rank, out] whatever its form, as the quantized ones are stored.
enum class factor_form : int32_t { rows, turned_rows, v_panels, u_panels };

struct factor {
  int32_t dtype;
  factor_form form;
  int64_t rows, cols, stride;
  const uint8_t *data;
  const float *scales;  // of int8 and nf4: [rows, stride / 64], or [16] a piece
};

// What a stored tensor becomes, its pointers still empty, and the bytes it needs.
factor describe_factor(const adrt_tensor &stored, factor_form form);
size_t factor_data_bytes(const factor &f);
size_t factor_bytes(const factor &f);
// `data` holds the tensor's bytes on the device; fills `to`, whose pointers are set.
void launch_pack_factor(const adrt_tensor &stored, const uint8_t *data, const factor &to, cudaStream_t stream);

// 16 codes' values of 16 bits, by byte: two of four registers hold the low bytes of 8 values, and two the high bytes.
struct nf4_bytes {
  uint32_t low[4], high[4];
};

// The values of four nf4 codes in the low half of `word`, as two pairs in storage order (high nibble first).
__device__ inline void decode_nf4(uint32_t word, const nf4_bytes &values, uint32_t &first, uint32_t &second) {
  uint32_t eighth = word & 0x7777, half = (0x3210 | (word & 0x8888) >> 1);
  uint32_t low = __byte_perm(__byte_perm(values.low[0], values.low[1], eighth),
                             __byte_perm(values.low[2], values.low[3], eighth), half);
  uint32_t high = __byte_perm(__byte_perm(values.high[0], values.high[1], eighth),
                              __byte_perm(values.high[2], values.high[3], eighth), half);
  first = __byte_perm(low, high, 0x4051), second = __byte_perm(low, high, 0x6273);
}

// The codebook of common/quant_tables.h, each value rounded to f16 or bf16.
__device__ inline nf4_bytes nf4_as_f16() {
  return {{0x52339200, 0x00d4ea8d, 0x68e02618, 0x00c9800d}, {0xb6b8b9bc, 0x00adb1b4, 0x3533312d, 0x3c393837}};
}
__device__ inline nf4_bytes nf4_as_bf16() {
  return {{0xca063280, 0x00ba3d92, 0xad7c25a3, 0x803910e2}, {0xbebfbfbf, 0x00bdbebe, 0x3e3e3e3d, 0x3f3f3f3e}};
}

// One value of rows.
__device__ inline float element(const factor &f, int64_t row, int64_t col) {
  int64_t at = row * f.stride + col;
  switch (f.dtype) {
    case ADRT_F32: return reinterpret_cast<const float *>(f.data)[at];
    case ADRT_F16: return __half2float(reinterpret_cast<const __half *>(f.data)[at]);
    case ADRT_BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(f.data)[at]);
    case ADRT_INT8: return float(int8_t(f.data[at])) * f.scales[at / BLOCK];
    default: {
      uint32_t first, second, byte = f.data[at / 2];
      decode_nf4(byte, nf4_as_f16(), first, second);
      __half2 pair = *reinterpret_cast<__half2 *>(&first);
      return __half2float(col % 2 ? __high2half(pair) : __low2half(pair)) * f.scales[at / BLOCK];
    }
  }
}

}  // namespace adaptrt
#endif
