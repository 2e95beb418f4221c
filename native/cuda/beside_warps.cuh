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

constexpr int tokens_barrier = 1, beside_barrier = 2;

// Passed once all changes of the block are there: an arrival a warp.
struct changes_ready {
  uint32_t at;
  __device__ changes_ready(uint8_t *shared, const beside_call &c) : at(shared_address(shared + c.plan.ready)) {}
  __device__ void init(int warps) const { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(warps) : "memory"); }
  __device__ void arrive() const {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(at) : "memory");
  }
  __device__ void wait() const {
    uint32_t passed;
    do {
      asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
                   : "=r"(passed) : "r"(at) : "memory");
    } while (!passed);
  }
};

// [tiles, tokens, 16]: y = x y + y of the changes of the block's outputs.
__device__ inline float2 *changes_of(uint8_t *shared, const beside_call &c) {
  return reinterpret_cast<float2 *>(shared + c.plan.changes);
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
    int lane = threadIdx.x % warp_size;
    return bytes == 16 ? step * 512 + lane * 16 : bytes == 8 ? step / 2 * 512 + lane * 16 + step % 2 * 8 : lane * 16 + step * 4;
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
  static __device__ void copy(uint8_t *to, const uint8_t *from) {
    if constexpr (bytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(bytes) : "memory");
  }
};

// ---- the work of a block's warps beside the product ----

template <weight_kind kind>
struct beside_warps {
  static constexpr int piece_bytes = tile_bytes(kind), step_bytes = piece_bytes / 4;
  const beside_call &c;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int tokens, columns;      // columns in blocks of 64
  int first_tile, tiles;    // the block's
  int warp, lane;
  uint8_t *shared;

  __device__ beside_term *terms() const { return reinterpret_cast<beside_term *>(shared + c.plan.terms); }
  __device__ const beside_term &term_at(int slot, int member) const { return terms()[slot * c.n_members + member]; }
  // [members, slots, slot_tokens, rank_pieces * 16]
  __device__ float *hidden(int member, int slot, int token) const {
    int row = (member * c.n_slots + slot) * c.slot_tokens + token;
    return reinterpret_cast<float *>(shared + c.plan.hidden) + row * c.rank_pieces * panel_ranks;
  }
  __device__ uint64_t *parts(int slot, int token, int member, int piece) const {
    return c.parts + (((slot * c.slot_tokens + token) * c.n_members + member) * c.rank_pieces + piece) * c.splits * panel_ranks;
  }
  __device__ void sync() const { sync_threads(beside_barrier, c.warps * warp_size); }

  __device__ void find_terms() const {
    for (int i = warp * warp_size + lane; i < c.n_slots * c.n_members; i += c.warps * warp_size)
      terms()[i].find(c.slots[i / c.n_members], c.members[i % c.n_members].target);
    sync();
  }

  // ---- V x ----

  // 16 ranks of a term by a part of the columns.
  struct unit {
    int slot, member, piece, split, begin, end;
  };
  __device__ bool find_unit(int n, unit &u) const {
    u.split = n % c.splits, n /= c.splits;
    u.piece = n % c.rank_pieces, n /= c.rank_pieces;
    u.member = n % c.n_members, u.slot = n / c.n_members;
    u.begin = columns * u.split / c.splits, u.end = columns * (u.split + 1) / c.splits;
    return u.slot < c.n_slots;
  }
  __device__ const uint8_t *v_of(const unit &u) const {
    const beside_term &t = term_at(u.slot, u.member);
    return t.v + (int64_t(u.piece) * t.v_blocks + u.begin) * piece_bytes;
  }
  __device__ uint8_t *v_room() const { return shared + c.plan.v + warp * c.plan.v_room * piece_bytes; }
  __device__ int first_unit() const { return blockIdx.x + warp * gridDim.x; }

