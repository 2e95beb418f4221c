#include "shared.cuh"

#include "panels.cuh"

#include <algorithm>

namespace adaptrt {
namespace {

// Both kernels have tiles of 32 rows (of a factor) by 32 tokens a warp, and read their operands as they lie in memory:
// a lane takes 16 bytes, 8 columns, of a row, which are the operands of two products of 16 columns. Which columns
// these are does not matter as long as both sides have the same.
constexpr int tile = 32, step_cols = 32;
constexpr int project_warps = 8, project_threads = project_warps * warp_size;
constexpr int project_splits = 4;  // blocks of a cluster
constexpr int extend_warps = 4, extend_rows = extend_warps * tile;
constexpr int extend_blocks = 3;    // of a multiprocessor
constexpr int hidden_padding = 32;  // of a row in shared memory: then the rows of neighbouring lanes meet in no bank

// sums[m][n][i]: of row operand 2m + i / 2 of lane group g, and of token 8n + 2t + i % 2, where lane = 4g + t.
using tile_sums = float[2][4][4];

__device__ void multiply(tile_sums &sums, const uint4 rows[4], const uint4 tokens[4]) {
#pragma unroll
  for (int s = 0; s < 4; s += 2)
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const uint4 &upper = rows[2 * m], &lower = rows[2 * m + 1];
      const uint32_t a[4] = {word_of(upper, s), word_of(lower, s), word_of(upper, s + 1), word_of(lower, s + 1)};
#pragma unroll
      for (int n = 0; n < 4; n++) multiply_add(sums[m][n], a, word_of(tokens[n], s), word_of(tokens[n], s + 1));
    }
}

__device__ uint4 load16(const __nv_bfloat16 *at) { return *reinterpret_cast<const uint4 *>(at); }

// ---- project ----

// Where register i of tile_sums is, and whose it is, in the tile.
__device__ int row_of_sum(int i) { return i / 16 * 16 + i / 2 % 2 * 8; }
__device__ int token_of_sum(int i) { return i / 4 % 4 * 8 + i % 2; }

// Stores the sums of a tile, which the blocks of a cluster have parts of, in the order of tile_sums.
__device__ void store_sums(const project_call &c, const float *sums) {
  int first = 0, count = tile * tile;
#if __CUDA_ARCH__ >= 900
  wait_for_writes_of_cluster();
  count /= int(gridDim.z), first = count * int(blockIdx.z);
#endif
#pragma unroll 1
  for (int i = first + threadIdx.x; i < first + count; i += project_threads) {
    float sum = 0;
#if __CUDA_ARCH__ >= 900
#pragma unroll 1
    for (int block = 0; block < int(gridDim.z); block++) sum += load_of_cluster(shared_address(sums + i), block);
#else
    sum = sums[i];
#endif
    int lane = i % warp_size, row = blockIdx.x * tile + row_of_sum(i / warp_size) + lane / 4;
    int token = blockIdx.y * tile + token_of_sum(i / warp_size) + lane % 4 * 2;
    if (token < c.tokens) c.out[token * projected_stride(c.v.rows) + row] = sum;
  }
#if __CUDA_ARCH__ >= 900
  wait_for_writes_of_cluster();  // none ends before the others have read
#endif
}

// A tile of V's rows and tokens; the warps of the blocks of a cluster share its columns.
__global__ void __launch_bounds__(project_threads) project(const project_call c) {
  __shared__ float parts[project_warps][tile * tile];
  int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, group = lane / 4;
  const __nv_bfloat16 *v[4], *x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = min(int(blockIdx.x) * tile + 8 * i + group, int(c.v.rows) - 1);
    int token = min(int(blockIdx.y) * tile + 8 * i + group, c.tokens - 1);
    v[i] = c.v.data + row * c.v.stride + lane % 4 * 8;
    x[i] = c.x + token * c.x_stride + lane % 4 * 8;
  }
  unsigned steps = unsigned(c.cols + step_cols - 1) / step_cols, pieces = project_warps * gridDim.z;
  unsigned piece = blockIdx.z * project_warps + warp;
  int begin = int(steps * piece / pieces) * step_cols, end = int(steps * (piece + 1) / pieces) * step_cols;
  wait_for_before();
  tile_sums sums = {};
#pragma unroll 2
  for (int col = begin; col < end; col += step_cols) {
    uint4 rows[4], tokens[4];
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = load16(v[i] + col), tokens[i] = load16(x[i] + col);
    multiply(sums, rows, tokens);
  }
#pragma unroll
  for (int i = 0; i < tile; i++) parts[warp][i * warp_size + lane] = sums[i / 16][i / 4 % 4][i % 4];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < tile * tile; i += project_threads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < project_warps; w++) sum += parts[w][i];
    parts[0][i] = sum;
  }
  store_sums(c, parts[0]);
}

