#include "record.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 128;

__global__ void __launch_bounds__(threads) resolve(const application *applications, const int32_t *heads, int tokens,
                                                   term_record *records) {
  wait_for_before();
  int token = blockIdx.x * threads + threadIdx.x, target = blockIdx.y;
  if (token >= tokens) return;
  term_record r = {};
  if (heads[token] >= 0) {
    const application &a = applications[heads[token]];
    const attachment &what = a.attachments[target];
    const term &t = what.first;
    if (what.acts) r.g_out = what.g_out;
    if (what.acts && what.n_terms)
      r = {t.v.data, t.u.data, t.v.scales, t.u.scales, t.d, t.e, r.g_out, t.scale, int32_t(t.width)};
    r.row = a.rows_before + token - a.token;
  }
  records[target * tokens + token] = r;
}

}  // namespace

void launch_resolve(const queue &q, const application *applications, const int32_t *heads, int tokens, int targets,
                    term_record *records) {
  launch(q, resolve, dim3(blocks_of(tokens, threads), unsigned(targets)), threads, 0, applications, heads, tokens,
         records);
}

}  // namespace adaptrt
