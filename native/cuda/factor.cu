// Packing an adapter's tensors, once, when it is attached.
#include "factor.cuh"

#include "quant_tables.h"

namespace adaptrt {
namespace {

constexpr int threads = 256;
constexpr int64_t most_blocks = 4096;

struct dynamic_map {
  float value[256];
};

// The parts of a tensor as spec/format.md lays it out.
struct stored_factor {
  int32_t dtype;
  int64_t rows, cols;
  const uint8_t *data, *absmax;
  const float *nested, *offset;
  const __nv_bfloat16 *scales;
};

// `data` is the device's copy of the host's tensor.
stored_factor parts_of(const adrt_tensor &t, const uint8_t *data) {
  matrix m;
  adrt_error error;
  check(cpu_matrix(&t, "adapter tensor", 0, &m, &error), error);
  auto there = [&](const void *here) { return here ? data + (static_cast<const uint8_t *>(here) - m.data) : nullptr; };
  stored_factor s = {t.dtype, t.rows, t.cols, data, there(m.absmax), nullptr, nullptr, nullptr};
  s.nested = reinterpret_cast<const float *>(there(m.nested));
  s.scales = reinterpret_cast<const __nv_bfloat16 *>(there(m.scales));
  if (t.dtype == ADRT_NF4) s.offset = reinterpret_cast<const float *>(data + t.bytes - 4);
  return s;
}

__device__ float absmax_of(const stored_factor &s, const dynamic_map &map, int64_t block) {
  return __fadd_rn(__fmul_rn(map.value[s.absmax[block]], s.nested[block / NESTED_BLOCK]), *s.offset);
}

__device__ int nf4_code(const stored_factor &s, int64_t i) { return i % 2 ? s.data[i / 2] & 15 : s.data[i / 2] >> 4; }

// A value of nf4 whose blocks run across the ends of rows.
__device__ float odd_nf4_value(const stored_factor &s, const dynamic_map &map, int64_t i) {
  __half2 pairs[2];
  decode_nf4(uint32_t(nf4_code(s, i)) << 4, make_nf4_bytes(), pairs);
  return __low2float(pairs[0]) * absmax_of(s, map, i / BLOCK);
}

template <typename item>
__device__ void copy_item(const stored_factor &s, const factor &to, int64_t row, int64_t col, bool transposed) {
  bool inside = col < to.cols;
  int64_t from = transposed ? col * s.cols + row : row * s.cols + col;
  reinterpret_cast<item *>(const_cast<uint8_t *>(to.data))[row * to.stride + col] =
      inside ? reinterpret_cast<const item *>(s.data)[from] : item(0);
}

__device__ void pack_value(const stored_factor &s, const dynamic_map &map, const factor &to, int64_t row, int64_t col,
                           bool transposed) {
  if (s.dtype == ADRT_F32) {
    copy_item<float>(s, to, row, col, transposed);
  } else if (s.dtype == ADRT_INT8) {
    copy_item<int8_t>(s, to, row, col, false);
  } else if (s.dtype != ADRT_NF4) {
    copy_item<uint16_t>(s, to, row, col, transposed);
  } else if (to.dtype == ADRT_BF16) {
    float value = col < s.cols ? odd_nf4_value(s, map, row * s.cols + col) : 0.f;
    reinterpret_cast<__nv_bfloat16 *>(const_cast<uint8_t *>(to.data))[row * to.stride + col] = __float2bfloat16(value);
  } else if (col % 2 == 0) {
    const_cast<uint8_t *>(to.data)[(row * to.stride + col) / 2] = s.data[(row * s.cols + col) / 2];
  }
}

__global__ void __launch_bounds__(threads) pack(const stored_factor s, const factor to, bool transposed,
                                                const __grid_constant__ dynamic_map map) {
  int64_t count = to.rows * to.stride, step = int64_t(gridDim.x) * threads;
  for (int64_t i = blockIdx.x * int64_t(threads) + threadIdx.x; i < count; i += step) {
    int64_t row = i / to.stride, col = i % to.stride;
    pack_value(s, map, to, row, col, transposed);
    if (col % BLOCK || !to.scales) continue;
    int64_t block = row * (to.stride / BLOCK) + col / BLOCK;
    const_cast<float *>(to.scales)[block] =
        s.dtype == ADRT_NF4 ? absmax_of(s, map, block) : __bfloat162float(s.scales[block]);
  }
}

size_t value_bits(int32_t dtype) { return dtype == ADRT_F32 ? 32 : dtype == ADRT_INT8 ? 8 : dtype == ADRT_NF4 ? 4 : 16; }

}  // namespace

factor describe_factor(const adrt_tensor &stored, bool transposed) {
  bool turn = transposed && stored.dtype <= ADRT_BF16;
  factor f = {stored.dtype, turn ? stored.cols : stored.rows, turn ? stored.rows : stored.cols, 0, nullptr, nullptr};
  if (stored.dtype == ADRT_NF4 && stored.cols % BLOCK) f.dtype = ADRT_BF16;
  f.stride = cpu_align(f.cols, BLOCK);
  return f;
}

size_t factor_data_bytes(const factor &f) {
  return size_t(cpu_align(int64_t(f.rows * f.stride * int64_t(value_bits(f.dtype)) / 8), 256));
}

size_t factor_bytes(const factor &f) {
  bool scaled = f.dtype == ADRT_INT8 || f.dtype == ADRT_NF4;
  return factor_data_bytes(f) + (scaled ? size_t(f.rows * f.stride / BLOCK) * sizeof(float) : 0);
}

void launch_pack_factor(const adrt_tensor &stored, const uint8_t *data, const factor &to, bool transposed,
                        cudaStream_t stream) {
  dynamic_map map;
  for (int i = 0; i < 256; i++) map.value[i] = DYNAMIC_MAP[i];
  bool turn = transposed && stored.dtype <= ADRT_BF16;
  int64_t blocks = (to.rows * to.stride + threads - 1) / threads;
  launch({stream, false}, pack, dim3(unsigned(blocks < most_blocks ? blocks : most_blocks)), threads, 0,
         parts_of(stored, data), to, turn, map);
}

}  // namespace adaptrt
