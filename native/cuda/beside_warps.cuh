// What the warps beside a product do (beside.cuh).
#ifndef ADAPTRT_CUDA_BESIDE_WARPS_CUH
#define ADAPTRT_CUDA_BESIDE_WARPS_CUH
#include "beside.cuh"
#include "panels.cuh"

namespace adaptrt {

// ---- barriers ----

__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Of the warps that multiply, when the tokens are staged; of those beside them; of all, when changes are there.
constexpr int multipliers_barrier = 1, terms_barrier = 2, beside_barrier = 3, changes_barrier = 4;

// y = gain * y + delta, [tiles, tokens, 16] of each; gains only with vectors.
struct changes {
  float *delta, *gain;
  __device__ void step(int items) { delta += items, gain += items; }
};
__device__ inline changes changes_of(uint8_t *shared, const beside_call &c, int tiles, int tokens) {
  float *delta = reinterpret_cast<float *>(shared + c.plan.changes);
  return {delta, delta + tiles * tokens * tile_rows};
}

__device__ inline void copy_16(const void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// ---- a step's operand: 16 ranks by 16 inputs or outputs of a piece, of which a lane has some words ----

template <weight_kind kind>
struct step_words {
  static constexpr int bytes = tile_bytes(kind) / 4 / warp_size;
  union {
    uint32_t word[bytes / 4];
    std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, uint32_t>> all;
  };

  // Where the lane's are in a piece.
  static __device__ int place(int step) {
    int vector = threadIdx.x % warp_size * 16;
    return bytes == 16 ? step * 512 + vector : bytes == 8 ? step / 2 * 512 + vector + step % 2 * 8 : vector + step * 4;
  }
  __device__ void load(const uint8_t *from) { all = *reinterpret_cast<const decltype(all) *>(from); }
  __device__ void operand(uint32_t a[4]) const {
    if constexpr (kind == weight_kind::nf4) {
      nf4_bytes values = nf4_as_bf16();
      decode_nf4(word[0], values, a[0], a[1]);
      decode_nf4(word[0] >> 16, values, a[2], a[3]);
    } else if constexpr (kind == weight_kind::int8) {
      for (int r = 0; r < 4; r++) a[r] = int8_pair(word[r / 2], r % 2);
    } else {
      for (int r = 0; r < 4; r++) a[r] = word[r];
    }
  }
  static __device__ void copy(const uint8_t *to, const uint8_t *from) {
    if constexpr (bytes == 16)
      copy_16(to, from);
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(bytes)
                   : "memory");
  }
};

// ---- the work of a block's warps beside the product ----
//
// A warp does one instruction after the other, and most of them once: each costs about ten cycles, most of that for
// fetching it, while the shortest products take some thousands. So some warps fetch what V x needs and do it while others
// fetch what U h needs, and then all go on together; and there are no divisions.

template <weight_kind kind>
struct beside_warps {
  static constexpr int piece_bytes = tile_bytes(kind), step_bytes = piece_bytes / 4;
  const beside_call &c;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int rows, columns, tokens;  // columns in blocks of 64
  int first_tile, tiles;      // the block's
  int warp, warps, lane;      // of those that work together
  uint8_t *shared;

  // From a token's parts to the next one's, and of a slot's first token.
  __device__ int part_stride() const { return c.n_members * c.rank_pieces * c.splits() * panel_ranks; }
  __device__ uint64_t *parts_of(int slot, int member, int piece) const {
    return c.parts + slot * c.slot_tokens * part_stride() + (member * c.rank_pieces + piece) * c.splits() * panel_ranks;
  }

  // ---- V x ----

