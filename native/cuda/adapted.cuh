// The adapters of a stage's products, which have one input: what is launched before, beside and after them.
#ifndef ADAPTRT_CUDA_ADAPTED_CUH
#define ADAPTRT_CUDA_ADAPTED_CUH
#include <vector>

#include "beside.cuh"
#include "executable.cuh"
#include "lone.cuh"
#include "split.cuh"

namespace adaptrt {

struct product_member {
  packed_matrix w;
  int32_t target;
  const float *bias;
};

bool acts(const adrt_executable &e, int32_t target);

// Once what is before a product is launched.
struct adapters_left {
  common_call common;
  bool ready;      // the product may run at the same time as what was launched (launch_product)
  bool are_split;  // as `split` says; after the product with V x, or without
  split_call split;
};

class adapted_members {
 public:
  // `gated`: `after` may get a gate.
  adapted_members(std::vector<product_member> members, bool head, bool gated)
      : members_(std::move(members)), head_(head), gated_(gated) {}

  const std::vector<product_member> &all() const { return members_; }
  int tokens(const adrt_executable &e) const { return head_ ? e.plan.n_logits : e.plan.n_tokens; }
  const segment_plan &segments(const adrt_executable &e) const { return head_ ? e.plan.logits : e.plan.tokens; }
  bool maps_input(const adrt_executable &e, const product_member &m) const;

  // x and y are the caller's to fill in.
  adapter_call describe(const adrt_executable &e) const;
  // Whether `product` has room for all adapters inside it, as `beside`.
  bool fit_beside(adrt_executable &e, const adapter_call &call, const packed_matrix &product, beside_call &beside) const;
  // What is launched before the product, V x if there is no room for it beside the product. The result says what is left.
  adapters_left before(adrt_executable &e, const adapter_call &call, const packed_matrix &product) const;
  // The result says whether `gate` (or NULL) has been applied, too.
  bool after(adrt_executable &e, const adapter_call &call, const adapters_left &left, const lone_gate *gate) const;

  int64_t hidden_width(const adrt_executable &e) const;
  int64_t projected_width(const adrt_executable &e) const;

 private:
  bool has_common(const adrt_executable &e, const product_member &m) const;
  bool has_other(const adrt_executable &e, const product_member &m) const;
  int64_t chunks(const adrt_executable &e) const;
  const term_record *records(const adrt_executable &e) const { return head_ ? nullptr : e.records; }
  bool one_term_each(const adrt_executable &e, weight_kind &kind, int &rank_pieces) const;
  bool are_lone(const adrt_executable &e, const adapter_call &call, lone_call &lone) const;
  bool are_split(const adrt_executable &e, const adapter_call &call, split_call &split) const;
  common_call project(adrt_executable &e, const adapter_call &call) const;

  std::vector<product_member> members_;
  bool head_, gated_;
};

}  // namespace adaptrt
#endif
