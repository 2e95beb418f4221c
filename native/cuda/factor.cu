// Packing an adapter's tensors, once, when it is attached.
#include <algorithm>

#include "panels.cuh"

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
  uint32_t first, second;
  decode_nf4(uint32_t(nf4_code(s, i)) << 4, nf4_as_f16(), first, second);
  return __low2float(*reinterpret_cast<__half2 *>(&first)) * absmax_of(s, map, i / BLOCK);
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

__global__ void __launch_bounds__(threads) pack_rows(const stored_factor s, const factor to, bool transposed,
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

// ---- panels ----

// Of rank r and input or output c; `turned`: the tensor is stored as [out, rank].
struct panel_source {
  const stored_factor &s;
  const dynamic_map &map;
  bool turned;

  __device__ int64_t place(int64_t r, int64_t c) const { return turned ? c * s.cols + r : r * s.cols + c; }
  __device__ __nv_bfloat16 value(int64_t r, int64_t c) const {
    int64_t i = place(r, c);
    switch (s.dtype) {
      case ADRT_F32: return __float2bfloat16(reinterpret_cast<const float *>(s.data)[i]);
      case ADRT_F16: return __float2bfloat16(__half2float(reinterpret_cast<const __half *>(s.data)[i]));
      case ADRT_BF16: return reinterpret_cast<const __nv_bfloat16 *>(s.data)[i];
      default: return __float2bfloat16(odd_nf4_value(s, map, i));
    }
  }
};

// A register's two values, of ranks and columns that there may not be.
__device__ void pack_pair(const panel_source &from, const factor &to, uint8_t *at, const int64_t r[2],
                          const int64_t c[2]) {
  constexpr int zero_of_nf4 = 7;
  bool there[2];
  for (int i = 0; i < 2; i++) there[i] = r[i] < to.rows && c[i] < to.cols;
  for (int i = 0; i < 2 && to.dtype == ADRT_BF16; i++)
    reinterpret_cast<__nv_bfloat16 *>(at)[i] = there[i] ? from.value(r[i], c[i]) : __float2bfloat16(0.f);
  for (int i = 0; i < 2 && to.dtype == ADRT_INT8; i++) at[i] = there[i] ? from.s.data[from.place(r[i], c[i])] : 0;
  if (to.dtype != ADRT_NF4) return;
  int codes[2];
  for (int i = 0; i < 2; i++) codes[i] = there[i] ? nf4_code(from.s, from.place(r[i], c[i])) : zero_of_nf4;
  *at = uint8_t(codes[0] << 4 | codes[1]);
}

__global__ void __launch_bounds__(threads) pack_panels(const stored_factor s, const factor to, bool turned,
                                                       const __grid_constant__ dynamic_map map) {
  constexpr int pairs = tile_items / 2;
  panel_source from = {s, map, turned};
  int64_t count = rank_pieces(to) * block_pieces(to) * pairs, step = int64_t(gridDim.x) * threads;
  for (int64_t i = blockIdx.x * int64_t(threads) + threadIdx.x; i < count; i += step) {
    int64_t piece = i / pairs, blocks = block_pieces(to), ranks = rank_pieces(to);
    bool v = to.form == factor_form::v_panels;
    int64_t rank = (v ? piece / blocks : piece % ranks) * panel_ranks, block = v ? piece % blocks : piece / ranks;
    int lane = int(i % pairs) / 16, tile_step = int(i % 16) / 4, reg = int(i % 4);
    int64_t r[2], c[2];
    for (int odd = 0; odd < 2; odd++) {
      r[odd] = rank + (v ? lane / 4 + reg % 2 * 8 : lane % 4 * 2 + reg / 2 * 8 + odd);
      c[odd] = block * BLOCK + (v ? lane % 4 * 16 + tile_step * 4 + reg / 2 * 2 + odd
                                  : tile_step * 16 + lane / 4 * 2 + reg % 2);
    }
    weight_kind kind = panel_kind(to.dtype);
    uint8_t *data = const_cast<uint8_t *>(to.data) + piece * tile_bytes(kind);
    pack_pair(from, to, data + byte_in_tile(kind, {lane, tile_step, reg, 0}), r, c);
    if (i % pairs >= panel_ranks || !to.scales) continue;
    int64_t row = rank + i % pairs, at = row * blocks + block;
    const_cast<float *>(to.scales)[piece * panel_ranks + i % pairs] =
        row >= to.rows ? 0.f : s.dtype == ADRT_NF4 ? absmax_of(s, map, at) : __bfloat162float(s.scales[at]);
  }
}

bool is_panels(factor_form form) { return form == factor_form::v_panels || form == factor_form::u_panels; }

bool is_turned(const adrt_tensor &stored, factor_form form) {
  return (form == factor_form::turned_rows || form == factor_form::u_panels) && stored.dtype <= ADRT_BF16;
}

size_t value_bits(int32_t dtype) { return dtype == ADRT_F32 ? 32 : dtype == ADRT_INT8 ? 8 : dtype == ADRT_NF4 ? 4 : 16; }

}  // namespace

factor describe_factor(const adrt_tensor &stored, factor_form form) {
  bool turned = is_turned(stored, form);
  factor f = {stored.dtype, form, turned ? stored.cols : stored.rows, turned ? stored.rows : stored.cols};
  if (stored.dtype == ADRT_NF4 && stored.cols % BLOCK) f.dtype = ADRT_BF16;
  if (is_panels(form) && stored.dtype <= ADRT_BF16) f.dtype = ADRT_BF16;
  f.stride = cpu_align(f.cols, BLOCK);
  return f;
}

static int64_t filled_rows(const factor &f) { return is_panels(f.form) ? rank_pieces(f) * panel_ranks : f.rows; }

size_t factor_data_bytes(const factor &f) {
  return size_t(cpu_align(int64_t(filled_rows(f) * f.stride * int64_t(value_bits(f.dtype)) / 8), 256));
}

size_t factor_bytes(const factor &f) {
  bool scaled = f.dtype == ADRT_INT8 || f.dtype == ADRT_NF4;
  return factor_data_bytes(f) + (scaled ? size_t(filled_rows(f) * f.stride / BLOCK) * sizeof(float) : 0);
}

void launch_pack_factor(const adrt_tensor &stored, const uint8_t *data, const factor &to, cudaStream_t stream) {
  dynamic_map map;
  for (int i = 0; i < 256; i++) map.value[i] = DYNAMIC_MAP[i];
  int64_t items = is_panels(to.form) ? filled_rows(to) * to.stride / 2 : to.rows * to.stride;
  dim3 blocks(unsigned(std::min(most_blocks, (items + threads - 1) / threads)));
  launch({stream, false}, is_panels(to.form) ? pack_panels : pack_rows, blocks, threads, 0, parts_of(stored, data), to,
         is_turned(stored, to.form), map);
}

}  // namespace adaptrt
