// The stages of a program, and how its operations become them. Operations that read one input are one product; a sum and
// the norm of it are one pass; rotations ride with the storing of keys and values, and for tokens of sequences of their own
// with attention itself.
#include <algorithm>

#include "adapted.cuh"
#include "elementwise.cuh"

namespace adaptrt {
namespace {

// A register that its kernel wrote as float32 only, for products.
void narrow(adrt_executable &e, const view &v) {
  destination out = e.destination_of(v);
  if (!out.narrow) return;
  out.wide = nullptr;
  launch_combine(e.queue(), {combination::scale, e.source_of(v), {}, out, e.buffers[size_t(v.buffer)].width, 1.f, 0.f},
                 e.plan.n_tokens);
}

class embed_stage : public stage {
 public:
  embed_stage(loaded_matrix table, view out, int32_t target)
      : w_(table.w), block_(table.block), out_(out), target_(target) {}
  void launch(adrt_executable &e) const override {
    source out = e.source_of(out_);
    float *y = const_cast<float *>(out.data);
    const plan &p = e.plan;
    check(launch_rows(e.weights.table_at(block_, w_), p.device_tokens, p.n_tokens, y, out.stride, e.queues.main), "embedding");
    if (acts(e, target_))
      launch_embed_adapters(e.queue(),
                            {p.tokens.device_applications, p.tokens.device_tiles, p.device_tokens, target_, y,
                             out.stride, w_.cols},
                            int(p.tokens.tiles.size()));
    narrow(e, out_);
  }

 private:
  packed_matrix w_;
  int block_;
  view out_;
  int32_t target_;
};

class norm_stage : public stage {
 public:
  norm_stage(view a, view b, view sum, view out, const float *weight, int64_t width, float eps, int32_t target)
      : a_(a), b_(b), sum_(sum), out_(out), weight_(weight), width_(width), eps_(eps), target_(target) {}
  void launch(adrt_executable &e) const override {
    const plan &p = e.plan;
    norm_call call = {e.source_of(a_), e.source_of(b_), e.destination_of(sum_), e.destination_of(out_),
                      weight_,         width_,          eps_};
    launch_norm(e.queue(), call, p.n_tokens);
    if (acts(e, target_))
      launch_gain(e.queue(), {p.tokens.device_applications, p.tokens.device_tiles, target_, call.out, width_},
                  int(p.tokens.tiles.size()));
  }

 private:
  view a_, b_, sum_, out_;
  const float *weight_;
  int64_t width_;
  float eps_;
  int32_t target_;
};

class combine_stage : public stage {
 public:
  combine_stage(combination kind, view a, view b, view out, int64_t width, float factor, float cap)
      : kind_(kind), a_(a), b_(b), out_(out), width_(width), factor_(factor), cap_(cap) {}
  void launch(adrt_executable &e) const override {
    launch_combine(e.queue(), {kind_, e.source_of(a_), e.source_of(b_), e.destination_of(out_), width_, factor_, cap_},
                   e.plan.n_tokens);
  }
  lone_gate gate(const adrt_executable &e) const { return {kind_, e.destination_of(out_)}; }

 private:
  combination kind_;
  view a_, b_, out_;
  int64_t width_;
  float factor_, cap_;
};

// One or more products with the same input, their outputs side by side; or the head. With `gate`, nobody but that reads
// the outputs of two.
class product_stage : public stage {
 public:
  product_stage(view in, view out, bool head, loaded_matrix all, std::vector<product_member> members,
                std::unique_ptr<combine_stage> gate)
      : in_(in), out_(out), head_(head), all_(all.w), block_(all.block), members_(std::move(members), head, gate != nullptr),
        gate_(std::move(gate)) {}

  void launch(adrt_executable &e) const override {
    if (!members_.tokens(e)) return;
    adapter_call call = describe(e);
    beside_call beside;
    bool fits = members_.fit_beside(e, call, all_, beside);
    adapters_left left;
    if (!fits) left = members_.before(e, call, all_);  // the product fills its pipeline with weights meanwhile
    e.weights.acquire(block_);
    if (fits)
      product(e, all_, call, call.x, 0, &beside);
    else
      multiply(e, call, left.ready);
    e.weights.release(block_);
    if (!finish(e, call, fits, left) && gate_) gate_->launch(e);
    if (!head_) narrow(e, out_);
  }

  int64_t hidden_width(const adrt_executable &e) const override { return members_.hidden_width(e); }
  int64_t projected_width(const adrt_executable &e) const override { return members_.projected_width(e); }

