// U times hidden values of terms in common, added to what the product left.
//
// A block has a run of tiles of 16 rows of one member's U, or of both whose outputs a gate reads, and many tokens, whose
// hidden values lie in shared memory. A warp keeps a tile of U in registers, all its ranks, and goes through tokens with it,
// 16 at a time, while their outputs and gains are on their way to its own part of shared memory; where there are fewer tiles
// than warps, several share one, each with other tokens.
#include <algorithm>

#include "lone_shared.cuh"
#include "shared.cuh"

namespace adaptrt {
namespace {

constexpr int most_warps = 16, tile = 16, pieces_at_once = 16;  // of rows; of 16 ranks
constexpr int ranks_at_once = pieces_at_once * panel_ranks;
constexpr int pass_tokens = 16, most_tokens = 112, most_tokens_gated = 64;  // of a warp at once; of a block
constexpr int depth = 2;                            // passes whose outputs are on their way
constexpr int hidden_padding = 64;  // bytes of a row in shared memory: then the rows of neighbouring lanes meet in no bank
constexpr int line_bytes = tile * 4 + 16;  // of a token's outputs, likewise
constexpr int gains_at = pass_tokens * line_bytes, slot_bytes = 2 * gains_at;  // outputs, then gains
constexpr int held_bytes = pass_tokens / 4 * warp_size * int(sizeof(float2));  // of a pass, for the gate

// The division of work: runs of so many tiles of a member's rows, for so many tokens.
struct extend_division {
  int block_tiles, block_tokens;
  int log_sharing, at_once;     // warps with one tile, and tiles that a block's warps have at once
  int of_member[most_members];  // runs
};

// Of a token's hidden values, filled up with zeros.
__host__ __device__ inline int hidden_row_bytes(int64_t stride) {
  return int((stride + ranks_at_once - 1) / ranks_at_once) * ranks_at_once * 2 + hidden_padding;
}

// Shared memory: hidden values of each side, then each warp's part.
__host__ __device__ inline int warp_bytes(int sides, int block_tokens) {
  return depth * slot_bytes + (sides - 1) * block_tokens / pass_tokens * held_bytes;
}

// A lane's part of 16 rows by up to 256 ranks: two rows, neighbours.
struct lane_rows {
  uint4 pieces[pieces_at_once];

  __device__ void load(const factor &u, int row_tile, int first_piece) {
    constexpr int bytes = tile_bytes(weight_kind::bf16), tiles = BLOCK / tile;
    int of_ranks = int(rank_pieces(u)), left = of_ranks - first_piece;
    const uint8_t *at = u.data + (int64_t(row_tile / tiles) * of_ranks + first_piece) * bytes +
                        row_tile % tiles * (bytes / tiles) + lane_index() * 16;
#pragma unroll
    for (int i = 0; i < pieces_at_once; i++) pieces[i] = i < left ? load16(at + i * bytes) : uint4{};
  }
  static __device__ uint4 load16(const void *at) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
  }
};

// sums[n][i]: of the lane's row i / 2 and token 8n + 2t + i % 2, in lane 4g + t.
using pass_sums = float[pass_tokens / 8][4];

__device__ void multiply(pass_sums &sums, const lane_rows &u, uint32_t hidden, int row_bytes) {
#pragma unroll
  for (int i = 0; i < pieces_at_once; i += 2) {
    uint4 h[pass_tokens / 8];
#pragma unroll
    for (int n = 0; n < pass_tokens / 8; n++) h[n] = load_vector(hidden + n * 8 * row_bytes + i * panel_ranks * 2);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const uint4 &piece = u.pieces[i + k];
      const uint32_t a[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int n = 0; n < pass_tokens / 8; n++) multiply_add(sums[n], a, word_of(h[n], 2 * k), word_of(h[n], 2 * k + 1));
    }
  }
}

