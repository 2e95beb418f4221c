#include <algorithm>

#include "expand.cuh"
#include "lone_ring.cuh"

namespace adaptrt {
namespace {

constexpr int most_blocks_of_run = 16;

template <weight_kind kind>
constexpr int most_warps = kind == weight_kind::bf16 ? 16 : 24;
template <weight_kind kind>
using output_ring = piece_ring<kind, 4, BLOCK * int(sizeof(float))>;
constexpr int ring_depth = 4;

// The division of work: runs of so many blocks of 64 outputs, for each token.
struct run_division {
  int run, runs, of_member[most_members];
};

// ---- U h: runs of 64 outputs of a token, by a warp ----

// What a warp needs of a member for a token.
struct run_side {
  const uint8_t *u;
  const float *u_scales, *e, *g_out;
  float *y;
  int64_t hidden;  // where its sums are
  int width, ranks;

  __device__ void find(const lone_call &lone, int member, int token) {
    const adapter_call &c = lone.call;
    const adaptrt::member &m = c.members[member];
    const term_record t = read_record(lone.records + m.target * c.n_tiles + token);
    u = t.u, u_scales = t.u_scales, e = t.e, g_out = t.g_out, width = t.width;
    ranks = max(1, (width + panel_ranks - 1) / panel_ranks);
    y = c.y + token * c.y_stride + m.row;
    hidden = (t.row * c.n_members + member) * lone.rank_pieces * lone.splits * panel_ranks;
  }
};

// A place in a run: a block of 64 outputs, a side, and a piece of ranks.
struct run_place {
  int block, side, rank_piece;
};

__device__ float2 vector_at(const float *vector, int row) {
  return vector ? *reinterpret_cast<const float2 *>(vector + row) : make_float2(1, 1);
}

// y = g_out * (y + e * U hidden) for some blocks of outputs; of two sides the second gated by the first.
template <weight_kind kind, int sides>
struct output_run {
  const lone_call &lone;
  output_ring<kind> ring;
  uint32_t hidden;  // [sides, rank_pieces, 16] in shared memory
  run_side of[sides];
  int token, rows, first_block, pieces;

  __device__ output_run(const lone_call &lone, uint32_t start)
      : lone(lone), ring(start), hidden(start + output_ring<kind>::bytes), pieces(0) {}

  // A choice between registers: an index would put them into memory.
  template <typename value>
  __device__ value at(const run_place &p, value run_side::*field) const {
    return sides == 2 && p.side ? of[sides - 1].*field : of[0].*field;
  }
  __device__ int ranks(const run_place &p) const { return at(p, &run_side::ranks); }
  __device__ int width(const run_place &p) const { return at(p, &run_side::width); }
  __device__ void next(run_place &p) const {
    if (++p.rank_piece < ranks(p)) return;
    p.rank_piece = 0;
    if (++p.side < sides) return;
    p.side = 0, p.block++;
  }
  __device__ bool is_last(const run_place &p) const { return p.rank_piece == ranks(p) - 1; }

  __device__ void fetch_factor(int i, const run_place &p) const {
    if (width(p))
      ring.fetch_factor(i, at(p, &run_side::u), at(p, &run_side::u_scales), p.block * ranks(p) + p.rank_piece);
  }
  __device__ void fetch_outputs(int i, const run_place &p) const {
    int left = min(BLOCK, rows - p.block * BLOCK);
    if (is_last(p)) ring.fetch_line(i, at(p, &run_side::y) + p.block * BLOCK, left * int(sizeof(float)));
  }