 private:
  adapter_call describe(adrt_executable &e) const {
    const plan &p = e.plan;
    const activations &in = e.buffers[size_t(in_.buffer)];
    adapter_call call = members_.describe(e);
    call.x = in.narrow, call.x_stride = in.narrow_stride();
    if (head_ && p.gathers) {
      launch_gather(e.queue(), in.narrow, in.narrow_stride(), p.device_logit_rows, p.n_logits, e.gathered);
      call.x = e.gathered;
    }
    if (head_) {
      call.y = e.logits.as<float>(), call.y_stride = e.logit_rows;
    } else {
      source out = e.source_of(out_);
      call.y = const_cast<float *>(out.data), call.y_stride = out.stride;
    }
    return call;
  }

  // What adapters do after the product; whether the gate's work is done.
  bool finish(adrt_executable &e, const adapter_call &call, bool fits, const adapters_left &left) const {
    if (fits) return false;
    if (!gate_) return members_.after(e, call, left, nullptr);
    lone_gate gate = gate_->gate(e);
    return members_.after(e, call, left, &gate);
  }

  void multiply(adrt_executable &e, const adapter_call &call, bool ready) const {
    const std::vector<product_member> &all = members_.all();
    if (std::none_of(all.begin(), all.end(), [&](const product_member &m) { return members_.maps_input(e, m); })) {
      product(e, all_, call, call.x, 0, nullptr, ready);
      return;
    }
    for (size_t i = 0; i < all.size(); i++) {
      bool mine = members_.maps_input(e, all[i]);
      if (mine)
        launch_map(e.queue(),
                   {call.applications, call.tiles, all[i].target, call.x, e.mapped, call.x_stride, call.cols,
                    e.map_scratch},
                   call.n_tiles);
      product(e, all[i].w, call, mine ? e.mapped : call.x, call.members[i].row);
    }
  }

  void product(adrt_executable &e, const packed_matrix &w, const adapter_call &call, const __nv_bfloat16 *x, int64_t row,
               const beside_call *beside = nullptr, bool ready = false) const {
    product_output out = {call.y + row, call.y_stride, false, false};
    check(launch_product(e.products.context, e.weights.at(block_, w), x, call.x_stride, members_.tokens(e), out,
                         e.workspace.bytes(), e.queues.main, beside, ready),
          "product");
  }

  view in_, out_;
  bool head_;
  packed_matrix all_;
  int block_;
  adapted_members members_;
  std::unique_ptr<combine_stage> gate_;
};

class rope_stage : public stage {
 public:
  rope_stage(view in, view out, size_t table, int32_t heads, int32_t half)
      : in_(in), out_(out), table_(table), heads_(heads), half_(half) {}
  void launch(adrt_executable &e) const override {
    rope_call call = {e.source_of(in_), e.destination_of(out_), e.rope_tables[table_].cos_sin, heads_, half_};
    launch_rope(e.queue(), call, e.plan.n_tokens);
  }

 private:
  view in_, out_;
  size_t table_;
  int32_t heads_, half_;
};

constexpr int no_table = -1;

class attention_stage : public stage {
 public:
  attention_stage(view q, view k, view v, view out, int q_table, int k_table, int32_t layer, attention_shape shape)
      : q_(q), k_(k), v_(v), out_(out), q_table_(q_table), k_table_(k_table), layer_(layer), shape_(shape) {}
  void launch(adrt_executable &e) const override {
    const plan &p = e.plan;
    const kv_layer &layer = e.kv_layers[size_t(layer_)];
    kv_cache kv = {e.page_table.as<uint8_t *>(), p.device_pages, e.options.page_tokens, layer.dim, layer.k_offset,
                   layer.v_offset};
    const query_plan &q = *std::find_if(p.queries.begin(), p.queries.end(), [&](const query_plan &one) {
      return one.tokens_a_block == shape_.tokens_a_block();
    });
    int32_t n = int32_t(q.blocks.size()), splits = splits_of(e, shape_, n);
    float *partial = e.partial.as<float>();
    int32_t *arrived = e.arrived.as<int32_t>();
    source qs = e.source_of(q_), ks = e.source_of(k_), vs = e.source_of(v_);
    if (p.separate && q_table_ == k_table_ && q_table_ != no_table && can_attend_one(shape_, kv)) {
      launch_attend_one(e.queue(), {qs, ks, vs, table(e, q_table_), q.device_blocks, n, splits, kv, shape_, partial, arrived,
                                    e.destination_of(out_)});
      return;
    }
    launch_store(e.queue(),
                 {qs, ks, vs, table(e, q_table_), table(e, k_table_), p.device_positions, p.device_token_pages, kv, shape_,
                  e.queries},
                 p.n_tokens);
    launch_attend(e.queue(),
                  {e.queries, q.device_blocks, n, splits, kv, shape_, partial, arrived, e.destination_of(out_)});
  }