  __device__ void prefetch_v() const {
    unit u;
    if (!find_unit(first_unit(), u) || u.piece >= term_at(u.slot, u.member).pieces()) return;
    const uint8_t *from = v_of(u);
    int bytes = min(u.end - u.begin, c.plan.v_room) * piece_bytes;
    for (int i = lane * 16; i < bytes; i += warp_size * 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(v_room() + i)), "l"(from + i) : "memory");
  }

  // In lane 4g + t: ranks g and g + 8 by tokens 2t and 2t + 1.
  __device__ void multiply_unit(const unit &u, const beside_term &t, bool fetched, float sums[4]) const {
    constexpr int together = 2;
    const uint8_t *v = v_of(u);
    int at = (t.token + min(lane / 4, t.n_tokens - 1)), n = u.end - u.begin;
    const __nv_bfloat16 *from = x + at * x_stride + u.begin * BLOCK + lane % 4 * 16;
    const float *scales = t.v_scales + (int64_t(u.piece) * t.v_blocks + u.begin) * panel_ranks + lane / 4;
#pragma unroll 1
    for (int first = 0; first < n; first += together) {
      uint4 values[together][2];
      float by[together][2];
#pragma unroll
      for (int i = 0; i < together; i++) {
        int block = min(first + i, n - 1);
        for (int h = 0; h < 2; h++) {
          values[i][h] = reinterpret_cast<const uint4 *>(from + block * BLOCK)[h];
          by[i][h] = first + i >= n ? 0.f : kind == weight_kind::bf16 ? 1.f : __ldg(scales + block * panel_ranks + 8 * h);
        }
      }
#pragma unroll
      for (int i = 0; i < together; i++) {
        int block = min(first + i, n - 1);
        const uint8_t *codes = fetched && block < c.plan.v_room ? v_room() + block * piece_bytes : v + int64_t(block) * piece_bytes;
        float sum[4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {
          step_words<kind> words;
          uint32_t a[4];
          words.load(codes + step_words<kind>::place(s));
          words.operand(a);
          multiply_add(sum, a, word_of(values[i][s / 2], s % 2 * 2), word_of(values[i][s / 2], s % 2 * 2 + 1));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) sums[k] += by[i][k / 2] * sum[k];
      }
    }
  }

  // A sum and the launch's number in one store, so that who sees the one sees the other.
  __device__ void leave(const unit &u, const beside_term &t, const float sums[4], uint32_t launch) const {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      int token = lane % 4 * 2 + k % 2, rank = lane / 4 + k / 2 * 8;
      if (token >= t.n_tokens) continue;
      uint64_t *to = parts(u.slot, token, u.member, u.piece) + u.split * panel_ranks + rank;
      uint64_t value = uint64_t(launch) << 32 | __float_as_uint(sums[k]);
      asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
    }
  }

  __device__ void shrink(uint32_t launch) const {
    unit u;
#pragma unroll 1
    for (int n = first_unit(); find_unit(n, u); n += gridDim.x * c.warps) {
      const beside_term &t = term_at(u.slot, u.member);
      if (u.piece >= t.pieces()) continue;
      float sums[4] = {};
      multiply_unit(u, t, n == first_unit(), sums);
      leave(u, t, sums, launch);
    }
  }

  // ---- h = scale * d * V x ----

  // Two neighbouring ranks of a piece: four groups of lanes take turns at the splits.
  __device__ float2 await_sums(const uint64_t *from, uint32_t launch) const {
    constexpr int groups = 4, turns = most_splits_beside / groups;
    int pair = lane % 8, group = lane / 8;
    uint64_t v[turns][2];
    bool fresh;
    do {
      fresh = true;
#pragma unroll
      for (int i = 0; i < turns; i++) {
        int split = group + i * groups;
        v[i][0] = v[i][1] = uint64_t(launch) << 32;
        if (split < c.splits)
          asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                       : "=l"(v[i][0]), "=l"(v[i][1]) : "l"(from + split * panel_ranks + pair * 2) : "memory");
      }
#pragma unroll
      for (int i = 0; i < turns; i++) fresh = fresh && v[i][0] >> 32 == launch && v[i][1] >> 32 == launch;
    } while (!fresh);
    float2 sum = {0, 0};
