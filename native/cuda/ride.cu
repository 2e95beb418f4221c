#include "ride.cuh"

#include <algorithm>

#include "expand.cuh"
#include "shrink.cuh"

namespace adaptrt {
namespace {

// So few and small that they find room beside the blocks of a product.
constexpr int warps = 4, threads = warps * warp_size, blocks_beside = 5;
constexpr int part_floats = shrink_tokens * panel_ranks;

// ---- shrink: a piece of hidden, a part of its columns ----

__device__ void shrink_unit(const ride_call &ride, int unit, uint32_t launch) {
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
  // In one store, so that who sees the launch's number sees the sum.
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(ride.parts + unit * part_floats + threadIdx.x),
               "r"(__float_as_uint(sum)), "r"(launch)
               : "memory");
  __syncthreads();
}

// ---- hidden, as shrink leaves it, in shared memory ----

// Where a value of hidden comes from and goes to.
struct hidden_value {
  const uint2 *parts;  // or NULL
  int to;
  float scale;
};

__device__ hidden_value find_value(const ride_call &ride, int i) {
  int piece = i / part_floats, token = i % part_floats / panel_ranks, r = i % panel_ranks;
  if (piece >= ride.n_shrink_tiles * ride.chunks) return {};
  const token_tile &tile = ride.shrink_tiles[piece / ride.chunks];
  shrink_place at;
  if (token >= tile.n_tokens || !find_place(ride.call, tile.head, piece % ride.chunks, at)) return {};
  const term &t = *at.t;
  if (at.row + r >= t.width) return {};
  int64_t to = at.hidden + (tile.token - tile.head.token + token) * t.width + at.row + r;
  return {ride.parts + piece * ride.splits * part_floats + i % part_floats, int(to),
          t.d ? t.scale * t.d[at.row + r] : t.scale};
}

// A part, once it is there. Every block of threads has left its own parts before it waits for others'.
__device__ float await_part(const uint2 *part, uint32_t launch) {
  uint2 v;
  do {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(part) : "memory");
  } while (v.y != launch);
  return __uint_as_float(v.x);
}

__device__ void gather_value(const ride_call &ride, const hidden_value &value, uint32_t launch, float *hidden) {
  if (!value.parts) return;
  float sum = 0;
  for (int split = 0; split < ride.splits; split++) sum += await_part(value.parts + split * part_floats, launch);
  hidden[value.to] = sum * value.scale;
}