 private:
  static const float *table(const adrt_executable &e, int i) {
    return i == no_table ? nullptr : e.rope_tables[size_t(i)].cos_sin;
  }
  view q_, k_, v_, out_;
  int q_table_, k_table_;
  int32_t layer_;
  attention_shape shape_;
};

// Walks the operations once; `current_` says where each register lies at the moment.
class builder {
 public:
  builder(adrt_executable &e, const adrt_program &program) : e_(e), p_(program) {
    current_.resize(size_t(p_.n_registers));
    own_.assign(size_t(p_.n_registers), -1);
  }

  void build() {
    for (int32_t i = 0; i < p_.n_ops;) i += add(i);
  }

 private:
  const adrt_op &op(int32_t i) const { return p_.ops[i]; }
  const adrt_tensor &tensor(int32_t i) const { return p_.tensors[i]; }

  // Adds a stage for the operations from `i` on; returns how many it covers.
  int32_t add(int32_t i) {
    const adrt_op &o = op(i);
    switch (o.kind) {
      case ADRT_EMBED: return add_embed(o);
      case ADRT_NORM: return add_norm(o, nullptr);
      case ADRT_LINEAR: return add_linears(i);
      case ADRT_LOGITS: return add_head(o);
      case ADRT_ROPE: return attention_from(i) < 0 ? add_rope(o) : add_attention(i, attention_from(i));
      case ADRT_ATTENTION: return add_attention(i, i);
      case ADRT_ADD:
        if (i + 1 < p_.n_ops && op(i + 1).kind == ADRT_NORM && op(i + 1).a == o.out) return 1 + add_norm(op(i + 1), &o);
        return add_combine(o, combination::add);
      case ADRT_GATED: return add_combine(o, gate_kind(o));
      default: return add_combine(o, combination::scale);
    }
  }

  view read(int32_t reg) {
    e_.buffers[size_t(current_[size_t(reg)].buffer)].wants_wide = true;
    return current_[size_t(reg)];
  }
  view read_narrow(int32_t reg) {
    e_.buffers[size_t(current_[size_t(reg)].buffer)].wants_narrow = true;
    return current_[size_t(reg)];
  }
  view write(int32_t reg) {
    int &own = own_[size_t(reg)];
    if (own < 0) own = new_buffer(p_.register_widths[reg]);
    return current_[size_t(reg)] = {own, 0};
  }
  int new_buffer(int64_t width) {
    e_.buffers.push_back({width});
    return int(e_.buffers.size()) - 1;
  }

  static bool reads(const adrt_op &o, int32_t reg) {
    bool two = o.kind == ADRT_GATED || o.kind == ADRT_ADD || o.kind == ADRT_ATTENTION;
    return (o.kind != ADRT_EMBED && o.a == reg) || (two && o.b == reg) || (o.kind == ADRT_ATTENTION && o.c == reg);
  }
  static bool writes(const adrt_op &o, int32_t reg) { return o.kind != ADRT_LOGITS && o.out == reg; }

  bool read_later(int32_t reg, int32_t from, bool by_products_only = false) const {
    for (int32_t i = from; i < p_.n_ops; i++) {
      if (reads(op(i), reg) && (!by_products_only || is_product(op(i).kind))) return true;
      if (writes(op(i), reg)) return false;
    }
    return false;
  }

  int32_t add_embed(const adrt_op &o) {
    loaded_matrix w = load_matrix(e_, tensor(o.weight));
    e_.weights.note_use(w.block, block_use::table);
    e_.vocabulary = std::min(e_.vocabulary, w.w.rows);
    view out = write(o.out);
    read(o.out);  // its kernel writes float32
    add_stage<embed_stage>(w, out, o.target);
    return 1;
  }

  // With `sum`, the ADD before it as well.
  int32_t add_norm(const adrt_op &o, const adrt_op *sum) {
    view a = read(sum ? sum->a : o.a), b, kept;
    if (sum) {
      b = read(sum->b);
      kept = write(sum->out);
      read(sum->out);
    }
    const float *weight = load_vector(e_, tensor(o.weight));
    add_stage<norm_stage>(a, b, kept, write(o.out), weight, p_.register_widths[o.out], o.value[0], o.target);
    return 1;
  }

