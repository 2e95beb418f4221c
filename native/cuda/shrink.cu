// hidden = scale * d * (V x) for all terms of all adapters of a batch, in one launch.
#include <algorithm>

#include "shrink.cuh"

namespace adaptrt {
namespace {

constexpr int most_warps = 16;

// Sums over the block's warps and writes hidden[token * width + row].
__device__ void finish_panel(const term &t, int64_t row, int tokens, const float sums[4], float *hidden) {
  __shared__ float parts[most_warps][shrink_tokens][panel_ranks];
  int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
#pragma unroll
  for (int k = 0; k < 4; k++) parts[warp][lane % 4 * 2 + k % 2][lane / 4 + k / 2 * 8] = sums[k];
  __syncthreads();
  int r = threadIdx.x % panel_ranks, token = threadIdx.x / panel_ranks;
  if (token >= tokens || row + r >= t.width) return;
  float sum = 0;
  for (int w = 0; w < int(blockDim.x) / warp_size; w++) sum += parts[w][token][r];
  hidden[token * t.width + row + r] = sum * (t.d ? t.scale * t.d[row + r] : t.scale);
}

// ---- sparse and Kronecker terms ----

// Value `row` for one token, this thread's part.
__device__ float other_part(const term &t, int64_t row, const __nv_bfloat16 *x) {
  float sum = 0;
  if (t.kind == ADRT_SPARSE) {
    for (int32_t k = t.row_start[row] + threadIdx.x; k < t.row_start[row + 1]; k += blockDim.x)
      sum += t.values[k] * __bfloat162float(x[t.columns[k]]);
  } else {  // (W1 kron W2) x = W1 (X W2^T), X being x in rows of W2's columns: this is X W2^T
    const __nv_bfloat16 *mine = x + row / t.v.rows * t.v.cols;
    for (int64_t col = threadIdx.x; col < t.v.cols; col += blockDim.x)
      sum += element(t.v, row % t.v.rows, col) * __bfloat162float(mine[col]);
  }
  return sum;
}

__device__ void shrink_other(const term &t, int64_t row, const input &in, float *hidden) {
  __shared__ float parts[most_warps];
  int64_t rows = min(int64_t(rows_together), t.width - row);
  for (int i = 0; i < rows * in.tokens; i++) {
    int64_t at = row + i % rows, token = i / rows;
    float part = warp_sum(other_part(t, at, in.x + token * in.stride));
    if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = part;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < int(blockDim.x) / warp_size; w++) sum += parts[w];
    if (threadIdx.x == 0) hidden[token * t.width + at] = sum * t.scale;
    __syncthreads();
  }
}

// One block a piece of hidden and tile of tokens.
__global__ void __maxnreg__(80) shrink(const __grid_constant__ adapter_call c) {
  const token_tile &tile = c.tiles[blockIdx.y];
  const application &a = tile.head;
  shrink_place at;
  if (!find_place(c, a, blockIdx.x, at)) {
    wait_for_before();  // if no block did, this kernel could end, and the next begin, before the one before ends
    return;
  }
  const term &t = *at.t;
  input in = {c.x + tile.token * c.x_stride, c.x_stride, c.cols, tile.n_tokens};
  float *hidden = c.hidden + at.hidden + (tile.token - a.token) * t.width;
  if (t.kind != ADRT_LOW_RANK) {
    wait_for_before();
    shrink_other(t, at.row, in, hidden);
    return;
  }
  float sums[4] = {};
  int warp = threadIdx.x / warp_size;
  with_kind(t.v.dtype, [&](auto kind) {
    multiply_panel<decltype(kind)::value, true>(t.v, at.row / panel_ranks, in, warp, blocks_of_columns(in),
                                                blockDim.x / warp_size, sums);
  });
  finish_panel(t, at.row, tile.n_tokens, sums, hidden);
}

// As many warps a block as all blocks can have at once.
int warps_for(int64_t blocks, int multiprocessors) {
  return blocks <= multiprocessors ? 16 : blocks <= 3 * multiprocessors ? 8 : 4;
}

}  // namespace

void launch_shrink(const queue &q, const adapter_call &call, int64_t chunks, int multiprocessors) {
  constexpr int most_in_y = 65535;
  adapter_call part = call;
  int warps = warps_for(chunks * call.n_tiles, multiprocessors);
  for (int done = 0; done < call.n_tiles && chunks; done += most_in_y) {
    part.tiles = call.tiles + done;
    dim3 grid(unsigned(chunks), unsigned(std::min(most_in_y, call.n_tiles - done)));
    launch(q, shrink, grid, unsigned(warps * warp_size), 0, part);
  }
}

}  // namespace adaptrt
