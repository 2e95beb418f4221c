#include "ride.cuh"

#include <algorithm>

#include "expand.cuh"
#include "shrink.cuh"

namespace adaptrt {
namespace {

// So few and small that they find room beside the blocks of a product.
constexpr int warps = 4, threads = warps * warp_size, blocks_beside = 5;
constexpr int part_floats = shrink_tokens * panel_ranks;

// Brings the attachments to the L2, all at once.
__device__ void prefetch_attachments(const ride_call &ride) {
  int n_members = ride.call.n_members;
  if (int(threadIdx.x) >= ride.n_shrink_tiles * n_members) return;
  const application &a = ride.shrink_tiles[threadIdx.x / n_members].head;
  const uint8_t *at = reinterpret_cast<const uint8_t *>(a.attachments + ride.call.members[threadIdx.x % n_members].target);
  for (size_t i = 0; i < sizeof(attachment); i += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(at + i));
}

// ---- shrink: a piece of hidden, a part of its columns ----

__device__ void shrink_unit(const ride_call &ride, int unit) {
  __shared__ float parts[warps][part_floats];
  const adapter_call &c = ride.call;
  int split = unit % ride.splits, lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const token_tile &tile = ride.shrink_tiles[unit / ride.splits / ride.chunks];
  shrink_place at;
  if (!find_place(c, tile.head, unit / ride.splits % ride.chunks, at)) return;
  input in = {c.x + tile.token * c.x_stride, c.x_stride, c.cols, tile.n_tokens};
  int blocks = blocks_of_columns(in), begin = blocks * split / ride.splits, end = blocks * (split + 1) / ride.splits;
  float sums[4] = {};
  with_kind(at.t->v.dtype, [&](auto kind) {
    multiply_panel<decltype(kind)::value, false>(at.t->v, at.row / panel_ranks, in, begin + warp, end, warps, sums);
  });
#pragma unroll
  for (int k = 0; k < 4; k++) parts[warp][(lane % 4 * 2 + k % 2) * panel_ranks + lane / 4 + k / 2 * 8] = sums[k];
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < warps; w++) sum += parts[w][threadIdx.x];
  static_assert(part_floats == threads, "a value a thread");
  ride.parts[int64_t(unit) * part_floats + threadIdx.x] = sum;
  __syncthreads();
}

// ---- the blocks of threads meet ----

// Every block has done its part before it waits for others, so they need not all run at once.
__device__ void meet(const ride_call &ride) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(ride.blocks_done, 1u);
    uint32_t done = 0;
    while (done < gridDim.x)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(ride.blocks_done) : "memory");
    if (atomicAdd(ride.blocks_left, 1u) == gridDim.x - 1) *ride.blocks_done = 0, *ride.blocks_left = 0;
  }
  __syncthreads();
}

// ---- hidden, as shrink leaves it, in shared memory ----

__device__ void gather_hidden(const ride_call &ride, float *hidden) {
  const adapter_call &c = ride.call;
  int pieces = ride.n_shrink_tiles * ride.chunks;
  for (int i = threadIdx.x; i < pieces * part_floats; i += threads) {
    int piece = i / part_floats, token = i % part_floats / panel_ranks, r = i % panel_ranks;
    const token_tile &tile = ride.shrink_tiles[piece / ride.chunks];
    shrink_place at;
    if (token >= tile.n_tokens || !find_place(c, tile.head, piece % ride.chunks, at)) continue;
    const term &t = *at.t;
    if (at.row + r >= t.width) continue;
    const float *parts = ride.parts + int64_t(piece) * ride.splits * part_floats + i % part_floats;
    float sum = 0;
#pragma unroll 8
    for (int split = 0; split < ride.splits; split++) sum += parts[split * part_floats];
    int64_t to = at.hidden + (tile.token - tile.head.token + token) * t.width + at.row + r;
    hidden[to] = sum * (t.d ? t.scale * t.d[at.row + r] : t.scale);
  }
  __syncthreads();
}

// ---- expand ----

// The product of the gains of a tile's stack.
template <bool single>
__device__ void load_gains(const adapter_call &c, const member &m, const token_tile &tile, int64_t block,
                           float (*gain)[2]) {
  constexpr int steps = lane_outputs<single>::steps;
  load_vector_of<single>(nullptr, block, m.rows, 1.f, gain);
  for (int i = 0; i < tile.n; i++) {
    const attachment &what = application_of(c.applications, tile, i).attachments[m.target];
    const float *g_out = what.acts ? what.g_out : nullptr;
    if (!g_out) continue;
    float more[steps][2];
    load_vector_of<single>(g_out, block, m.rows, 1.f, more);
#pragma unroll
    for (int k = 0; k < 2 * steps; k++) gain[k / 2][k % 2] *= more[k / 2][k % 2];
  }
}

