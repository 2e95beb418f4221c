// Memory that a step needs: activations, workspaces, pages of the KV cache. It grows, and is kept.
#include <string.h>

#include <algorithm>

#include "beside.cuh"
#include "executable.cuh"
#include "lone.cuh"
#include "split.cuh"

namespace adaptrt {
namespace {

constexpr int32_t least_tokens = 16;
constexpr size_t attention_and_plan_bytes = size_t(4) << 20;  // of a step of some hundred tokens, roughly
constexpr int warps_of_attention = 4, positions_of_tile = 32;

int32_t power_of_two_from(int32_t n, int32_t least) {
  while (least < n && least < 1 << 30) least *= 2;
  return std::max(least, n);
}

// Grows `m`; what was in it is lost, and what graphs know of it is stale.
bool grow(adrt_executable &e, device_memory &m, size_t bytes, const char *what) {
  if (bytes <= m.size()) return false;
  m = device_memory();
  m = device_memory(bytes, what);
  e.generation++;
  return true;
}

// Hands out parts of one piece of memory; first called to measure, then to place.
class placer {
 public:
  explicit placer(uint8_t *base) : base_(base) {}
  template <typename item>
  void place(item *&pointer, int64_t count) {
    pointer = reinterpret_cast<item *>(base_ + end_);
    end_ += size_t(cpu_align(count * int64_t(sizeof(item)), 256));
  }
  size_t end() const { return end_; }

