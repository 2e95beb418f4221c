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
  cudaError_t status = cudaStreamEndCapture(stream, &graph);
  if (status == cudaErrorStreamCaptureInvalidated) {
    cudaGetLastError();
    return nullptr;
  }
  check(status, "capturing a step");
  status = cudaGraphInstantiate(&made, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "making a step's graph");
  return made;
}

bool graph_cache::abandon(cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  cudaError_t status = cudaStreamEndCapture(stream, &graph);
  if (graph) cudaGraphDestroy(graph);
  cudaGetLastError();
  return status == cudaErrorStreamCaptureInvalidated;
}

}  // namespace adaptrt
