// What the warps beside a product do (beside.cuh).
#ifndef ADAPTRT_CUDA_BESIDE_WARPS_CUH
#define ADAPTRT_CUDA_BESIDE_WARPS_CUH
#include <stddef.h>

#include "beside_parts.cuh"

namespace adaptrt {

// ---- the work of a block's warps beside the product ----
//
// A warp does one instruction after the other, and most of them once: each costs about ten cycles, most of that for
// fetching it, while the shortest products take some thousands. So some warps fetch what V x needs and do it while others
// fetch what U h needs, and then all go on together; there are no divisions; and what can be known is kept in registers when
// a wait begins, where compilers would rather work it out again.

template <weight_kind kind>
struct beside_warps {
  static constexpr int piece_bytes = tile_bytes(kind), step_bytes = piece_bytes / 4;
  const beside_call &c;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int rows, columns, tokens;  // columns in blocks of 64
  int first_tile, tiles;      // the block's
  int warp, warps, lane;      // of those that work together
  int multipliers;            // the other warps
  uint8_t *shared;

  // Hidden values, and the sums that they are made of, are rows of 16 ranks: [members, slots, slot_tokens, rank_pieces].
  __device__ int rows_of_slot() const { return c.slot_tokens * c.rank_pieces; }
  __device__ int row_of(int member, int slot) const { return (member * c.n_slots + slot) * rows_of_slot(); }
  __device__ float *hidden(int row) const {
    return reinterpret_cast<float *>(shared + c.plan.hidden) + row * panel_ranks;
  }
  __device__ uint64_t *parts(int row) const { return c.parts + row * c.splits() * panel_ranks; }
  __device__ int part_stride() const { return c.rank_pieces * c.splits() * panel_ranks; }  // from token to token

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
    u.to = parts(row_of(member, slot) + piece) + split * panel_ranks + lane % 4 * 2 * part_stride() + lane / 4;
    return true;
  }
  static __device__ int blocks() { return blocks_of_v(gridDim.x * gridDim.y); }
  static __device__ int block() { return blockIdx.x + gridDim.x * blockIdx.y; }
  __device__ uint32_t v_room() const { return shared_address(shared) + c.plan.v + warp * c.plan.v_room * piece_bytes; }

  __device__ void prefetch_v(const unit &u) const {
    int bytes = u.tokens ? min(u.blocks, c.plan.v_room) * piece_bytes : 0;
#pragma unroll 1
    for (int i = lane * 16; i < bytes; i += warp_size * 16) copy_async(v_room() + i, u.codes + i);
  }

