#include "ride.cuh"

#include <algorithm>

#include "expand.cuh"
#include "shrink.cuh"

namespace adaptrt {
namespace {

// So few and small that they find room beside the blocks of a product.
constexpr int warps = 4, threads = warps * warp_size, blocks_beside = 7;
constexpr int most_units_of_block = 8;

// The only term of a tile at a member, or NULL.
__device__ const term *term_at(const adapter_call &c, int tile, int member) {
  if (!c.tiles[tile].n) return nullptr;
  const attachment &what = c.tiles[tile].head.attachments[c.members[member].target];
  return what.acts && what.n_terms ? &what.first : nullptr;
}

// ---- V x: 16 ranks, a part of the columns, by a block of threads ----

template <weight_kind kind>
__device__ void shrink_unit(const ride_call &ride, int unit, uint32_t launch) {
  __shared__ float parts[warps][panel_ranks];
  const adapter_call &c = ride.call;
  int split = unit % ride.splits, piece = unit / ride.splits % ride.rank_pieces;
  int at = unit / ride.splits / ride.rank_pieces, lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const term *t = term_at(c, at / c.n_members, at % c.n_members);
  if (!t || piece * panel_ranks >= t->width) return;
  input in = {c.x + c.tiles[at / c.n_members].token * c.x_stride, 0, c.cols, 1};
  int blocks = blocks_of_columns(in), begin = blocks * split / ride.splits, end = blocks * (split + 1) / ride.splits;
  float sums[4] = {};
  multiply_panel<kind, false>(t->v, piece, in, begin + warp, end, warps, sums);
  if (lane % 4 == 0) parts[warp][lane / 4] = sums[0], parts[warp][lane / 4 + 8] = sums[2];
  __syncthreads();
  if (threadIdx.x < panel_ranks) {
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += parts[w][threadIdx.x];
    // In one store, so that who sees the launch's number sees the sum.
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(ride.parts + unit * panel_ranks + threadIdx.x),
                 "r"(__float_as_uint(sum)), "r"(launch)
                 : "memory");
  }
  __syncthreads();
}

// ---- U h: 64 outputs of a token, by a warp ----

// Two neighbouring sums once they are there. Every block of threads has left its own before it waits for others'.
__device__ float2 await_sums(const uint2 *parts, uint32_t launch) {
  uint4 v;
  do {
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(parts) : "memory");
  } while (v.y != launch || v.w != launch);
  return {__uint_as_float(v.x), __uint_as_float(v.z)};
}

// The lane's ranks of V x: the eight groups of lanes take turns at the splits.
__device__ void gather_ranks(const ride_call &ride, int unit, uint32_t launch, lane_ranks &ranks) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    float2 sum = {0, 0};
    for (int split = threadIdx.x % warp_size / 4; split < ride.splits; split += 8) {
      float2 part = await_sums(ride.parts + (unit + split) * panel_ranks + lane_ranks::rank(i), launch);
      sum.x += part.x, sum.y += part.y;
    }
#pragma unroll
    for (int step = 4; step < warp_size; step *= 2) {
      sum.x += __shfl_xor_sync(all_lanes, sum.x, step);
      sum.y += __shfl_xor_sync(all_lanes, sum.y, step);
    }
    ranks.v[i] = sum.x, ranks.v[i + 1] = sum.y;
  }
}

