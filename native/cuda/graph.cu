#include "graph.cuh"

namespace adaptrt {

void graph_cache::clear() {
  for (auto &[key, graph] : graphs_)
    if (graph) cudaGraphExecDestroy(graph);
  graphs_.clear();
}

void graph_cache::begin(cudaStream_t stream) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a step");
}

cudaGraphExec_t graph_cache::end(cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t made = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "capturing a step");
  cudaError_t status = cudaGraphInstantiate(&made, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "making a step's graph");
  return made;
}

void graph_cache::abandon(cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream, &graph);
  if (graph) cudaGraphDestroy(graph);
  cudaGetLastError();
}

}  // namespace adaptrt
