#include "split.cuh"

#include <algorithm>

#include "expand.cuh"
#include "shrink.cuh"

namespace adaptrt {
namespace {

__device__ float *hidden_of(const split_call &s, const member &m, int64_t row, int split) {
  return s.call.hidden + (split * s.tokens + row) * s.call.hidden_width + m.hidden;
}

// ---- V x ----

constexpr int warps = 4, threads = warps * warp_size;  // as many as find registers beside a product's
static_assert(threads == shrink_tokens * panel_ranks, "a thread has a value");

// The block's sum for the thread's token and rank.
__device__ float join_warps(const float sums[4]) {
  __shared__ float parts[warps][threads];
  int lane = threadIdx.x % warp_size;
#pragma unroll
  for (int k = 0; k < 4; k++)
    parts[threadIdx.x / warp_size][(lane % 4 * 2 + k % 2) * panel_ranks + lane / 4 + k / 2 * 8] = sums[k];
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < warps; w++) sum += parts[w][threadIdx.x];
  return sum;
}

// 16 ranks of a slot by a part of the columns.
template <weight_kind kind>
__device__ void shrink_part(const split_call &s) {
  const adapter_call &c = s.call;
  const member &m = c.members[blockIdx.z / s.rank_pieces];
  const beside_term t = read_record(s.terms + m.target * s.n_slots + blockIdx.y);
  int piece = blockIdx.z % s.rank_pieces;
  if (piece >= t.pieces || !t.n_tokens) {
    if (!s.after_product) wait_for_before();
    return;
  }
  int rank = piece * panel_ranks + threadIdx.x % panel_ranks, token = threadIdx.x / panel_ranks;
  bool there = token < t.n_tokens && rank < t.width;
  int64_t row = s.records[m.target * s.tokens + t.token].row + token;
  float by = there && t.d ? t.scale * t.d[rank] : t.scale;
  factor v = {};
  v.form = factor_form::v_panels, v.stride = int64_t(t.v_blocks) * BLOCK, v.data = t.v, v.scales = t.v_scales;
  input in = {c.x + t.token * c.x_stride, c.x_stride, c.cols, t.n_tokens};
  int first = blockIdx.x * warps + threadIdx.x / warp_size, step = gridDim.x * warps;
  float sums[4] = {};
  if (s.after_product)
    multiply_panel<kind, false>(v, piece, in, first, blocks_of_columns(in), step, sums);
  else
    multiply_panel<kind, true>(v, piece, in, first, blocks_of_columns(in), step, sums);
  float sum = join_warps(sums);
  if (there) hidden_of(s, m, row, blockIdx.x)[rank] = sum * by;
}

// What comes next waits for this alone. So after a product, which has let this start when it had its input, one block waits for
// the product.
template <weight_kind kind>
__global__ void __maxnreg__(96) shrink_split(const __grid_constant__ split_call s) {
  if (s.after_product) let_next_kernel_start();
  shrink_part<kind>(s);
  if (s.after_product && blockIdx.x + blockIdx.y + blockIdx.z == 0) wait_for_before();
}

// ---- U h: 64 outputs of a token by a warp ----

constexpr int expand_warps = 16;

// All loads of the parts at once.
__device__ void load_hidden(const split_call &s, const member &m, const term_record &t, int first_rank, lane_ranks &sum) {
  lane_ranks parts[most_shrink_splits];
#pragma unroll
  for (int i = 0; i < most_shrink_splits; i++)
    parts[i].load({hidden_of(s, m, t.row, i), i < s.splits ? t.width : 0, 1}, 0, first_rank);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum.v[i] = parts[0].v[i];
#pragma unroll
    for (int k = 1; k < most_shrink_splits; k++) sum.v[i] += parts[k].v[i];
  }
}

__device__ float2 pair_at(const float *vector, int row) {
  return vector ? __ldg(reinterpret_cast<const float2 *>(vector + row)) : make_float2(1, 1);
}

