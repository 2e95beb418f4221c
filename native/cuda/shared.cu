#include "shared.cuh"

#include "panels.cuh"

#include <algorithm>

namespace adaptrt {
namespace {

// Both kernels have tiles of 32 rows (of a factor) by 32 tokens a warp, and read their operands as they lie in memory:
// a lane takes 16 bytes, 8 columns, of a row, which are the operands of two products of 16 columns. Which columns
// these are does not matter as long as both sides have the same.
constexpr int tile = 32, step_cols = 32;
constexpr int project_warps = 8, extend_warps = 4, extend_rows = extend_warps * tile;
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

// A tile of V's rows and tokens; the warps of the blocks of a tile share its columns.
__global__ void __launch_bounds__(project_warps *warp_size) project(const project_call c) {
  __shared__ float parts[project_warps][tile * tile];
  int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, group = lane / 4;
  const __nv_bfloat16 *v[4], *x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int64_t row = min(blockIdx.x * int64_t(tile) + 8 * i + group, c.v.rows - 1);
    int64_t token = min(blockIdx.y * tile + 8 * i + group, c.tokens - 1);
    v[i] = c.v.data + row * c.v.stride + lane % 4 * 8;
    x[i] = c.x + token * c.x_stride + lane % 4 * 8;
  }
  int64_t steps = (c.cols + step_cols - 1) / step_cols, pieces = project_warps * project_splits;
  int64_t piece = blockIdx.z * project_warps + warp;
  int64_t begin = steps * piece / pieces * step_cols, end = steps * (piece + 1) / pieces * step_cols;
  wait_for_before();
  tile_sums sums = {};
#pragma unroll 4
  for (int64_t col = begin; col < end; col += step_cols) {
    uint4 rows[4], tokens[4];
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = load16(v[i] + col), tokens[i] = load16(x[i] + col);
    multiply(sums, rows, tokens);
  }
#pragma unroll
  for (int i = 0; i < tile; i++) parts[warp][i * warp_size + lane] = sums[i / 16][i / 4 % 4][i % 4];
  __syncthreads();
  int64_t stride = projected_stride(c.v.rows);
  for (int i = threadIdx.x; i < tile * tile; i += project_warps * warp_size) {
    int m = i / 512, n = i / 128 % 4, k = i / 32 % 4;
    int64_t row = blockIdx.x * int64_t(tile) + 16 * m + k / 2 * 8 + group;
    int token = blockIdx.y * tile + 8 * n + lane % 4 * 2 + k % 2;
    float sum = 0;
    for (int w = 0; w < project_warps; w++) sum += parts[w][i];
    if (token < c.tokens) c.out[(blockIdx.z * int64_t(c.tokens) + token) * stride + row] = sum;
  }
}

// ---- extend ----

// What a block knows of a token of its tile.
struct token_vectors {
  bool ours;
  float scale;
  const float *d, *e;  // or NULL
};

__device__ token_vectors vectors_of(const extend_call &c, const extend_member &m, int token) {
  if (c.records && token < c.tokens) {
    const term_record t = read_record(c.records + m.target * c.tokens + token);
    if (t.width && t.v == m.term.v && t.u == m.term.u) return {true, t.scale, t.d, t.e};
    return {};
  }
  int head = token < c.tokens ? c.heads[token] : -1;
  if (head < 0) return {};
  const attachment &what = c.applications[head].attachments[m.target];
  const term &t = what.first;
  if (!what.acts || !what.n_terms || !m.term.is(t)) return {};
  return {true, t.scale, t.d, t.e};
}

__device__ float4 load_four(const float *at) { return *reinterpret_cast<const float4 *>(at); }

// Values r to r + 3 of scale * d * (V x), as bfloat16; beyond the rank there are zeros.
__device__ uint2 hidden_values(const float4 (&parts)[project_splits], const float4 &d, float scale, int left) {
  float4 sum = {0, 0, 0, 0};
  for (const float4 &part : parts) sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
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
  for (int r = threadIdx.x % warp_size * 4; r < filled; r += warp_size * 4)
    for (int first = warp * together; first < tile; first += extend_warps * together) {
      float4 parts[together][project_splits], d[together];
#pragma unroll
      for (int i = 0; i < together; i++) {
        int token = min(first_token + first + i, c.tokens - 1);
#pragma unroll
        for (int k = 0; k < project_splits; k++)
          parts[i][k] = load_four(m.projected + (int64_t(k) * c.tokens + token) * filled + r);
        const float *of = vectors[first + i].d;
        d[i] = of && r < rank ? load_four(of + r) : make_float4(1, 1, 1, 1);
      }
#pragma unroll
      for (int i = 0; i < together; i++) {
        const token_vectors &of = vectors[first + i];
        *reinterpret_cast<uint2 *>(hidden + (first + i) * stride + r) =
            hidden_values(parts[i], d[i], of.scale, of.ours ? rank - r : 0);
      }
    }
}

// Four neighbouring rows of y for each of a lane's tokens.
struct lane_outputs {
  static constexpr int tokens = 8;
  float4 y[tokens], e[tokens];
};

__device__ int token_of_lane(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

__device__ void load_outputs(lane_outputs &out, const extend_call &c, const extend_member &m,
                             const token_vectors *vectors, int first_token, int64_t row) {
#pragma unroll
  for (int i = 0; i < lane_outputs::tokens; i++) {
    const token_vectors &of = vectors[token_of_lane(i)];
    out.e[i] = of.e ? load_four(of.e + row) : make_float4(1, 1, 1, 1);
    if (of.ours) out.y[i] = load_four(c.y + (first_token + token_of_lane(i)) * c.y_stride + m.row + row);
  }
}

__device__ void add_four(float *y, const float *e, const float sum[4], int64_t left) {
  for (int i = 0; i < 4 && i < left; i++) y[i] += (e ? e[i] : 1.f) * sum[i];
}

// y += e * sums, for a lane's four rows from `row` on.
__device__ void add_outputs(const tile_sums &sums, const extend_call &c, const extend_member &m,
                            const token_vectors *vectors, int first_token, int64_t row) {
  bool vector = row + 4 <= m.rows && (c.y_stride | m.row) % 4 == 0;
  lane_outputs old;
  if (vector) load_outputs(old, c, m, vectors, first_token, row);
#pragma unroll
  for (int i = 0; i < lane_outputs::tokens; i++) {
    int n = i / 2, k = i % 2;
    const token_vectors &of = vectors[token_of_lane(i)];
    const float sum[4] = {sums[0][n][k], sums[0][n][2 + k], sums[1][n][k], sums[1][n][2 + k]};
    float *y = c.y + (first_token + token_of_lane(i)) * c.y_stride + m.row + row;
    if (!of.ours) continue;
    if (vector)
      *reinterpret_cast<float4 *>(y) =
          make_float4(old.y[i].x + old.e[i].x * sum[0], old.y[i].y + old.e[i].y * sum[1],
                      old.y[i].z + old.e[i].z * sum[2], old.y[i].w + old.e[i].w * sum[3]);
    else
      add_four(y, of.e ? of.e + row : nullptr, sum, m.rows - row);
  }
}

// Into L2, ahead of its use.
__device__ void bring(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ void extend_rows_of_warp(const extend_call &c, const extend_member &m, const token_vectors *vectors,
                                    const __nv_bfloat16 *hidden, int first_token, int stride, int64_t first_row) {
  int lane = threadIdx.x % warp_size, group = lane / 4;
  const __nv_bfloat16 *u[4], *h = hidden + group * stride + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < 4; i++)  // a lane's four rows are neighbours
    u[i] = m.u.data + min(first_row + 4 * group + i, m.u.rows - 1) * m.u.stride + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < lane_outputs::tokens; i++)
    if (const float *e = vectors[token_of_lane(i)].e) bring(e + min(first_row + 4 * group, m.rows - 1));
  tile_sums sums = {};
#pragma unroll 4
  for (int64_t col = 0; col < m.u.cols; col += step_cols) {
    uint4 rows[4], tokens[4];
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = load16(u[i] + col), tokens[i] = load16(h + 8 * i * stride + col);
    multiply(sums, rows, tokens);
  }
  add_outputs(sums, c, m, vectors, first_token, first_row + 4 * group);
}

__host__ __device__ int64_t blocks_of_member(const extend_member &m, int tiles_a_block) {
  int64_t run = extend_rows * int64_t(tiles_a_block);
  return (m.rows + run - 1) / run;
}

// A run of rows of one member, and a tile of tokens, whose hidden values are prepared once for the run.
__global__ void __launch_bounds__(extend_warps *warp_size, extend_blocks)
    extend(const __grid_constant__ extend_call c, int tiles_a_block) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ token_vectors vectors[tile];
  __nv_bfloat16 *hidden = reinterpret_cast<__nv_bfloat16 *>(shared);
  int64_t block = blockIdx.x, run = extend_rows * int64_t(tiles_a_block);
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
  int64_t end = min((block + 1) * run, m.rows);
  for (int64_t row = block * run + threadIdx.x / warp_size * tile; row < end; row += extend_rows)
    extend_rows_of_warp(c, m, vectors, hidden, first_token, stride, row);
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
  dim3 grid(blocks_of(call.v.rows, tile), blocks_of(call.tokens, tile), project_splits);
  launch(q, project, grid, project_warps * warp_size, 0, call);
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
