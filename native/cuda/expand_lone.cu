#include <algorithm>

#include "expand.cuh"
#include "lone_shared.cuh"

namespace adaptrt {
namespace {

constexpr int most_blocks_of_run = 16, depth = 2;  // blocks of 64 outputs; of them on their way
constexpr int block_bytes = BLOCK * int(sizeof(float)), scale_bytes = panel_ranks * int(sizeof(float));

template <weight_kind kind>
constexpr int most_warps = kind == weight_kind::bf16 ? 24 : 32;

// The division of work: runs of so many blocks of 64 outputs, for each token.
struct run_division {
  int run, runs, of_member[most_members];
};

// A warp's part of shared memory: of `depth` blocks for each side (a member that takes part) codes, scales and outputs,
// then each side's hidden values.
template <weight_kind kind>
struct warp_room {
  int scales, outputs, side, slot, hidden, all;
  __host__ __device__ warp_room(int sides, int rank_pieces)
      : scales(rank_pieces * tile_bytes(kind)), outputs(scales + rank_pieces * scale_bytes),
        side(outputs + block_bytes), slot(sides * side), hidden(depth * slot),
        all(hidden + sides * rank_pieces * scale_bytes) {}
};

// ---- U h: runs of 64 outputs of a token, by a warp ----

__device__ void multiply_by(float2 &v, const float *vector, int row) {  // which may be NULL
  if (!vector) return;
  float2 by = *reinterpret_cast<const float2 *>(vector + row);
  v.x *= by.x, v.y *= by.y;
}

// What a warp needs of a member for a token, for one block of its run after the other. Half of the lanes bring a block's
// outputs, the others its scales.
template <weight_kind kind, bool one>
struct run_side {
  const uint8_t *codes;  // the lane's, of the block that is fetched next
  const uint8_t *line;   // likewise of its outputs or scales
  const float *e, *g_out;
  float *y;        // of the token
  int64_t hidden;  // where its sums are
  int width, ranks;

  static __device__ bool brings_outputs() { return lane_index() < block_bytes / 16; }

  __device__ void find(const lone_call &lone, int index, int token, int first_block) {
    const adapter_call &c = lone.call;
    const member &m = c.members[index];
    const term_record t = read_record(lone.records + m.target * c.n_tiles + token);
    e = t.e, g_out = t.g_out, width = t.width;
    ranks = (width + panel_ranks - 1) / panel_ranks;
    y = c.y + token * c.y_stride + m.row;
    hidden = (t.row * c.n_members + index) * lone.rank_pieces * lone.splits * panel_ranks;
    int piece = first_block * ranks;
    codes = t.u + int64_t(piece) * tile_bytes(kind) + lane_index() * 16;
    line = brings_outputs() ? reinterpret_cast<const uint8_t *>(y + first_block * BLOCK) + lane_index() * 16
                            : reinterpret_cast<const uint8_t *>(t.u_scales + piece * panel_ranks) +
                                  (lane_index() * 16 - block_bytes);
  }
  __device__ void fetch_codes(uint32_t to, uint64_t policy) {
#pragma unroll 1
    for (int r = 0; r < ranks; r++, to += tile_bytes(kind)) {
#pragma unroll
      for (int v = 0; v < decoder<kind>::vectors; v++)
        copy_async(to + lane_index() * 16 + v * 512, codes + v * 512, policy);
      codes += tile_bytes(kind);
      if (one) break;
    }
  }
  // `outputs`: how many there are from the block's first on. `here`: whether this lane's half is to be brought.
  __device__ void fetch_line(uint32_t to, const warp_room<kind> &room, int outputs, bool here) {
    int at = lane_index() * 16;
    if (!here) return;
    bool first_half = brings_outputs();
    int bytes = first_half ? outputs * int(sizeof(float)) : decoder<kind>::scaled ? ranks * scale_bytes : 0;
    if (!first_half) at -= block_bytes;
    if (at < bytes) copy_async(to + (first_half ? room.outputs : room.scales) + at, line);
    line += first_half ? block_bytes : bytes;
  }
};

// y = g_out * (y + e * U hidden) for some blocks of outputs; of two sides the second gated by the first. `one`: no adapter
// has more than one piece of ranks, which makes constants of many addresses.
template <weight_kind kind, int sides, bool one>
struct output_run {
  const lone_call &lone;
  const int rank_pieces;
  const warp_room<kind> room;
  uint32_t start;
  uint64_t policy;
  run_side<kind, one> of[sides];
  int token, rows, first_block, blocks;

  __device__ output_run(const lone_call &lone, uint32_t warps_start)
      : lone(lone), rank_pieces(one ? 1 : lone.rank_pieces), room(sides, rank_pieces),
        start(warps_start + warp_index() * room.all), policy(evict_first_policy()), blocks(0) {}