__device__ void store_four(uint32_t to, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// Four values to shared memory, of which there are `left`; with `in_fours` four or none.
template <bool in_fours>
__device__ void bring_four(uint32_t to, const float *from, int64_t left) {
  if constexpr (in_fours) {
    if (left > 0) copy_async(to, from);
  } else {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = i < left ? from[i] : 0.f;
    store_four(to, v);
  }
}

// What a warp does: its tile's rows for every so many passes of the block's tokens, of one side, then of the other.
template <int sides, bool in_fours>
struct warp_extension {
  const common_call &c;
  const common_member *members;              // of the sides
  const float *const (*gains)[most_tokens];  // of the block's tokens, or NULL: 1
  uint32_t hidden, ring;
  float2 *held;
  int first_token, block_tokens, limit;  // tokens of the block, and how many of them there are
  int share, passes, log_sharing;        // passes that are the warp's
  int row_bytes, y_stride;
  int first_row, first_rank;
  lane_rows u;

  __device__ int jobs() const { return sides * passes; }
  __device__ int side_of(int job) const { return sides > 1 && job >= passes; }
  __device__ int token_of_job(int job) const {
    return (share + ((job - side_of(job) * passes) << log_sharing)) * pass_tokens;
  }
  __device__ uint32_t slot(int job) const { return ring + job % depth * slot_bytes; }

  __device__ void load_rows(int side) {
    if (side && members[side].u.data == members[0].u.data) return;
    u.load(members[side].u, first_row / tile, first_rank / panel_ranks);
  }
  __device__ void begin(int row, int rank) {
    first_row = row, first_rank = rank;
    load_rows(0);
  }

  // A lane brings four outputs of two tokens, and their gains.
  __device__ void fetch_gains(int job) {
    if (job >= jobs()) return;
    int side = side_of(job), row = first_row + lane_index() % 4 * 4, left = int(members[side].rows) - row;
    const float *const *of = gains[side] + token_of_job(job) + lane_index() / 4;
    uint32_t to = slot(job) + gains_at + lane_index() / 4 * line_bytes + lane_index() % 4 * 16;
    const float ones[4] = {1, 1, 1, 1};
#pragma unroll
    for (int i = 0; i < pass_tokens; i += 8) {
      if (const float *e = of[i])
        bring_four<in_fours>(to + i * line_bytes, e + row, left);
      else
        store_four(to + i * line_bytes, ones);
    }
  }
  __device__ void fetch_outputs(int job) {
    if (job < jobs()) {
      const common_member &m = members[side_of(job)];
      int row = first_row + lane_index() % 4 * 4, left = int(m.rows) - row, token = token_of_job(job) + lane_index() / 4;
      uint32_t to = slot(job) + lane_index() / 4 * line_bytes + lane_index() % 4 * 16;
      const float *from = c.y + (first_token + token) * c.y_stride + m.row + row;
#pragma unroll
      for (int i = 0; i < pass_tokens; i += 8)
        if (token + i < limit) bring_four<in_fours>(to + i * line_bytes, from + i * y_stride, left);
    }
    commit_copies();
  }

  // The lane's outputs of a pass: two neighbouring rows of each of its tokens.
  static constexpr int lane_tokens = pass_tokens / 4;
  static __device__ int token_of(int i) { return i / 2 * 8 + lane_index() % 4 * 2 + i % 2; }

  __device__ void put(int first, int row, const float2 (&v)[lane_tokens]) const {
    const common_member &m = members[0];
    float *to = c.y + (first_token + first) * c.y_stride + m.row + row;
#pragma unroll
    for (int i = 0; i < lane_tokens; i++) {
      float *y = to + token_of(i) * y_stride;
      if (first + token_of(i) >= limit || row >= m.rows) continue;
      if (in_fours) {
        *reinterpret_cast<float2 *>(y) = v[i];
      } else {
        y[0] = v[i].x;
        if (row + 1 < m.rows) y[1] = v[i].y;
      }
    }
  }

  __device__ void put_gated(int first, int row, const float2 (&a)[lane_tokens], const float2 (&b)[lane_tokens],
                            const lone_gate &gate) const {
    float2 v[lane_tokens];
    if (gate.kind == combination::silu) {
#pragma unroll
      for (int i = 0; i < lane_tokens; i++)
        v[i] = make_float2(gated(combination::silu, a[i].x, b[i].x), gated(combination::silu, a[i].y, b[i].y));
    } else {
#pragma unroll
      for (int i = 0; i < lane_tokens; i++)
        v[i] = make_float2(gated(combination::gelu_tanh, a[i].x, b[i].x), gated(combination::gelu_tanh, a[i].y, b[i].y));
    }
#pragma unroll
    for (int i = 0; i < lane_tokens; i++) {
      int token = first + token_of(i);
      if (token < limit && row < members[0].rows) gate.out.put_two(first_token + token, row, v[i]);
    }
  }

  __device__ void finish(int job, const pass_sums &sums, const lone_gate &gate) {
    int row = first_row + lane_index() / 4 * 2, token = token_of_job(job);
    float2 v[lane_tokens];
#pragma unroll
    for (int i = 0; i < lane_tokens; i++) {
      uint32_t at = slot(job) + token_of(i) * line_bytes + lane_index() / 4 * 8;
      float2 y = load_float2(at), e = load_float2(at + gains_at);
      v[i] = make_float2(y.x + e.x * sums[i / 2][i % 2], y.y + e.y * sums[i / 2][2 + i % 2]);
    }
    if (sides == 1) return put(token, row, v);
    float2 *other = held + (job - side_of(job) * passes) * lane_tokens * warp_size + lane_index();
    if (!side_of(job)) {
#pragma unroll
      for (int i = 0; i < lane_tokens; i++) other[i * warp_size] = v[i];
      return;
    }
    float2 first[lane_tokens];
#pragma unroll
    for (int i = 0; i < lane_tokens; i++) first[i] = other[i * warp_size];
    put_gated(token, row, first, v, gate);
  }

  __device__ void run(const lone_gate &gate) {
#pragma unroll 1
    for (int job = 0; job < jobs(); job++) {
      if (sides == 2 && job == passes) load_rows(1);
      wait_for_copies<depth - 1>();
      __syncwarp();
      pass_sums sums = {};
      uint32_t of_pass = hidden + (side_of(job) * block_tokens + token_of_job(job) + lane_index() / 4) * row_bytes;
      multiply(sums, u, of_pass + first_rank * 2 + lane_index() % 4 * 16, row_bytes);
      finish(job, sums, gate);
      __syncwarp();
      fetch_gains(job + depth);
      fetch_outputs(job + depth);
    }
  }
};

// Of all sides, one after the other.
template <int sides>
__device__ void stage_hidden(const common_call &c, const common_member *members, int first_token, int block_tokens,
                             uint32_t to, int row_bytes) {
  int stride = int(hidden_stride(members[0].u.rows));
  for (int i = warp_index(); i < sides * block_tokens; i += int(blockDim.x) / warp_size) {
    int side = sides > 1 && i >= block_tokens, token = first_token + i - side * block_tokens;
    const __nv_bfloat16 *from = members[side].hidden + int64_t(min(token, c.tokens - 1)) * stride;
    for (int r = lane_index() * 8; r * 2 < row_bytes - hidden_padding; r += warp_size * 8)
      copy_columns(to + i * row_bytes + r * 2, from, r, stride);
  }
}

template <int sides, bool in_fours>
__global__ void __launch_bounds__(most_warps *warp_size, 1)
    extend(const __grid_constant__ common_call c, const __grid_constant__ extend_division by,
           const __grid_constant__ lone_gate gate) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ const float *gains[sides][most_tokens];
  int run = blockIdx.x, first_token = blockIdx.y * by.block_tokens, i = 0;
  if (sides == 1)
    for (; run >= by.of_member[i]; i++) run -= by.of_member[i];
  const common_member *members = c.members + i;
  int share = warp_index() & ((1 << by.log_sharing) - 1), passes = by.block_tokens / pass_tokens;
  passes = max(0, (passes - share + (1 << by.log_sharing) - 1) >> by.log_sharing);
  int at = run * by.block_tiles + (warp_index() >> by.log_sharing);
  int end = min((run + 1) * by.block_tiles, (int(members->rows) + tile - 1) / tile);
  int row_bytes = hidden_row_bytes(members->u.rows);
  int own = sides * by.block_tokens * row_bytes + warp_index() * warp_bytes(sides, by.block_tokens);
  warp_extension<sides, in_fours> work = {c, members, gains, shared_address(shared), shared_address(shared) + own,
                                          reinterpret_cast<float2 *>(shared + own + depth * slot_bytes), first_token,
                                          by.block_tokens, c.tokens - first_token, share, passes, by.log_sharing,
                                          row_bytes, int(c.y_stride)};
  bool busy = at < end;
  if (busy) work.begin(at * tile, 0);
  for (int k = threadIdx.x; k < sides * by.block_tokens; k += blockDim.x) {
    int side = sides > 1 && k >= by.block_tokens, token = k - side * by.block_tokens;
    gains[side][token] = vectors_of(c, members[side], first_token + token).e;
  }
  __syncthreads();
  if (busy) work.fetch_gains(0), work.fetch_gains(1);
  wait_for_before();
  stage_hidden<sides>(c, members, first_token, by.block_tokens, shared_address(shared), row_bytes);
  if (busy) work.fetch_outputs(0), work.fetch_outputs(1);
  static_assert(depth == 2);
  if (!busy) commit_copies(), commit_copies();
  wait_for_copies<depth - 1>();
  __syncthreads();
  for (int rank = 0; busy;) {
    work.run(gate);
    rank += ranks_at_once;
    if (rank >= members->u.rows) rank = 0, at += by.at_once;
    busy = at < end;
    if (!busy) break;
    work.begin(at * tile, rank);
#pragma unroll 1
    for (int job = 0; job < depth; job++) work.fetch_gains(job), work.fetch_outputs(job);
  }
}

