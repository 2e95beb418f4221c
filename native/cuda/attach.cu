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

  void check_fit(const adrt_attachment &in) {
    if (in.target < 0 || size_t(in.target) >= table_.size() || table_[size_t(in.target)].acts)
      fail(ADRT_BAD_ARGUMENT, "attach: target %d of %zu is %s", in.target, table_.size(),
           in.target >= 0 && size_t(in.target) < table_.size() ? "given twice" : "out of range");
    adrt_error error;
    check(cpu_validate_attachment(&in, &e_.points[size_t(in.target)], &error), error);
    table_[size_t(in.target)].acts = true;
  }

  // The tensors that no other adapter has brought, into one piece of memory.
  void bring_factors(const std::vector<adrt_attachment> &attachments) {
    for (const adrt_attachment &in : attachments)
      for (int32_t k = 0; k < in.n_terms; k++) {
        const adrt_term &t = in.terms[k];
        if (t.kind == ADRT_SPARSE) continue;
        forms f = forms_of(t, e_.points[size_t(in.target)]);
        need(t.v, f.v);
        if (t.u.data) need(t.u, f.u);
      }
    if (arrivals_.empty()) return;
    auto memory = std::make_shared<device_memory>(made_->factor_bytes, "an adapter's tensors");
    for (arrival &a : arrivals_) place(a, memory);
    upload();
  }

  void add(const adrt_attachment &in) {
    const attach_point &point = e_.points[size_t(in.target)];
    attachment &out = table_[size_t(in.target)];
    host_attachment &host = made_->targets[size_t(in.target)];
    host.acts = true;
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
    bool fits = low_rank && only->v.stride == cpu_align(point.inner, BLOCK);  // V has no columns to pass over
    host.lone = (fits || !in.n_terms) && !in.c;
    host.vectors = in.g_out || (low_rank && only->e);
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
    check(cudaStreamSynchronize(e_.queues.adapters), "attaching an adapter");
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
      forms f = forms_of(in, point);
      shared_factor *v = share(in.v, f.v), *u = t.identity ? nullptr : share(in.u, f.u);
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

  struct forms {
    factor_form v, u;
  };
  static forms forms_of(const adrt_term &t, const attach_point &point) {
    if (t.kind == ADRT_KRONECKER) return {factor_form::rows, factor_form::rows};
    if (point.kind == ADRT_EMBED) return {factor_form::rows, factor_form::turned_rows};
    return {factor_form::v_panels, factor_form::u_panels};
  }

  // One that was needed before.
  shared_factor *share(const adrt_tensor &tensor, factor_form form) {
    std::shared_ptr<shared_factor> shared = e_.factors[{key_of(tensor), form}].lock();
    shared->terms++;
    return shared.get();
  }

  struct arrival {
    const adrt_tensor *tensor;
    std::shared_ptr<shared_factor> factor;
    size_t offset;
  };

  void need(const adrt_tensor &tensor, factor_form form) {
    std::weak_ptr<shared_factor> &known = e_.factors[{key_of(tensor), form}];
    std::shared_ptr<shared_factor> shared = known.lock();
    if (!shared) {
      shared = std::make_shared<shared_factor>();
      shared->f = describe_factor(tensor, form);
      shared->number = ++e_.factors_made;
      known = shared;
      arrivals_.push_back({&tensor, shared, made_->factor_bytes});
      made_->factor_bytes += size_t(cpu_align(int64_t(factor_bytes(shared->f)), 256));
    }
    made_->factors.push_back(shared);
  }

  void place(arrival &a, const std::shared_ptr<device_memory> &memory) {
    factor &f = a.factor->f;
    a.factor->memory = memory;
    f.data = memory->bytes() + a.offset;
    if (factor_bytes(f) > factor_data_bytes(f)) f.scales = reinterpret_cast<const float *>(f.data + factor_data_bytes(f));
  }

  // As many tensors at a time as `stored` holds: all threads copy, then each tensor is packed.
  void upload() {
    constexpr size_t enough = size_t(32) << 20;
    size_t largest = 0, all = 0;
    for (const arrival &a : arrivals_) {
      largest = std::max(largest, stored_bytes(a));
      all += stored_bytes(a);
    }
    size_t wanted = std::max(largest, std::min(all, enough));
    if (wanted > e_.stored.size()) {
      e_.stored = device_memory();
      e_.stored = device_memory(wanted, "an adapter's tensors");
    }
    for (size_t first = 0, end = 0; first < arrivals_.size(); first = end) {
      std::vector<uploader::part> parts;
      size_t at = 0;
      for (; end < arrivals_.size() && at + stored_bytes(arrivals_[end]) <= e_.stored.size(); end++) {
        const adrt_tensor &t = *arrivals_[end].tensor;
        parts.push_back({at, t.data, t.bytes});
        at += stored_bytes(arrivals_[end]);
      }
      e_.uploader->copy(e_.stored.bytes(), parts);
      for (size_t i = first; i < end; i++)
        launch_pack_factor(*arrivals_[i].tensor, e_.stored.bytes() + parts[i - first].at, arrivals_[i].factor->f,
                           e_.queues.adapters);
    }
  }

  static size_t stored_bytes(const arrival &a) { return size_t(cpu_align(int64_t(a.tensor->bytes), 256)); }

  adrt_executable &e_;
  std::unique_ptr<adapter> made_;
  std::vector<attachment> table_;
  std::vector<term> terms_;
  std::vector<std::pair<size_t, size_t>> first_terms_;  // target, its first term
  blob vectors_;
  std::vector<arrival> arrivals_;
};

}  // namespace

void forget_released(adrt_executable &e) {
  for (auto i = e.factors.begin(); i != e.factors.end();) i = i->second.expired() ? e.factors.erase(i) : std::next(i);
}

const factor &plain_form(adrt_executable &e, shared_factor &s) {
  if (s.f.dtype == ADRT_BF16) return s.f;
  if (s.plain.data) return s.plain;
  factor plain = describe_plain(s.f);
  s.plain_memory = device_memory(factor_bytes(plain), "an adapter's tensor");
  plain.data = s.plain_memory.bytes();
  launch_plain(e.queue(), s.f, plain);
  return s.plain = plain;
}

std::unique_ptr<adapter> make_adapter(adrt_executable &e, const std::vector<adrt_attachment> &attachments) {
  if (!e.uploader) e.uploader = std::make_unique<uploader>(e.queues.adapters);
  attaching work(e);
  for (const adrt_attachment &one : attachments) work.check_fit(one);
  work.bring_factors(attachments);
  for (const adrt_attachment &one : attachments) work.add(one);
  return work.finish();
}

}  // namespace adaptrt