  __device__ uint32_t slot(int block, int side) const { return start + block % depth * room.slot + side * room.side; }
  __device__ int outputs_of(int block) const { return rows - (first_block + block) * BLOCK; }

  // Finds out what run `n` is, and has its factors brought.
  __device__ void begin(const run_division &work, unsigned n, unsigned end) {
    const adapter_call &c = lone.call;
    blocks = 0;
    if (n >= end) return;
    token = int(n / unsigned(work.runs));
    int place = int(n) - token * work.runs, member = 0;
    if (sides == 1)
      for (; place >= work.of_member[member]; member++) place -= work.of_member[member];
    rows = int(c.members[member].rows), first_block = place * work.run;
#pragma unroll
    for (int k = 0; k < sides; k++) of[k].find(lone, member + k, token, first_block);
    if (sides == 1 && !of[0].width && !of[0].g_out) return;
    blocks = min(work.run, (rows + BLOCK - 1) / BLOCK - first_block);
#pragma unroll 1
    for (int i = 0; i < min(blocks, depth); i++)
#pragma unroll
      for (int k = 0; k < sides; k++) {
        of[k].fetch_codes(slot(i, k), policy);
        of[k].fetch_line(slot(i, k), room, outputs_of(i), !of[k].brings_outputs());
      }
  }

  // The sums of splits, added up. Reading is the lanes', for all splits at once; then all of them have all sums.
  __device__ void load_hidden(int k, const run_side<kind, one> &s) const {
    const float4 *from = reinterpret_cast<const float4 *>(lone.call.hidden + s.hidden) + lane_index();
#pragma unroll 1
    for (int r = 0; r < s.ranks; r++, from += 4 * lone.splits) {
      float4 sum = {}, parts[most_lone_splits / 8];
#pragma unroll
      for (int i = 0; i < most_lone_splits / 8; i++)
        parts[i] = lane_index() / 4 + 8 * i < lone.splits ? __ldcg(from + 32 * i) : make_float4(0, 0, 0, 0);
#pragma unroll
      for (const float4 &v : parts) sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
#pragma unroll
      for (int step = 4; step < warp_size; step *= 2) {
        sum.x += __shfl_xor_sync(all_lanes, sum.x, step), sum.y += __shfl_xor_sync(all_lanes, sum.y, step);
        sum.z += __shfl_xor_sync(all_lanes, sum.z, step), sum.w += __shfl_xor_sync(all_lanes, sum.w, step);
      }
      uint32_t to = start + room.hidden + (k * rank_pieces + r) * scale_bytes + lane_index() * 16;
      if (lane_index() < 4)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w));
    }
  }

  // The lane's two outputs of a side, times nothing but U.
  __device__ float2 multiply(uint32_t from, int k, int ranks, const decoder<kind> &decode) const {
    float c[4] = {};
    uint32_t hidden = start + room.hidden + k * rank_pieces * scale_bytes + lane_index() % 4 * 16;
    uint32_t scales = from + room.scales + lane_index() % 4 * 8;
    from += lane_index() * 16;
#pragma unroll 1
    for (int r = 0; r < ranks; r++, from += tile_bytes(kind), hidden += scale_bytes, scales += scale_bytes) {
      uint4 codes[decoder<kind>::vectors];
#pragma unroll
      for (int v = 0; v < decoder<kind>::vectors; v++) codes[v] = load_vector(from + v * 512);
      float2 low = load_float2(hidden), high = load_float2(hidden + 8), by[2] = {};
      if (decoder<kind>::scaled) by[0] = load_float2(scales), by[1] = load_float2(scales + 32);
      lane_ranks values = {{low.x, low.y, high.x, high.y}};
      uint32_t b[2];
      values.column<kind>(by, b);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        uint32_t a[4];
        decode.step(codes, s, a);
        bool mine = lane_index() / 8 == s;
        multiply_add(c, a, mine ? b[0] : 0, mine ? b[1] : 0);
      }
      if (one) break;
    }
    return make_float2(c[0] + c[1], c[2] + c[3]);
  }

  __device__ float2 outputs(int block, int k, int row, const decoder<kind> &decode) const {
    const run_side<kind, one> &s = of[k];
    float2 y = load_float2(slot(block, k) + room.outputs + lane_outputs<true>::row(0) * int(sizeof(float)));
    float2 change = multiply(slot(block, k), k, s.ranks, decode);
    if (row >= rows) return y;
    multiply_by(change, s.e, row);
    y.x += change.x, y.y += change.y;
    multiply_by(y, s.g_out, row);
    return y;
  }

  __device__ void finish(const decoder<kind> &decode, const lone_gate &gate) {
    if (!blocks) return;
#pragma unroll 1
    for (int i = 0; i < depth; i++, commit_copies())
#pragma unroll
      for (int k = 0; k < sides; k++)
        of[k].fetch_line(slot(i, k), room, outputs_of(i), of[k].brings_outputs() && i < blocks);
#pragma unroll
    for (int k = 0; k < sides; k++) load_hidden(k, of[k]);
#pragma unroll 1
    for (int i = 0; i < blocks; i++) {
      wait_for_copies<depth - 1>();
      __syncwarp();
      int row = (first_block + i) * BLOCK + lane_outputs<true>::row(0);
      float2 y = outputs(i, 0, row, decode);
      if (sides == 2) {
        float2 up = outputs(i, sides - 1, row, decode);
        float2 out = make_float2(gated(gate.kind, y.x, up.x), gated(gate.kind, y.y, up.y));
        if (row < rows) gate.out.put_two(token, row, out);
      } else if (row < rows) {
        *reinterpret_cast<float2 *>(of[0].y + row) = y;
      }
      __syncwarp();
      if (i + depth < blocks)
#pragma unroll
        for (int k = 0; k < sides; k++) {
          of[k].fetch_codes(slot(i, k), policy);
          of[k].fetch_line(slot(i, k), room, outputs_of(i + depth), true);
        }
      commit_copies();
    }
  }
};

