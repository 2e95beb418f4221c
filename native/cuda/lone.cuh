// Adapters of many streams: each token has one adapter or none, with one low-rank term and at most a gain, and all factors
// are of one kind. Shrink and expand for that alone, in few instructions, since kernels that are so short wait for
// their instructions more than for bytes.
#ifndef ADAPTRT_CUDA_LONE_CUH
#define ADAPTRT_CUDA_LONE_CUH
#include "adapters.cuh"
#include "product.cuh"

namespace adaptrt {

// What these kernels need to know of a token at an attach point, in one place: to follow pointers from one table to the
// next costs each launch a microsecond and more.
struct alignas(16) lone_record {
  const uint8_t *v, *u;
  const float *v_scales, *u_scales, *d, *e, *g_out;  // as in term and attachment
  float scale;
  int32_t width;  // of the term, 0 where there is none
  int64_t row;    // of hidden values
};

// Fills [targets, tiles] records for a step. It must end before the kernel before the first that reads them begins.
void launch_resolve(const queue &q, const token_tile *tiles, int n_tiles, int n_targets, lone_record *records);

struct lone_call {
  adapter_call call;  // whose tiles have one token each
  weight_kind kind;   // of all factors
  int rank_pieces;    // the most pieces of 16 ranks
  const lone_record *records;
};

// Whether expand_lone can take four outputs at a time.
bool in_fours(const adapter_call &call);

void launch_shrink_lone(const queue &q, const lone_call &lone, int multiprocessors);
void launch_expand_lone(const queue &q, const lone_call &lone, int multiprocessors);

}  // namespace adaptrt
#endif
