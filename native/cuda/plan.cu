#include "plan.cuh"

#include <string.h>

#include <algorithm>

#include "beside.cuh"
#include "executable.cuh"

namespace adaptrt {
namespace {

int32_t run_of(const adrt_batch &b, int32_t token) {
  return int32_t(std::upper_bound(b.run_start, b.run_start + b.n_runs + 1, token) - b.run_start) - 1;
}

void add_tiles(std::vector<token_tile> &tiles, token_tile whole, int32_t most) {
  for (int32_t done = 0; done < whole.n_tokens; done += most)
    tiles.push_back({whole.token + done, std::min(most, whole.n_tokens - done), whole.first, whole.n, whole.head});
}

void add_segment(const adrt_executable &e, const adrt_batch &b, int32_t run, int32_t start, int32_t end,
                 segment_plan &out) {
  int32_t first = int32_t(out.applications.size()), n = b.stack_start[run + 1] - b.stack_start[run];
  for (int32_t i = 0; i < n; i++) {
    const adapter &a = *e.adapters[b.stacks[b.stack_start[run] + i]];
    out.applications.push_back({a.table.as<attachment>(), i, start, end - start, out.hidden_rows});
    add_tiles(out.shrink_tiles, {start, end - start, first + i, 1, out.applications.back()}, shrink_tokens);
    out.hidden_rows += end - start;
  }
  out.heads.resize(size_t(end), n ? first : -1);
  out.stacked = out.stacked || n > 1;
  add_tiles(out.tiles, {start, end - start, first, n, n ? out.applications[size_t(first)] : application{}},
            expand_tokens);
}

// `runs[i]` is the run of row i; a segment ends where the stack changes.
void cut_segments(const adrt_executable &e, const adrt_batch &b, const std::vector<int32_t> &runs, segment_plan &out) {
  out.applications.clear();
  out.tiles.clear();
  out.shrink_tiles.clear();
  out.heads.clear();
  out.stacked = false;
  out.hidden_rows = 0;
  out.single = true;
  int32_t start = 0, n = int32_t(runs.size());
  for (int32_t i = 1; i <= n; i++) {
    if (i < n && (runs[i] == runs[i - 1] || cpu_same_stack(&b, runs[i], runs[i - 1]))) continue;
    add_segment(e, b, runs[start], start, i, out);
    out.single = out.single && i - start == 1;
    start = i;
  }
}

void cut_queries(const adrt_executable &e, const adrt_batch &b, plan &p) {
  for (query_plan &q : p.queries) q.blocks.clear();
  for (const attention_shape &shape : e.attention_shapes) {
    auto same = [&](const query_plan &q) { return q.tokens_a_block == shape.tokens_a_block(); };
    if (std::none_of(p.queries.begin(), p.queries.end(), same)) p.queries.push_back({shape.tokens_a_block(), {}});
  }
  for (query_plan &q : p.queries)
    for (int32_t r = 0; r < b.n_runs; r++)
      for (int32_t t = b.run_start[r]; t < b.run_start[r + 1]; t += q.tokens_a_block)
        q.blocks.push_back({t, std::min(q.tokens_a_block, b.run_start[r + 1] - t), b.positions[t], b.page_start[r]});
}

// Whether all runs are one token that no other run sees.
bool are_separate(const adrt_batch &b, std::vector<int32_t> &writers, int32_t n_pages, int32_t page_tokens) {
  if (b.n_runs != b.n_tokens) return false;
  if (b.n_runs == 1) return true;
  writers.assign(size_t(n_pages), -1);
  auto written = [&](int32_t r) -> int32_t & { return writers[size_t(b.pages[b.page_start[r] + b.positions[r] / page_tokens])]; };
  for (int32_t r = 0; r < b.n_runs; r++) {
    if (written(r) >= 0) return false;
    written(r) = r;
  }
  for (int32_t r = 0; r < b.n_runs; r++)
    for (int32_t i = b.page_start[r]; i < b.page_start[r + 1]; i++) {
      int32_t writer = writers[size_t(b.pages[i])];
      if (writer >= 0 && writer != r) return false;
    }
  return true;
}

// Arrays one after the other, first measured, then written.
class layout {
 public:
  explicit layout(plan &p) : p_(p) { p.offsets.clear(); }
  template <typename item>
  void add(const item *data, size_t count, const item **device) {
    parts_.push_back({data, count * sizeof(item), reinterpret_cast<const void **>(device)});
    p_.offsets.push_back(end_);
    end_ += (count * sizeof(item) + 255) / 256 * 256;
  }
  // Whether memory had to grow.
  bool write() {
    bool grows = end_ > p_.host.size();
    if (grows) {
      p_.host = pinned_memory(2 * end_, "the plan of a step");
      p_.device = device_memory(2 * end_, "the plan of a step");
    }
    p_.bytes = end_;
    for (size_t i = 0; i < parts_.size(); i++) {
      if (parts_[i].bytes) memcpy(p_.host.bytes() + p_.offsets[i], parts_[i].data, parts_[i].bytes);
      *parts_[i].device = p_.device.bytes() + p_.offsets[i];
    }
    return grows;
  }