// A block of threads has neighbouring runs: of a few tokens, whose factors it reads from end to end.
template <weight_kind kind, int sides, bool one>
__global__ void __launch_bounds__(most_warps<kind> *warp_size, 1)
    expand_lone(const __grid_constant__ lone_call lone, const __grid_constant__ run_division work,
                const __grid_constant__ lone_gate gate, const __grid_constant__ nf4_values codebook) {
  extern __shared__ __align__(1024) uint8_t shared[];
  output_run<kind, sides, one> run(lone, shared_address(shared) + table_bytes<kind>);
  unsigned all = unsigned(work.runs) * lone.call.n_tiles, of_block = (all + gridDim.x - 1) / gridDim.x;
  unsigned first = blockIdx.x * of_block, end = min(all, first + of_block), step = blockDim.x / warp_size;
  run.begin(work, first + warp_index(), end);
  decoder<kind> decode = make_decoder<kind>(shared, codebook);
  wait_for_before();
#pragma unroll 1
  for (unsigned n = first + warp_index(); n < end; n += step) {
    run.finish(decode, gate);
    run.begin(work, n + step, end);
  }
}

run_division divide(const adapter_call &call, int members, int run) {
  run_division work = {run};
  for (int i = 0; i < members; i++)
    work.runs += work.of_member[i] = int((call.members[i].rows + BLOCK * run - 1) / (BLOCK * run));
  return work;
}

template <weight_kind kind, int sides, bool one>
void launch_kind(const queue &q, const lone_call &lone, const lone_gate &gate, const lone_device &device) {
  lone_launch sizes(device, table_bytes<kind>, warp_room<kind>(sides, lone.rank_pieces).all, most_warps<kind>);
  int members = sides == 1 ? lone.call.n_members : 1;  // which are divided
  int64_t blocks = int64_t(divide(lone.call, members, 1).runs) * lone.call.n_tiles;
  int64_t together = int64_t(sizes.warps) * device.multiprocessors;
  run_division work =
      divide(lone.call, members, int(std::min<int64_t>(most_blocks_of_run, (blocks + together - 1) / together)));
  check(cudaFuncSetAttribute(expand_lone<kind, sides, one>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizes.shared_bytes),
        "adapters");
  dim3 grid(unsigned(std::min<int64_t>(device.multiprocessors, int64_t(work.runs) * lone.call.n_tiles)));
  launch(q, expand_lone<kind, sides, one>, grid, unsigned(sizes.warps * warp_size), size_t(sizes.shared_bytes), lone, work, gate,
         nf4_codebook());
}

}  // namespace

bool in_fours(const adapter_call &call) {
  int64_t all = call.y_stride;
  for (int i = 0; i < call.n_members; i++) all |= call.members[i].row | call.members[i].rows;
  return all % 4 == 0 && reinterpret_cast<uintptr_t>(call.y) % 16 == 0;
}

void launch_expand_lone(const queue &q, const lone_call &lone, const lone_gate *gate, const lone_device &device) {
  lone_gate to = gate ? *gate : lone_gate{};
  with_lone_kind(lone.kind, [&](auto of) {
    constexpr weight_kind kind = decltype(of)::value;
    bool one = lone.rank_pieces == 1;
    auto launch = gate ? one ? launch_kind<kind, 2, true> : launch_kind<kind, 2, false>
                       : one ? launch_kind<kind, 1, true> : launch_kind<kind, 1, false>;
    launch(q, lone, to, device);
  });
}

}  // namespace adaptrt
