// Adapters of few tokens, in one launch beside the product: shrink, then expand, then what they make of the product's
// output once that is there. It may start when the product has seen its input, and ends after it.
#ifndef ADAPTRT_CUDA_RIDE_CUH
#define ADAPTRT_CUDA_RIDE_CUH
#include "adapters.cuh"

namespace adaptrt {

struct ride_call {
  adapter_call call;  // whose tiles are those of expand
  const token_tile *shrink_tiles;
  int n_shrink_tiles;
  int chunks;         // the most pieces of hidden that an application has
  int splits;         // parts of the columns
  uint2 *parts;       // [shrink tiles, chunks, splits, shrink_tokens, 16]: a sum, and the number of the launch
  uint32_t *launches, *blocks_left;  // counted; the second is left as zero
};

constexpr int64_t most_hidden_to_ride = 3072;  // floats of all applications: every block of threads has them
// Memory for `parts` and the counts, which starts as zero.
size_t ride_bytes(int multiprocessors);
// Fills in what depends on the sizes and `memory`; false when it is too much to ride.
bool plan_ride(ride_call &ride, int64_t hidden_floats, uint8_t *memory, int multiprocessors);
void launch_ride(const queue &q, const ride_call &ride, bool single, int multiprocessors);

}  // namespace adaptrt
#endif
