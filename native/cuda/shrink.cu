// hidden = scale * d * (V x) for all terms of all adapters of a batch, in one launch.
#include <algorithm>

#include "adapters.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 128, warps = threads / warp_size;
constexpr int rows_together = 4;      // of V, in a block
constexpr int few_tiles = 16;         // decoded tokens that need every row in a block of its own to fill a GPU

// Where a block's piece of work is.
struct shrink_place {
  const term *t;
  int64_t hidden;  // of the segment's first token and the term's first value
  int64_t row;
};

// Walks members and terms to piece number `chunk` of an application.
__device__ bool find_place(const adapter_call &c, const application &a, int64_t chunk, int64_t rows, shrink_place &at) {
  for (int m = 0; m < c.n_members; m++) {
    const attachment &what = a.attachments[c.members[m].target];
    for (int k = 0; what.acts && k < what.n_terms; k++) {
      const term &t = term_of(what, k);
      int64_t chunks = (t.width + rows - 1) / rows;
      if (chunk < chunks) {
        at = {&t, hidden_start(c, a, c.members[m], t), chunk * rows};
        return true;
      }
      chunk -= chunks;
    }
  }
  return false;
}

// Products of n_rows rows of V with n_tokens tokens, this thread's part of the columns.
template <int dtype, int n_rows, int n_tokens>
__device__ void partial_products(const factor &v, int64_t row, int64_t cols, const __nv_bfloat16 *x, int64_t x_stride,
                                 int rows_left, int tokens_left, float out[n_rows][n_tokens]) {
  nf4_bytes nf4 = make_nf4_bytes();
#pragma unroll 4
  for (int64_t col = threadIdx.x * 8; col < cols; col += threads * 8) {
    float weights[n_rows][8];
#pragma unroll
    for (int i = 0; i < n_rows; i++) load8<dtype>(v, row + min(i, rows_left - 1), col, nf4, weights[i]);
#pragma unroll
    for (int t = 0; t < n_tokens; t++) {
      float values[8];
      widen(*reinterpret_cast<const uint4 *>(x + min(t, tokens_left - 1) * x_stride + col), values, true);
#pragma unroll
      for (int i = 0; i < n_rows; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) out[i][t] += weights[i][j] * values[j];
    }
  }
}

// Sums over the block and writes hidden[token * width + row].
template <int n_rows, int n_tokens>
__device__ void finish(const term &t, int64_t row, int rows_left, int tokens_left, const float sums[n_rows][n_tokens],
                       float *hidden) {
  __shared__ float parts[warps][n_rows * n_tokens];
#pragma unroll
  for (int i = 0; i < n_rows; i++)
#pragma unroll
    for (int k = 0; k < n_tokens; k++) {
      float sum = warp_sum(sums[i][k]);
      if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size][i * n_tokens + k] = sum;
    }
  __syncthreads();
  int i = threadIdx.x / n_tokens, k = threadIdx.x % n_tokens;
  if (i >= rows_left || i >= n_rows || k >= tokens_left) return;
  float sum = 0;
  for (int w = 0; w < warps; w++) sum += parts[w][threadIdx.x];
  hidden[k * t.width + row + i] = sum * (t.d ? t.scale * t.d[row + i] : t.scale);
}

template <int n_rows, int n_tokens>
__device__ void shrink_low_rank(const term &t, int64_t row, int tokens_left, int64_t cols, const __nv_bfloat16 *x,
                                int64_t x_stride, float *hidden) {
  float sums[n_rows][n_tokens] = {};
  int rows_left = int(min(int64_t(n_rows), t.width - row));
  with_dtype(t.v.dtype, [&](auto dtype) {
    partial_products<decltype(dtype)::value, n_rows, n_tokens>(t.v, row, cols, x, x_stride, rows_left, tokens_left,
                                                               sums);
  });
  finish<n_rows, n_tokens>(t, row, rows_left, tokens_left, sums, hidden);
}

// Value `row` of a sparse or Kronecker term for one token, this thread's part.
__device__ float other_part(const term &t, int64_t row, const __nv_bfloat16 *x) {
  float sum = 0;
  if (t.kind == ADRT_SPARSE) {
    for (int32_t k = t.row_start[row] + threadIdx.x; k < t.row_start[row + 1]; k += threads)
      sum += t.values[k] * __bfloat162float(x[t.columns[k]]);
  } else {  // (W1 kron W2) x = W1 (X W2^T), X being x in rows of W2's columns: this is X W2^T
    const __nv_bfloat16 *mine = x + row / t.v.rows * t.v.cols;
    for (int64_t col = threadIdx.x; col < t.v.cols; col += threads)
      sum += element(t.v, row % t.v.rows, col) * __bfloat162float(mine[col]);
  }
  return sum;
}

template <int n_rows>
__device__ void shrink_other(const term &t, int64_t row, int n_tokens, const __nv_bfloat16 *x, int64_t x_stride,
                             float *hidden) {
  for (int i = 0; i < n_rows && row + i < t.width; i++)
    for (int k = 0; k < n_tokens; k++) {
      float sum[1][1] = {{other_part(t, row + i, x + k * x_stride)}};
      finish<1, 1>(t, row + i, 1, 1, sum, hidden + k * t.width);
      __syncthreads();
    }
}

template <int n_rows, int n_tokens>
__device__ void shrink_tile(const adapter_call &c, const token_tile &tile, const application &a) {
  shrink_place at;
  if (!find_place(c, a, blockIdx.x, n_rows, at)) {
    wait_for_before();  // if no block did, this kernel could end, and the next begin, before the one before ends
    return;
  }
  const term &t = *at.t;
  const __nv_bfloat16 *x = c.x + tile.token * c.x_stride;
  float *hidden = c.hidden + at.hidden + (tile.token - a.token) * t.width;
  if (t.kind == ADRT_LOW_RANK) prefetch(t.v, at.row, min(int64_t(n_rows), t.width - at.row), 0, c.cols);
  wait_for_before();
  if (t.kind == ADRT_LOW_RANK)
    shrink_low_rank<n_rows, n_tokens>(t, at.row, tile.n_tokens, c.cols, x, c.x_stride, hidden);
  else
    shrink_other<n_rows>(t, at.row, tile.n_tokens, x, c.x_stride, hidden);
}

// One block a piece of hidden and tile of tokens.
template <int n_rows, int n_tokens>
__global__ void __launch_bounds__(threads) shrink(const __grid_constant__ adapter_call c) {
  const token_tile &tile = c.tiles[blockIdx.y];
  shrink_tile<n_rows, n_tokens>(c, tile, tile.head);
}

}  // namespace

int64_t shrink_chunks(int64_t width, bool single, int n_tiles) {
  int64_t rows = single && n_tiles <= few_tiles ? 1 : rows_together;
  return (width + rows - 1) / rows;
}

void launch_shrink(const queue &q, const adapter_call &call, bool single, int64_t chunks) {
  constexpr int most_in_y = 65535;
  adapter_call part = call;
  for (int done = 0; done < call.n_tiles && chunks; done += most_in_y) {
    part.tiles = call.tiles + done;
    dim3 grid(unsigned(chunks), unsigned(std::min(most_in_y, call.n_tiles - done)));
    if (!single)
      launch(q, shrink<rows_together, shrink_tokens>, grid, threads, 0, part);
    else if (call.n_tiles > few_tiles)
      launch(q, shrink<rows_together, 1>, grid, threads, 0, part);
    else
      launch(q, shrink<1, 1>, grid, threads, 0, part);
  }
}

}  // namespace adaptrt