template <weight_kind kind>
__device__ void expand_unit(const ride_call &ride, int tile, int member, int block, uint32_t launch) {
  using lane = lane_outputs<true>;
  const adapter_call &c = ride.call;
  const struct member &m = c.members[member];
  const term *t = term_at(c, tile, member);
  const float *g_out = nullptr;
  if (c.tiles[tile].n) {
    const attachment &what = c.tiles[tile].head.attachments[m.target];
    if (what.acts) g_out = what.g_out;
  }
  int width = t ? int(t->width) : 0, rows = int(m.rows), row = block * BLOCK + lane::row(0);
  int unit = (tile * c.n_members + member) * ride.rank_pieces * ride.splits;
  float e[1][2], gain[1][2], sums[1][4] = {}, old[2];
  load_vector_of<true>(t ? t->e : nullptr, block, rows, 1.f, e);
  load_vector_of<true>(g_out, block, rows, 1.f, gain);
#pragma unroll 1
  for (int r = 0; r < width; r += panel_ranks, unit += ride.splits) {
    int64_t piece = piece_of(t->u, r / panel_ranks, block);
    piece_codes<kind> codes;
    codes.load(t->u, piece);
    lane_ranks ranks, by;
    by.load({t->d, width, 1}, t->d ? 0 : 1, r);
    gather_ranks(ride, unit, launch, ranks);
    for (int i = 0; i < 4; i++) ranks.v[i] *= t->d ? t->scale * by.v[i] : t->scale;
    uint32_t b[2];
    ranks.column<kind>(t->u.scales + piece * panel_ranks, b);
    multiply_piece<kind, true>(codes, b, sums);
  }
  wait_for_before();
  if (!t && !g_out) return;
  float *y = c.y + c.tiles[tile].token * c.y_stride + m.row;
  for (int i = 0; i < 2; i++) old[i] = row + i < rows ? y[row + i] : 0.f;
  for (int i = 0; i < 2; i++)
    if (row + i < rows) y[row + i] = gain[0][i] * (old[i] + e[0][i] * (sums[0][2 * i] + sums[0][2 * i + 1]));
}

// Ends a launch: the last block of threads gives the next one another number.
__device__ void count_block(const ride_call &ride) {
  __syncthreads();
  if (threadIdx.x || atomicAdd(ride.blocks_left, 1u) != gridDim.x - 1) return;
  *ride.blocks_left = 0;
  *ride.launches += 1;
}

template <weight_kind kind>
__global__ void __launch_bounds__(threads, blocks_beside) ride_beside(const __grid_constant__ ride_call ride) {
  const adapter_call &c = ride.call;
  uint32_t launch = *ride.launches + 1;
  int units = c.n_tiles * c.n_members * ride.rank_pieces * ride.splits;
#pragma unroll 1
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) shrink_unit<kind>(ride, unit, launch);
  int n = blockIdx.x + threadIdx.x / warp_size * gridDim.x;  // a warp's neighbours are in other blocks of threads
#pragma unroll 1
  for (int member = 0; member < c.n_members; member++) {
    int blocks = int((c.members[member].rows + BLOCK - 1) / BLOCK), all = blocks * c.n_tiles;
#pragma unroll 1
    for (; n < all; n += warps * gridDim.x) expand_unit<kind>(ride, n / blocks, member, n % blocks, launch);
    n -= all;
  }
  wait_for_before();
  count_block(ride);
}

}  // namespace

size_t ride_bytes(int multiprocessors) {
  return size_t(multiprocessors) * most_units_of_block * panel_ranks * sizeof(uint2) + 2 * sizeof(uint32_t);
}

bool plan_ride(ride_call &ride, uint8_t *memory, int multiprocessors) {
  constexpr int enough_blocks = 2 * warps, most_splits = 16;  // of columns, for a block of threads
  int pieces = ride.call.n_tiles * ride.call.n_members * ride.rank_pieces;
  if (pieces > most_units_of_block * multiprocessors) return false;
  int useful = std::min(most_splits, int((ride.call.cols + BLOCK * enough_blocks - 1) / (BLOCK * enough_blocks)));
  ride.splits = std::max(1, std::min(useful, multiprocessors / pieces));
  ride.parts = reinterpret_cast<uint2 *>(memory);
  ride.launches = reinterpret_cast<uint32_t *>(ride.parts + multiprocessors * most_units_of_block * panel_ranks);
  ride.blocks_left = ride.launches + 1;
  return true;
}

void launch_ride(const queue &q, const ride_call &ride, int multiprocessors) {
  void (*kernels[])(ride_call) = {ride_beside<weight_kind::nf4>, ride_beside<weight_kind::int8>,
                                  ride_beside<weight_kind::bf16>};
  launch(q, kernels[int(ride.kind)], dim3(unsigned(multiprocessors)), threads, 0, ride);
}

}  // namespace adaptrt