template <weight_kind kind>
__device__ void expand_block(const split_call &s, const member &m, int token, int block) {
  const term_record t = read_record(s.records + m.target * s.tokens + token);
  if (!t.width && !t.g_out) return;
  int ranks = (t.width + panel_ranks - 1) / panel_ranks, row = block * BLOCK + lane_outputs<true>::row(0);
  bool there = row < m.rows;
  float2 *y = reinterpret_cast<float2 *>(s.call.y + token * s.call.y_stride + m.row + row), old = {};
  piece_codes<kind> codes;
  if (ranks) codes.load(t.u, block * ranks);
  float2 e = there ? pair_at(t.e, row) : old, gain = there ? pair_at(t.g_out, row) : old;
  wait_for_before();
  if (there) old = *y;
  float c[1][4] = {};
#pragma unroll 1
  for (int r = 0; r < ranks; r++) {
    int piece = block * ranks + r;
    lane_ranks values;
    uint32_t b[2];
    if (r) codes.load(t.u, piece);
    load_hidden(s, m, t, r * panel_ranks, values);
    values.template column<kind>(t.u_scales + piece * panel_ranks, b);
    multiply_piece<kind, true>(codes, b, c);
  }
  if (there) *y = {gain.x * (old.x + e.x * (c[0][0] + c[0][1])), gain.y * (old.y + e.y * (c[0][2] + c[0][3]))};
}

__host__ __device__ int blocks_of_outputs(const member &m) { return int((m.rows + BLOCK - 1) / BLOCK); }

// A warp's neighbours are in other blocks of threads, so that few have many multiprocessors.
template <weight_kind kind>
__global__ void __launch_bounds__(expand_warps *warp_size, 1)
    expand_split(const __grid_constant__ split_call s, int blocks_of_token) {
  int all = blocks_of_token * s.tokens;
#pragma unroll 1
  for (int n = blockIdx.x + threadIdx.x / warp_size * gridDim.x; n < all; n += expand_warps * gridDim.x) {
    int token = n / blocks_of_token, block = n - token * blocks_of_token, i = 0;
    for (; block >= blocks_of_outputs(s.call.members[i]); i++) block -= blocks_of_outputs(s.call.members[i]);
    expand_block<kind>(s, s.call.members[i], token, block);
  }
  wait_for_before();
}

template <typename callable>
void with_kind_of(const split_call &s, const callable &call) {
  switch (s.kind) {
    case weight_kind::nf4: return call(std::integral_constant<weight_kind, weight_kind::nf4>());
    case weight_kind::int8: return call(std::integral_constant<weight_kind, weight_kind::int8>());
    default: return call(std::integral_constant<weight_kind, weight_kind::bf16>());
  }
}

}  // namespace

void divide_split(split_call &call, int multiprocessors) {
  int units = call.n_slots * call.call.n_members * call.rank_pieces, blocks = int((call.call.cols + BLOCK - 1) / BLOCK);
  call.splits = std::max(1, std::min({most_shrink_splits, blocks / warps, multiprocessors / units}));
}

void launch_shrink_split(const queue &q, const split_call &call) {
  dim3 grid = {unsigned(call.splits), unsigned(call.n_slots), unsigned(call.call.n_members * call.rank_pieces)};
  with_kind_of(call, [&](auto kind) { launch(q, shrink_split<decltype(kind)::value>, grid, threads, 0, call); });
}

void launch_expand_split(const queue &q, const split_call &call, int multiprocessors) {
  int blocks = 0;
  for (int i = 0; i < call.call.n_members; i++) blocks += blocks_of_outputs(call.call.members[i]);
  dim3 grid = unsigned(std::min(multiprocessors, blocks * call.tokens));
  with_kind_of(call, [&](auto kind) {
    launch(q, expand_split<decltype(kind)::value>, grid, expand_warps * warp_size, 0, call, blocks);
  });
}

}  // namespace adaptrt