  // A block of columns of the lane's token, and what V's codes there are times.
  struct unit_input {
    uint4 x[2];
    float by[2];
    __device__ void load(const unit &u, int block) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        x[i] = reinterpret_cast<const uint4 *>(u.x + block * BLOCK)[i];
        by[i] = kind == weight_kind::bf16 ? 1.f : __ldg(u.scales + block * panel_ranks + i * 8);
      }
    }
  };

  // In lane 4g + t: ranks g and g + 8 by tokens 2t and 2t + 1. `fetched` pieces are in shared memory. Inputs of two blocks are
  // on their way from the start: asked for in the loop, compilers put the second after the first one's products.
  __device__ void multiply_unit(const unit &u, int fetched, float sums[4]) const {
    uint32_t ahead = v_room();
    unit_input now, next;
    now.load(u, 0);
    if (u.blocks > 1) next.load(u, 1);
#pragma unroll 1
    for (int block = 0; block < u.blocks; block++) {
      step_words<kind> words[4];
#pragma unroll
      for (int s = 0; s < 4; s++) {
        int place = block * piece_bytes + step_words<kind>::place(s);
        if (block < fetched) words[s].load(ahead + place);
        else words[s].load(u.codes + place);
      }
      float halves[2][4] = {};  // that do not wait for each other
#pragma unroll
      for (int s = 0; s < 4; s++) {
        uint32_t a[4];
        words[s].operand(a);
        multiply_add(halves[s / 2], a, word_of(now.x[s / 2], s % 2 * 2), word_of(now.x[s / 2], s % 2 * 2 + 1));
      }
#pragma unroll
      for (int k = 0; k < 4; k++) sums[k] += now.by[k / 2] * (halves[0][k] + halves[1][k]);
      now = next;
      if (block + 2 < u.blocks) next.load(u, block + 2);
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
    for (int n = block() + warp * blocks(); there; there = find_unit(n += blocks() * warps, u), fetched = 0) {
      float sums[4] = {};
      if (!u.tokens) continue;
      multiply_unit(u, fetched, sums);
      leave(u, sums, launch);
    }
  }

  // ---- the block's tiles, by member ----

  // [members, slots]
  __device__ beside_term *terms() const { return reinterpret_cast<beside_term *>(shared + c.plan.terms); }
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
  }

  // ---- h = scale * d * V x ----

  __device__ bool has_tiles_of(int member) const { return start_of(member) < tiles && end_of(member) > 0; }

  // scale * d, where the hidden value will be; 0 where there is no such rank or token.
  __device__ void put_factors() const {
    int turn = warp;
#pragma unroll 1
    for (int member = 0; member < c.n_members; member++)
#pragma unroll 1
      for (int slot = 0; slot < c.n_slots && has_tiles_of(member); slot++) {
        if (--turn >= 0) continue;
        turn = warps - 1;
        put_factors(terms()[member * c.n_slots + slot], hidden(row_of(member, slot)));
      }
  }
  __device__ void put_factors(const beside_term &t, float *to) const {
    int ranks = c.rank_pieces * panel_ranks, n_tokens = t.n_tokens, width = t.width;
    float scale = t.scale;
    const float *d = t.d;
#pragma unroll 1
    for (int token = 0; token < c.slot_tokens; token++, to += ranks)
#pragma unroll 1
      for (int rank = lane; rank < ranks; rank += warp_size) {
        bool there = token < n_tokens && rank < width;
        to[rank] = !there ? 0.f : d ? scale * __ldg(d + rank) : scale;
      }
  }

  // First for one of a row's sums, another in each block: who asks for all of them, again and again, keeps weights waiting.
  __device__ void await_one(const uint64_t *of_row, uint32_t launch) const {
    const uint64_t *one = of_row + (block() & (c.splits() - 1)) * panel_ranks;
    uint64_t v;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(one) : "memory");
    while (uint32_t(v >> 32) != launch);
  }
  // Two neighbouring ranks of a row: four groups of lanes take turns at the splits. `from`: the lane's first.
  template <int turns>
  static __device__ float2 await_sums(const uint64_t *from, uint32_t launch) {
    uint64_t v[turns][2];
    uint32_t stale;
    do {
#pragma unroll
      for (int i = 0; i < turns; i++)
        asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                     : "=l"(v[i][0]), "=l"(v[i][1]) : "l"(from + i * least_splits_beside * panel_ranks) : "memory");
      stale = 0;
#pragma unroll
      for (int i = 0; i < 2 * turns; i++) stale |= uint32_t(v[i / 2][i % 2] >> 32) ^ launch;
    } while (stale);
    float2 sum = {0, 0};
#pragma unroll
    for (int i = 0; i < turns; i++)
      sum.x += __uint_as_float(uint32_t(v[i][0])), sum.y += __uint_as_float(uint32_t(v[i][1]));
