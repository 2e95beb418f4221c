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
  // Runs `enqueue`, which puts a step's launches on `stream`: as it is the first time for a key, as a graph afterwards,
  // unless another thread spoils that. `generation` counts what makes all graphs stale.
  template <typename callable>
  void run(const graph_key &key, uint64_t generation, cudaStream_t stream, const callable &enqueue) {
    if (generation != generation_ || graphs_.size() >= most) clear();
    generation_ = generation;
    auto [found, is_new] = graphs_.try_emplace(key, nullptr);
    if (!is_new && !found->second) found->second = capture(stream, enqueue);
    if (found->second)
      check(cudaGraphLaunch(found->second, stream), "launching a step's graph");
    else
      enqueue();
  }
  void clear();

 private:
  // NULL if another thread waited for the whole device meanwhile, with which CUDA ends all captures.
  template <typename callable>
  static cudaGraphExec_t capture(cudaStream_t stream, const callable &enqueue) {
    begin(stream);
    try {
      enqueue();
    } catch (...) {
      if (abandon(stream)) return nullptr;
      throw;
    }
    return end(stream);
  }

  static constexpr size_t most = 64;
  static void begin(cudaStream_t stream);
  static cudaGraphExec_t end(cudaStream_t stream);  // or NULL, as above
  static bool abandon(cudaStream_t stream);         // true: as above
  std::map<graph_key, cudaGraphExec_t> graphs_;  // empty until the key comes again
  uint64_t generation_ = 0;
};

}  // namespace adaptrt
#endif
