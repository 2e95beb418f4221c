// The plan of a step: what the kernels need to know of the batch, as arrays in one piece of memory.
#ifndef ADAPTRT_CUDA_PLAN_CUH
#define ADAPTRT_CUDA_PLAN_CUH
#include <vector>

#include "adapters.cuh"
#include "attention.cuh"
#include "memory.cuh"

namespace adaptrt {

// Tokens, or rows of logits, cut by adapter stack.
struct segment_plan {
  std::vector<application> applications;
  std::vector<token_tile> tiles;         // at most expand_tokens of one segment
  std::vector<token_tile> shrink_tiles;  // at most shrink_tokens of one application
  std::vector<int32_t> heads;            // the first application of each token's stack, or -1
  int64_t hidden_rows = 0;               // sum of tokens over the applications
  bool single = true;                    // every segment is one token
  bool stacked = false;                  // some stack has several adapters
  const int32_t *device_heads = nullptr;
  const application *device_applications = nullptr;
  const token_tile *device_tiles = nullptr, *device_shrink_tiles = nullptr;
};

// Query blocks of at most so many tokens of one run, for attention with as many rows a token.
struct query_plan {
  int tokens_a_block;
  std::vector<query_block> blocks;
  const query_block *device_blocks = nullptr;
};

struct plan {
  uint32_t number = 0;  // of the step, from zero on again when it does not fit beside the numbers of launches (beside.cuh)
  int32_t n_tokens = 0, n_logits = 0;
  bool gathers = false;  // the logit rows are not simply all tokens
  bool adapted = false;  // some run has a stack
  bool separate = false; // all runs are one token that no other run sees
  int32_t longest_context = 0;
  std::vector<int32_t> token_pages;  // where the pages of a token's run start
  std::vector<int32_t> writers;      // by page number: the run that stores something there, or -1
  std::vector<query_plan> queries;
  segment_plan tokens, logits;
  std::vector<size_t> offsets;  // of the arrays in memory: equal for plans that need the same launches
  const int32_t *device_tokens = nullptr, *device_positions = nullptr, *device_token_pages = nullptr,
                *device_logit_rows = nullptr, *device_pages = nullptr;
  const uint32_t *device_number = nullptr;
  pinned_memory host;
  device_memory device;
  size_t bytes = 0;  // of both that the step uses
};

// Plans a step whose batch has been validated. Grows `p`'s memory when it must, and then returns true.
bool make_plan(const adrt_executable &e, const adrt_batch &batch, plan &p);

}  // namespace adaptrt
#endif
