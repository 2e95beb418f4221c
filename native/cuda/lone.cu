#include "lone.cuh"

#include <algorithm>

#include "expand.cuh"
#include "quant_tables.h"

namespace adaptrt {
namespace {

__device__ int lane_index() { return threadIdx.x % warp_size; }

__device__ term_record record_of(const lone_call &lone, const member &m, int token) {
  return read_record(lone.records + m.target * lone.call.n_tiles + token);
}

// Warps of a block of threads that has a multiprocessor for itself.
template <weight_kind kind>
constexpr int most_warps = kind == weight_kind::bf16 ? 24 : kind == weight_kind::int8 ? 28 : 32;
constexpr int least_warps = 4;

// ---- V x: 16 ranks of a token, by a block of threads ----

// What a warp needs for 64 inputs.
template <weight_kind kind>
struct shrink_piece {
  piece_codes<kind> codes;
  float scales[2];
  uint4 x[2];

  __device__ void load_factor(const term_record &t, int piece) {
    codes.load(t.v, piece);
#pragma unroll
    for (int h = 0; h < 2; h++)
      scales[h] = kind == weight_kind::bf16 ? 1.f : __ldg(t.v_scales + piece * panel_ranks + lane_index() / 4 + 8 * h);
  }
  __device__ void load_input(const __nv_bfloat16 *token, int block) {
    const uint4 *from = reinterpret_cast<const uint4 *>(token + block * BLOCK) + lane_index() % 4 * 2;
    x[0] = from[0], x[1] = from[1];
  }
  __device__ void multiply(float sums[2]) const {
    float c[4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t a[4];
      codes.step(s, a);
      multiply_add(c, a, word_of(x[s / 2], s % 2 * 2), word_of(x[s / 2], s % 2 * 2 + 1));
    }
    sums[0] += scales[0] * c[0], sums[1] += scales[1] * c[2];
  }
};

template <weight_kind kind>
__global__ void __launch_bounds__(most_warps<kind> *warp_size) shrink_lone(const __grid_constant__ lone_call lone) {
  __shared__ float parts[most_warps<kind>][panel_ranks];
  const adapter_call &c = lone.call;
  const member &m = c.members[blockIdx.y / lone.rank_pieces];
  const term_record t = record_of(lone, m, blockIdx.x);
  int rank_piece = blockIdx.y % lone.rank_pieces, first_rank = rank_piece * panel_ranks;
  if (first_rank >= t.width) {
    wait_for_before();
    return;
  }
  int warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size, blocks = int((c.cols + BLOCK - 1) / BLOCK);
  int first_piece = rank_piece * blocks;
  const __nv_bfloat16 *x = c.x + blockIdx.x * c.x_stride;
  shrink_piece<kind> now, next;
  float sums[2] = {};
  now.load_factor(t, first_piece + min(warp, blocks - 1));
  next.load_factor(t, first_piece + min(warp + warps, blocks - 1));
  wait_for_before();
  now.load_input(x, min(warp, blocks - 1));
  next.load_input(x, min(warp + warps, blocks - 1));
#pragma unroll 1
  for (int block = warp; block < blocks; block += warps) {
    now.multiply(sums);
    now = next;
    int ahead = min(block + 2 * warps, blocks - 1);
    next.load_factor(t, first_piece + ahead);
    next.load_input(x, ahead);
  }
  if (lane_index() % 4 == 0)  // all columns are the same token
    parts[warp][lane_index() / 4] = sums[0], parts[warp][lane_index() / 4 + 8] = sums[1];
  __syncthreads();
  int r = threadIdx.x;
  if (r >= panel_ranks || first_rank + r >= t.width) return;
  float sum = 0;
#pragma unroll 1
  for (int w = 0; w < warps; w++) sum += parts[w][r];
  c.hidden[t.row * c.hidden_width + m.hidden + first_rank + r] = sum * (t.d ? t.scale * t.d[first_rank + r] : t.scale);
}

// ---- U h: runs of 64 outputs of a token, by a warp ----

// What a warp needs for 64 outputs by 16 ranks.
template <weight_kind kind>
struct expand_piece {
  piece_codes<kind> codes;
  float2 scales[2], y;

