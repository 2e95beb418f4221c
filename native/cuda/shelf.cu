#include "shelf.cuh"

#include <algorithm>

#include "executable.cuh"

namespace adaptrt {

int32_t shelf::attach(int32_t n, const adrt_attachment *attachments) {
  auto made = std::make_unique<entry>();
  made->attachments.assign(attachments, attachments + n);
  for (adrt_attachment &a : made->attachments) {
    made->terms.emplace_back(a.terms, a.terms + (a.terms ? std::max(a.n_terms, 0) : 0));
    if (a.terms) a.terms = made->terms.back().data();
  }
  std::unique_ptr<adapter> on_device = make_adapter(e_, made->attachments);
  made->last_use = now_++;
  e_.adapters.push_back(std::move(on_device));
  entries_.push_back(std::move(made));
  return int32_t(entries_.size()) - 1;
}

void shelf::detach(int32_t handle) {
  if (!has(handle)) fail(ADRT_BAD_ARGUMENT, "detach: no adapter with handle %d", handle);
  entries_[size_t(handle)].reset();
  e_.adapters[size_t(handle)].reset();
  forget_released(e_);
}

void shelf::begin_step(const adrt_batch &batch) {
  now_++;
  int32_t n = batch.stack_start[batch.n_runs];
  for (int32_t i = 0; i < n; i++) entries_[size_t(batch.stacks[i])]->last_use = now_;
  for (int32_t i = 0; i < n; i++) bring(batch.stacks[i]);
}

void shelf::want(int32_t n, const int32_t *handles) {
  for (int32_t i = 0; i < n; i++)
    if (!has(handles[i])) fail(ADRT_BAD_ARGUMENT, "prefetch: no adapter with handle %d", handles[i]);
  for (int32_t i = 0; i < n; i++)
    if (!e_.adapters[size_t(handles[i])]) wanted_.push_back(handles[i]);
}

void shelf::bring_wanted() {
  std::vector<int32_t> wanted = std::move(wanted_);
  wanted_.clear();
  try {
    for (int32_t handle : wanted) {
      if (!has(handle)) continue;
      entries_[size_t(handle)]->last_use = now_;
      bring(handle);
    }
  } catch (const failure &f) {
    if (f.error.code != ADRT_NO_MEMORY) throw;  // else they come when they are named, or fail then
  }
}

void shelf::bring(int32_t handle) {
  if (e_.adapters[size_t(handle)]) return;
  e_.adapters[size_t(handle)] = make_adapter(e_, entries_[size_t(handle)]->attachments);
  e_.joined.clear();  // it is another adapter than before
}

bool shelf::idle(size_t handle) const { return e_.adapters[handle] && entries_[handle]->last_use < now_; }

size_t shelf::movable() const {
  size_t bytes = 0;
  for (size_t i = 0; i < e_.adapters.size(); i++) bytes += idle(i) ? e_.adapters[i]->bytes() : 0;
  return bytes;
}

void shelf::give_way() {
  size_t oldest = e_.adapters.size();
  for (size_t i = 0; i < e_.adapters.size(); i++)
    if (idle(i) && (oldest == e_.adapters.size() || entries_[i]->last_use < entries_[oldest]->last_use)) oldest = i;
  if (oldest == e_.adapters.size()) return;
  budget::keeping keeping(e_.budget);
  e_.adapters[oldest].reset();
  forget_released(e_);
}

}  // namespace adaptrt