#pragma unroll
    for (int step = 8; step < warp_size; step *= 2) {
      sum.x += __shfl_xor_sync(all_lanes, sum.x, step);
      sum.y += __shfl_xor_sync(all_lanes, sum.y, step);
    }
    return sum;
  }
  __device__ float2 await_sums(const uint64_t *from, uint32_t launch) const {
    static_assert(most_splits_beside == 8 * least_splits_beside);
    switch (c.splits() / least_splits_beside) {
      case 8: return await_sums<8>(from, launch);
      case 4: return await_sums<4>(from, launch);
      case 2: return await_sums<2>(from, launch);
      default: return await_sums<1>(from, launch);
    }
  }

  // As a pair for tensor cores: values as bfloat16 and what is left of them, whose sum is exact enough; where scales of U
  // come to it first, as it is.
  static __device__ uint2 operand_pair(float2 h) {
    __nv_bfloat162 upper = __floats2bfloat162_rn(h.x, h.y);
    float2 whole = __bfloat1622float2(upper);
    __nv_bfloat162 lower = __floats2bfloat162_rn(h.x - whole.x, h.y - whole.y);
    return {*reinterpret_cast<uint32_t *>(&upper), *reinterpret_cast<uint32_t *>(&lower)};
  }
  static __device__ void leave_hidden(uint32_t to, float2 h) {
    if constexpr (kind == weight_kind::bf16) store_two(to, operand_pair(h));
    else store_float2(to, h);
  }

  // The rows of the members that the block has tiles of, of which the warp takes every so manieth, and the lane's place.
  struct row_walk {
    int row, end;
    uint32_t at;
    const uint64_t *from;
  };
  __device__ row_walk my_rows(int of_all) const {
    int first = 0, last = c.n_members - 1;
    while (!has_tiles_of(first)) first++;
    while (!has_tiles_of(last)) last--;
    int row = row_of(first, 0) + of_all;
    return {kept(row), kept(row_of(last + 1, 0)), kept(shared_address(hidden(row) + lane % 8 * 2)),
            kept(parts(row) + lane / 8 * panel_ranks + lane % 8 * 2)};
  }

  // A row whose factors are all 0 is done.
  __device__ void gather(row_walk rows, uint32_t launch) const {
#pragma unroll 1
    for (; rows.row < rows.end; rows.row += warps_beside) {
      float2 by = load_float2(rows.at);
      if (__any_sync(all_lanes, by.x != 0 || by.y != 0)) {
        await_one(parts(rows.row), launch);
        float2 sum = await_sums(rows.from, launch);
        if (lane < 8) leave_hidden(rows.at, {by.x * sum.x, by.y * sum.y});
      }
      rows.at += warps_beside * panel_ranks * int(sizeof(float)), rows.from += warps_beside * c.splits() * panel_ranks;
    }
  }

  // ---- U h ----

  // A warp takes every so manieth of the block's tiles, and for each all slots. What a slot needs for a tile is an entry in the
  // warp's ring in shared memory: the words of each piece, the scales of their ranks, and vectors of the outputs, e and
  // g_out. An entry on its way:
  struct entry {
    int tile, slot, member, place;
  };
  __device__ int ring() const { return c.plan.u_tiles * c.n_slots + c.plan.u_slots; }
  __device__ int member_from(int member, int tile) const {
    while (member + 1 < c.n_members && tile >= end_of(member)) member++;
    return member;
  }
  __device__ void step(entry &at, int all) const {
    if (++at.place == ring()) at.place = 0;
    if (++at.slot < c.n_slots) return;
    at.slot = 0, at.tile += all;
    at.member = member_from(at.member, at.tile);
  }
  __device__ uint8_t *room_of(int place, int of_warp) const {
    return shared + c.plan.u + (of_warp * ring() + place) * c.entry_bytes;
  }
  // Where in an entry.
  __device__ int scales_place() const { return c.rank_pieces * step_bytes; }
  __device__ int vectors_place() const {
    return c.rank_pieces * (step_bytes + (kind == weight_kind::bf16 ? 0 : panel_ranks * int(sizeof(float))));
  }

  // What a slot has for the tiles of a member, which start at one of the block's.
  struct factor_rows {
    const uint8_t *u;
    const float *scales, *e, *g_out;
    int pieces, start;
  };
  __device__ factor_rows rows_of(int member, int slot) const {
    const beside_term &t = terms()[member * c.n_slots + slot];
    return {t.u, t.u_scales, t.e, t.g_out, t.pieces, start_of(member)};
  }
  __device__ void fetch(const factor_rows &from, int of_block, uint8_t *room) const {
    int tile = of_block - from.start, row = tile * tile_rows + lane * 4;
    int64_t first = int64_t(tile / 4) * from.pieces;
    const uint8_t *words = from.u + first * piece_bytes + step_words<kind>::place(tile % 4);
#pragma unroll 1
    for (int i = 0; i < from.pieces; i++)
      step_words<kind>::copy(room + i * step_bytes + lane * step_words<kind>::bytes, words + i * piece_bytes);
    if constexpr (kind != weight_kind::bf16)
#pragma unroll 1
      for (int i = lane * 4; i < from.pieces * panel_ranks; i += warp_size * 4)
        copy_16(room + scales_place() + i * 4, from.scales + first * panel_ranks + i);
    if (!c.vectors || lane >= tile_rows / 4 || lane * 4 >= rows - (first_tile + of_block) * tile_rows) return;
    if (from.e) copy_16(room + vectors_place() + lane * 16, from.e + row);
    if (from.g_out) copy_16(room + vectors_place() + tile_rows * 4 + lane * 16, from.g_out + row);
  }

  // What there is room for, for all warps: of a slot one tile after the other.
  __device__ void prefetch_u() const {
#pragma unroll 1
    for (int member = 0; member < c.n_members; member++)
#pragma unroll 1
      for (int slot = 0; slot < c.n_slots && has_tiles_of(member); slot++) {
        const factor_rows from = rows_of(member, slot);
        int end = min(end_of(member), tiles), tile = max(from.start, 0) + warp, of_warp = tile, place = slot;
#pragma unroll 1
        for (; tile < end; tile += warps, of_warp += warps) {
          for (; of_warp >= warps_beside; of_warp -= warps_beside) place += c.n_slots;
          if (place >= ring()) break;
          fetch(from, tile, room_of(place, of_warp));
        }
      }
  }

  // What changes in a tile, in lane 4g + t: outputs 2g and 2g + 1 by tokens 2t and 2t + 1.
  struct tile_changes {
    float2 delta[2], gain[2];
  };

  // Column g of the second operand: 16 ranks' values for token g; 0 where it is not the slot's.
  static __device__ void load_operand(bool there, uint32_t values, uint32_t scales, uint32_t upper[2], uint32_t lower[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint2 pair = {0, 0};
      if (there && kind == weight_kind::bf16) pair = load_two(values + i * 32);
      if (there && kind != weight_kind::bf16) {
        float2 h = load_float2(values + i * 32), by = load_float2(scales + i * 32);
        pair = operand_pair({by.x * h.x, by.y * h.y});
      }
      upper[i] = pair.x, lower[i] = pair.y;
    }
  }

  // The tiles of a warp, and where in shared memory is what belongs to the first slot: its term and the lane's hidden
  // values, of a tile's member; and the lane's words of the first entry.
  struct tile_walk {
    int tile, member, member_end;
    uint32_t term, values, words, changes;
    bool streams;  // there are more entries than the ring has
  };
  __device__ tile_walk my_tiles(int of_all) const {
    int member = member_from(0, of_all);
    return {of_all, member, kept(end_of(member)), kept(shared_address(terms() + member * c.n_slots)),
            kept(shared_address(hidden(row_of(member, 0))) + lane % 4 * 8),
            kept(shared_address(room_of(0, of_all)) + lane * step_words<kind>::bytes),
            kept(shared_address(changes_of(shared, c, tiles, tokens).delta) +
                 ((of_all * tokens + lane % 4 * 2) * tile_rows + lane / 4 * 2) * int(sizeof(float))),
            bool(kept(int(of_all + c.plan.u_tiles * warps_beside < tiles)))};
  }
  __device__ void find_member(tile_walk &at) const {
    while (at.tile >= at.member_end && at.member + 1 < c.n_members) {
      at.member_end = end_of(++at.member);
      at.term += c.n_slots * sizeof(beside_term), at.values += c.n_slots * rows_of_slot() * panel_ranks * sizeof(float);
    }
  }

  // What a slot adds: a term's sums for lane 4g + t's outputs. A token of another slot is left as it is, whatever comes of
  // zeros times this slot's U.
  __device__ void expand_entry(uint32_t term, uint32_t values, uint32_t words_at, tile_changes &tile) const {
    uint4 shape = load_vector(term + offsetof(beside_term, pieces));
    int token = shape.z, n_tokens = shape.w;
    uint32_t row = lane / 4 - token, scales = words_at - lane * step_words<kind>::bytes + scales_place() + lane % 4 * 8;
    float sums[4] = {};
#pragma unroll 1
    for (int piece = 0; piece < int(shape.x); piece++) {
      step_words<kind> words;
      uint32_t a[4], upper[2], lower[2];
      words.load(words_at + piece * step_bytes);
      words.operand(a);
      load_operand(row < n_tokens, values + (row * c.rank_pieces + piece) * 64, scales + piece * 64, upper, lower);
      multiply_add(sums, a, upper[0], upper[1]);
      multiply_add(sums, a, lower[0], lower[1]);
    }
    if (c.vectors) return add_with_vectors(term, words_at, token, n_tokens, sums, tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (unsigned(lane % 4 * 2 + i - token) >= unsigned(n_tokens)) continue;
      tile.delta[i].x += sums[i], tile.delta[i].y += sums[2 + i];
    }
  }
  __device__ void add_with_vectors(uint32_t term, uint32_t words_at, int token, int n_tokens, const float sums[4],
                                   tile_changes &tile) const {
    uint32_t vectors = words_at - lane * step_words<kind>::bytes + vectors_place() + lane / 4 * 8;
    float2 e = {1, 1}, gain = {1, 1};
    uint2 has_e = load_two(term + offsetof(beside_term, e)), has_gain = load_two(term + offsetof(beside_term, g_out));
    if (has_e.x | has_e.y) e = load_float2(vectors);
    if (has_gain.x | has_gain.y) gain = load_float2(vectors + tile_rows * sizeof(float));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (unsigned(lane % 4 * 2 + i - token) >= unsigned(n_tokens)) continue;
      float2 &delta = tile.delta[i];
      delta = {gain.x * (delta.x + e.x * sums[i]), gain.y * (delta.y + e.y * sums[2 + i])};
      tile.gain[i] = {gain.x * tile.gain[i].x, gain.y * tile.gain[i].y};
    }
  }

  __device__ void leave_changes(uint32_t to, const tile_changes &values) const {
    int gains = tiles * tokens * tile_rows * int(sizeof(float));
#pragma unroll
    for (int i = 0; i < 2; i++, to += tile_rows * sizeof(float)) {
      if (lane % 4 * 2 + i >= tokens) continue;
      store_float2(to, values.delta[i]);
      if (c.vectors) store_float2(to + gains, values.gain[i]);
    }
  }

  // Where an entry was comes the one that is a ring further, if there are so many.
  __device__ void fetch_later(entry &later) const {
    __syncwarp();
    if (later.tile < tiles) {
      fetch(rows_of(later.member, later.slot), later.tile, room_of(later.place, warp));
      step(later, warps);
    }
    commit_copies();
  }

  // The adapters of a stack one after the other.
  __device__ void expand(tile_walk at) const {
    constexpr int depth = 8;
    int place = 0, size = ring();
    uint32_t words = at.words;
    entry later = {warp + c.plan.u_tiles * warps, c.plan.u_slots, 0, 0};
    if (at.streams) later.member = member_from(0, later.tile);
#pragma unroll 1
    for (; at.tile < tiles; at.tile += warps, at.changes += warps * tokens * tile_rows * sizeof(float)) {
      find_member(at);
      tile_changes values = {{}, {{1, 1}, {1, 1}}};
#pragma unroll 1
      for (int slot = 0; slot < c.n_slots; slot++) {
        if (at.streams) size < depth ? wait_for_copies<0>() : wait_for_copies<depth - 1>();
        __syncwarp();
        expand_entry(at.term + slot * sizeof(beside_term), at.values + slot * rows_of_slot() * 64, words, values);
        words += c.entry_bytes;
        if (++place == size) place = 0, words = at.words;
        if (at.streams) fetch_later(later);
      }
      leave_changes(at.changes, values);
    }
  }

  __device__ void run_v(uint32_t launch) const {
    unit first;
    bool there = block() < blocks() && find_unit(block() + warp * blocks(), first);
    if (there) prefetch_v(first);
    commit_copies();
    wait_for_kernel_before();
    wait_for_copies<0>();
    __syncwarp();
    shrink(first, there, launch);
  }

  // First the warps of U and those of V, which wait for what those of U have fetched; then all together. The other warps wait
  // for changes_barrier.
  __device__ void run() {
    constexpr int threads = warps_beside * warp_size;
    int of_all = warp;
    uint32_t launch = *c.step * most_launches_beside + c.launch;
    row_walk rows;
    tile_walk mine;
    if (warp < u_warps) {
      warps = u_warps;
      fetch_terms();
      rows = my_rows(of_all), mine = my_tiles(of_all);
      wait_for_copies<0>();
      sync_threads(terms_barrier, u_warps * warp_size);
      prefetch_u();
      commit_copies();
      put_factors();
      wait_for_kernel_before();
      wait_for_copies<0>();
      sync_threads(terms_barrier, u_warps * warp_size);
      arrive_threads(beside_barrier, threads);
    } else {
      warp -= u_warps, warps = v_warps;
      run_v(launch);
      sync_threads(beside_barrier, threads);
      rows = my_rows(of_all), mine = my_tiles(of_all);
    }
    warp = of_all, warps = warps_beside;
    gather(rows, launch);
    sync_threads(hidden_barrier, threads);
    expand(mine);
    __syncwarp();
    arrive_threads(changes_barrier, multipliers * warp_size + threads);
  }
};

}  // namespace adaptrt
#endif
