// Adapters of many streams: each token has one adapter or none, with one low-rank term and at most a gain, and all factors
// are of one kind. Shrink and expand for that alone, in few instructions, since kernels that are so short wait for
// their instructions more than for bytes.
#ifndef ADAPTRT_CUDA_LONE_CUH
#define ADAPTRT_CUDA_LONE_CUH
#include "product.cuh"
#include "record.cuh"

namespace adaptrt {

struct lone_call {
  adapter_call call;  // whose tiles have one token each
  weight_kind kind;   // of all factors
  int rank_pieces;    // the most pieces of 16 ranks
  const term_record *records;
};

// Whether expand_lone can take four outputs at a time.
bool in_fours(const adapter_call &call);

void launch_shrink_lone(const queue &q, const lone_call &lone, int multiprocessors);
void launch_expand_lone(const queue &q, const lone_call &lone, int multiprocessors);

}  // namespace adaptrt
#endif