  // How many LINEARs from `i` on can be one product: the same input, outputs that no product reads as they are.
  int32_t group_size(int32_t i) const {
    int32_t n = 0;
    for (; n < most_members && i + n < p_.n_ops; n++) {
      const adrt_op &o = op(i + n);
      if (o.kind != ADRT_LINEAR || o.a != op(i).a || o.out == o.a || read_later(o.out, i + n + 1, true)) break;
      bool twice = false;
      for (int32_t k = 0; k < n; k++) twice = twice || op(i + k).out == o.out;
      if (twice) break;
    }
    return n;
  }

  int32_t add_linears(int32_t i) {
    int32_t n = group_size(i);
    std::vector<const adrt_tensor *> tensors;
    for (int32_t k = 0; k < n; k++) tensors.push_back(&tensor(op(i + k).weight));
    loaded_matrix all;
    std::vector<packed_matrix> each;
    if (n < 2 || !load_together(e_, tensors, all, each)) {
      n = 1;
      all = load_matrix(e_, tensor(op(i).weight));
      each = {all.w};
    }
    e_.weights.note_use(all.block, block_use::product);
    view in = read_narrow(op(i).a), out;
    std::vector<product_member> members;
    for (int32_t k = 0; k < n; k++) {
      const adrt_op &o = op(i + k);
      members.push_back({each[size_t(k)], o.target, o.bias < 0 ? nullptr : load_vector(e_, tensor(o.bias))});
    }
    out = n == 1 ? write(op(i).out) : write_group(i, n, all.w.rows);
    e_.buffers[size_t(out.buffer)].wants_wide = true;
    note(all.w, each);
    std::unique_ptr<combine_stage> gate = gate_of(i, n);
    int32_t covered = n + (gate != nullptr);
    add_stage<product_stage>(in, out, false, all, std::move(members), std::move(gate));
    return covered;
  }

  // The GATED right after two LINEARs from `i` on, if all that they are for is that.
  std::unique_ptr<combine_stage> gate_of(int32_t i, int32_t n) {
    if (n != 2 || i + n == p_.n_ops || op(i + n).kind != ADRT_GATED) return nullptr;
    const adrt_op &o = op(i + n);
    auto read_elsewhere = [&](int32_t reg) { return reg != o.out && read_later(reg, i + n + 1); };
    bool fits = o.a == op(i).out && o.b == op(i + 1).out && !read_elsewhere(o.a) && !read_elsewhere(o.b);
    return fits ? combine_of(o, gate_kind(o)) : nullptr;
  }

  // One buffer for the outputs of a group, the same for every group of these registers.
  view write_group(int32_t i, int32_t n, int64_t width) {
    std::vector<int32_t> registers;
    for (int32_t k = 0; k < n; k++) registers.push_back(op(i + k).out);
    auto found = groups_.find(registers);
    if (found == groups_.end()) found = groups_.emplace(registers, new_buffer(width)).first;
    int64_t offset = 0;
    for (int32_t reg : registers) {
      current_[size_t(reg)] = {found->second, offset};
      offset += p_.register_widths[reg];
    }
    return {found->second, 0};
  }

  void note(const packed_matrix &all, const std::vector<packed_matrix> &each) {
    e_.product_weights.push_back(all);
    if (each.size() > 1) e_.product_weights.insert(e_.product_weights.end(), each.begin(), each.end());
    e_.widest_input = std::max(e_.widest_input, all.cols);
  }

  int32_t add_head(const adrt_op &o) {
    loaded_matrix w = load_matrix(e_, tensor(o.weight));
    e_.weights.note_use(w.block, block_use::head);
    e_.logit_rows = w.w.rows;
    note(w.w, {});
    const float *bias = o.bias < 0 ? nullptr : load_vector(e_, tensor(o.bias));
    add_stage<product_stage>(read_narrow(o.a), view{}, true, w, std::vector<product_member>{{w.w, o.target, bias}}, nullptr);
    return 1;
  }