  // Finds out what run `n` is, and has its factors brought.
  __device__ void begin(const run_division &work, unsigned n, unsigned all) {
    const adapter_call &c = lone.call;
    pieces = 0;
    if (n >= all) return;
    token = int(n / work.runs);
    int place = int(n - unsigned(token) * work.runs), member = 0;
    if (sides == 1)
      for (; place >= work.of_member[member]; member++) place -= work.of_member[member];
    rows = int(c.members[member].rows), first_block = place * work.run;
#pragma unroll
    for (int k = 0; k < sides; k++) of[k].find(lone, member + k, token);
    if (sides == 1 && !of[0].width && !of[0].g_out) return;
    int blocks = min(work.run, (rows + BLOCK - 1) / BLOCK - first_block);
#pragma unroll
    for (int k = 0; k < sides; k++) pieces += blocks * of[k].ranks;
    run_place ahead = {first_block, 0, 0};
#pragma unroll 1
    for (int i = 0; i < min(pieces, ring_depth); i++, next(ahead)) fetch_factor(i, ahead);
  }

  // The sums of splits, added up. Reading is the lanes', for all splits at once; then all of them have all sums.
  __device__ void load_hidden() const {
#pragma unroll
    for (int k = 0; k < sides; k++) {
      const float4 *from = reinterpret_cast<const float4 *>(lone.call.hidden + of[k].hidden) + lane_index();
#pragma unroll 1
      for (int r = 0; r < of[k].ranks && of[k].width; r++, from += 4 * lone.splits) {
        float4 sum = {}, parts[most_lone_splits / 8];
#pragma unroll
        for (int i = 0; i < most_lone_splits / 8; i++)
          parts[i] = lane_index() / 4 + 8 * i < lone.splits ? __ldcg(from + 32 * i) : make_float4(0, 0, 0, 0);
#pragma unroll
        for (const float4 &v : parts) sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        for (int step = 4; step < warp_size; step *= 2) {
          sum.x += __shfl_xor_sync(all_lanes, sum.x, step), sum.y += __shfl_xor_sync(all_lanes, sum.y, step);
          sum.z += __shfl_xor_sync(all_lanes, sum.z, step), sum.w += __shfl_xor_sync(all_lanes, sum.w, step);
        }
        uint32_t to = hidden + ((k * lone.rank_pieces + r) * panel_ranks + lane_index() * 4) * int(sizeof(float));
        if (lane_index() < 4)
          asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w));
      }
    }
    __syncwarp();
  }

  __device__ void multiply(int i, const run_place &p, const decoder<kind> &decode, float c[4]) const {
    uint4 codes[decoder<kind>::vectors];
    ring.load_codes(i, codes);
    uint32_t from = hidden + ((p.side * lone.rank_pieces + p.rank_piece) * panel_ranks + lane_index() % 4 * 4) * 4;
    uint32_t scales = ring.slot(i) + ring.scales_at + lane_index() % 4 * 8;
    float2 low = load_float2(from), high = load_float2(from + 8), by[2] = {};
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
  }

  // The lane's two outputs of a side, once its ranks have been multiplied.
  __device__ float2 outputs(int i, const run_place &p, int row, const float c[4]) const {
    float2 y = load_float2(ring.slot(i) + ring.lines_at + lane_outputs<true>::row(0) * 4);
    float2 e = vector_at(at(p, &run_side::e), row), gain = vector_at(at(p, &run_side::g_out), row);
    return make_float2(gain.x * (y.x + e.x * (c[0] + c[1])), gain.y * (y.y + e.y * (c[2] + c[3])));
  }

  __device__ void finish(const decoder<kind> &decode, const lone_gate &gate) const {
    if (!pieces) return;
    load_hidden();
    run_place now = {first_block, 0, 0}, ahead = now;
#pragma unroll 1
    for (int i = 0; i < ring_depth; i++, commit_copies())
      if (i < pieces) fetch_outputs(i, ahead), next(ahead);
    float sums[4] = {};
    float2 opening = {};
#pragma unroll 1
    for (int i = 0; i < pieces; i++) {
      ring.wait_for_slot();
      if (width(now)) multiply(i, now, decode, sums);
      int row = now.block * BLOCK + lane_outputs<true>::row(0);
      if (is_last(now)) {
        float2 y = {};
        if (row < rows) y = outputs(i, now, row, sums);
#pragma unroll
        for (int k = 0; k < 4; k++) sums[k] = 0;
        if (sides == 1) {
          if (row < rows) *reinterpret_cast<float2 *>(at(now, &run_side::y) + row) = y;
        } else if (!now.side) {
          opening = y;
        } else if (row < rows) {
          gate.out.put_two(token, row, {gated(gate.kind, opening.x, y.x), gated(gate.kind, opening.y, y.y)});
        }
      }
      next(now);
      __syncwarp();
      if (i + ring_depth < pieces) {
        fetch_factor(i + ring_depth, ahead);
        fetch_outputs(i + ring_depth, ahead);
        next(ahead);
      }
      commit_copies();
    }
  }
};

