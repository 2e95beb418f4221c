// V x: what kernels for it share.
#ifndef ADAPTRT_CUDA_SHRINK_CUH
#define ADAPTRT_CUDA_SHRINK_CUH
#include "adapters.cuh"
#include "panels.cuh"

namespace adaptrt {

constexpr int rows_together = panel_ranks;  // of hidden values, in a block of threads

// Where a block's piece of work is.
struct shrink_place {
  const term *t;
  int64_t hidden;  // of the segment's first token and the term's first value
  int64_t row;
};

// Walks members and terms to piece number `chunk` of an application.
__device__ inline bool find_place(const adapter_call &c, const application &a, int64_t chunk, shrink_place &at) {
  for (int m = 0; m < c.n_members; m++) {
    const attachment &what = a.attachments[c.members[m].target];
    for (int k = 0; what.acts && k < what.n_terms; k++) {
      const term &t = term_of(what, k);
      if (is_elsewhere(c.members[m], a, k, t)) continue;
      int64_t chunks = shrink_chunks(t.width);
      if (chunk < chunks) {
        at = {&t, hidden_start(c, a, c.members[m], t), chunk * rows_together};
        return true;
      }
      chunk -= chunks;
    }
  }
  return false;
}

struct input {
  const __nv_bfloat16 *x;
  int64_t stride, cols;
  int tokens;
};

__device__ inline int blocks_of_columns(const input &in) { return int((in.cols + BLOCK - 1) / BLOCK); }

// 16 ranks' products with up to 8 tokens, over every `step`th block of columns from `begin` on: in lane 4g + t those of
// ranks g and g + 8 with tokens 2t and 2t + 1. `waits`: for the kernel before, once codes are on their way.
template <weight_kind kind, bool waits>
__device__ void multiply_panel(const factor &v, int64_t rank_piece, const input &in, int begin, int end, int step,
                               float sums[4]) {
  constexpr int together = kind == weight_kind::bf16 ? 2 : 4;
  int lane = threadIdx.x % warp_size;
  int64_t first_piece = piece_of(v, rank_piece, 0);
  const __nv_bfloat16 *x = in.x + min(lane / 4, in.tokens - 1) * in.stride + lane % 4 * 16;
  bool still_waits = waits;
  for (int first = begin; first < end; first += step * together) {
    piece_codes<kind> codes[together];
    float scales[together][2];
    uint4 values[together][2];
#pragma unroll
    for (int i = 0; i < together; i++) {
      int64_t piece = first_piece + min(first + i * step, end - 1);
      codes[i].load(v, piece);
      for (int h = 0; h < 2; h++)
        scales[i][h] = first + i * step >= end        ? 0.f
                       : kind == weight_kind::bf16 ? 1.f
                                                   : v.scales[piece * panel_ranks + lane / 4 + 8 * h];
    }
    if (still_waits) wait_for_before();
    still_waits = false;
#pragma unroll
    for (int i = 0; i < 2 * together; i++)
      values[i / 2][i % 2] = reinterpret_cast<const uint4 *>(x + min(first + i / 2 * step, end - 1) * BLOCK)[i % 2];
#pragma unroll
    for (int i = 0; i < together; i++) {
      float c[4] = {};
#pragma unroll
      for (int s = 0; s < 4; s++) {
        uint32_t a[4];
        codes[i].step(s, a);
        multiply_add(c, a, word_of(values[i][s / 2], s % 2 * 2), word_of(values[i][s / 2], s % 2 * 2 + 1));
      }
#pragma unroll
      for (int k = 0; k < 4; k++) sums[k] += scales[i][k / 2] * c[k];
    }
  }
  if (still_waits) wait_for_before();
}

}  // namespace adaptrt
#endif