 private:
  uint8_t *base_;
  size_t end_ = 0;
};

size_t place_activations(adrt_executable &e, int64_t tokens, uint8_t *base) {
  placer p(base);
  int64_t widest_narrow = 0;
  for (activations &a : e.buffers) {
    if (a.wants_wide) p.place(a.wide, tokens * a.width);
    if (a.wants_narrow) p.place(a.narrow, tokens * a.narrow_stride());
    if (a.wants_narrow) widest_narrow = std::max(widest_narrow, a.narrow_stride());
  }
  p.place(e.queries, tokens * e.largest_queries);
  p.place(e.gathered, tokens * widest_narrow);
  for (rope_table &t : e.rope_tables) p.place(t.cos_sin, tokens * 2 * int64_t(t.values.size()));
  return p.end();
}

void make_token_room(adrt_executable &e, int32_t n_tokens) {
  int32_t n = std::max(n_tokens, e.plan.n_logits);  // a row of logits may be asked for twice
  if (n <= e.token_room) return;
  n = power_of_two_from(n, least_tokens);
  e.token_room = 0;
  size_t bytes = place_activations(e, n, nullptr);
  grow(e, e.activation_memory, bytes, "activations");
  place_activations(e, n, e.activation_memory.bytes());
  check(cudaMemsetAsync(e.activation_memory.bytes(), 0, bytes, e.queues.main), "activations");
  size_t workspace = workspace_zero_bytes;
  for (const packed_matrix &w : e.product_weights)
    workspace = std::max(workspace, product_workspace_bytes(e.products.context, w, n));
  if (grow(e, e.workspace, workspace, "workspace of products"))
    check(cudaMemsetAsync(e.workspace.bytes(), 0, workspace_zero_bytes, e.queues.main), "workspace of products");
  e.token_room = n;
}

void make_logit_room(adrt_executable &e) {
  if (e.plan.n_logits <= e.logit_room) return;
  int32_t n = power_of_two_from(e.plan.n_logits, 1);
  size_t bytes = size_t(n) * size_t(e.logit_rows) * sizeof(float);
  e.logit_room = 0;
  grow(e, e.logits, bytes, "logits");
  e.host_logits = pinned_memory();
  e.host_logits = pinned_memory(bytes, "logits");
  e.logit_room = n;
}

void make_attention_room(adrt_executable &e) {
  int64_t floats = 0, counters = 0;
  for (const attention_shape &shape : e.attention_shapes)
    for (const query_plan &q : e.plan.queries) {
      if (q.tokens_a_block != shape.tokens_a_block()) continue;
      int64_t n = int64_t(q.blocks.size());
      floats = std::max(floats, attention_partial_floats(shape, n, splits_of(e, shape, n)));
      counters = std::max(counters, n * shape.kv_heads * shape.head_chunks());
    }
  grow(e, e.partial, size_t(floats) * sizeof(float), "attention");
  if (grow(e, e.arrived, size_t(counters) * sizeof(int32_t), "attention"))
    check(cudaMemsetAsync(e.arrived.bytes(), 0, e.arrived.size(), e.queues.main), "attention");
}

void make_record_room(adrt_executable &e) {
  const segment_plan &s = e.plan.tokens;
  bool common = std::any_of(e.acting.points.begin(), e.acting.points.end(),
                            [](const host_attachment &a) { return a.v != nullptr; });
  bool alone = !s.stacked && (s.single || e.plan.n_tokens <= most_tokens_split);
  if (e.plan.n_tokens < least_recorded_tokens || !(common || alone)) return;
  grow(e, e.record_memory, size_t(e.plan.n_tokens) * e.points.size() * sizeof(term_record), "adapters");
  e.records = e.record_memory.as<term_record>();
}

void make_adapter_room(adrt_executable &e) {
  int64_t width = 0, projected = 0;
  bool maps = false;
  for (const std::unique_ptr<stage> &s : e.stages) {
    width = std::max(width, s->hidden_width(e));
    projected = std::max(projected, s->projected_width(e));
  }
  for (const host_attachment &a : e.acting.points) {
    maps = maps || a.maps_input;
    if (!a.v || e.plan.n_tokens < least_common_tokens) continue;
    plain_form(e, *a.v);  // now, as nothing may be allocated once the step's launches have begun
    plain_form(e, *a.u);
  }
  int64_t rows = std::max(e.plan.tokens.hidden_rows, e.plan.logits.hidden_rows);
  if (e.plan.n_tokens <= most_tokens_split) rows = std::max<int64_t>(rows, most_shrink_splits * e.plan.n_tokens);
  int64_t splits = width ? lone_split_floats(e.multiprocessors) : 0;
  grow(e, e.hidden, size_t(rows * width + splits) * sizeof(float), "adapters");
  int64_t tokens_or_logits = std::max(e.plan.n_tokens, e.plan.n_logits);
  grow(e, e.projected, size_t(tokens_or_logits * projected) * sizeof(float), "adapters");
  make_record_room(e);
  if (grow(e, e.beside, beside_bytes, "adapters"))
    check(cudaMemsetAsync(e.beside.bytes(), 0, e.beside.size(), e.queues.main), "adapters");
  size_t slots = e.plan.tokens.shrink_tiles.size() + e.plan.logits.shrink_tiles.size();
  grow(e, e.beside_terms, e.points.size() * slots * sizeof(beside_term), "adapters");
  if (!maps) return;
  int64_t stride = cpu_align(e.widest_input, BLOCK), tokens = e.token_room;
  size_t narrow = size_t(cpu_align(tokens * stride * int64_t(sizeof(__nv_bfloat16)), 256));
  size_t bytes = narrow + size_t(tokens * 2 * e.widest_input) * sizeof(float);
  if (grow(e, e.mapped_memory, bytes, "adapters"))
    check(cudaMemsetAsync(e.mapped_memory.bytes(), 0, bytes, e.queues.main), "adapters");
  e.mapped = e.mapped_memory.as<__nv_bfloat16>();
  e.map_scratch = reinterpret_cast<float *>(e.mapped_memory.bytes() + narrow);
}

}  // namespace

// Enough blocks for the whole GPU, but no split without a tile for each of its warps. Powers of two, so that a growing
// context seldom needs another graph.
int splits_of(const adrt_executable &e, const attention_shape &shape, int64_t n_blocks) {
  int64_t blocks = n_blocks * shape.kv_heads * shape.head_chunks();
  int64_t useful = (e.plan.longest_context + warps_of_attention * positions_of_tile - 1) /
                   (warps_of_attention * positions_of_tile);
  int splits = 1;
  while (splits < most_splits && splits < useful && splits * blocks < 2 * e.multiprocessors) splits *= 2;
  return splits;
}

size_t step_bytes(adrt_executable &e, const product_context *context, int32_t n_tokens) {
  size_t workspace = workspace_zero_bytes;
  for (const packed_matrix &w : e.product_weights)
    workspace = std::max(workspace, product_workspace_bytes(context, w, n_tokens));
  size_t pages = size_t((n_tokens + e.options.page_tokens - 1) / e.options.page_tokens);
  return place_activations(e, n_tokens, nullptr) + workspace + size_t(e.logit_rows) * sizeof(float) +
         pages * size_t(e.page_bytes) + attention_and_plan_bytes;
}

void make_room(adrt_executable &e) {
  make_token_room(e, e.plan.n_tokens);
  make_logit_room(e);
  make_attention_room(e);
  e.records = nullptr;
  if (e.plan.adapted) make_adapter_room(e);
  if (e.plan.number == 0 && e.beside.size())  // what it has of numbers that come again
    check(cudaMemsetAsync(e.beside.bytes(), 0, e.beside.size(), e.queues.main), "adapters");
}

void reserve_pages(adrt_executable &e, int32_t n_pages) {
  if (n_pages <= e.n_pages) return;
  int32_t more = n_pages - e.n_pages;
  int64_t bytes = cpu_product(more, e.page_bytes, 1);
  if (bytes < 0) fail(ADRT_NO_MEMORY, "no memory for %d KV pages of %lld bytes", n_pages, (long long)e.page_bytes);
  device_memory slab(size_t(bytes), "KV pages");
  check(cudaMemset(slab.bytes(), 0, size_t(bytes)), "KV pages");
  std::vector<uint8_t *> addresses = e.page_addresses;
  for (int32_t i = 0; i < more; i++) addresses.push_back(slab.bytes() + i * e.page_bytes);
  device_memory table(addresses.size() * sizeof(uint8_t *), "KV pages");
  check(cudaMemcpy(table.bytes(), addresses.data(), table.size(), cudaMemcpyHostToDevice), "KV pages");
  e.page_slabs.push_back(std::move(slab));
  e.page_addresses = std::move(addresses);
  e.page_table = std::move(table);
  e.n_pages = n_pages;
  e.generation++;
}

}  // namespace adaptrt