// A warp's neighbours are in other blocks of threads, so that few have many multiprocessors.
template <weight_kind kind, int sides>
__global__ void __launch_bounds__(most_warps<kind> *warp_size, 1)
    expand_lone(const __grid_constant__ lone_call lone, const __grid_constant__ run_division work,
                const __grid_constant__ lone_gate gate, const __grid_constant__ nf4_values codebook) {
  extern __shared__ __align__(1024) uint8_t shared[];
  int warp_bytes = output_ring<kind>::bytes + sides * lone.rank_pieces * panel_ranks * int(sizeof(float));
  output_run<kind, sides> run(lone, shared_address(shared) + table_bytes<kind> + warp_index() * warp_bytes);
  unsigned all = unsigned(work.runs) * lone.call.n_tiles;
  unsigned n = blockIdx.x + warp_index() * gridDim.x, step = blockDim.x / warp_size * gridDim.x;
  run.begin(work, n, all);
  decoder<kind> decode = make_decoder<kind>(shared, codebook);
  wait_for_before();
#pragma unroll 1
  for (; n < all; n += step) {
    run.finish(decode, gate);
    run.begin(work, n + step, all);
  }
}

run_division divide(const adapter_call &call, int members, int run) {
  run_division work = {run};
  for (int i = 0; i < members; i++)
    work.runs += work.of_member[i] = int((call.members[i].rows + BLOCK * run - 1) / (BLOCK * run));
  return work;
}

template <weight_kind kind, int sides>
void launch_kind(const queue &q, const lone_call &lone, const lone_gate &gate, const lone_device &device) {
  int hidden_bytes = sides * lone.rank_pieces * panel_ranks * int(sizeof(float));
  lone_launch sizes(device, table_bytes<kind>, output_ring<kind>::bytes + hidden_bytes, most_warps<kind>);
  int members = sides == 1 ? lone.call.n_members : 1;  // which are divided
  int64_t blocks = int64_t(divide(lone.call, members, 1).runs) * lone.call.n_tiles;
  int64_t together = int64_t(sizes.warps) * device.multiprocessors;
  run_division work =
      divide(lone.call, members, int(std::min<int64_t>(most_blocks_of_run, (blocks + together - 1) / together)));
  check(cudaFuncSetAttribute(expand_lone<kind, sides>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizes.shared_bytes),
        "adapters");
  dim3 grid(unsigned(std::min<int64_t>(device.multiprocessors, int64_t(work.runs) * lone.call.n_tiles)));
  launch(q, expand_lone<kind, sides>, grid, unsigned(sizes.warps * warp_size), size_t(sizes.shared_bytes), lone, work, gate,
         nf4_codebook());
}

}  // namespace

bool in_fours(const adapter_call &call) {
  int64_t all = call.y_stride;
  for (int i = 0; i < call.n_members; i++) all |= call.members[i].row | call.members[i].rows;
  return all % 4 == 0 && reinterpret_cast<uintptr_t>(call.y) % 16 == 0;
}

void launch_expand_lone(const queue &q, const lone_call &lone, const lone_gate *gate, const lone_device &device) {
  with_lone_kind(lone.kind, [&](auto kind) {
    if (gate)
      launch_kind<decltype(kind)::value, 2>(q, lone, *gate, device);
    else
      launch_kind<decltype(kind)::value, 1>(q, lone, {}, device);
  });
}

}  // namespace adaptrt