// `first` is this thread's first value, found before.
__device__ __noinline__ void gather_hidden(const ride_call &ride, const hidden_value &first, uint32_t launch,
                                           float *hidden) {
  gather_value(ride, first, launch, hidden);
  for (int i = threadIdx.x + threads; i < ride.n_shrink_tiles * ride.chunks * part_floats; i += threads)
    gather_value(ride, find_value(ride, i), launch, hidden);
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

// A warp's share of blocks of outputs and tiles; neighbours are in other blocks of threads.
struct output_place {
  const member *m;  // or NULL
  const token_tile *tile;
  int block;

  __device__ output_place(const adapter_call &c, int n) : m(nullptr) {
    for (int i = 0; i < c.n_members; i++) {
      int blocks = int((c.members[i].rows + BLOCK - 1) / BLOCK), all = blocks * c.n_tiles;
      if (n < all) {
        m = c.members + i, tile = c.tiles + n / blocks, block = n % blocks;
        return;
      }
      n -= all;
    }
  }
};

// The warp's first block of outputs: all that does not need hidden values or y is read before they are there.
template <weight_kind kind, typename callable>
__device__ void expand_lone(const lone_term &t, const output_place &at, float *y, const callable &gather) {
  using lane = lane_outputs<true>;
  int ranks = (t.width + panel_ranks - 1) / panel_ranks, row = at.block * BLOCK + lane::row(0), rows = int(at.m->rows);
  int64_t piece = int64_t(at.block) * ranks;
  float e[1][2], c[1][4] = {}, old[2];
  piece_codes<kind> codes;
  codes.load(t.u, piece);
  load_vector_of<true>(t.e, at.block, rows, 1.f, e);
  gather();
  for (int r = 0; r < ranks; r++) {
    lane_ranks values;
    values.load({t.hidden, t.width, 1}, 0, r * panel_ranks);
    uint32_t b[2];
    values.template column<kind>(t.u.scales + (piece + r) * panel_ranks, b);
    multiply_piece<kind, true>(codes, b, c);
    if (r + 1 < ranks) codes.load(t.u, piece + r + 1);
  }
  wait_for_before();
  for (int i = 0; i < 2; i++) old[i] = row + i < rows ? y[row + i] : 0.f;
  for (int i = 0; i < 2; i++)
    if (row + i < rows) y[row + i] = old[i] + e[0][i] * (c[0][2 * i] + c[0][2 * i + 1]);
}

// Ends a launch: the last block of threads gives the next one another number.
__device__ void count_block(const ride_call &ride) {
  if (threadIdx.x || atomicAdd(ride.blocks_left, 1u) != gridDim.x - 1) return;
  *ride.blocks_left = 0;
  *ride.launches += 1;
}

template <bool single>
__global__ void __launch_bounds__(threads, blocks_beside) ride_beside(const __grid_constant__ ride_call ride) {
  __shared__ float hidden[most_hidden_to_ride];
  const adapter_call &c = ride.call;
  uint32_t launch = *ride.launches + 1;
  hidden_value value = find_value(ride, threadIdx.x);
  for (int unit = blockIdx.x; unit < ride.n_shrink_tiles * ride.chunks * ride.splits; unit += gridDim.x)
    shrink_unit(ride, unit, launch);
  auto gather = [&] {
    gather_hidden(ride, value, launch, hidden);
    let_next_kernel_start();
  };
  int n = blockIdx.x + threadIdx.x / warp_size * gridDim.x;
  bool waits = true, gathers = true;
  if (output_place at(c, n); single && at.m) {
    lone_term t(c, hidden, *at.m, *at.tile);
    if (t.there) {
      float *y = c.y + at.tile->token * c.y_stride + at.m->row;
      with_kind(t.u.dtype, [&](auto kind) { expand_lone<decltype(kind)::value>(t, at, y, gather); });
      waits = gathers = false;
      n += warps * gridDim.x;
    }
  }
  if (gathers) gather();
  for (output_place at(c, n); at.m; at = output_place(c, n += warps * gridDim.x))
    expand_beside<single>(c, hidden, *at.m, *at.tile, at.block, waits);
  if (waits) wait_for_kernel_before();
  count_block(ride);
}

}  // namespace

size_t ride_bytes(int multiprocessors) {
  return size_t(multiprocessors) * part_floats * sizeof(uint2) + 2 * sizeof(uint32_t);
}

bool plan_ride(ride_call &ride, int64_t hidden_floats, uint8_t *memory, int multiprocessors) {
  constexpr int enough_blocks = 2 * warps, most_splits = 16;  // of columns, for a block of threads
  int pieces = std::max(1, ride.n_shrink_tiles * ride.chunks);
  if (pieces > multiprocessors || hidden_floats > most_hidden_to_ride) return false;
  int useful = std::min(most_splits, int((ride.call.cols + BLOCK * enough_blocks - 1) / (BLOCK * enough_blocks)));
  ride.splits = std::min(useful, multiprocessors / pieces);
  ride.parts = reinterpret_cast<uint2 *>(memory);
  ride.launches = reinterpret_cast<uint32_t *>(ride.parts + multiprocessors * part_floats);
  ride.blocks_left = ride.launches + 1;
  return true;
}

void launch_ride(const queue &q, const ride_call &ride, bool single, int multiprocessors) {
  launch(q, single ? ride_beside<true> : ride_beside<false>, dim3(unsigned(multiprocessors)), threads, 0, ride);
}

}  // namespace adaptrt