 private:
  struct part {
    const void *data;
    size_t bytes;
    const void **device;
  };
  plan &p_;
  std::vector<part> parts_;
  size_t end_ = 0;
};

void add_segments(layout &out, segment_plan &s) {
  out.add(s.applications.data(), s.applications.size(), &s.device_applications);
  out.add(s.tiles.data(), s.tiles.size(), &s.device_tiles);
  out.add(s.shrink_tiles.data(), s.shrink_tiles.size(), &s.device_shrink_tiles);
  out.add(s.heads.data(), s.heads.size(), &s.device_heads);
}

bool lay_out(const adrt_batch &b, plan &p) {
  layout out(p);
  size_t n = size_t(b.n_tokens);
  out.add(&p.number, 1, &p.device_number);
  out.add(b.tokens, n, &p.device_tokens);
  out.add(b.positions, n, &p.device_positions);
  out.add(p.token_pages.data(), n, &p.device_token_pages);
  out.add(b.logit_rows, size_t(b.n_logits), &p.device_logit_rows);
  for (query_plan &q : p.queries) out.add(q.blocks.data(), q.blocks.size(), &q.device_blocks);
  add_segments(out, p.tokens);
  add_segments(out, p.logits);
  out.add(b.pages, size_t(b.page_start[b.n_runs]), &p.device_pages);  // last: it alone grows from step to step
  return out.write();
}

}  // namespace

bool make_plan(const adrt_executable &e, const adrt_batch &b, plan &p) {
  std::vector<int32_t> token_runs(size_t(b.n_tokens)), logit_runs(size_t(b.n_logits));
  p.number = (p.number + 1) % (UINT32_MAX / most_launches_beside);
  p.n_tokens = b.n_tokens;
  p.n_logits = b.n_logits;
  p.adapted = b.stack_start[b.n_runs] > 0;
  p.gathers = b.n_logits != b.n_tokens;
  p.longest_context = 0;
  p.token_pages.resize(size_t(b.n_tokens));
  for (int32_t r = 0; r < b.n_runs; r++)
    for (int32_t t = b.run_start[r]; t < b.run_start[r + 1]; t++) {
      token_runs[t] = r;
      p.token_pages[t] = b.page_start[r];
      p.longest_context = std::max(p.longest_context, b.positions[t] + 1);
    }
  for (int32_t i = 0; i < b.n_logits; i++) {
    logit_runs[i] = run_of(b, b.logit_rows[i]);
    p.gathers = p.gathers || b.logit_rows[i] != i;
  }
  cut_segments(e, b, token_runs, p.tokens);
  cut_segments(e, b, logit_runs, p.logits);
  cut_queries(e, b, p);
  p.separate = are_separate(b, p.writers, e.n_pages, e.options.page_tokens);
  return lay_out(b, p);
}

}  // namespace adaptrt
