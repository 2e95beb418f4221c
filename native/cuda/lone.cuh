// Adapters of many streams: each token has one adapter or none, with one low-rank term and at most a gain, and all
// factors are of one kind. Shrink and expand for that alone, in few instructions, since kernels that are so short wait
// for their instructions as much as for bytes; and with much on its way at once, since they wait for memory again and
// again otherwise.
//
//   shrink_lone.cu   V x: of 16 ranks and a split of a token's inputs, by a warp, which leaves its sums
//   expand_lone.cu   the splits' sums added up, U h, vectors and, where two outputs are only read by a gate, the gate
#ifndef ADAPTRT_CUDA_LONE_CUH
#define ADAPTRT_CUDA_LONE_CUH
#include "elementwise.cuh"
#include "product.cuh"
#include "record.cuh"

namespace adaptrt {

// Hidden values are [rows, members, rank_pieces, splits, 16]: rank r of a piece at r % 8 / 2 * 4 + r / 8 * 2 + r % 2, so
// that what a lane needs of them for a tensor core's operand lies together.
struct lone_call {
  adapter_call call;  // whose tiles have one token each
  weight_kind kind;   // of all factors
  int rank_pieces;    // the most of 16 ranks that an adapter has; up to most_lone_pieces
  int splits;         // of the inputs: lone_splits
  const term_record *records;
};
constexpr int most_lone_pieces = 4, most_lone_splits = 32;

struct lone_device {
  int multiprocessors, shared_bytes;
};
int lone_splits(const adapter_call &call, int rank_pieces, int multiprocessors);
// Hidden values beyond those without splits, at most.
int64_t lone_split_floats(int multiprocessors);

// What reads the outputs of a call's two members, and nobody else does.
struct lone_gate {
  combination kind;  // silu or gelu_tanh
  destination out;
};

// Whether expand_lone can take four outputs at a time.
bool in_fours(const adapter_call &call);

void launch_shrink_lone(const queue &q, const lone_call &lone, const lone_device &device);
void launch_expand_lone(const queue &q, const lone_call &lone, const lone_gate *gate, const lone_device &device);

}  // namespace adaptrt
#endif
