// Attach and detach: an adapter's tensors and vectors go to the device once, with a table that kernels walk.
#include <algorithm>

#include "executable.cuh"

namespace adaptrt {
namespace {

// Bytes that go to the device in one piece. Until that is there, pointers into it are offsets, none of which is 0.
class blob {
 public:
  template <typename item>
  const item *add(const item *data, int64_t count) {
    if (!data || !count) return nullptr;
    size_t offset = bytes_.size();
    const uint8_t *from = reinterpret_cast<const uint8_t *>(data);
    bytes_.insert(bytes_.end(), from, from + size_t(count) * sizeof(item));
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    return reinterpret_cast<const item *>(offset);
  }
  const std::vector<uint8_t> &bytes() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_ = std::vector<uint8_t>(16);
};

template <typename item>
void relocate(const item *&pointer, const device_memory &base) {
  if (pointer) pointer = reinterpret_cast<const item *>(base.bytes() + reinterpret_cast<uintptr_t>(pointer));
}

class attaching {
 public:
  explicit attaching(adrt_executable &e) : e_(e), made_(std::make_unique<adapter>()), table_(e.points.size()) {
    made_->targets.resize(e.points.size());
  }

  void add(const adrt_attachment &in) {
    if (in.target < 0 || size_t(in.target) >= table_.size() || table_[size_t(in.target)].acts)
      fail(ADRT_BAD_ARGUMENT, "attach: target %d of %zu is %s", in.target, table_.size(),
           in.target >= 0 && size_t(in.target) < table_.size() ? "given twice" : "out of range");
    const attach_point &point = e_.points[size_t(in.target)];
    adrt_error error;
    check(cpu_validate_attachment(&in, &point, &error), error);
    attachment &out = table_[size_t(in.target)];
    host_attachment &host = made_->targets[size_t(in.target)];
    out.acts = host.acts = true;
    out.scales_bias = in.scales_bias != 0;
    out.n_terms = in.n_terms;
    first_terms_.push_back({size_t(in.target), terms_.size()});
    for (int32_t k = 0; k < in.n_terms; k++) add_term(in.terms[k], point, host);
    out.g_in = vectors_.add(in.g_in, point.inner);
    out.rotation = vectors_.add(in.rotation, in.rotation ? point.inner * in.rotation_block : 0);
    out.rotation_block = in.rotation_block;
    out.g_out = vectors_.add(in.g_out, point.out);
    out.c = vectors_.add(in.c, point.out);
    host.more_terms = std::max(0, in.n_terms - 1);
    host.maps_input = (in.g_in || in.rotation) && point.kind != ADRT_EMBED;
    host.alone = host.v && in.n_terms == 1 && !in.g_out && !in.c;
    const term *only = in.n_terms == 1 ? &terms_.back() : nullptr;
    bool low_rank = only && only->kind == ADRT_LOW_RANK && !only->identity && only->u.dtype == only->v.dtype;
    host.lone = (low_rank || !in.n_terms) && !in.c;
    host.dtype = low_rank ? only->u.dtype : -1;
  }

  std::unique_ptr<adapter> finish() {
    made_->vectors = device_memory(vectors_.bytes().size(), "an adapter's vectors");
    e_.uploader->copy(made_->vectors.bytes(), vectors_.bytes().data(), vectors_.bytes().size());
    size_t head = table_.size() * sizeof(attachment), tail = terms_.size() * sizeof(term);
    made_->table = device_memory(head + tail + 1, "an adapter's table");
    for (const auto &[target, first] : first_terms_)
      table_[target].terms = reinterpret_cast<const term *>(made_->table.bytes() + head) + first;
    for (term &t : terms_) relocate_term(t);
    for (const auto &[target, first] : first_terms_)
      if (table_[target].n_terms) table_[target].first = terms_[first];
    for (attachment &a : table_)
      for (const float **pointer : {&a.g_in, &a.rotation, &a.g_out, &a.c}) relocate(*pointer, made_->vectors);
    if (head) e_.uploader->copy(made_->table.bytes(), table_.data(), head);
    if (tail) e_.uploader->copy(made_->table.bytes() + head, terms_.data(), tail);
    check(cudaStreamSynchronize(e_.queues.main), "attaching an adapter");
    return std::move(made_);
  }

 private:
  void relocate_term(term &t) {
    for (const float **pointer : {&t.d, &t.e, &t.values}) relocate(*pointer, made_->vectors);
    for (const int32_t **pointer : {&t.row_start, &t.columns}) relocate(*pointer, made_->vectors);
  }

