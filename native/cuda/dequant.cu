// Packing: a tensor's bytes as in the file -> tiles; and back from tiles to values.
#include <math.h>

#include "quant_tables.h"
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 256;
constexpr int buffer_alignment = 256;
// Scales are halves of at most 2^15: 29 powers of two below that keep all their bits.
constexpr int largest_scale_exponent = 15;

struct codebooks {
  float nf4[16], dynamic[256];
};

codebooks make_codebooks() {
  codebooks c;
  for (int i = 0; i < 16; i++) c.nf4[i] = NF4_CODEBOOK[i];
  for (int i = 0; i < 256; i++) c.dynamic[i] = DYNAMIC_MAP[i];
  return c;
}



// A matrix as spec/format.md lays it out.
struct stored_matrix {
  adrt_dtype dtype;
  int64_t rows, cols;
  const uint8_t *codes, *absmax;
  const float *nested, *offset;
  const __nv_bfloat16 *scales;
  int64_t groups;  // nested absmax
};

stored_matrix describe_stored(adrt_dtype dtype, int64_t rows, int64_t cols, const void *stored) {
  const uint8_t *bytes = static_cast<const uint8_t *>(stored);
  stored_matrix s = {dtype, rows, cols, bytes, nullptr, nullptr, nullptr, nullptr, 0};
  int64_t count = rows * cols;
  if (dtype == ADRT_NF4) {
    int64_t blocks = ceil_div(count, 64), absmax = align_up(ceil_div(count, 2), 64);
    int64_t nested = align_up(absmax + blocks, 64);
    s.groups = ceil_div(blocks, 256);
    s.absmax = bytes + absmax;
    s.nested = reinterpret_cast<const float *>(bytes + nested);
    s.offset = s.nested + s.groups;
  } else if (dtype == ADRT_INT8) {
    s.scales = reinterpret_cast<const __nv_bfloat16 *>(bytes + align_up(count, 64));
  }
  return s;
}

__device__ int64_t blocks_a_row(const stored_matrix &s) { return (s.cols + block_cols - 1) / block_cols; }

__device__ float stored_absmax(const stored_matrix &s, const codebooks &books, int64_t block) {
  return __fadd_rn(__fmul_rn(books.dynamic[s.absmax[block]], s.nested[block / 256]), *s.offset);
}

__device__ float stored_value(const stored_matrix &s, const codebooks &books, int64_t row, int64_t col) {
  int64_t i = row * s.cols + col;
  switch (s.dtype) {
    case ADRT_F32: return reinterpret_cast<const float *>(s.codes)[i];
    case ADRT_F16: return __half2float(reinterpret_cast<const __half *>(s.codes)[i]);
    case ADRT_BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(s.codes)[i]);
    case ADRT_INT8:
      return static_cast<int8_t>(s.codes[i]) * __bfloat162float(s.scales[row * blocks_a_row(s) + col / block_cols]);
    default: {
      int code = i % 2 ? s.codes[i / 2] & 15 : s.codes[i / 2] >> 4;
      return books.nf4[code] * stored_absmax(s, books, i / 64);
    }
  }
}

// One thread an item or, of nf4, a pair of items: a byte.
__global__ void pack_codes(stored_matrix from, packed_matrix to, const __grid_constant__ codebooks books) {
  int64_t items_a_row = to.col_blocks * block_cols, total = to.row_tiles * tile_rows * items_a_row;
  int step = to.kind == weight_kind::nf4 ? 2 : 1;
  for (int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * step; i < total;
       i += int64_t(gridDim.x) * blockDim.x * step) {
    int64_t row = i / items_a_row, col = i % items_a_row;
    bool inside = row < from.rows && col < from.cols;
    int64_t tile = row / tile_rows * to.col_blocks + col / block_cols;
    tile_place place = place_in_tile(row % tile_rows, col % block_cols);
    uint8_t *at = to.codes + tile * tile_bytes(to.kind) + byte_in_tile(to.kind, place);
    if (to.kind == weight_kind::nf4)
      *at = inside ? from.codes[(row * from.cols + col) / 2] : 0x77;
    else if (to.kind == weight_kind::int8)
      *at = inside ? from.codes[row * from.cols + col] : 0;
    else
      *reinterpret_cast<__nv_bfloat16 *>(at) = __float2bfloat16(inside ? stored_value(from, books, row, col) : 0.f);
  }
}

// The power of two that brings the largest scale to at most 2^15. One block of threads.
__global__ void choose_unit(stored_matrix from, float *unit) {
  __shared__ float largest[threads];
  float bound = 0;
  int64_t n = from.dtype == ADRT_NF4 ? from.groups : from.rows * blocks_a_row(from);
  for (int64_t i = threadIdx.x; i < n; i += threads)
    bound = fmaxf(bound, fabsf(from.dtype == ADRT_NF4 ? from.nested[i] : __bfloat162float(from.scales[i])));
  largest[threadIdx.x] = bound;
  for (int half = threads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + half]);
  }
  if (threadIdx.x) return;
  bound = largest[0] + (from.dtype == ADRT_NF4 ? fabsf(*from.offset) : 0.f);
  int exponent;
  frexpf(bound, &exponent);  // bound < 2^exponent
  *unit = bound > 0 ? exp2f(fmaxf(exponent - largest_scale_exponent, -120)) : 1.f;
}

