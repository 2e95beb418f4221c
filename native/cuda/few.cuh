// How products for up to 16 tokens are divided (product_few.cu says into what), and what lies where in shared memory.
#ifndef ADAPTRT_CUDA_FEW_CUH
#define ADAPTRT_CUDA_FEW_CUH
#include "beside.cuh"
#include "launch.cuh"

namespace adaptrt {

constexpr int most_warps = 16;  // that multiply

// Registers of a thread. Where adapters are worked out by more warps beside those that multiply, all warps start with as
// many, and those beside give some of theirs to the others, as groups of four warps can.
__host__ __device__ constexpr int registers_of(int products) { return products == 1 ? 104 : 128; }
constexpr int registers_beside = 64;
constexpr int registers_at_start =
    (most_warps * registers_of(1) + warps_beside * registers_beside) / (most_warps + warps_beside);
static_assert(registers_at_start == 96, "what there is, in eights");

constexpr int product_sums = tile_rows * 8;  // of a tile and 8 tokens
constexpr int long_tokens = 128 * 1024;  // bytes of all: so many a block fetches faster than a cluster adds its sums

// Blocks of 64 columns of a warp's span: their tokens and a chunk of weights have to fit into its registers. With a second
// chunk on its way products are slower.
__host__ __device__ constexpr int span_of(weight_kind kind, int products) {
  return kind == weight_kind::nf4 || (kind == weight_kind::int8 && products == 1) ? 4 : 2;
}

// How a product is divided. A cluster's blocks are parts of the columns, and several groups of blocks have different tiles.
struct few_division {
  int parts, groups;
  int columns, teams;         // warps that share a tile, each with other columns; groups of these
  int passes;                 // over the tiles: spans of a warp
  int rounds, rounds_at_once;  // a tile for each team: of the groups with most; from one joining of sums to the next
  int spans;                  // of a part; the last may have fewer
  int group_tiles, one_more;  // tiles of a group, and how many of the groups have one more
  int tile_blocks;            // blocks of columns of a tile
};

// Shared memory: the pair table, for nf4; what each warp has for itself, its tokens and its sums (offset from there), which
// may lie over the tokens; and the sums that the cluster's blocks send, after the barrier that counts them.
struct shared_plan {
  int warps, warp_bytes, sums, inbox, bytes;
};

struct few_plan {
  few_division divided;  // without groups where there is no room
  shared_plan shared;
};

inline few_division divide(const product_context &context, const packed_matrix &w, int span, int parts, int most_warps) {
  few_division d = {};
  int most = context.clusters[parts], row_tiles = int(w.row_tiles);
  d.parts = parts;
  d.groups = most < row_tiles ? most : row_tiles;
  if (d.groups == 0) return d;
  d.spans = int(ceil_div(w.col_blocks / span, parts));
  d.passes = int(ceil_div(d.spans, most_warps));
  d.columns = int(ceil_div(d.spans, d.passes));
  d.group_tiles = row_tiles / d.groups;
  d.one_more = row_tiles % d.groups;
  d.tile_blocks = int(w.col_blocks);
  int tiles = int(ceil_div(row_tiles, d.groups)), room = most_warps / d.columns;
  d.teams = tiles < room ? tiles : room;
  d.rounds = int(ceil_div(tiles, d.teams));
  return d;
}

// Room for all sums, or for those of some rounds, beside what adapters need.
inline few_plan plan_memory(const product_context &context, const packed_matrix &w, int tokens, int span, few_division d,
                            const beside_call *beside) {
  few_plan plan = {d, {}};
  if (d.groups == 0) return plan;
  int tiles = int(ceil_div(w.row_tiles, d.groups)), warps = d.columns * d.teams;
  int token_bytes = d.passes * span * tokens * 128;
  int sum_bytes = int(sizeof(float)) * product_sums * (tokens <= 8 ? 1 : 2);
  int inbox = d.parts > 1 ? int(sizeof(uint64_t)) + tiles * tokens * tile_rows * int(sizeof(float)) : 0;
  shared_plan &s = plan.shared;
  s.warps = w.kind == weight_kind::nf4 ? pair_table_bytes : 0;
  s.sums = d.passes > 1 ? token_bytes : 0;
  int end = context.shared_bytes - (beside ? least_beside(*beside, tiles, tokens) : 0);
  int room = (end - s.warps - inbox) / warps / 128 * 128, at_once = (room - s.sums) / sum_bytes;
  if (at_once > 0) at_once = int(ceil_div(d.rounds, ceil_div(d.rounds, at_once)));
  s.warp_bytes = s.sums + at_once * sum_bytes;
  if (s.warp_bytes < token_bytes) s.warp_bytes = token_bytes;
  s.inbox = s.warps + warps * s.warp_bytes;
  s.bytes = s.inbox + inbox;
  plan.divided.rounds_at_once = at_once;
  if (at_once <= 0 || s.bytes > end) plan.divided.groups = 0;
  return plan;
}

// As few parts as make the tokens short, as many warps as there is room for.
inline few_plan plan_few(const product_context &context, const packed_matrix &w, int tokens,
                         const beside_call *beside = nullptr) {
  few_plan best = {};
  int span = span_of(w.kind, tokens <= 8 ? 1 : 2);
  for (int parts = 1; parts <= most_parts; parts *= 2) {
    few_plan plan = {};
    for (int warps = most_warps; warps > 0 && plan.divided.groups == 0; warps /= 2)
      plan = plan_memory(context, w, tokens, span, divide(context, w, span, parts, warps), beside);
    if (plan.divided.groups > 0) best = plan;
    if (w.col_blocks * 128 * tokens <= int64_t(long_tokens) * parts && best.divided.groups > 0) break;
  }
  return best;
}

}  // namespace adaptrt
#endif
