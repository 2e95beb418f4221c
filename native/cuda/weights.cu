// Tensors of the program on the device: packed for the products, vectors as float32.
#include <algorithm>

#include "executable.cuh"
#include "tile.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 256;
constexpr size_t read_over = 32 * 1024;  // products read whole chunks, the last of which may reach over a matrix's end

// Brings the scales of one matrix to the largest of n units, which unit[0] becomes; unit[1 ...] are the matrices' own.
__global__ void share_unit(__half *scales, int64_t count, float *unit, int mine, int n) {
  float largest = unit[1];
  for (int i = 2; i <= n; i++) largest = fmaxf(largest, unit[i]);
  float factor = unit[mine] / largest;
  for (int64_t i = blockIdx.x * int64_t(threads) + threadIdx.x; i < count; i += int64_t(gridDim.x) * threads)
    scales[i] = __float2half(__half2float(scales[i]) * factor);
  if (!blockIdx.x && !threadIdx.x) unit[0] = largest;
}

int64_t scale_count(const packed_matrix &w) { return w.row_tiles * w.col_blocks * tile_rows; }

void pack(adrt_executable &e, const adrt_tensor &tensor, const packed_matrix &to) {
  if (e.weights.counts_only()) return;
  e.arrivals->receive(tensor.data, tensor.bytes, [&](const uint8_t *stored) {
    check(launch_pack(adrt_dtype(tensor.dtype), stored, to, e.queues.main), "packing a tensor");
  });
}

loaded_matrix allocate(adrt_executable &e, const adrt_tensor &tensor, int64_t rows) {
  adrt_dtype dtype = adrt_dtype(tensor.dtype);
  size_t bytes = packed_bytes(dtype, rows, tensor.cols);
  if (!bytes)
    fail(ADRT_BAD_ARGUMENT, "a tensor of [%lld, %lld] is too large", (long long)rows, (long long)tensor.cols);
  int block = e.weights.add(bytes + read_over);
  return {describe_packed(dtype, rows, tensor.cols, e.weights.address(block)), block};
}

}  // namespace

loaded_matrix load_matrix(adrt_executable &e, const adrt_tensor &tensor) {
  auto known = e.matrices.find(key_of(tensor));
  if (known != e.matrices.end()) return known->second;
  loaded_matrix made = allocate(e, tensor, tensor.rows);
  pack(e, tensor, made.w);
  e.matrices.emplace(key_of(tensor), made);
  return made;
}

bool load_together(adrt_executable &e, const std::vector<const adrt_tensor *> &tensors, loaded_matrix &all_loaded,
                   std::vector<packed_matrix> &each) {
  int64_t rows = 0;
  for (const adrt_tensor *t : tensors) {
    if (t->dtype != tensors[0]->dtype || t->cols != tensors[0]->cols || t->rows % tile_rows) return false;
    rows += t->rows;
  }
  all_loaded = allocate(e, *tensors[0], rows);
  packed_matrix &all = all_loaded.w;
  int n = int(tensors.size());
  int64_t tile = 0;
  for (const adrt_tensor *t : tensors) {
    packed_matrix w = all;
    w.rows = t->rows;
    w.row_tiles = t->rows / tile_rows;
    w.codes += tile * w.col_blocks * tile_bytes(w.kind);
    if (w.scales) w.scales += tile * w.col_blocks * (tile_rows / 2);
    w.unit = all.unit + 1 + each.size();
    pack(e, *t, w);
    each.push_back(w);
    tile += w.row_tiles;
  }
  for (int i = 0; i < n && all.scales && !e.weights.counts_only(); i++)
    launch({e.queues.main, false}, share_unit, dim3(256), threads, 0, reinterpret_cast<__half *>(each[i].scales),
           scale_count(each[i]), all.unit, i + 1, n);
  for (packed_matrix &w : each) w.unit = all.unit;
  return true;
}

const float *load_vector(adrt_executable &e, const adrt_tensor &tensor) {
  matrix m;
  adrt_error error;
  check(cpu_matrix(&tensor, "tensor", 0, &m, &error), error);
  std::vector<float> values(size_t(tensor.cols));
  cpu_decode_row(&m, 0, values.data());
  e.vector_bytes += values.size() * sizeof(float);
  if (e.weights.counts_only()) return nullptr;
  e.vectors.emplace_back(values.size() * sizeof(float), "weights");
  check(cudaMemcpyAsync(e.vectors.back().bytes(), values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice,
                        e.queues.main),
        "upload");
  return e.vectors.back().as<float>();
}

}  // namespace adaptrt
