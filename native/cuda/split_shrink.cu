#include "split_shrink.cuh"

#include <algorithm>

#include "shrink.cuh"

namespace adaptrt {
namespace {

constexpr int warps = 4, threads = warps * warp_size;  // as many as find registers beside a product's
constexpr int most_splits = 16, values_of_slot = shrink_tokens * panel_ranks;
static_assert(threads == values_of_slot, "a thread has a value");

// Whether this block is the last of `n` that get here; all that the others have written before can be read then.
__device__ bool is_last(uint32_t *arrived, uint32_t n) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1) == n - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

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
__device__ void shrink_part(const split_shrink &s) {
  const adapter_call &c = s.lone.call;
  int member = blockIdx.z / s.lone.rank_pieces, piece = blockIdx.z % s.lone.rank_pieces, slot = blockIdx.y;
  const struct member &m = c.members[member];
  const beside_term t = s.terms[m.target * s.n_slots + slot];
  if (piece >= t.pieces || !t.n_tokens) {
    if (!s.after_product) wait_for_before();
    return;
  }
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
  int unit = slot * gridDim.z + blockIdx.z;
  float *parts = s.parts + size_t(unit) * gridDim.x * values_of_slot + threadIdx.x;
  if (gridDim.x > 1) {
    parts[blockIdx.x * values_of_slot] = sum;
    if (!is_last(s.arrived + unit, gridDim.x)) return;
    sum = 0;
#pragma unroll 4
    for (int i = 0; i < int(gridDim.x); i++) sum += __ldcg(parts + i * values_of_slot);
  }
  int rank = piece * panel_ranks + threadIdx.x % panel_ranks, token = threadIdx.x / panel_ranks;
  if (token >= t.n_tokens || rank >= t.width) return;
  int64_t row = read_record(s.lone.records + m.target * c.n_tiles + t.token).row + token;
  c.hidden[row * c.hidden_width + m.hidden + rank] = sum * (t.d ? t.scale * t.d[rank] : t.scale);
}

// After the product all its input is there: the product lets this start when it has waited for it. What comes next waits for
// this alone, so that one block has to wait for the product.
template <weight_kind kind>
__global__ void __maxnreg__(96) shrink_split(const __grid_constant__ split_shrink s) {
#if __CUDA_ARCH__ >= 900
  if (s.after_product) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  shrink_part<kind>(s);
  if (s.after_product && blockIdx.x + blockIdx.y + blockIdx.z == 0) wait_for_before();
}

}  // namespace

bool launch_split_shrink(const queue &q, const lone_call &lone, const beside_term *terms, int n_slots, void *memory,
                         bool after_product, int multiprocessors) {
  constexpr int least_blocks_of_warp = 1;
  int panels = lone.call.n_members * lone.rank_pieces, units = n_slots * panels;
  int blocks = int((lone.call.cols + BLOCK - 1) / BLOCK), most = multiprocessors * (after_product ? 1 : 2);
  int splits = std::min({most_splits, (blocks + warps * least_blocks_of_warp - 1) / (warps * least_blocks_of_warp), most / units});
  splits = std::max(1, splits);
  size_t counters = (size_t(units) * sizeof(uint32_t) + 255) / 256 * 256;
  if (splits > 1 && counters + size_t(units) * splits * values_of_slot * sizeof(float) > split_shrink_bytes) splits = 1;
  if (counters > split_shrink_bytes || n_slots > 65535 || panels > 65535) return false;
  uint8_t *at = static_cast<uint8_t *>(memory);
  split_shrink s = {lone, terms, n_slots, reinterpret_cast<uint32_t *>(at), reinterpret_cast<float *>(at + counters),
                    after_product};
  dim3 grid = {unsigned(splits), unsigned(n_slots), unsigned(panels)};
  switch (lone.kind) {
    case weight_kind::nf4: launch(q, shrink_split<weight_kind::nf4>, grid, threads, 0, s); break;
    case weight_kind::int8: launch(q, shrink_split<weight_kind::int8>, grid, threads, 0, s); break;
    default: launch(q, shrink_split<weight_kind::bf16>, grid, threads, 0, s);
  }
  return true;
}

}  // namespace adaptrt
