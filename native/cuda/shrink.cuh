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

// Some pieces of 16 ranks on their way: blocks of columns `first`, `first` + step ... before `end`.
template <weight_kind kind>
struct piece_batch {
  static constexpr int pieces = kind == weight_kind::bf16 ? 2 : 4;
  piece_codes<kind> codes[pieces];
  float scales[pieces][2];  // of the lane's two ranks; 0 past the end

  __device__ void load(const factor &v, int64_t first_piece, int first, int end, int step) {
#pragma unroll
    for (int i = 0; i < pieces; i++) {
      bool there = first + i * step < end;
      int64_t piece = first_piece + min(first + i * step, end - 1);
      codes[i].load(v, piece);
      const float *of = v.scales + piece * panel_ranks + threadIdx.x % warp_size / 4;
      for (int h = 0; h < 2; h++) scales[i][h] = !there ? 0.f : kind == weight_kind::bf16 ? 1.f : __ldg(of + 8 * h);
    }
  }
};

// 16 ranks' products with up to 8 tokens, over every `step`th block of columns from `begin` on: in lane 4g + t those of
// ranks g and g + 8 with tokens 2t and 2t + 1. `waits`: for the kernel before, once codes are on their way.
template <weight_kind kind, bool waits>
__device__ void multiply_panel(const factor v, int64_t rank_piece, const input &in, int begin, int end, int step,
                               float sums[4]) {
  constexpr int pieces = piece_batch<kind>::pieces;
  int64_t first_piece = piece_of(v, rank_piece, 0);
  const __nv_bfloat16 *x =
      in.x + min(int(threadIdx.x % warp_size / 4), in.tokens - 1) * in.stride + threadIdx.x % 4 * 16;
  piece_batch<kind> now, next;
  now.load(v, first_piece, begin, end, step);
  if (waits) wait_for_before();
  for (int first = begin; first < end; first += step * pieces, now = next) {
    uint4 values[pieces][2];
#pragma unroll
    for (int i = 0; i < 2 * pieces; i++)
      values[i / 2][i % 2] = __ldcg(reinterpret_cast<const uint4 *>(x + min(first + i / 2 * step, end - 1) * BLOCK) + i % 2);
    next.load(v, first_piece, first + step * pieces, end, step);
#pragma unroll
    for (int i = 0; i < pieces; i++) {
      float c[4] = {};
#pragma unroll
      for (int s = 0; s < 4; s++) {
        uint32_t a[4];
        now.codes[i].step(s, a);
        multiply_add(c, a, word_of(values[i][s / 2], s % 2 * 2), word_of(values[i][s / 2], s % 2 * 2 + 1));
      }
#pragma unroll
      for (int k = 0; k < 4; k++) sums[k] += now.scales[i][k / 2] * c[k];
    }
  }
}

}  // namespace adaptrt
#endif