// ---- extend ----

// What a block knows of a token of its tile.
struct token_vectors {
  bool ours;
  float scale;
  const float *d, *e;  // or NULL
};

__device__ token_vectors vectors_of(const extend_call &c, const extend_member &m, int token) {
  int head = token < c.tokens ? c.heads[token] : -1;
  if (head < 0) return {};
  const attachment &what = c.applications[head].attachments[m.target];
  const term &t = what.first;
  if (!what.acts || !what.n_terms || !m.term.is(t)) return {};
  return {true, t.scale, t.d, t.e};
}

__device__ float4 load_four(const float *at) { return *reinterpret_cast<const float4 *>(at); }

// Values r to r + 3 of scale * d * (V x), as bfloat16; beyond the rank there are zeros.
__device__ uint2 hidden_values(const float4 &sum, const float4 &d, float scale, int left) {
  float h[4] = {scale * d.x * sum.x, scale * d.y * sum.y, scale * d.z * sum.z, scale * d.w * sum.w};
  for (int i = 0; i < 4; i++) h[i] = i < left ? h[i] : 0.f;
  __nv_bfloat162 low = __floats2bfloat162_rn(h[0], h[1]), high = __floats2bfloat162_rn(h[2], h[3]);
  return {*reinterpret_cast<uint32_t *>(&low), *reinterpret_cast<uint32_t *>(&high)};
}

// scale * d * (V x), [tile, stride]; zeros for tokens with something else. A warp does some tokens at a time, so that
// their loads are on their way together.
__device__ void stage_hidden(__nv_bfloat16 *hidden, const extend_call &c, const extend_member &m,
                             const token_vectors *vectors, int first_token, int stride) {
  constexpr int together = 4;
  int rank = int(m.u.cols), filled = int(projected_stride(rank)), warp = threadIdx.x / warp_size;
#pragma unroll 1
  for (int r = threadIdx.x % warp_size * 4; r < filled; r += warp_size * 4)
#pragma unroll 1
    for (int first = warp * together; first < tile; first += extend_warps * together) {
      float4 sums[together], d[together];
#pragma unroll
      for (int i = 0; i < together; i++) {
        int token = min(first_token + first + i, c.tokens - 1);
        sums[i] = load_four(m.projected + token * int64_t(filled) + r);
        const float *of = vectors[first + i].d;
        d[i] = of && r < rank ? load_four(of + r) : make_float4(1, 1, 1, 1);
      }
#pragma unroll
      for (int i = 0; i < together; i++) {
        const token_vectors &of = vectors[first + i];
        *reinterpret_cast<uint2 *>(hidden + (first + i) * stride + r) =
            hidden_values(sums[i], d[i], of.scale, of.ours ? rank - r : 0);
      }
    }
}

// y += e * sums, a lane a row: through shared memory, [tile, tile + 1] for the warp.
__device__ void add_outputs(const tile_sums &sums, float *tile_of_warp, const extend_call &c, const extend_member &m,
                            const token_vectors *vectors, int first_token, int first_row) {
  constexpr int together = 8, stride = tile + 1;
  int lane = threadIdx.x % warp_size;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < tile; i++)
    tile_of_warp[(token_of_sum(i) + lane % 4 * 2) * stride + row_of_sum(i) + lane / 4] = sums[i / 16][i / 4 % 4][i % 4];
  __syncwarp();
  int row = first_row + lane;
  if (row >= m.rows) return;
  float *y = c.y + first_token * c.y_stride + m.row + row;
#pragma unroll 1
  for (int first = 0; first < tile; first += together) {
    float old[together], e[together];
#pragma unroll
    for (int i = 0; i < together; i++) {
      const token_vectors &of = vectors[first + i];
      old[i] = of.ours ? y[(first + i) * c.y_stride] : 0.f;
      e[i] = of.e ? of.e[row] : 1.f;
    }
#pragma unroll
    for (int i = 0; i < together; i++)
      if (vectors[first + i].ours)
        y[(first + i) * c.y_stride] = old[i] + e[i] * tile_of_warp[(first + i) * stride + lane];
  }
}

__device__ void extend_rows_of_warp(const extend_call &c, const extend_member &m, const token_vectors *vectors,
                                    const __nv_bfloat16 *hidden, float *tile_of_warp, int first_token, int stride,
                                    int first_row) {
  int lane = threadIdx.x % warp_size, group = lane / 4;
  const __nv_bfloat16 *u[4], *h = hidden + group * stride + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < 4; i++)
    u[i] = m.u.data + min(first_row + 8 * i + group, int(m.u.rows) - 1) * m.u.stride + lane % 4 * 8;
  tile_sums sums = {};
  uint4 rows[4], next[4], tokens[4];
#pragma unroll
  for (int i = 0; i < 4; i++) rows[i] = load16(u[i]);