  void add_term(const adrt_term &in, const attach_point &point, host_attachment &host) {
    term t = {in.kind, false, in.scale, point.out, host.width};
    if (in.kind == ADRT_SPARSE) {
      int64_t rows = point.kind == ADRT_EMBED ? point.inner : point.out;
      t.row_start = vectors_.add(in.row_start, rows + 1);
      t.columns = vectors_.add(in.columns, in.n_values);
      t.values = vectors_.add(in.values, in.n_values);
    } else {
      bool kronecker = in.kind == ADRT_KRONECKER;
      t.identity = !in.u.data;
      t.width = kronecker ? in.u.cols * in.v.rows : in.v.rows;
      factor_form v_form = factor_form::rows, u_form = kronecker ? factor_form::rows : factor_form::turned_rows;
      if (!kronecker && point.kind != ADRT_EMBED) v_form = factor_form::v_panels, u_form = factor_form::u_panels;
      shared_factor *v = share(in.v, v_form), *u = t.identity ? nullptr : share(in.u, u_form);
      t.v = v->f;
      if (u) t.u = u->f;
      bool first = first_terms_.back().second == terms_.size();
      if (first && u && !kronecker && t.width <= widest_shared) host.v = v, host.u = u;
      t.d = vectors_.add(in.d, kronecker ? 0 : t.width);
      t.e = vectors_.add(in.e, kronecker ? 0 : point.out);
    }
    host.width += t.width;
    terms_.push_back(t);
  }

  shared_factor *share(const adrt_tensor &tensor, factor_form form) {
    std::weak_ptr<shared_factor> &known = e_.factors[{key_of(tensor), form}];
    std::shared_ptr<shared_factor> shared = known.lock();
    if (!shared) {
      shared = std::make_shared<shared_factor>(upload(tensor, form));
      shared->number = ++e_.factors_made;
      known = shared;
    }
    made_->factors.push_back(shared);
    shared->terms++;
    return shared.get();
  }

  shared_factor upload(const adrt_tensor &tensor, factor_form form) {
    shared_factor made = {describe_factor(tensor, form)};
    made.memory = device_memory(factor_bytes(made.f), "an adapter's tensor");
    made.f.data = made.memory.bytes();
    if (factor_bytes(made.f) > factor_data_bytes(made.f))
      made.f.scales = reinterpret_cast<const float *>(made.memory.bytes() + factor_data_bytes(made.f));
    if (tensor.bytes > e_.stored.size()) {
      check(cudaStreamSynchronize(e_.queues.main), "attaching an adapter");
      e_.stored = device_memory();
      e_.stored = device_memory(std::max<size_t>(tensor.bytes, size_t(1) << 20), "an adapter's tensor");
    }
    e_.uploader->copy(e_.stored.bytes(), tensor.data, tensor.bytes);
    launch_pack_factor(tensor, e_.stored.bytes(), made.f, e_.queues.main);
    return made;
  }

  adrt_executable &e_;
  std::unique_ptr<adapter> made_;
  std::vector<attachment> table_;
  std::vector<term> terms_;
  std::vector<std::pair<size_t, size_t>> first_terms_;  // target, its first term
  blob vectors_;
};

void forget_released(adrt_executable &e) {
  for (auto i = e.factors.begin(); i != e.factors.end();) i = i->second.expired() ? e.factors.erase(i) : std::next(i);
}

}  // namespace

// As rows of bfloat16.
const dense_factor &dense_form(adrt_executable &e, shared_factor &s) {
  if (s.dense.data) return s.dense;
  s.dense = describe_dense(s.f);
  size_t bytes = size_t(s.dense.rows * s.dense.stride) * sizeof(__nv_bfloat16);
  s.dense_memory = device_memory(bytes, "an adapter's tensor");
  s.dense.data = s.dense_memory.as<__nv_bfloat16>();
  launch_densify(e.queue(), s.f, s.dense);
  return s.dense;
}

int32_t attach(adrt_executable &e, int32_t n, const adrt_attachment *attachments) {
  attaching work(e);
  for (int32_t i = 0; i < n; i++) work.add(attachments[i]);
  e.adapters.push_back(work.finish());
  return int32_t(e.adapters.size()) - 1;
}

void detach(adrt_executable &e, int32_t handle) {
  if (handle < 0 || size_t(handle) >= e.adapters.size() || !e.adapters[size_t(handle)])
    fail(ADRT_BAD_ARGUMENT, "detach: no adapter with handle %d", handle);
  e.adapters[size_t(handle)].reset();
  forget_released(e);
}

}  // namespace adaptrt
