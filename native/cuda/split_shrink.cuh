// V x of few tokens: its columns are split among blocks of threads, each of which leaves hidden values of its own; expand adds
// them up.
#ifndef ADAPTRT_CUDA_SPLIT_SHRINK_CUH
#define ADAPTRT_CUDA_SPLIT_SHRINK_CUH
#include "beside.cuh"
#include "lone.cuh"

namespace adaptrt {

// How many parts fill the GPU, with work for each.
int splits_of_shrink(const lone_call &lone, int n_slots, int multiprocessors);

// `after_product`: launched after the product that reads the same input, into the room that its blocks leave.
void launch_split_shrink(const queue &q, const lone_call &lone, const beside_term *terms, int n_slots, bool after_product);

}  // namespace adaptrt
#endif
