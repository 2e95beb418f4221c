#include "split_shrink.cuh"

#include <algorithm>

#include "shrink.cuh"

namespace adaptrt {
namespace {

constexpr int warps = 4, threads = warps * warp_size;  // as many as find registers beside a product's
static_assert(threads == shrink_tokens * panel_ranks, "a thread has a value");

struct split_call {
  lone_call lone;
  const beside_term *terms;  // [targets, slots]
  int n_slots;
  bool after_product;
};

// The block's sum for the thread's token and rank.
__device__ float join_warps(const float sums[4]) {
  __shared__ float parts[warps][shrink_tokens][panel_ranks];
  int lane = threadIdx.x % warp_size;
#pragma unroll
  for (int k = 0; k < 4; k++) parts[threadIdx.x / warp_size][lane % 4 * 2 + k % 2][lane / 4 + k / 2 * 8] = sums[k];
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < warps; w++) sum += (&parts[w][0][0])[threadIdx.x];
  return sum;
}

// 16 ranks of a slot by a part of the columns.
template <weight_kind kind>
__device__ void shrink_part(const split_call &s) {
  const adapter_call &c = s.lone.call;
  const member &m = c.members[blockIdx.z / s.lone.rank_pieces];
  const beside_term t = read_record(s.terms + m.target * s.n_slots + blockIdx.y);
  int piece = blockIdx.z % s.lone.rank_pieces;
  if (piece >= t.pieces || !t.n_tokens) {
    if (!s.after_product) wait_for_before();
    return;
  }
  int rank = piece * panel_ranks + threadIdx.x % panel_ranks, token = threadIdx.x / panel_ranks;
  bool there = token < t.n_tokens && rank < t.width;
  int64_t row = s.lone.records[m.target * c.n_tiles + t.token].row + token;
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
  if (there) c.hidden[blockIdx.x * s.lone.split_stride + row * c.hidden_width + m.hidden + rank] = sum * by;
}

// After the product all its input is there: the product lets this start when it has waited for it. What comes next waits for
// this alone, so that one block has to wait for the product.
template <weight_kind kind>
__global__ void __maxnreg__(96) shrink_split(const __grid_constant__ split_call s) {
#if __CUDA_ARCH__ >= 900
  if (s.after_product) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  shrink_part<kind>(s);
  if (s.after_product && blockIdx.x + blockIdx.y + blockIdx.z == 0) wait_for_before();
}

}  // namespace

int splits_of_shrink(const lone_call &lone, int n_slots, int multiprocessors) {
  int units = n_slots * lone.call.n_members * lone.rank_pieces, blocks = int((lone.call.cols + BLOCK - 1) / BLOCK);
  return std::max(1, std::min({most_splits_of_lone, blocks / warps, multiprocessors / units}));
}

void launch_split_shrink(const queue &q, const lone_call &lone, const beside_term *terms, int n_slots, bool after_product) {
  dim3 grid = {unsigned(lone.splits), unsigned(n_slots), unsigned(lone.call.n_members * lone.rank_pieces)};
  split_call s = {lone, terms, n_slots, after_product};
  switch (lone.kind) {
    case weight_kind::nf4: launch(q, shrink_split<weight_kind::nf4>, grid, threads, 0, s); break;
    case weight_kind::int8: launch(q, shrink_split<weight_kind::int8>, grid, threads, 0, s); break;
    default: launch(q, shrink_split<weight_kind::bf16>, grid, threads, 0, s);
  }
}

}  // namespace adaptrt