  // 16 ranks of a term by a part of the columns, and where the lane finds its part of them.
  struct unit {
    int blocks, tokens;  // no tokens: nothing to do
    const uint8_t *codes;
    const float *scales;
    const __nv_bfloat16 *x;
    uint64_t *to;
  };
  __device__ bool find_unit(int n, unit &u) const {
    int split = n & (c.splits() - 1), piece = n >> c.log_splits, slot = 0, member = 0;
    for (; piece >= c.n_members * c.rank_pieces; slot++) piece -= c.n_members * c.rank_pieces;
    for (; piece >= c.rank_pieces; member++) piece -= c.rank_pieces;
    if (slot >= c.n_slots) return false;
    const beside_term &t = c.terms[c.members[member].target * c.n_slots + slot];
    int begin = columns * split >> c.log_splits, end = columns * (split + 1) >> c.log_splits;
    int token = min(lane / 4, t.n_tokens - 1), first = piece * t.v_blocks + begin;
    u.blocks = end - begin;
    u.tokens = piece < t.pieces ? t.n_tokens : 0;
    u.codes = t.v + int64_t(first) * piece_bytes;
    u.scales = t.v_scales + first * panel_ranks + lane / 4;
    u.x = x + (t.token + token) * x_stride + begin * BLOCK + lane % 4 * 16;
    u.to = parts_of(slot, member, piece) + split * panel_ranks + lane % 4 * 2 * part_stride() + lane / 4;
    return true;
  }
  static __device__ int blocks() { return gridDim.x * gridDim.y; }
  __device__ int first_unit() const { return blockIdx.x + gridDim.x * blockIdx.y + warp * blocks(); }
  __device__ uint8_t *v_room() const { return shared + c.plan.v + warp * c.plan.v_room * piece_bytes; }

  __device__ void prefetch_v(const unit &u) const {
    int bytes = u.tokens ? min(u.blocks, c.plan.v_room) * piece_bytes : 0;
#pragma unroll 1
    for (int i = lane * 16; i < bytes; i += warp_size * 16) copy_16(v_room() + i, u.codes + i);
  }

  // Two blocks of columns of the lane's token, and what V's codes there are times.
  struct unit_input {
    uint4 x[2][2];
    float by[2][2];
    __device__ void load(const unit &u, int first) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int block = min(first + i / 2, u.blocks - 1);
        bool there = first + i / 2 < u.blocks;
        x[i / 2][i % 2] = reinterpret_cast<const uint4 *>(u.x + block * BLOCK)[i % 2];
        by[i / 2][i % 2] = there && kind != weight_kind::bf16 ? __ldg(u.scales + block * panel_ranks + i % 2 * 8) : there;
      }
    }
  };

  // In lane 4g + t: ranks g and g + 8 by tokens 2t and 2t + 1. `fetched` pieces are in shared memory.
  __device__ void multiply_unit(const unit &u, int fetched, float sums[4]) const {
    const uint8_t *ahead = v_room();
    unit_input now, next;
    now.load(u, 0);
#pragma unroll 1
    for (int first = 0; first < u.blocks; first += 2, now = next) {
      if (first + 2 < u.blocks) next.load(u, first + 2);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int block = min(first + i, u.blocks - 1);
        const uint8_t *codes = (block < fetched ? ahead : u.codes) + block * piece_bytes;
        float sum[4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {
          step_words<kind> words;
          uint32_t a[4];
          words.load(codes + step_words<kind>::place(s));
          words.operand(a);
          multiply_add(sum, a, word_of(now.x[i][s / 2], s % 2 * 2), word_of(now.x[i][s / 2], s % 2 * 2 + 1));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) sums[k] += now.by[i][k / 2] * sum[k];
      }
    }
  }

  // A sum and the launch's number in one store, so that who sees the one sees the other.
  __device__ void leave(const unit &u, const float sums[4], uint32_t launch) const {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (lane % 4 * 2 + k % 2 >= u.tokens) continue;
      uint64_t value = uint64_t(launch) << 32 | __float_as_uint(sums[k]), *to = u.to + k % 2 * part_stride() + k / 2 * 8;
      asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
    }
  }

  // From the warp's first unit on, of which pieces are on their way.
  __device__ void shrink(unit &u, bool there, uint32_t launch) const {
    int fetched = c.plan.v_room;
#pragma unroll 1
    for (int n = first_unit(); there; there = find_unit(n += blocks() * warps, u), fetched = 0) {
      float sums[4] = {};
      if (!u.tokens) continue;
      multiply_unit(u, fetched, sums);
      leave(u, sums, launch);
    }
  }

  // ---- the block's tiles, by member ----

  // [members, slots]
  __device__ beside_term *terms() const { return reinterpret_cast<beside_term *>(shared + c.plan.terms); }
  // [members, slots, slot_tokens, rank_pieces * 16]
  __device__ float *hidden_at(int member, int slot) const {
    int row = (member * c.n_slots + slot) * c.slot_tokens;
    return reinterpret_cast<float *>(shared + c.plan.hidden) + row * c.rank_pieces * panel_ranks;
  }
  // Where a member's tiles start and end, counted from the block's first.
  __device__ int start_of(int member) const { return (member ? c.members[member - 1].end_tile : 0) - first_tile; }
  __device__ int end_of(int member) const { return c.members[member].end_tile - first_tile; }

  __device__ void fetch_terms() const {
    constexpr int vectors = sizeof(beside_term) / 16;
#pragma unroll 1
    for (int member = 0; member < c.n_members && warp == 0; member++) {
      const uint4 *from = reinterpret_cast<const uint4 *>(c.terms + c.members[member].target * c.n_slots);
      uint4 *to = reinterpret_cast<uint4 *>(terms() + member * c.n_slots);
#pragma unroll 1
      for (int i = lane; i < c.n_slots * vectors; i += warp_size) copy_16(to + i, from + i);
    }
    commit_copies();
    wait_for_copies<0>();
    sync_threads(terms_barrier, warps * warp_size);
  }

  // ---- h = scale * d * V x ----

  // Two neighbouring ranks of a piece: four groups of lanes take turns at the splits.
  __device__ float2 await_sums(const uint64_t *of_piece, uint32_t launch) const {
    constexpr int groups = least_splits_beside, most_turns = most_splits_beside / groups;
    int turns = c.splits() / groups;
    const uint64_t *from = of_piece + lane / 8 * panel_ranks + lane % 8 * 2;
    uint64_t v[most_turns][2];
    uint32_t stale;
    do {
#pragma unroll
      for (int i = 0; i < most_turns; i++)
        asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                     : "=l"(v[i][0]), "=l"(v[i][1]) : "l"(from + min(i, turns - 1) * groups * panel_ranks) : "memory");
      stale = 0;
#pragma unroll
      for (int i = 0; i < 2 * most_turns; i++) stale |= uint32_t(v[i / 2][i % 2] >> 32) ^ launch;
    } while (stale);
    float2 sum = {0, 0};
