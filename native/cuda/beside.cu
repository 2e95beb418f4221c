// How the work of adapters beside a product is divided.
#include "beside.cuh"

#include <algorithm>

namespace adaptrt {
namespace {

constexpr int most_pieces_of_v_warp = 16;

int align_16(int bytes) { return (bytes + 15) / 16 * 16; }

__global__ void find_terms(term_tables tables, int n_targets) {
  wait_for_before();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (const term_table &t : tables.of) {
    if (i < n_targets * t.n_slots) t.terms[i].find(t.slots[i % t.n_slots], i / t.n_slots);
    i -= n_targets * t.n_slots;
    if (i < 0) return;
  }
}

}  // namespace

void launch_find_terms(const queue &q, const term_tables &tables, int n_targets) {
  constexpr int threads = 32;
  int all = (tables.of[0].n_slots + tables.of[1].n_slots) * n_targets;
  if (all) launch(q, find_terms, dim3(blocks_of(all, threads)), threads, 0, tables, n_targets);
}

bool divide_beside(beside_call &call, int columns, int blocks) {
  int panels = call.n_slots * call.n_members * call.rank_pieces;
  blocks = blocks_of_v(blocks);
  int pieces = (panels * columns + blocks - 1) / blocks;  // for a block of threads
  int useful = std::min({most_splits_beside, columns, blocks * v_warps / panels});
  for (call.log_splits = 2; 2 << call.log_splits <= useful;) call.log_splits++;
  size_t bytes = size_t(panels) * size_t(call.slot_tokens * call.splits() * panel_ranks) * sizeof(uint64_t);
  return pieces <= most_pieces_of_v_warp * v_warps && bytes <= beside_bytes;
}

static beside_plan plan_least(const beside_call &call, int tiles, int tokens, int first) {
  beside_plan plan = {};
  int slots = call.n_slots * call.n_members;
  plan.terms = align_16(first);
  plan.hidden = align_16(plan.terms + slots * int(sizeof(beside_term)));
  plan.changes = plan.hidden + slots * call.slot_tokens * call.rank_pieces * panel_ranks * int(sizeof(float));
  plan.v = plan.changes + tiles * tokens * tile_rows * int(call.vectors ? sizeof(float2) : sizeof(float));
  return plan;
}

static int entry_bytes(const beside_call &call) {
  int scales = call.kind == weight_kind::bf16 ? 0 : panel_ranks * int(sizeof(float));
  int vectors = call.vectors ? 2 * tile_rows * int(sizeof(float)) : 0;
  return call.rank_pieces * (tile_bytes(call.kind) / 4 + scales) + vectors;
}

int least_beside(const beside_call &call, int tiles, int tokens) {
  return plan_least(call, tiles, tokens, 0).v + 16 + warps_beside * entry_bytes(call);
}

void plan_room_beside(beside_call &call, int tiles, int tokens, int columns, int first, int end) {
  beside_plan &plan = call.plan = plan_least(call, tiles, tokens, first);
  int piece = tile_bytes(call.kind), pieces = (columns + call.splits() - 1) / call.splits();
  call.entry_bytes = entry_bytes(call);
  int of_warp = call.n_slots * ((tiles + warps_beside - 1) / warps_beside);
  int least = plan.v + warps_beside * call.entry_bytes;
  plan.v_room = std::min(pieces, (end - least) / 2 / piece / v_warps);
  plan.u = plan.v + plan.v_room * piece * v_warps;
  int ring = std::min(of_warp, (end - plan.u) / call.entry_bytes / warps_beside);
  plan.u_tiles = ring / call.n_slots, plan.u_slots = ring % call.n_slots;
  plan.bytes = plan.u + ring * warps_beside * call.entry_bytes;
}

}  // namespace adaptrt
