#include <algorithm>

#include "lone_ring.cuh"

namespace adaptrt {
namespace {

// Few enough registers and warps that a block starts beside one of the norm before it, and has V when x is there.
constexpr int warps = 16, most_registers = 48;
constexpr int unit_blocks = 4;  // what a unit costs beside its blocks of inputs, in such blocks

template <weight_kind kind>
using input_ring = piece_ring<kind, kind == weight_kind::bf16 ? 4 : 8, BLOCK * int(sizeof(__nv_bfloat16))>;
template <weight_kind kind>
constexpr int ring_depth = input_ring<kind>::bytes / input_ring<kind>::slot_bytes;

// ---- V x: 16 ranks of a token and a part of the inputs, by a warp ----

template <weight_kind kind>
struct shrink_unit {
  const lone_call &lone;
  input_ring<kind> ring;
  const __nv_bfloat16 *x;
  const uint8_t *v;
  const float *v_scales;
  float *out;
  float by[2];  // of the lane's ranks
  int first_piece, blocks;

  __device__ shrink_unit(const lone_call &lone, uint32_t ring_start) : lone(lone), ring(ring_start), blocks(0) {}

  // Finds out what unit `n` is, and has its factors brought.
  __device__ void begin(unsigned n, unsigned all) {
    const adapter_call &c = lone.call;
    blocks = 0;
    if (n >= all) return;
    unsigned unit = n / lone.splits, split = n - unit * lone.splits, of_token = c.n_members * lone.rank_pieces;
    unsigned token = unit / of_token, at = unit - token * of_token;
    unsigned member = lone.rank_pieces == 1 ? at : at / lone.rank_pieces;
    int rank_piece = int(at - member * lone.rank_pieces);
    const term_record t = read_record(lone.records + c.members[member].target * c.n_tiles + token);
    if (rank_piece * panel_ranks >= t.width) return;
    int row_blocks = int(c.cols + BLOCK - 1) / BLOCK, first = row_blocks * int(split) / lone.splits;
    blocks = row_blocks * int(split + 1) / lone.splits - first;
    first_piece = rank_piece * row_blocks + first;
    v = t.v, v_scales = t.v_scales;
    x = c.x + token * c.x_stride + first * BLOCK;
    out = c.hidden + ((t.row * of_token + at) * lone.splits + split) * panel_ranks;
#pragma unroll 1
    for (int i = 0; i < min(blocks, ring_depth<kind>); i++) ring.fetch_factor(i, v, v_scales, first_piece + i);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int rank = rank_piece * panel_ranks + lane_index() / 4 + 8 * h;
      by[h] = rank >= t.width ? 0.f : t.d ? t.scale * __ldg(t.d + rank) : t.scale;
    }
  }
  __device__ void multiply(int i, const decoder<kind> &decode, float sums[2]) const {
    uint32_t slot = ring.slot(i), inputs = slot + ring.lines_at + lane_index() % 4 * 32;
    uint4 codes[decoder<kind>::vectors], values[2] = {load_vector(inputs), load_vector(inputs + 16)};
    ring.load_codes(i, codes);
    float c[4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t a[4];
      decode.step(codes, s, a);
      multiply_add(c, a, word_of(values[s / 2], s % 2 * 2), word_of(values[s / 2], s % 2 * 2 + 1));
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float scale = decoder<kind>::scaled ? load_float(slot + ring.scales_at + (lane_index() / 4 + 8 * h) * 4) : 1.f;
      sums[h] += scale * c[2 * h];
    }
  }
  __device__ void finish(const decoder<kind> &decode) const {
    if (!blocks) return;
    constexpr int depth = ring_depth<kind>, line = BLOCK * int(sizeof(__nv_bfloat16));
    float sums[2] = {};
#pragma unroll 1
    for (int i = 0; i < depth; i++) {
      ring.fetch_line(i, x + i * BLOCK, i < blocks ? line : 0);
      commit_copies();
    }
#pragma unroll 1
    for (int i = 0; i < blocks; i++) {
      ring.wait_for_slot();
      multiply(i, decode, sums);
      __syncwarp();
      int ahead = i + depth;
      if (ahead < blocks) {
        ring.fetch_factor(ahead, v, v_scales, first_piece + ahead);
        ring.fetch_line(ahead, x + ahead * BLOCK, line);
      }
      commit_copies();
    }
    int g = lane_index() / 4;
    if (lane_index() % 4) return;  // all columns are the same token
    out[g / 2 * 4 + g % 2] = by[0] * sums[0], out[g / 2 * 4 + g % 2 + 2] = by[1] * sums[1];
  }
};

// A warp's neighbours are in other blocks of threads, so that few have many multiprocessors.
template <weight_kind kind>
__global__ void __maxnreg__(most_registers)
    shrink_lone(const __grid_constant__ lone_call lone, const __grid_constant__ nf4_values codebook) {
  extern __shared__ __align__(1024) uint8_t shared[];
  shrink_unit<kind> unit(lone, shared_address(shared) + table_bytes<kind> + warp_index() * input_ring<kind>::bytes);
  unsigned all = unsigned(lone.call.n_tiles) * lone.call.n_members * lone.rank_pieces * lone.splits;
  unsigned n = blockIdx.x + warp_index() * gridDim.x, step = blockDim.x / warp_size * gridDim.x;
  unit.begin(n, all);
  decoder<kind> decode = make_decoder<kind>(shared, codebook);
  wait_and_let_next_start();
#pragma unroll 1
  for (; n < all; n += step) {
    unit.finish(decode);
    unit.begin(n + step, all);
  }
}

template <weight_kind kind>
void launch_kind(const queue &q, const lone_call &lone, const lone_device &device) {
  lone_launch sizes(device, table_bytes<kind>, input_ring<kind>::bytes, warps);
  check(cudaFuncSetAttribute(shrink_lone<kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizes.shared_bytes), "adapters");
  launch(q, shrink_lone<kind>, dim3(unsigned(device.multiprocessors)), unsigned(sizes.warps * warp_size),
         size_t(sizes.shared_bytes), lone, nf4_codebook());
}

}  // namespace

// So many that all warps have as much to do as possible, and not more than twice as many parts as warps.
int lone_splits(const adapter_call &call, int rank_pieces, int multiprocessors) {
  int64_t units = int64_t(call.n_tiles) * call.n_members * rank_pieces, together = int64_t(warps) * multiprocessors;
  int64_t blocks = (call.cols + BLOCK - 1) / BLOCK, least = INT64_MAX;
  int best = 1;
  for (int splits = 1; splits <= std::min<int64_t>(most_lone_splits, blocks); splits++) {
    if (splits > 1 && splits * units > 2 * together) break;
    int64_t rounds = (splits * units + together - 1) / together;
    int64_t cost = rounds * ((blocks + splits - 1) / splits + unit_blocks);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

int64_t lone_split_floats(int multiprocessors) { return int64_t(2) * warps * multiprocessors * panel_ranks; }

void launch_shrink_lone(const queue &q, const lone_call &lone, const lone_device &device) {
  with_lone_kind(lone.kind, [&](auto kind) { launch_kind<decltype(kind)::value>(q, lone, device); });
}

}  // namespace adaptrt