__global__ void pack_scales(stored_matrix from, packed_matrix to, const __grid_constant__ codebooks books) {
  int64_t blocks = blocks_a_row(from), total = to.row_tiles * tile_rows * to.col_blocks;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    int64_t row = i / to.col_blocks, block = i % to.col_blocks;
    float scale = 0;
    if (row < from.rows && block < blocks)
      scale = from.dtype == ADRT_NF4 ? stored_absmax(from, books, row * blocks + block)
                                     : __bfloat162float(from.scales[row * blocks + block]);
    int64_t tile = row / tile_rows * to.col_blocks + block;
    __half *pair = reinterpret_cast<__half *>(to.scales + tile * 8 + row % 8);
    pair[row % tile_rows / 8] = __float2half(scale / *to.unit);
  }
}

__device__ float packed_value(const packed_matrix &w, const codebooks &books, int64_t row, int64_t col) {
  int64_t tile = row / tile_rows * w.col_blocks + col / block_cols;
  tile_place place = place_in_tile(row % tile_rows, col % block_cols);
  const uint8_t *at = w.codes + tile * tile_bytes(w.kind) + byte_in_tile(w.kind, place);
  if (w.kind == weight_kind::bf16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(at));
  const __half *pair = reinterpret_cast<const __half *>(w.scales + tile * 8 + row % 8);
  float scale = __half2float(pair[row % tile_rows / 8]) * *w.unit;
  if (w.kind == weight_kind::int8) return static_cast<int8_t>(*at) * scale;
  return books.nf4[place.odd ? *at & 15 : *at >> 4] * scale;
}

template <typename item>
__device__ item rounded(float v);
template <>
__device__ float rounded<float>(float v) { return v; }
template <>
__device__ __nv_bfloat16 rounded<__nv_bfloat16>(float v) { return __float2bfloat16(v); }

// Row blockIdx.y of the output, or as many as a grid can count, is row indices[...] of the matrix.
template <typename item>
__global__ void unpack_rows(packed_matrix w, const int32_t *indices, int64_t n, item *out, int64_t out_stride,
                            const __grid_constant__ codebooks books) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y) {
    int64_t row = indices ? indices[i] : i;
    for (int64_t col = blockIdx.x * blockDim.x + threadIdx.x; col < w.cols; col += gridDim.x * blockDim.x)
      out[i * out_stride + col] =
          rounded<item>(row >= 0 && row < w.rows ? packed_value(w, books, row, col) : 0.f);
  }
}

dim3 unpack_grid(const packed_matrix &w, int64_t n) {
  return dim3(unsigned(ceil_div(w.cols, threads)), unsigned(n < 65535 ? n : 65535));
}

weight_kind packed_kind(adrt_dtype dtype, int64_t cols) {
  if (dtype == ADRT_INT8) return weight_kind::int8;
  return dtype == ADRT_NF4 && cols % 64 == 0 ? weight_kind::nf4 : weight_kind::bf16;
}

}  // namespace

packed_matrix describe_packed(adrt_dtype dtype, int64_t rows, int64_t cols, void *buffer) {
  packed_matrix w = {packed_kind(dtype, cols), rows, cols, ceil_div(rows, tile_rows), 0, nullptr, nullptr, nullptr};
  w.col_blocks = align_up(ceil_div(cols, block_cols), col_blocks_step);
  uint8_t *bytes = static_cast<uint8_t *>(buffer);
  w.unit = reinterpret_cast<float *>(bytes);
  w.codes = bytes + buffer_alignment;
  if (w.kind != weight_kind::bf16)
    w.scales = reinterpret_cast<__half2 *>(w.codes + w.row_tiles * w.col_blocks * tile_bytes(w.kind));
  return w;
}

size_t packed_bytes(adrt_dtype dtype, int64_t rows, int64_t cols) {
  constexpr int64_t longest = int64_t(1) << 30;
  if (dtype < ADRT_F32 || dtype > ADRT_NF4 || rows < 1 || cols < 1 || rows > longest || cols > longest) return 0;
  packed_matrix w = describe_packed(dtype, rows, cols, nullptr);
  int64_t tiles = w.row_tiles * w.col_blocks, scales = w.kind == weight_kind::bf16 ? 0 : 8 * sizeof(__half2);
  constexpr int64_t reach = buffer_alignment;  // copies may reach a little over the end
  return size_t(buffer_alignment + tiles * (tile_bytes(w.kind) + scales) + reach);
}

cudaError_t launch_pack(adrt_dtype dtype, const void *stored, const packed_matrix &to, cudaStream_t stream) {
  constexpr unsigned grid = 4096;
  stored_matrix from = describe_stored(dtype, to.rows, to.cols, stored);
  codebooks books = make_codebooks();
  pack_codes<<<grid, threads, 0, stream>>>(from, to, books);
  if (to.scales) {
    choose_unit<<<1, threads, 0, stream>>>(from, to.unit);
    pack_scales<<<grid, threads, 0, stream>>>(from, to, books);
  }
  return cudaGetLastError();
}

cudaError_t launch_rows(const packed_matrix &w, const int32_t *indices, int n, float *out, int64_t out_stride,
                        cudaStream_t stream) {
  unpack_rows<<<unpack_grid(w, n), threads, 0, stream>>>(w, indices, int64_t(n), out, out_stride, make_codebooks());
  return cudaGetLastError();
}

cudaError_t launch_dequantize(const packed_matrix &w, __nv_bfloat16 *out, cudaStream_t stream) {
  unpack_rows<<<unpack_grid(w, w.rows), threads, 0, stream>>>(w, static_cast<const int32_t *>(nullptr), w.rows, out,
                                                              w.cols, make_codebooks());
  return cudaGetLastError();
}

}  // namespace adaptrt
