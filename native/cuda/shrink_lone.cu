#include <algorithm>

#include "lone_shared.cuh"

namespace adaptrt {
namespace {

// Few enough registers and warps that a block starts beside one of the norm before it, and has V when x is there.
constexpr int warps = 16, most_registers = 48;
constexpr int unit_blocks = 4;  // what a unit costs beside its blocks of inputs, in such blocks

// A warp's ring in shared memory: pieces of V, and the inputs that they meet.
template <weight_kind kind>
struct input_ring {
  static constexpr int depth = kind == weight_kind::bf16 ? 4 : 8, vectors = decoder<kind>::vectors;
  static constexpr int scales_at = tile_bytes(kind), scale_bytes = decoder<kind>::scaled ? panel_ranks * 4 : 0;
  static constexpr int inputs_at = scales_at + scale_bytes, input_bytes = BLOCK * int(sizeof(__nv_bfloat16));
  static constexpr int slot_bytes = inputs_at + input_bytes, bytes = depth * slot_bytes;
  uint32_t start;
  uint64_t policy;

  __device__ uint32_t slot(int i) const { return start + i % depth * slot_bytes; }
  __device__ void fetch_piece(int i, const uint8_t *pieces, const float *scales, int piece) const {
    int at = lane_index() * 16;
    const uint8_t *from = pieces + int64_t(piece) * tile_bytes(kind) + at;
#pragma unroll
    for (int v = 0; v < vectors; v++) copy_async(slot(i) + at + v * 512, from + v * 512, policy);
    if (at < scale_bytes) copy_async(slot(i) + scales_at + at, scales + piece * panel_ranks + at / 4, policy);
  }
  __device__ void fetch_inputs(int i, const __nv_bfloat16 *x) const {
    int at = lane_index() * 16;
    if (at < input_bytes) copy_async(slot(i) + inputs_at + at, x + at / int(sizeof(__nv_bfloat16)));
  }
};

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

  __device__ shrink_unit(const lone_call &lone, uint32_t warps_start)
      : lone(lone), ring{warps_start + warp_index() * ring.bytes, evict_first_policy()}, blocks(0) {}

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
    for (int i = 0; i < min(blocks, ring.depth); i++) ring.fetch_piece(i, v, v_scales, first_piece + i);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int rank = rank_piece * panel_ranks + lane_index() / 4 + 8 * h;
      by[h] = rank >= t.width ? 0.f : t.d ? t.scale * __ldg(t.d + rank) : t.scale;
    }
  }
  __device__ void multiply(int i, const decoder<kind> &decode, float sums[2]) const {
    uint32_t slot = ring.slot(i), inputs = slot + ring.inputs_at + lane_index() % 4 * 32;
    uint4 codes[ring.vectors], x[2] = {load_vector(inputs), load_vector(inputs + 16)};
#pragma unroll
    for (int k = 0; k < ring.vectors; k++) codes[k] = load_vector(slot + lane_index() * 16 + k * 512);
    float c[4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t a[4];
      decode.step(codes, s, a);
      multiply_add(c, a, word_of(x[s / 2], s % 2 * 2), word_of(x[s / 2], s % 2 * 2 + 1));
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint32_t scale = slot + ring.scales_at + (lane_index() / 4 + 8 * h) * 4;
      sums[h] += decoder<kind>::scaled ? load_float(scale) * c[2 * h] : c[2 * h];
    }
  }
  __device__ void finish(const decoder<kind> &decode) const {
    if (!blocks) return;
    float sums[2] = {};
#pragma unroll 1
    for (int i = 0; i < ring.depth; i++, commit_copies())
      if (i < blocks) ring.fetch_inputs(i, x + i * BLOCK);
#pragma unroll 1
    for (int i = 0, ahead = ring.depth; i < blocks; i++, ahead++) {
      wait_for_copies<input_ring<kind>::depth - 1>();
      __syncwarp();
      multiply(i, decode, sums);
      __syncwarp();
      if (ahead < blocks) {
        ring.fetch_piece(ahead, v, v_scales, first_piece + ahead);
        ring.fetch_inputs(ahead, x + ahead * BLOCK);
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
  shrink_unit<kind> unit(lone, shared_address(shared) + table_bytes<kind>);
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