#pragma unroll
    for (int i = 0; i < turns; i++) sum.x += __uint_as_float(uint32_t(v[i][0])), sum.y += __uint_as_float(uint32_t(v[i][1]));
#pragma unroll
    for (int step = 8; step < warp_size; step *= 2) {
      sum.x += __shfl_xor_sync(all_lanes, sum.x, step);
      sum.y += __shfl_xor_sync(all_lanes, sum.y, step);
    }
    return sum;
  }

  __device__ int member_of(int tile) const {
    int member = 0;
    while (member < c.n_members - 1 && tile >= c.members[member].end_tile) member++;
    return member;
  }

  // Of the members that the block has tiles of.
  __device__ void gather(uint32_t launch) const {
    int first = member_of(first_tile), members = member_of(first_tile + tiles - 1) - first + 1;
    int all = members * c.n_slots * c.slot_tokens * c.rank_pieces;
#pragma unroll 1
    for (int i = warp; i < all; i += c.warps) {
      int piece = i % c.rank_pieces, n = i / c.rank_pieces, token = n % c.slot_tokens;
      n /= c.slot_tokens;
      int slot = n % c.n_slots, member = first + n / c.n_slots, rank = piece * panel_ranks + lane % 8 * 2;
      const beside_term &t = term_at(slot, member);
      if (token >= t.n_tokens || piece >= t.pieces()) continue;
      float2 by = {t.scale, t.scale};
      if (t.d) by.x *= t.d[min(rank, t.width - 1)], by.y *= t.d[min(rank + 1, t.width - 1)];
      float2 sum = await_sums(parts(slot, token, member, piece), launch);
      if (lane < 8) *reinterpret_cast<float2 *>(hidden(member, slot, token) + rank) = {by.x * sum.x, by.y * sum.y};
    }
    sync();
  }

  // ---- U h ----

  // The lane's words of a tile's 16 outputs by 16 ranks.
  __device__ const uint8_t *u_of(const beside_term &t, int tile_of_member, int piece) const {
    int64_t at = int64_t(tile_of_member / 4) * t.pieces() + piece;
    return t.u + at * piece_bytes + step_words<kind>::place(tile_of_member % 4);
  }
  __device__ int tile_of_member(int tile, int member) const {
    return first_tile + tile - (member ? c.members[member - 1].end_tile : 0);
  }
  __device__ uint8_t *u_room(int number) const {
    return shared + c.plan.u + number * step_bytes + lane * step_words<kind>::bytes;
  }

  // do_piece(number among the block's, the term, tile's member, slot, piece) for a tile's.
  __device__ void prefetch_u() const {
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += c.warps) {
      int member = member_of(first_tile + tile), number = tile * c.n_slots * c.rank_pieces;
#pragma unroll 1
      for (int slot = 0; slot < c.n_slots; slot++) {
        const beside_term &t = term_at(slot, member);
        for (int piece = 0; piece < t.pieces() && number + slot * c.rank_pieces + piece < c.plan.u_room; piece++)
          step_words<kind>::copy(u_room(number + slot * c.rank_pieces + piece), u_of(t, tile_of_member(tile, member), piece));
      }
    }
  }

  // Column g of the second operand: the values of 16 ranks for token g, as an upper and a lower half whose sum is exact
  // enough; zeros where the term is not that token's.
  __device__ void columns_of(const float *values, const float *scales, uint32_t upper[2], uint32_t lower[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int rank = lane % 4 * 2 + i * 8;
      float2 h = values ? *reinterpret_cast<const float2 *>(values + rank) : float2{0, 0};
      if constexpr (kind != weight_kind::bf16) {
        float2 by = __ldg(reinterpret_cast<const float2 *>(scales + rank));
        h.x *= by.x, h.y *= by.y;
      }
      __nv_bfloat162 high = __floats2bfloat162_rn(h.x, h.y);
      float2 whole = __bfloat1622float2(high);
      __nv_bfloat162 rest = __floats2bfloat162_rn(h.x - whole.x, h.y - whole.y);
      upper[i] = *reinterpret_cast<uint32_t *>(&high), lower[i] = *reinterpret_cast<uint32_t *>(&rest);
    }
  }

  // A slot's term, for eight tokens: in lane 4g + t outputs 2g and 2g + 1 by tokens 2t and 2t + 1.
  __device__ void expand_slot(int tile, int member, int slot, int first_token, float sums[4]) const {
    const beside_term &t = term_at(slot, member);
    int token = first_token + lane / 4 - t.token, in_member = tile_of_member(tile, member);
    bool there = token >= 0 && token < t.n_tokens;
#pragma unroll 1
    for (int piece = 0; piece < t.pieces(); piece++) {
      int number = (tile * c.n_slots + slot) * c.rank_pieces + piece;
      step_words<kind> words;
      words.load(number < c.plan.u_room ? u_room(number) : u_of(t, in_member, piece));
      uint32_t a[4], upper[2], lower[2];
      words.operand(a);
      columns_of(there ? hidden(member, slot, token) + piece * panel_ranks : nullptr,
                 t.u_scales + (int64_t(in_member / 4) * t.pieces() + piece) * panel_ranks, upper, lower);
      multiply_add(sums, a, upper[0], upper[1]);
      multiply_add(sums, a, lower[0], lower[1]);
    }
  }

  // y = gain * y + delta, an adapter of the stack after the other.
  __device__ void expand_tile(int tile, int first_token, int64_t rows) const {
    int member = member_of(first_tile + tile), in_member = tile_of_member(tile, member);
    float gain[4] = {1, 1, 1, 1}, delta[4] = {};
#pragma unroll 1
    for (int slot = 0; slot < c.n_slots; slot++) {
      const beside_term &t = term_at(slot, member);
      if (t.token + t.n_tokens <= first_token || t.token >= first_token + 8) continue;
      float sums[4] = {};
      expand_slot(tile, member, slot, first_token, sums);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = first_token + lane % 4 * 2 + i % 2 - t.token, row = in_member * tile_rows + lane / 4 * 2 + i / 2;
        bool there = token >= 0 && token < t.n_tokens && first_tile * int64_t(tile_rows) + tile * tile_rows + lane / 4 * 2 + i / 2 < rows;
        float e = there && t.e ? __ldg(t.e + row) : 1.f, g = there && t.g_out ? __ldg(t.g_out + row) : 1.f;
        delta[i] = g * (delta[i] + e * sums[i]), gain[i] *= g;
      }
    }
    float2 *changes = changes_of(shared, c) + tile * tokens * tile_rows;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int token = first_token + lane % 4 * 2 + i;
      if (token < tokens)
        *reinterpret_cast<float4 *>(changes + token * tile_rows + lane / 4 * 2) = {gain[i], delta[i], gain[i + 2], delta[i + 2]};
    }
  }

  // `all_threads`: of the block; the product's warps wait for them once before they multiply.
  __device__ void run(int all_threads, int64_t rows) const {
    changes_ready ready(shared, c);
    if (warp == 0 && lane == 0) ready.init(c.warps);
    arrive_threads(tokens_barrier, all_threads);
    uint32_t launch = *c.step * most_launches_beside + c.launch;
    find_terms();
    prefetch_v();
    prefetch_u();
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
    wait_for_kernel_before();
    shrink(launch);
    gather(launch);
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += c.warps)
      for (int first_token = 0; first_token < tokens; first_token += 8) expand_tile(tile, first_token, rows);
    __syncwarp();
    if (lane == 0) ready.arrive();
  }
};

}  // namespace adaptrt
#endif