// What comes after more members than that is attention (they are q, k and v). Its blocks, each alone on a multiprocessor,
// read the cache as soon as they find one: half of them are left to it.
constexpr int most_before_all = 2;

// How a launch is divided, and what it takes.
struct extend_plan {
  extend_division by;
  unsigned blocks, groups;  // of rows; of tokens
  int warps, shared_bytes;

  // So many tiles of rows a block that all blocks run at once.
  extend_plan(const common_call &call, int sides, const lone_device &device) : by{}, warps(most_warps) {
    int64_t rank = 0, tiles = 0;
    for (int i = 0; i < call.n_members; i++) rank = std::max(rank, call.members[i].u.rows);
    int members = sides == 1 ? call.n_members : 1;  // which are divided
    for (int i = 0; i < members; i++) tiles += tiles_of(call.members[i]);
    by.block_tokens = sides == 1 ? most_tokens : most_tokens_gated;
    while (!fits(sides, rank, device)) by.block_tokens > pass_tokens ? by.block_tokens -= pass_tokens : warps /= 2;
    groups = blocks_of(call.tokens, by.block_tokens);
    by.block_tokens = int(cpu_align((call.tokens + groups - 1) / groups, pass_tokens));
    fits(sides, rank, device);
    int64_t wanted = std::max<int64_t>(1, device.multiprocessors / groups / (call.n_members > most_before_all ? 2 : 1));
    by.block_tiles = int((tiles + wanted - 1) / wanted);
    while (by.block_tiles << (by.log_sharing + 1) <= warps) by.log_sharing++;
    by.at_once = warps >> by.log_sharing;
    blocks = 0;
    for (int i = 0; i < members; i++)
      blocks += by.of_member[i] = blocks_of(tiles_of(call.members[i]), by.block_tiles);
  }

