// Adapters of many streams: each token has one adapter or none, with one low-rank term and at most a gain, and all factors
// are of one kind. Shrink and expand for that alone, in few instructions, since kernels that are so short wait for
// their instructions more than for bytes; and with all that a warp reads on its way at once, since they wait for one
// trip to memory after the other most of all.
//
//   shrink_lone.cu   V x: 16 ranks of a token, its inputs split among warps wherever they are, each of which leaves sums
//   expand_lone.cu   adds up the sums of splits, then U h, vectors and, where outputs are a gate and what it gates, that
#ifndef ADAPTRT_CUDA_LONE_CUH
#define ADAPTRT_CUDA_LONE_CUH
#include "elementwise.cuh"
#include "product.cuh"
#include "record.cuh"

namespace adaptrt {

struct lone_call {
  adapter_call call;  // whose tiles have one token each
  weight_kind kind;   // of all factors
  int rank_pieces;    // the most pieces of 16 ranks; not more than most_lone_pieces
  int splits;         // of the inputs
  const term_record *records;
};
constexpr int most_lone_pieces = 4, most_lone_splits = 32;

// Hidden values of a lone_call: [rows, members, rank_pieces, splits, 16], a piece's ranks in the order in which lanes of a
// tensor core's operand have them: rank r at r % 8 / 2 * 4 + r / 8 * 2 + r % 2.
struct lone_device {
  int multiprocessors, shared_bytes;
};
int lone_splits(const adapter_call &call, int rank_pieces, int multiprocessors);
// Floats of hidden values that splits may add to one a token, member and rank.
int64_t lone_split_floats(int multiprocessors);

// What becomes of the two members' outputs, when nobody else reads them.
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
