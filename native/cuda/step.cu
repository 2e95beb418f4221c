// One step: check the batch, plan it, upload the plan, run the stages, bring the logits back.
#include <string.h>

#include <algorithm>

#include "beside.cuh"
#include "executable.cuh"

namespace adaptrt {
namespace {

bool attached(const void *owner, int32_t handle) {
  return static_cast<const adrt_executable *>(owner)->shelf.has(handle);
}

void check_batch(const adrt_executable &e, const adrt_batch &batch) {
  const batch_limits limits = {e.vocabulary, e.options.page_tokens, e.n_pages, attached, &e};
  adrt_error error;
  check(cpu_validate_batch(&batch, &limits, &error), error);
}

// FNV-1a over what launches depend on.
uint64_t hash_of(const std::vector<host_attachment> &all) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const host_attachment &a : all)
    for (int64_t v : {int64_t(a.acts), int64_t(a.maps_input), a.width, a.more_terms, int64_t(a.alone), int64_t(a.lone),
                      int64_t(a.dtype), int64_t(a.vectors), a.v ? a.v->number : 0, a.u ? a.u->number : 0})
      hash = (hash ^ uint64_t(v)) * 0x100000001b3u;
  return hash;
}

// Adds what one more adapter does at an attach point.
void join(host_attachment &all, const host_attachment &one) {
  if (!one.acts) return;
  bool shared = one.v && one.v->terms > 1 && one.u->terms > 1, first = !all.acts;
  if (shared && !all.v) all.v = one.v, all.u = one.u;
  all.alone = (first || all.alone) && one.alone && one.v == all.v && one.u == all.u;
  bool one_dtype = first || all.dtype < 0 || one.dtype < 0 || all.dtype == one.dtype;
  all.lone = (first || all.lone) && one.lone && one_dtype;
  all.dtype = first || all.dtype < 0 ? one.dtype : all.dtype;
  all.acts = true;
  all.vectors = all.vectors || one.vectors;
  all.maps_input = all.maps_input || one.maps_input;
  all.width = std::max(all.width, one.width);
  all.more_terms = std::max(all.more_terms, one.more_terms);
}

joined_adapters join_all(const adrt_executable &e, const std::vector<int32_t> &handles) {
  joined_adapters all;
  all.points.resize(e.points.size());
  for (int32_t handle : handles)
    for (size_t i = 0; i < all.points.size(); i++) join(all.points[i], e.adapters[size_t(handle)]->targets[i]);
  all.hash = hash_of(all.points);
  return all;
}

// Batches take turns and come again, and 100 adapters of 32 layers are 22,500 attach points to join.
constexpr size_t most_joined = 32;

// What the adapters of the batch do at each attach point, all together. Handles are never reused, so an equal list means
// equal adapters.
void note_acting(adrt_executable &e, const adrt_batch &b) {
  std::vector<int32_t> handles(b.stacks, b.stacks + b.stack_start[b.n_runs]);
  std::sort(handles.begin(), handles.end());
  handles.erase(std::unique(handles.begin(), handles.end()), handles.end());
  if (e.acting_factors != e.factors_made) e.joined.clear();
  e.acting_factors = e.factors_made;
  auto at = e.joined.find(handles);
  if (at == e.joined.end()) {
    if (e.joined.size() >= most_joined) e.joined.clear();
    at = e.joined.emplace(handles, join_all(e, handles)).first;
  }
  e.acting = at->second;
}

// A step of more tokens is long enough to hide its launches.
constexpr int32_t most_tokens_of_graph = 256;

graph_key key_of_step(const adrt_executable &e) {
  const plan &p = e.plan;
  graph_key key = {p.n_tokens, p.n_logits, p.gathers, p.adapted, p.separate, int64_t(e.acting.hash)};
  for (const segment_plan *s : {&p.tokens, &p.logits}) key.insert(key.end(), {s->single, s->stacked});
  for (const segment_plan *s : {&p.tokens, &p.logits})
    for (size_t count : {s->applications.size(), s->tiles.size(), s->shrink_tiles.size()}) key.push_back(int64_t(count));
  for (const query_plan &q : p.queries) key.push_back(int64_t(q.blocks.size()));
  for (const attention_shape &shape : e.attention_shapes)
    for (const query_plan &q : p.queries) key.push_back(splits_of(e, shape, int64_t(q.blocks.size())));
  return key;
}

// What products need to know of adapters that they have inside. They read it before the kernel before them has ended; what
// looks up embeddings starts after all before it, and every program begins with it.
void find_terms(adrt_executable &e) {
  const plan &p = e.plan;
  beside_term *terms = e.beside_terms.as<beside_term>();
  auto table = [](const segment_plan &s, beside_term *to) {
    return term_table{s.device_shrink_tiles, int(s.shrink_tiles.size()), to};
  };
  e.launches_beside = 0;
  if (p.adapted)
    launch_find_terms(e.queue(), {{table(p.tokens, terms), table(p.logits, terms + e.first_logit_term())}},
                      int(e.points.size()));
}

void enqueue(adrt_executable &e) {
  const plan &p = e.plan;
  if (e.records)
    launch_resolve(e.queue(), p.tokens.device_applications, p.tokens.device_heads, p.n_tokens, int(e.points.size()),
                   e.records);
  find_terms(e);
  for (const rope_table &t : e.rope_tables)
    launch_fill_rope(e.queue(), p.device_positions, p.n_tokens, t.inverse, int(t.values.size()), t.factor, t.cos_sin);
  for (const std::unique_ptr<stage> &s : e.stages) s->launch(e);
}

void run_stages(adrt_executable &e) {
  pager::step paging(e.weights);
  if (e.plan.n_tokens > most_tokens_of_graph || e.weights.streams())  // which takes far longer than launches, too
    enqueue(e);
  else
    e.graphs.run(key_of_step(e), e.generation + e.weights.moves(), e.queues.main, [&] { enqueue(e); });
}

void fetch_logits(adrt_executable &e, float *logits) {
  size_t bytes = size_t(e.plan.n_logits) * size_t(e.logit_rows) * sizeof(float);
  if (bytes)
    check(cudaMemcpyAsync(e.host_logits.bytes(), e.logits.bytes(), bytes, cudaMemcpyDeviceToHost, e.queues.main),
          "fetching the logits");
  check(cudaStreamSynchronize(e.queues.main), "a step");
  if (bytes) copy_in_threads(reinterpret_cast<uint8_t *>(logits), e.host_logits.bytes(), bytes);
}

}  // namespace

void step(adrt_executable &e, const adrt_batch &batch) {
  check_batch(e, batch);
  e.shelf.begin_step(batch);
  if (make_plan(e, batch, e.plan)) e.generation++;
  note_acting(e, batch);
  make_room(e);
  check(cudaMemcpyAsync(e.plan.device.bytes(), e.plan.host.bytes(), e.plan.bytes, cudaMemcpyHostToDevice, e.queues.main),
        "uploading a step's plan");
  run_stages(e);
  e.shelf.bring_wanted();
  fetch_logits(e, batch.logits);
  e.shelf.end_step();
}

}  // namespace adaptrt
