// Adapters of few tokens, in one launch beside the product: V x, then U h, then that into the product's output once
// this is there. It may start when the product has seen its input, and ends after it.
//
// For what is usual then: each token has one adapter or none, with one low-rank term and at most a gain, and all
// factors are of one kind. The kernel has to be short: at this length fetching its instructions counts.
#ifndef ADAPTRT_CUDA_RIDE_CUH
#define ADAPTRT_CUDA_RIDE_CUH
#include "adapters.cuh"
#include "product.cuh"

namespace adaptrt {

struct ride_call {
  adapter_call call;  // whose tiles have one token each
  weight_kind kind;   // of all factors
  int rank_pieces;    // the most pieces of 16 ranks
  int splits;         // parts of the columns
  uint2 *parts;       // [tiles, members, rank_pieces, splits, 16]: a sum, and the number of the launch
  uint32_t *launches, *blocks_left;  // counted; the second is left as zero
};

// Memory for `parts` and the counts, which starts as zero.
size_t ride_bytes(int multiprocessors);
// Fills in what depends on the sizes and `memory`; false when it is too much to ride.
bool plan_ride(ride_call &ride, uint8_t *memory, int multiprocessors);
void launch_ride(const queue &q, const ride_call &ride, int multiprocessors);

}  // namespace adaptrt
#endif
