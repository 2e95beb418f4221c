// Adapters of 5 to 16 streams: each token has one adapter or none, its own or one in common, with one low-rank term and at most
// a gain, and all factors are of one kind.
//
//   shrink   V x: columns are split among blocks of threads, each of which leaves hidden values of its own; where there is
//            room beside the product's blocks it is launched after the product, and done before that is
//   expand   adds up what the splits left, then y = g_out * (y + e * U h)
#ifndef ADAPTRT_CUDA_SPLIT_CUH
#define ADAPTRT_CUDA_SPLIT_CUH
#include "beside.cuh"
#include "record.cuh"

namespace adaptrt {

constexpr int most_tokens_split = 16, most_pieces_split = 4, most_shrink_splits = 8;

struct split_call {
  adapter_call call;
  weight_kind kind;  // of all factors
  int rank_pieces;   // the most pieces of 16 ranks; at most most_pieces_split
  int tokens, n_slots;
  const term_record *records;  // [targets, tokens]
  const beside_term *terms;    // [targets, slots]
  int splits;                  // each with [tokens, hidden_width] of hidden values
  bool after_product;          // where shrink is launched: there all of its input is there when it starts
};

// Fills in `splits`: as many parts as fill the GPU, with work for each.
void divide_split(split_call &call, int multiprocessors);
void launch_shrink_split(const queue &q, const split_call &call);
void launch_expand_split(const queue &q, const split_call &call, int multiprocessors);

}  // namespace adaptrt
#endif
