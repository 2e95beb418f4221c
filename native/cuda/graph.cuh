// CUDA graphs of a step's launches, one for each shape of batch that came twice.
#ifndef ADAPTRT_CUDA_GRAPH_CUH
#define ADAPTRT_CUDA_GRAPH_CUH
#include <map>
#include <vector>

#include "failure.cuh"

namespace adaptrt {

// All that the launches of a step depend on; what lies in the plan's memory may differ.
using graph_key = std::vector<int64_t>;

class graph_cache {
 public:
  ~graph_cache() { clear(); }
  // Runs `enqueue`, which puts a step's launches on `stream`: as it is the first time for a key, as a graph afterwards.
  // `generation` counts what makes all graphs stale.
  template <typename callable>
  void run(const graph_key &key, uint64_t generation, cudaStream_t stream, const callable &enqueue) {
    if (generation != generation_ || graphs_.size() >= most) clear();
    generation_ = generation;
    auto [found, is_new] = graphs_.try_emplace(key, nullptr);
    if (is_new) {
      enqueue();
      return;
    }
    if (!found->second) {
      begin(stream);
      try {
        enqueue();
      } catch (...) {
        abandon(stream);
        throw;
      }
      found->second = end(stream);
    }
    check(cudaGraphLaunch(found->second, stream), "launching a step's graph");
  }
  void clear();

 private:
  static constexpr size_t most = 64;
  static void begin(cudaStream_t stream);
  static cudaGraphExec_t end(cudaStream_t stream);
  static void abandon(cudaStream_t stream);
  std::map<graph_key, cudaGraphExec_t> graphs_;  // empty until the key comes again
  uint64_t generation_ = 0;
};

}  // namespace adaptrt
#endif
