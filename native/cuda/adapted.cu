#include "adapted.cuh"

#include <algorithm>

#include "launch.cuh"
#include "panels.cuh"

namespace adaptrt {
namespace {

const host_attachment &acting(const adrt_executable &e, const product_member &m) { return e.acting.points[size_t(m.target)]; }

lone_device device_of(const adrt_executable &e) { return {e.multiprocessors, e.products.context->shared_bytes}; }

}  // namespace

bool acts(const adrt_executable &e, int32_t target) {
  return target >= 0 && e.plan.adapted && e.acting.points[size_t(target)].acts;
}

bool adapted_members::maps_input(const adrt_executable &e, const product_member &m) const {
  return acts(e, m.target) && acting(e, m).maps_input;
}

bool adapted_members::has_common(const adrt_executable &e, const product_member &m) const {
  return tokens(e) >= least_common_tokens && acts(e, m.target) && acting(e, m).v;
}

// Whether adapters do more there than that.
bool adapted_members::has_other(const adrt_executable &e, const product_member &m) const {
  return acts(e, m.target) && !(has_common(e, m) && acting(e, m).alone && !segments(e).stacked);
}

int64_t adapted_members::hidden_width(const adrt_executable &e) const {
  int64_t width = 0, pieces = 0;
  for (const product_member &m : members_) {
    if (!acts(e, m.target)) continue;
    width += acting(e, m).width;
    pieces = std::max(pieces, shrink_chunks(acting(e, m).width));
  }
  return std::max(width, int64_t(members_.size()) * pieces * panel_ranks);  // lone.cuh has whole pieces of all members
}

int64_t adapted_members::projected_width(const adrt_executable &e) const {
  int64_t width = 0;
  for (const product_member &m : members_)
    if (has_common(e, m)) width += hidden_stride(acting(e, m).v->f.rows) / 2;  // halves of a float
  return width;
}

// The most pieces of hidden that an adapter has.
int64_t adapted_members::chunks(const adrt_executable &e) const {
  int64_t chunks = 0;
  for (const product_member &m : members_)
    if (has_other(e, m)) chunks += shrink_chunks(acting(e, m).width) + acting(e, m).more_terms;
  return chunks;
}

adapter_call adapted_members::describe(const adrt_executable &e) const {
  const segment_plan &s = segments(e);
  adapter_call call = {s.device_applications, s.device_tiles, int32_t(s.tiles.size()), int32_t(members_.size())};
  int64_t row = 0, hidden = 0;
  for (size_t i = 0; i < members_.size(); i++) {
    const product_member &m = members_[i];
    call.members[i] = {m.target < 0 ? 0 : m.target, row, m.w.rows, hidden, m.bias};
    row += m.w.rows;
    if (acts(e, m.target)) hidden += acting(e, m).width;
    if (has_common(e, m)) call.members[i].elsewhere = {acting(e, m).v->f.data, acting(e, m).u->f.data};
  }
  call.cols = members_[0].w.cols;
  call.hidden = e.hidden.as<float>(), call.hidden_width = hidden;
  return call;
}

// Whether each acting adapter is one low-rank term, all factors of one dtype; then of which kind, and how wide.
bool adapted_members::one_term_each(const adrt_executable &e, weight_kind &kind, int &rank_pieces) const {
  int32_t dtype = -1;
  int64_t width = 0;
  for (const product_member &m : members_) {
    if (m.bias) return false;
    if (!acts(e, m.target)) continue;
    const host_attachment &a = acting(e, m);
    if (!a.lone || has_common(e, m) || (dtype >= 0 && a.dtype >= 0 && a.dtype != dtype)) return false;
    dtype = std::max(dtype, a.dtype);
    width = std::max(width, a.width);
  }
  kind = panel_kind(dtype), rank_pieces = int(shrink_chunks(width));
  return true;
}

// Whether adapters are as lone.cuh says.
bool adapted_members::are_lone(const adrt_executable &e, const adapter_call &call, lone_call &lone) const {
  const segment_plan &s = segments(e);
  if (!records(e) || !chunks(e) || !s.single || s.stacked || !in_fours(call)) return false;
  lone = {call, {}, 0, 1, records(e)};
  if (!one_term_each(e, lone.kind, lone.rank_pieces) || lone.rank_pieces > most_lone_pieces) return false;
  adapter_call &c = lone.call;
  auto idle = [&](const member &m) { return !acts(e, m.target); };
  if (!gated_) c.n_members = int32_t(std::remove_if(c.members, c.members + c.n_members, idle) - c.members);
  lone.splits = lone_splits(c, lone.rank_pieces, e.multiprocessors);
  return true;
}

// Whether adapters are as split.cuh says.
bool adapted_members::are_split(const adrt_executable &e, const adapter_call &call, split_call &split) const {
  const segment_plan &s = segments(e);
  if (!records(e) || !chunks(e) || s.stacked || tokens(e) > most_tokens_split || !in_fours(call)) return false;
  split = {call, {}, 0, tokens(e), int(s.shrink_tiles.size()), records(e), e.beside_terms.as<beside_term>()};
  if (!one_term_each(e, split.kind, split.rank_pieces) || split.rank_pieces > most_pieces_split) return false;
  divide_split(split, e.multiprocessors);
  return true;
}

bool adapted_members::fit_beside(adrt_executable &e, const adapter_call &call, const packed_matrix &product,
                                 beside_call &beside) const {
  const segment_plan &s = segments(e);
  split_call split;
  if (!chunks(e) || e.launches_beside >= most_launches_beside) return false;
  if (int(s.shrink_tiles.size()) > most_slots_beside && are_split(e, call, split)) return false;
  beside = {e.beside_terms.as<beside_term>() + (head_ ? e.first_logit_term() : 0), int(s.shrink_tiles.size()),
            s.single ? 1 : std::min(shrink_tokens, tokens(e))};
  if (!one_term_each(e, beside.kind, beside.rank_pieces)) return false;
  int64_t tile = 0;
  for (const product_member &m : members_) {
    beside.members[beside.n_members++] = {std::max(m.target, 0), int32_t(tile += m.w.row_tiles)};
    if (!acts(e, m.target)) continue;
    if (maps_input(e, m)) return false;
    beside.vectors = beside.vectors || acting(e, m).vectors;
  }
  beside.parts = e.beside.as<uint64_t>(), beside.step = e.plan.device_number;
  if (!plan_beside(e.products.context, product, tokens(e), beside)) return false;
  beside.launch = ++e.launches_beside;
  return true;
}

// Hidden values of the terms in common, V x once a V.
common_call adapted_members::project(adrt_executable &e, const adapter_call &call) const {
  int n = tokens(e);
  common_call common = {call.applications, segments(e).device_heads, n};
  common.y = call.y, common.y_stride = call.y_stride, common.records = records(e);
  std::vector<shared_factor *> inputs;
  __nv_bfloat16 *hidden = e.projected.as<__nv_bfloat16>();
  for (size_t i = 0; i < members_.size(); i++) {
    if (!has_common(e, members_[i])) continue;
    const host_attachment &a = acting(e, members_[i]);
    const member &m = call.members[i];
    const factor &u = plain_form(e, *a.u);
    common.members[common.n_members++] = {m.elsewhere, m.target, u, hidden, m.row, m.rows};
    hidden += n * hidden_stride(u.rows);
    if (std::find(inputs.begin(), inputs.end(), a.v) == inputs.end()) inputs.push_back(a.v);
  }
  for (shared_factor *v : inputs)
    launch_project(e.queue(), {v->f.data, plain_form(e, *v), call.x, call.x_stride, call.cols}, common,
                   e.products.context->hopper);
  return common;
}

adapters_left adapted_members::before(adrt_executable &e, const adapter_call &call, const packed_matrix &product) const {
  adapters_left left = {project(e, call), false, false, {}};
  const segment_plan &s = segments(e);
  adapter_call shrink = call;
  shrink.tiles = s.device_shrink_tiles, shrink.n_tiles = int32_t(s.shrink_tiles.size());
  lone_call lone;
  left.are_split = are_split(e, call, left.split);
  left.split.after_product = left.are_split && leaves_room_after(e.products.context, product, tokens(e));
  if (left.split.after_product) return left;
  bool lone_shrink = !left.are_split && are_lone(e, call, lone);
  left.ready = lone_shrink || (left.common.n_members && !chunks(e));
  if (left.are_split)
    launch_shrink_split(e.queue(), left.split);
  else if (lone_shrink)
    launch_shrink_lone(e.queue(), lone, device_of(e));
  else
    launch_shrink(e.queue(), shrink, chunks(e), e.multiprocessors);
  return left;
}

bool adapted_members::after(adrt_executable &e, const adapter_call &call, const adapters_left &left,
                            const lone_gate *gate) const {
  bool more = std::any_of(members_.begin(), members_.end(),
                          [&](const product_member &m) { return m.bias || has_other(e, m); });
  bool gates = gate && !more && can_gate(left.common);
  if (left.common.n_members) launch_extend(e.queue(), left.common, gates ? gate : nullptr, device_of(e));
  lone_call lone;
  if (left.split.after_product) launch_shrink_split(e.queue(), left.split);
  if (left.are_split) {
    launch_expand_split(e.queue(), left.split, e.multiprocessors);
    return false;
  }
  if (are_lone(e, call, lone)) {
    launch_expand_lone(e.queue(), lone, gate, device_of(e));
    return true;
  }
  if (more) launch_expand(e.queue(), call, segments(e).single, e.multiprocessors);
  return gates;
}

}  // namespace adaptrt
