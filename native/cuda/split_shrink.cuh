// V x of few tokens: columns are split among blocks of threads, of which the last to arrive adds up what all have left.
#ifndef ADAPTRT_CUDA_SPLIT_SHRINK_CUH
#define ADAPTRT_CUDA_SPLIT_SHRINK_CUH
#include "beside.cuh"
#include "lone.cuh"

namespace adaptrt {

struct split_shrink {
  lone_call lone;
  const beside_term *terms;  // [targets, slots]
  int n_slots;
  uint32_t *arrived;         // [slots, members, rank_pieces], zeros before and after
  float *parts;              // [slots, members, rank_pieces, splits, shrink_tokens, 16]
  // Launched after the product that reads the same input, in the room that its blocks leave.
  bool after_product;
};

constexpr size_t split_shrink_bytes = size_t(1) << 20;  // of `arrived`, then `parts`

// False when there are too many for that: nothing is launched.
bool launch_split_shrink(const queue &q, const lone_call &lone, const beside_term *terms, int n_slots, void *memory,
                         bool after_product, int multiprocessors);

}  // namespace adaptrt
#endif