#pragma unroll 1
  for (int col = 0; col < int(m.u.cols); col += step_cols) {
    int ahead = min(col + step_cols, int(m.u.stride) - step_cols);
#pragma unroll
    for (int i = 0; i < 4; i++) next[i] = load16(u[i] + ahead), tokens[i] = load16(h + 8 * i * stride + col);
    multiply(sums, rows, tokens);
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = next[i];
  }
  add_outputs(sums, tile_of_warp, c, m, vectors, first_token, first_row);
}

__host__ __device__ int blocks_of_member(const extend_member &m, int tiles_a_block) {
  int run = extend_rows * tiles_a_block;
  return (int(m.rows) + run - 1) / run;
}

// A run of rows of one member, and a tile of tokens, whose hidden values are prepared once for the run.
__global__ void __launch_bounds__(extend_warps *warp_size, extend_blocks)
    extend(const __grid_constant__ extend_call c, int tiles_a_block) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ token_vectors vectors[tile];
  __shared__ float tiles[extend_warps][tile * (tile + 1)];
  __nv_bfloat16 *hidden = reinterpret_cast<__nv_bfloat16 *>(shared);
  int block = blockIdx.x, run = extend_rows * tiles_a_block;
  int i = 0, first_token = blockIdx.y * tile;
  for (; block >= blocks_of_member(c.members[i], tiles_a_block); i++)
    block -= blocks_of_member(c.members[i], tiles_a_block);
  const extend_member &m = c.members[i];
  int stride = int(projected_stride(m.u.cols)) + hidden_padding;
  if (threadIdx.x < tile) vectors[threadIdx.x] = vectors_of(c, m, first_token + threadIdx.x);
  __syncthreads();
  wait_for_before();
  stage_hidden(hidden, c, m, vectors, first_token, stride);
  __syncthreads();
  int end = min((block + 1) * run, int(m.rows));
  int warp = threadIdx.x / warp_size;
#pragma unroll 1
  for (int row = block * run + warp * tile; row < end; row += extend_rows)
    extend_rows_of_warp(c, m, vectors, hidden, tiles[warp], first_token, stride, row);
}

// ---- densify ----

constexpr int threads = 256;

__global__ void __launch_bounds__(threads) densify(const factor f, const dense_factor to) {
  wait_for_before();
  int64_t count = to.rows * to.stride, step = int64_t(gridDim.x) * threads;
  for (int64_t i = blockIdx.x * int64_t(threads) + threadIdx.x; i < count; i += step) {
    int64_t row = i / to.stride, col = i % to.stride;
    bool v = f.form == factor_form::v_panels;
    float value = col >= to.cols ? 0.f : panel_element(f, v ? row : col, v ? col : row);
    const_cast<__nv_bfloat16 *>(to.data)[i] = __float2bfloat16(value);
  }
}

}  // namespace

dense_factor describe_dense(const factor &f) {
  bool v = f.form == factor_form::v_panels;
  int64_t rows = v ? f.rows : f.cols, cols = v ? f.cols : f.rows;
  return {nullptr, rows, cols, cpu_align(cols, BLOCK)};
}

void launch_densify(const queue &q, const factor &f, const dense_factor &to) {
  constexpr unsigned most_blocks = 4096;
  launch(q, densify, dim3(std::min(most_blocks, blocks_of(to.rows * to.stride, threads))), threads, 0, f, to);
}

void launch_project(const queue &q, const project_call &call) {
  unsigned splits = q.overlap ? project_splits : 1;  // of the columns
  dim3 grid(blocks_of(call.v.rows, tile), blocks_of(call.tokens, tile), splits);
  launch_in_clusters(q, splits, project, grid, project_threads, 0, call);
}

// So many tiles of rows a block that all blocks run at once.
void launch_extend(const queue &q, const extend_call &call, int multiprocessors) {
  
  unsigned token_tiles = blocks_of(call.tokens, tile);
  int64_t tiles = 0, rank = 0, blocks = 0;
  for (int i = 0; i < call.n_members; i++) {
    tiles += blocks_of_member(call.members[i], 1);
    rank = std::max(rank, call.members[i].u.cols);
  }
  int64_t wanted = std::max<int64_t>(1, int64_t(extend_blocks) * multiprocessors / token_tiles);
  int tiles_a_block = int((tiles + wanted - 1) / wanted);
  for (int i = 0; i < call.n_members; i++) blocks += blocks_of_member(call.members[i], tiles_a_block);
  size_t shared_bytes = size_t(tile) * size_t(projected_stride(rank) + hidden_padding) * sizeof(__nv_bfloat16);
  launch(q, extend, dim3(unsigned(blocks), token_tiles), extend_warps * warp_size, shared_bytes, call, tiles_a_block);
}

}  // namespace adaptrt
