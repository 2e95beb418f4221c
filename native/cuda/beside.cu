// How the work of adapters beside a product is divided.
#include "beside.cuh"

#include <algorithm>

namespace adaptrt {
namespace {

constexpr int most_warps = 4, pieces_of_warp = 2, most_pieces_of_warp = 16;  // pieces of V

int align_16(int bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

bool divide_beside(beside_call &call, int columns, int blocks) {
  int panels = call.n_slots * call.n_members * call.rank_pieces;
  int pieces = (panels * columns + blocks - 1) / blocks;  // for a block of threads
  call.warps = std::min(most_warps, (pieces + pieces_of_warp - 1) / pieces_of_warp);
  call.splits = std::max(1, std::min({most_splits_beside, columns, blocks * call.warps / panels}));
  size_t bytes = size_t(panels) * size_t(call.slot_tokens * call.splits * panel_ranks) * sizeof(uint64_t);
  return pieces <= most_pieces_of_warp * call.warps && bytes <= beside_bytes;
}

static beside_plan plan_least(const beside_call &call, int tiles, int tokens, int first) {
  beside_plan plan = {};
  int slots = call.n_slots * call.n_members;
  plan.ready = align_16(first);
  plan.terms = plan.ready + 16;
  plan.hidden = align_16(plan.terms + slots * int(sizeof(beside_term)));
  plan.changes = plan.hidden + slots * call.slot_tokens * call.rank_pieces * panel_ranks * int(sizeof(float));
  plan.v = plan.changes + tiles * tokens * tile_rows * int(sizeof(float2));
  return plan;
}

int least_beside(const beside_call &call, int tiles, int tokens) { return plan_least(call, tiles, tokens, 0).v + 16; }

void plan_room_beside(beside_call &call, int tiles, int tokens, int columns, int first, int end) {
  beside_plan &plan = call.plan = plan_least(call, tiles, tokens, first);
  int piece = tile_bytes(call.kind), pieces = (columns + call.splits - 1) / call.splits, entry = call.entry_bytes();
  plan.v_room = std::min(pieces, (end - plan.v) / 2 / piece / call.warps);
  plan.u = plan.v + plan.v_room * piece * call.warps;
  plan.u_room = std::min(tiles * call.n_slots, (end - plan.u) / entry);
  plan.bytes = plan.u + plan.u_room * entry;
}

}  // namespace adaptrt