  __device__ void load_factor(const term_record &t, int piece) {
    codes.load(t.u, piece);
    lane_ranks::load_scales<kind>(t.u_scales + piece * panel_ranks, scales);
  }
  __device__ void multiply(const lane_ranks &hidden, const decoder<kind> &decode, float c[4]) const {
    uint32_t b[2];
    hidden.column<kind>(scales, b);
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t a[4];
      decode.step(codes.vector, s, a);
      bool mine = lane_index() / 8 == s;
      multiply_add(c, a, mine ? b[0] : 0, mine ? b[1] : 0);
    }
  }
};

__device__ float2 vector_at(const float *vector, int row) {
  return vector ? *reinterpret_cast<const float2 *>(vector + row) : make_float2(1, 1);
}

// A place in a run: the row where its 64 outputs start, and a piece of ranks.
struct run_place {
  int row, rank_piece;
  __device__ void next(int rank_pieces) {
    if (++rank_piece < rank_pieces) return;
    rank_piece = 0, row += BLOCK;
  }
};

// y = g_out * (y + e * U hidden) for the outputs of blocks [first, end) of a member and a token.
template <weight_kind kind>
__device__ void expand_run(const lone_call &lone, const member &m, int token, int first, int end,
                           const decoder<kind> &decode) {
  const adapter_call &c = lone.call;
  const term_record t = record_of(lone, m, token);
  if (!t.width && !t.g_out) return;
  int ranks = max(1, (t.width + panel_ranks - 1) / panel_ranks);
  int lane_row = lane_outputs<true>::row(0), rows = int(m.rows) - lane_row;
  int piece = first * ranks, last = end * ranks - 1;
  float *y = c.y + token * c.y_stride + m.row + lane_row;
  hidden_values hidden = {c.hidden + t.row * c.hidden_width + m.hidden, t.width, 1};
  expand_piece<kind> now, next;
  if (t.width) now.load_factor(t, piece), next.load_factor(t, min(piece + 1, last));
  wait_for_before();
  lane_ranks values;
  values.load(hidden, 0, 0);
  auto load_outputs = [&](expand_piece<kind> &p, int row) {
    if (row < rows) p.y = *reinterpret_cast<const float2 *>(y + row);
  };
  run_place at = {first * BLOCK, 0}, ahead = at;
  load_outputs(now, ahead.row), ahead.next(ranks);
  load_outputs(next, ahead.row), ahead.next(ranks);
  float sums[4] = {};
#pragma unroll 1
  for (; piece <= last; piece++) {
    if (t.width) now.multiply(values, decode, sums);
    float2 old = now.y;
    int row = at.row;
    now = next;
    if (t.width) next.load_factor(t, min(piece + 2, last));
    load_outputs(next, ahead.row), ahead.next(ranks), at.next(ranks);
    if (ranks > 1) values.load(hidden, 0, at.rank_piece * panel_ranks);
    if (at.rank_piece || row >= rows) continue;
    float2 e = vector_at(t.e, lane_row + row), gain = vector_at(t.g_out, lane_row + row);
    *reinterpret_cast<float2 *>(y + row) =
        make_float2(gain.x * (old.x + e.x * (sums[0] + sums[1])), gain.y * (old.y + e.y * (sums[2] + sums[3])));
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = 0;
  }
}

// The division of work: runs of so many blocks of outputs, for each token.
struct run_division {
  int run, runs, of_member[most_members];
};

// A warp's neighbours are in other blocks of threads, so that few have many multiprocessors.
template <weight_kind kind>
__global__ void __launch_bounds__(most_warps<kind> *warp_size, 1)
    expand_lone(const __grid_constant__ lone_call lone, const __grid_constant__ run_division work,
                const __grid_constant__ nf4_values codebook) {
  extern __shared__ __align__(1024) uint8_t table[];
  const adapter_call &c = lone.call;
  if constexpr (kind == weight_kind::nf4) {
    fill_pair_table(table, codebook, blockDim.x);
    __syncthreads();
  }
  decoder<kind> decode = {shared_address(table) - shared_start + lane_index() * 4};
  unsigned all = work.runs * c.n_tiles;
#pragma unroll 1
  for (unsigned n = blockIdx.x + threadIdx.x / warp_size * gridDim.x; n < all; n += most_warps<kind> * gridDim.x) {
    int token = int(n / work.runs), at = int(n - token * work.runs), i = 0;
    for (; at >= work.of_member[i]; i++) at -= work.of_member[i];
    const member &m = c.members[i];
    int first = at * work.run, end = min(first + work.run, (int(m.rows) + BLOCK - 1) / BLOCK);
    expand_run<kind>(lone, m, token, first, end, decode);
  }
  wait_for_before();
}

run_division divide(const adapter_call &call, int run) {
  run_division work = {run};
  for (int i = 0; i < call.n_members; i++)
    work.runs += work.of_member[i] = int((call.members[i].rows + BLOCK * run - 1) / (BLOCK * run));
  return work;
}

template <weight_kind kind>
void launch_shrink_kind(const queue &q, const lone_call &lone, int multiprocessors) {
  dim3 grid(unsigned(lone.call.n_tiles), unsigned(lone.call.n_members * lone.rank_pieces));
  int64_t blocks = int64_t(grid.x) * grid.y, together = (blocks + multiprocessors - 1) / multiprocessors;
  int warps = std::max<int>(least_warps, most_warps<kind> / int(std::min<int64_t>(together, most_warps<kind>)));
  launch(q, shrink_lone<kind>, grid, unsigned(warps * warp_size), 0, lone);
}

template <weight_kind kind>
void launch_expand_kind(const queue &q, const lone_call &lone, int multiprocessors) {
  constexpr int warps = most_warps<kind>, most_blocks_of_warp = 16;
  int64_t blocks = int64_t(divide(lone.call, 1).runs) * lone.call.n_tiles, together = int64_t(warps) * multiprocessors;
  run_division work = divide(lone.call, int(std::min<int64_t>(most_blocks_of_warp, (blocks + together - 1) / together)));
  nf4_values codebook;
  for (int i = 0; i < 16; i++) codebook.value[i] = __float2bfloat16(NF4_CODEBOOK[i]);
  int shared_bytes = kind == weight_kind::nf4 ? pair_table_bytes : 0;
  check(cudaFuncSetAttribute(expand_lone<kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "adapters");
  dim3 grid(unsigned(std::min<int64_t>(multiprocessors, int64_t(work.runs) * lone.call.n_tiles)));
  launch(q, expand_lone<kind>, grid, warps * warp_size, size_t(shared_bytes), lone, work, codebook);
}

template <typename callable>
void with_launcher(weight_kind kind, const callable &call) {
  switch (kind) {
    case weight_kind::nf4: return call(std::integral_constant<weight_kind, weight_kind::nf4>());
    case weight_kind::int8: return call(std::integral_constant<weight_kind, weight_kind::int8>());
    default: return call(std::integral_constant<weight_kind, weight_kind::bf16>());
  }
}

}  // namespace

bool in_fours(const adapter_call &call) {
  int64_t all = call.y_stride;
  for (int i = 0; i < call.n_members; i++) all |= call.members[i].row | call.members[i].rows;
  return all % 4 == 0 && reinterpret_cast<uintptr_t>(call.y) % 16 == 0;
}

void launch_shrink_lone(const queue &q, const lone_call &lone, int multiprocessors) {
  with_launcher(lone.kind, [&](auto kind) { launch_shrink_kind<decltype(kind)::value>(q, lone, multiprocessors); });
}

void launch_expand_lone(const queue &q, const lone_call &lone, int multiprocessors) {
  with_launcher(lone.kind, [&](auto kind) { launch_expand_kind<decltype(kind)::value>(q, lone, multiprocessors); });
}

}  // namespace adaptrt