// Adapters make gain * y + change of y.
template <bool single>
__device__ void expand_beside(const adapter_call &c, const float *hidden, const member &m, const token_tile &tile,
                              int64_t block, bool &waits) {
  lane_outputs<single> out = {};
  float gain[out.steps][2];
  bool there = out.token() < tile.n_tokens;
  load_vector_of<single>(m.bias, block, m.rows, 0.f, out.constant);
  load_gains<single>(c, m, tile, block, gain);
  apply_stack(c, hidden, m, tile, block, out);
  if (waits) wait_for_before();
  waits = false;
  float *y = c.y + (tile.token + out.token()) * c.y_stride + m.row, before[out.steps][2];
#pragma unroll
  for (int i = 0; i < 4 * out.steps; i++) {  // first all are on their way
    int k = i % (2 * out.steps);
    int64_t row = block * BLOCK + out.row(k / 2) + k % 2;
    float &old = before[k / 2][k % 2];
    if (!there || row >= m.rows) continue;
    if (i < 2 * out.steps)
      old = y[row];
    else
      y[row] = gain[k / 2][k % 2] * old + out.y[k / 2][k % 2] + out.constant[k / 2][k % 2];
  }
}

__device__ int64_t output_blocks(const member &m) { return (m.rows + BLOCK - 1) / BLOCK; }

// `call(member, tile, block of outputs)` for this warp's share of them.
template <typename callable>
__device__ void for_each_output_block(const ride_call &ride, const callable &call) {
  const adapter_call &c = ride.call;
  int64_t at = blockIdx.x + int64_t(threadIdx.x / warp_size) * gridDim.x;  // neighbours in other blocks of threads
  for (int i = 0; i < c.n_members; i++) {
    int64_t blocks = output_blocks(c.members[i]), all = blocks * c.n_tiles;
    for (; at < all; at += int64_t(warps) * gridDim.x) call(c.members[i], c.tiles[at / blocks], at % blocks);
    at -= all;
  }
}

template <bool single>
__global__ void __launch_bounds__(threads, blocks_beside) ride_beside(const __grid_constant__ ride_call ride) {
  __shared__ float hidden[most_hidden_to_ride];
  prefetch_attachments(ride);
  for (int unit = blockIdx.x; unit < ride.n_shrink_tiles * ride.chunks * ride.splits; unit += gridDim.x)
    shrink_unit(ride, unit);
  for_each_output_block(ride, [&](const member &m, const token_tile &tile, int64_t block) {
    prefetch_first(m, tile, block, 1);
  });
  meet(ride);
  let_next_kernel_start();  // all blocks have a place
  gather_hidden(ride, hidden);
  bool waits = true;
  for_each_output_block(ride, [&](const member &m, const token_tile &tile, int64_t block) {
    expand_beside<single>(ride.call, hidden, m, tile, block, waits);
  });
  if (waits) wait_for_kernel_before();
}

}  // namespace

size_t ride_bytes(int multiprocessors) {
  return size_t(multiprocessors) * part_floats * sizeof(float) + 2 * sizeof(uint32_t);
}

bool plan_ride(ride_call &ride, int64_t hidden_floats, uint8_t *memory, int multiprocessors) {
  constexpr int enough_blocks = 2 * warps, most_splits = 16;  // of columns, for a block of threads
  int pieces = std::max(1, ride.n_shrink_tiles * ride.chunks);
  if (pieces > multiprocessors || hidden_floats > most_hidden_to_ride) return false;
  int useful = std::min(most_splits, int((ride.call.cols + BLOCK * enough_blocks - 1) / (BLOCK * enough_blocks)));
  ride.splits = std::min(useful, multiprocessors / pieces);
  ride.parts = reinterpret_cast<float *>(memory);
  ride.blocks_done = reinterpret_cast<uint32_t *>(ride.parts + multiprocessors * part_floats);
  ride.blocks_left = ride.blocks_done + 1;
  return true;
}

void launch_ride(const queue &q, const ride_call &ride, bool single, int multiprocessors) {
  launch(q, single ? ride_beside<true> : ride_beside<false>, dim3(unsigned(multiprocessors)), threads, 0, ride);
}

}  // namespace adaptrt
