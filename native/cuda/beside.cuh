// Adapters of few tokens inside the product that they belong to (product_few.cu): while most warps of a block of threads
// multiply, a few more work out what adapters change in the block's outputs, y = gain * y + delta.
//
//   before the input is there   the terms, the block's piece of V and its rows of U are on their way to shared memory, and
//           addresses and scale * d are worked out: after a wait every instruction counts
//   V x     16 ranks by a part of the columns a warp; all blocks of threads leave their sums in global memory
//   h       every block adds up the sums that it needs, always in the same order
//   U h     for the rows of the block's tiles, on tensor cores
//
// So there is no launch for adapters, nothing reads an output again, and all of it takes less time than the shortest
// product. Blocks wait for the sums of others, so all have to run at once: there are no more than multiprocessors (or
// clusters that run at once), and the GPU places all blocks of a launch before those of a later one (spec/backend.md).
//
// For what is usual: stacks of adapters each with one low-rank term and at most a gain, all factors of one kind.
#ifndef ADAPTRT_CUDA_BESIDE_CUH
#define ADAPTRT_CUDA_BESIDE_CUH
#include "adapters.cuh"
#include "panels.cuh"
#include "product.cuh"

namespace adaptrt {

// Offsets into shared memory, and for how much there is room of what is fetched ahead: pieces of a warp's first unit of V;
// and of what slots need for a warp's tiles, all that so many tiles need and so many slots of one more.
struct beside_plan {
  int terms, hidden, changes, v, u, bytes, v_room, u_tiles, u_slots;
};

// A slot is up to shrink_tokens tokens with one adapter; those of a stack come one after the other, in its order. What
// there is to know of a slot's term at an attach point; width 0 where there is none.
struct alignas(16) beside_term {
  const uint8_t *v, *u;
  const float *v_scales, *u_scales, *d, *e, *g_out;
  float scale;
  int32_t width, pieces, v_blocks, token, n_tokens;

  __device__ void find(const token_tile &slot, int32_t target) {
    const attachment &what = slot.head.attachments[target];
    const term &t = what.first;
    token = slot.token, n_tokens = what.acts ? slot.n_tokens : 0;
    width = what.acts && what.n_terms ? int32_t(t.width) : 0;
    pieces = (width + panel_ranks - 1) / panel_ranks;
    v = t.v.data, u = t.u.data, v_scales = t.v.scales, u_scales = t.u.scales;
    v_blocks = int32_t(block_pieces(t.v)), scale = t.scale;
    d = t.d, e = width ? t.e : nullptr, g_out = what.g_out;
  }
};

struct beside_call {
  const beside_term *terms;  // [targets, slots]
  int n_slots, slot_tokens;  // the most tokens of a slot
  int n_members;
  struct {
    int32_t target, end_tile;  // of the product's tiles
  } members[most_members];
  weight_kind kind;    // of all factors
  int rank_pieces;     // the most pieces of 16 ranks
  bool vectors;        // some have vectors of the outputs
  uint64_t *parts;     // [members, slots, slot_tokens, rank_pieces, splits, 16]: a sum, and in which launch it was made
  const uint32_t *step;  // the step's number
  uint32_t launch;       // this launch's, in the step
  // filled in by plan_beside
  int log_splits, entry_bytes;  // of what a slot needs for a tile of outputs
  beside_plan plan;

  __host__ __device__ int splits() const { return 1 << log_splits; }
};

constexpr int u_warps = 2, v_warps = 2, warps_beside = u_warps + v_warps;  // of a block: so many can give registers away
constexpr int most_tokens_beside = 8;  // columns of a tensor core's product
constexpr int most_slots_beside = 4;   // where there is another way that is quick (split.cuh)
constexpr int least_splits_beside = 4, most_splits_beside = 32;  // of the columns; powers of two
// The last blocks of a launch start late, where the kernel before has its own: V x, which all wait for, is the others'.
__host__ __device__ constexpr int blocks_of_v(int blocks) { return blocks - blocks / 16; }
constexpr uint32_t most_launches_beside = 1 << 12;  // in a step
constexpr size_t beside_bytes = size_t(1) << 20;  // of `parts`

// Fills in tables of terms, once a step: of tokens and of logits.
struct term_table {
  const token_tile *slots;
  int n_slots;
  beside_term *terms;  // [targets, slots]
};
struct term_tables {
  term_table of[2];
};
void launch_find_terms(const queue &q, const term_tables &tables, int n_targets);

// Fills in how the work is divided for a product; false when it is too much, or the product is another kernel's.
bool plan_beside(const product_context *context, const packed_matrix &w, int tokens, beside_call &call);

// The parts of that: into units for blocks of threads, the shared memory that it cannot do without beside so many tiles, and
// the room for what is fetched ahead, in what a product leaves from `first` to `end`.
bool divide_beside(beside_call &call, int columns, int blocks);
int least_beside(const beside_call &call, int tiles, int tokens);
void plan_room_beside(beside_call &call, int tiles, int tokens, int columns, int first, int end);

}  // namespace adaptrt
#endif