  // The ATTENTION that ROPEs from `i` on lead to, if its q and k are all they rotate and nobody else wants them; or -1.
  int32_t attention_from(int32_t i) const {
    int32_t end = i;
    while (end < p_.n_ops && op(end).kind == ADRT_ROPE) end++;
    if (end == p_.n_ops || op(end).kind != ADRT_ATTENTION || end - i > 2) return -1;
    const adrt_op &o = op(end);
    for (int32_t k = i; k < end; k++) {
      int32_t reg = op(k).a;
      bool fits = op(k).out == reg && op(k).head_dim == o.head_dim &&
                  ((reg == o.a && op(k).heads == o.heads) || (reg == o.b && op(k).heads == o.kv_heads));
      bool rewritten = o.out == reg;
      if (!fits || reg == o.c || o.a == o.b || (!rewritten && read_later(reg, end + 1))) return -1;
    }
    return end - i == 2 && op(i).a == op(i + 1).a ? -1 : end;
  }

  int32_t add_attention(int32_t first, int32_t at) {
    const adrt_op &o = op(at);
    int q_table = no_table, k_table = no_table;
    for (int32_t i = first; i < at; i++) (op(i).a == o.a ? q_table : k_table) = rope_table_of(op(i));
    attention_shape shape = {o.heads, o.kv_heads, o.head_dim, o.value[0], o.value[1]};
    place_layer(o);
    view q = read(o.a), k = read(o.b), v = read(o.c);
    add_stage<attention_stage>(q, k, v, write(o.out), q_table, k_table, o.layer, shape);
    e_.attention_shapes.push_back(shape);
    e_.largest_queries = std::max<int64_t>(e_.largest_queries, int64_t(o.heads) * padded_head(o.head_dim));
    return at - first + 1;
  }

  void place_layer(const adrt_op &o) {
    if (o.head_dim > largest_head)
      fail(ADRT_UNAVAILABLE, "layer %d: heads of %d values, this backend takes up to %d", o.layer, o.head_dim,
           largest_head);
    int32_t dim = padded_head(o.head_dim);
    int64_t bytes = int64_t(o.kv_heads) * e_.options.page_tokens * dim * int64_t(sizeof(__half));
    if (int64_t(e_.kv_layers.size()) <= o.layer) e_.kv_layers.resize(size_t(o.layer) + 1);
    e_.kv_layers[size_t(o.layer)] = {e_.page_bytes, e_.page_bytes + cpu_align(bytes, 256), dim};
    e_.page_bytes += 2 * cpu_align(bytes, 256);
  }

  int rope_table_of(const adrt_op &o) {
    std::vector<float> values(size_t(o.head_dim / 2));
    matrix m;
    cpu_matrix(&tensor(o.weight), "tensor", o.weight, &m, nullptr);
    cpu_decode_row(&m, 0, values.data());
    for (size_t i = 0; i < e_.rope_tables.size(); i++)
      if (e_.rope_tables[i].values == values && e_.rope_tables[i].factor == o.value[0]) return int(i);
    const float *inverse = load_vector(e_, tensor(o.weight));
    e_.rope_tables.push_back({inverse, values, o.value[0], nullptr});
    return int(e_.rope_tables.size()) - 1;
  }

  int32_t add_rope(const adrt_op &o) {
    view in = read(o.a), out = write(o.out);
    add_stage<rope_stage>(in, out, size_t(rope_table_of(o)), o.heads, o.head_dim / 2);
    return 1;
  }

  static combination gate_kind(const adrt_op &o) {
    return o.mode == ADRT_SILU ? combination::silu : combination::gelu_tanh;
  }

  std::unique_ptr<combine_stage> combine_of(const adrt_op &o, combination kind) {
    view a = read(o.a), b;
    if (kind != combination::scale) b = read(o.b);
    return std::make_unique<combine_stage>(kind, a, b, write(o.out), p_.register_widths[o.out], o.value[0], o.value[1]);
  }

  int32_t add_combine(const adrt_op &o, combination kind) {
    e_.stages.push_back(combine_of(o, kind));
    return 1;
  }

  template <typename kind, typename... arguments>
  void add_stage(arguments &&...values) {
    e_.stages.push_back(std::make_unique<kind>(std::forward<arguments>(values)...));
  }

  adrt_executable &e_;
  const adrt_program &p_;
  std::vector<view> current_;  // by register
  std::vector<int> own_;       // a register's own buffer, -1 before it has one
  std::map<std::vector<int32_t>, int> groups_;
};

}  // namespace

int64_t stage::hidden_width(const adrt_executable &) const { return 0; }
int64_t stage::projected_width(const adrt_executable &) const { return 0; }

void make_stages(adrt_executable &e, const adrt_program &program) { builder(e, program).build(); }

}  // namespace adaptrt