 private:
  static int64_t tiles_of(const common_member &m) { return (m.rows + tile - 1) / tile; }
  bool fits(int sides, int64_t rank, const lone_device &device) {
    int gains = sides * most_tokens * int(sizeof(float *));
    shared_bytes = sides * by.block_tokens * hidden_row_bytes(rank) + warps * warp_bytes(sides, by.block_tokens);
    return shared_bytes + gains <= device.shared_bytes;
  }
};

template <int sides, bool in_fours>
void launch_sides(const queue &q, const common_call &call, const lone_gate &gate, const lone_device &device) {
  extend_plan plan(call, sides, device);
  auto kernel = extend<sides, in_fours>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes), "launch of a kernel");
  launch(q, kernel, dim3(plan.blocks, plan.groups), unsigned(plan.warps * warp_size), size_t(plan.shared_bytes), call,
         plan.by, gate);
}

}  // namespace

static bool in_fours(const common_call &call) {
  int64_t all = call.y_stride;
  for (int i = 0; i < call.n_members; i++) all |= call.members[i].row | call.members[i].rows;
  return all % 4 == 0;
}

bool can_gate(const common_call &call) {
  const common_member &a = call.members[0], &b = call.members[1];
  return call.n_members == 2 && a.rows == b.rows && a.u.rows == b.u.rows && a.u.rows <= ranks_at_once && in_fours(call);
}

void launch_extend(const queue &q, const common_call &call, const lone_gate *gate, const lone_device &device) {
  if (gate)
    launch_sides<2, true>(q, call, *gate, device);
  else if (in_fours(call))
    launch_sides<1, true>(q, call, {}, device);
  else
    launch_sides<1, false>(q, call, {}, device);
}

}  // namespace adaptrt
