// y = g_out * (y + e * U hidden ...) + bias + c, in stacking order, for all adapters of a batch in one launch.
#include <algorithm>

#include "expand.cuh"

namespace adaptrt {
namespace {

constexpr int warps = 4, threads = warps * warp_size;
constexpr int most_blocks_of_warp = 16;
constexpr int warps_together = 28;  // of a multiprocessor

template <bool single>
__device__ void expand_block(const adapter_call &c, const member &m, const token_tile &tile, int64_t block) {
  lane_outputs<single> out;
  bool there = out.token() < tile.n_tokens;
  float *y = c.y + (tile.token + out.token()) * c.y_stride + m.row;
  load_vector_of<single>(m.bias, block, m.rows, 0.f, out.constant);
#pragma unroll
  for (int i = 0; i < 2 * out.steps; i++) {
    int64_t row = block * BLOCK + out.row(i / 2) + i % 2;
    out.y[i / 2][i % 2] = there && row < m.rows ? y[row] : 0.f;
  }
  apply_stack(c, m, tile, block, out);
#pragma unroll
  for (int i = 0; i < 2 * out.steps; i++) {
    int64_t row = block * BLOCK + out.row(i / 2) + i % 2;
    if (there && row < m.rows) y[row] = out.y[i / 2][i % 2] + out.constant[i / 2][i % 2];
  }
}

__host__ __device__ inline int64_t runs_of(const member &m, int run) {
  return (m.rows + BLOCK * run - 1) / (BLOCK * run);
}

// One warp a run of blocks of outputs and tile of tokens; the members' outputs lie one after the other.
template <bool single>
__global__ void __launch_bounds__(threads) expand(const __grid_constant__ adapter_call c, int run) {
  const token_tile &tile = c.tiles[blockIdx.y];
  int64_t at = blockIdx.x * int64_t(warps) + threadIdx.x / warp_size;
  int i = 0;
  for (; i < c.n_members && at >= runs_of(c.members[i], run); i++) at -= runs_of(c.members[i], run);
  if (i == c.n_members) {
    wait_for_before();
    return;
  }
  const member &m = c.members[i];
  int64_t blocks = min(int64_t(run), (m.rows + BLOCK - 1) / BLOCK - at * run);
  if constexpr (single) {
    lone_term t(c, m, tile);
    wait_for_before();
    if (t.there) {
      float *y = c.y + tile.token * c.y_stride + m.row;
      with_kind(t.u.dtype, [&](auto kind) {
        expand_run<decltype(kind)::value>(t, y, m.rows, at * run, at * run + blocks);
      });
      return;
    }
  }
  wait_for_before();
  for (int64_t block = at * run; block < at * run + blocks; block++) expand_block<single>(c, m, tile, block);
}

}  // namespace

void launch_expand(const queue &q, const adapter_call &call, bool single, int multiprocessors) {
  constexpr int most_in_y = 65535;
  int64_t blocks = 0, runs = 0, together = int64_t(warps_together) * multiprocessors;
  for (int i = 0; i < call.n_members; i++) blocks += runs_of(call.members[i], 1);
  int run = int(std::min<int64_t>(most_blocks_of_warp, (blocks * call.n_tiles + together - 1) / together));
  for (int i = 0; i < call.n_members; i++) runs += runs_of(call.members[i], run);
  adapter_call part = call;
  for (int done = 0; done < call.n_tiles; done += most_in_y) {
    part.tiles = call.tiles + done;
    dim3 grid(blocks_of(runs, warps), unsigned(std::min(most_in_y, call.n_tiles - done)));
    launch(q, single ? expand<true> : expand<false>, grid, threads, 0, part, run);
  }
}

}  // namespace adaptrt