#pragma unroll
    for (int i = 0; i < most_turns; i++)
      if (i < turns) sum.x += __uint_as_float(uint32_t(v[i][0])), sum.y += __uint_as_float(uint32_t(v[i][1]));
#pragma unroll
    for (int step = 8; step < warp_size; step *= 2) {
      sum.x += __shfl_xor_sync(all_lanes, sum.x, step);
      sum.y += __shfl_xor_sync(all_lanes, sum.y, step);
    }
    return sum;
  }

  // As a pair for tensor cores: values as bfloat16 and what is left of them, whose sum is exact enough; where scales of U
  // come to it first, as it is.
  static __device__ uint2 operand_pair(float2 h) {
    __nv_bfloat162 upper = __floats2bfloat162_rn(h.x, h.y);
    float2 whole = __bfloat1622float2(upper);
    __nv_bfloat162 lower = __floats2bfloat162_rn(h.x - whole.x, h.y - whole.y);
    return {*reinterpret_cast<uint32_t *>(&upper), *reinterpret_cast<uint32_t *>(&lower)};
  }
  static __device__ void leave_hidden(float *to, float2 h) {
    if constexpr (kind == weight_kind::bf16)
      *reinterpret_cast<uint2 *>(to) = operand_pair(h);
    else
      *reinterpret_cast<float2 *>(to) = h;
  }

  // All pieces of a slot's tokens, as far as it is the warp's turn.
  __device__ void gather_slot(int member, int slot, uint32_t launch, int &turn) const {
    const beside_term &t = terms()[member * c.n_slots + slot];
    int pair = lane % 8 * 2;
    const uint64_t *from = parts_of(slot, member, 0);
    float *to = hidden_at(member, slot) + pair;
#pragma unroll 1
    for (int token = 0; token < t.n_tokens; token++, from += part_stride(), to += c.rank_pieces * panel_ranks)
#pragma unroll 1
      for (int piece = 0; piece < t.pieces; piece++) {
        if (--turn) continue;
        turn = warps;
        float2 sum = await_sums(from + piece * c.splits() * panel_ranks, launch), by = {t.scale, t.scale};
        int rank = piece * panel_ranks + pair;
        if (t.d) by.x *= __ldg(t.d + min(rank, t.width - 1)), by.y *= __ldg(t.d + min(rank + 1, t.width - 1));
        if (lane < 8) leave_hidden(to + piece * panel_ranks, {by.x * sum.x, by.y * sum.y});
      }
  }
  // For the members that the block has tiles of.
  __device__ void gather(uint32_t launch) const {
    int turn = warp + 1;
#pragma unroll 1
    for (int member = 0; member < c.n_members; member++)
#pragma unroll 1
      for (int slot = 0; slot < c.n_slots && start_of(member) < tiles && end_of(member) > 0; slot++)
        gather_slot(member, slot, launch, turn);
  }

  // ---- U h ----

  // A warp takes every so manieth of the block's tiles, and for each all slots. What a slot needs for a tile is an entry in the
  // warp's ring in shared memory: the words of each piece, the scales of their ranks, and vectors of the outputs, e and
  // g_out.
  struct entry {
    int tile, slot, member, place;
  };
  __device__ int ring() const { return c.plan.u_tiles * c.n_slots + c.plan.u_slots; }
  __device__ entry entry_from(int tile, int slot) const {
    entry at = {tile, slot, 0, 0};
    find_member(at);
    return at;
  }
  __device__ void find_member(entry &at) const {
    while (at.member + 1 < c.n_members && at.tile >= end_of(at.member)) at.member++;
  }
  __device__ void step(entry &at, int all) const {
    if (++at.place == ring()) at.place = 0;
    if (++at.slot < c.n_slots) return;
    at.slot = 0, at.tile += all;
    find_member(at);
  }
  __device__ const beside_term &term_of(const entry &at) const { return terms()[at.member * c.n_slots + at.slot]; }
  __device__ uint8_t *room_of(const entry &at, int of_warp) const {
    return shared + c.plan.u + (of_warp * ring() + at.place) * c.entry_bytes;
  }
  __device__ float *scales_of(uint8_t *room) const { return reinterpret_cast<float *>(room + c.rank_pieces * step_bytes); }
  __device__ float *vectors_of(uint8_t *room) const {
    return scales_of(room) + (kind == weight_kind::bf16 ? 0 : c.rank_pieces * panel_ranks);
  }

  __device__ void fetch(const entry &at, int of_warp) const {
    const beside_term &t = term_of(at);
    uint8_t *room = room_of(at, of_warp);
    int tile = at.tile - start_of(at.member), row = tile * tile_rows + lane * 4;
    int64_t first = int64_t(tile / 4) * t.pieces;
    const uint8_t *words = t.u + first * piece_bytes + step_words<kind>::place(tile % 4);
#pragma unroll 1
    for (int i = 0; i < t.pieces; i++)
      step_words<kind>::copy(room + i * step_bytes + lane * step_words<kind>::bytes, words + i * piece_bytes);
    if constexpr (kind != weight_kind::bf16)
#pragma unroll 1
      for (int i = lane * 4; i < t.pieces * panel_ranks; i += warp_size * 4)
        copy_16(scales_of(room) + i, t.u_scales + first * panel_ranks + i);
    if (!c.vectors || lane >= tile_rows / 4 || lane * 4 >= rows - (first_tile + at.tile) * tile_rows) return;
    if (t.e) copy_16(vectors_of(room) + lane * 4, t.e + row);
    if (t.g_out) copy_16(vectors_of(room) + tile_rows + lane * 4, t.g_out + row);
  }
  // What there is room for, for all warps.
  __device__ void prefetch_u(int all) const {
#pragma unroll 1
    for (int of_warp = warp; of_warp < all; of_warp += warps) {
      entry at = entry_from(of_warp, 0);
#pragma unroll 1
      for (int n = 0; n < ring() && at.tile < tiles; n++, step(at, all)) fetch(at, of_warp);
    }
  }

  // What changes in a tile, in lane 4g + t: outputs 2g and 2g + 1 by tokens 2t and 2t + 1.
  struct tile_changes {
    float2 delta[2], gain[2];
  };

  // Column g of the second operand: 16 ranks' values for token g. In a warp all columns of other tokens are zeros.
  __device__ void load_operand(const float *values, const float *scales, uint32_t upper[2], uint32_t lower[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int rank = lane % 4 * 2 + i * 8;
      uint2 pair = {0, 0};
      if (values && kind == weight_kind::bf16) pair = *reinterpret_cast<const uint2 *>(values + rank);
      if (values && kind != weight_kind::bf16) {
        float2 h = *reinterpret_cast<const float2 *>(values + rank), by = *reinterpret_cast<const float2 *>(scales + rank);
        pair = operand_pair({by.x * h.x, by.y * h.y});
      }
      upper[i] = pair.x, lower[i] = pair.y;
    }
  }

  __device__ void multiply_entry(const entry &at, const beside_term &t, uint8_t *room, float sums[4]) const {
    int token = lane / 4 - t.token;
    const float *values = hidden_at(at.member, at.slot) + token * c.rank_pieces * panel_ranks;
    if (unsigned(token) >= unsigned(t.n_tokens)) values = nullptr;
#pragma unroll 1
    for (int piece = 0; piece < t.pieces; piece++) {
      step_words<kind> words;
      uint32_t a[4], upper[2], lower[2];
      words.load(room + piece * step_bytes + lane * step_words<kind>::bytes);
      words.operand(a);
      load_operand(values ? values + piece * panel_ranks : nullptr, scales_of(room) + piece * panel_ranks, upper, lower);
      multiply_add(sums, a, upper[0], upper[1]);
      multiply_add(sums, a, lower[0], lower[1]);
    }
  }

  // A token of another slot is left as it is, whatever comes of zeros times this slot's U.
  __device__ void expand_entry(const entry &at, tile_changes &tile) const {
    const beside_term &t = term_of(at);
    uint8_t *room = room_of(at, warp);
    float sums[4] = {};
    multiply_entry(at, t, room, sums);
    const float2 *vectors = reinterpret_cast<const float2 *>(vectors_of(room)) + lane / 4;
    float2 e = {1, 1}, gain = {1, 1};
    if (c.vectors && t.e) e = vectors[0];
    if (c.vectors && t.g_out) gain = vectors[tile_rows / 2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (unsigned(lane % 4 * 2 + i - t.token) >= unsigned(t.n_tokens)) continue;
      float2 &delta = tile.delta[i];
      delta = {gain.x * (delta.x + e.x * sums[i]), gain.y * (delta.y + e.y * sums[2 + i])};
      tile.gain[i] = {gain.x * tile.gain[i].x, gain.y * tile.gain[i].y};
    }
  }

  __device__ void leave_changes(int tile, const tile_changes &values) const {
    changes at = changes_of(shared, c, tiles, tokens);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int token = lane % 4 * 2 + i, item = (tile * tokens + token) * tile_rows + lane / 4 * 2;
      if (token >= tokens) continue;
      *reinterpret_cast<float2 *>(at.delta + item) = values.delta[i];
      if (c.vectors) *reinterpret_cast<float2 *>(at.gain + item) = values.gain[i];
    }
  }

  // The adapters of a stack one after the other. Where an entry was comes the one that is a ring further.
  __device__ void expand() const {
    constexpr int depth = 8;
    entry at = entry_from(warp, 0), later = entry_from(warp + c.plan.u_tiles * warps, c.plan.u_slots);
#pragma unroll 1
    while (at.tile < tiles) {
      tile_changes values = {{}, {{1, 1}, {1, 1}}};
      int tile = at.tile;
#pragma unroll 1
      do {
        if (ring() < depth) wait_for_copies<0>();
        else wait_for_copies<depth - 1>();
        __syncwarp();
        expand_entry(at, values);
        __syncwarp();
        if (later.tile < tiles) {
          fetch(later, warp);
          step(later, warps);
        }
        commit_copies();
        step(at, warps);
      } while (at.tile == tile);
      leave_changes(tile, values);
    }
  }

  __device__ void run_v(uint32_t launch) const {
    unit first;
    bool there = find_unit(first_unit(), first);
    if (there) prefetch_v(first);
    commit_copies();
    wait_for_kernel_before();
    wait_for_copies<0>();
    __syncwarp();
    shrink(first, there, launch);
  }

  // First the warps of U and those of V, then all together. The other warps wait for changes_barrier.
  __device__ void run() {
    int all = c.u_warps + c.v_warps, of_all = warp;
    uint32_t launch = *c.step * most_launches_beside + c.launch;
    if (warp < c.u_warps) {
      warps = c.u_warps;
      fetch_terms();
      prefetch_u(all);
      commit_copies();
      wait_for_kernel_before();
      wait_for_copies<0>();
    } else {
      warp -= c.u_warps, warps = c.v_warps;
      run_v(launch);
    }
    warp = of_all, warps = all;
    sync_threads(beside_barrier, all * warp_size);
    gather(launch);
    sync_threads(beside_barrier, all * warp_size);
    expand();
    __syncwarp();
    arrive_threads(changes_barrier, blockDim.x);
  }
};

}  // namespace adaptrt
#endif
