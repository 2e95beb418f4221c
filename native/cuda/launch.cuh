// What the launchers of this folder's product kernels share.
#ifndef ADAPTRT_CUDA_LAUNCH_CUH
#define ADAPTRT_CUDA_LAUNCH_CUH
#include <cuda.h>

#include "decode.cuh"

namespace adaptrt {

struct cublas_library;

constexpr int few_tokens = 16, most_parts = 4;  // product_few.cu: of tokens; of columns

struct product_context {
  int device, multiprocessors, shared_bytes;  // shared memory that a block may have
  bool hopper;                                // wgmma, bulk copies, clusters, programmatic dependent launch
  int clusters[most_parts + 1];               // how many clusters of 1, 2 and 4 blocks run at once, or 0
  nf4_values codebook;
  cublas_library *cublas;                               // or none
  decltype(&cuTensorMapEncodeTiled) encode_tensor_map;  // of the driver; on Hopper
};

struct product_call {
  const product_context *context;
  packed_matrix w;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int tokens;
  product_output out;
  void *workspace;
  cudaStream_t stream;
  const beside_call *beside;  // or NULL; product_few.cu only
  bool ready;                 // as launch_product says; product_some.cu only
};

// Columns in boxes of 64, tokens in boxes of n: what one copy to shared memory fetches, on Hopper.
cudaError_t describe_tokens(const product_call &call, int n, CUtensorMap *map);

// product_few.cu: up to few_tokens tokens; how many at once depends on their length.
int few_tokens_at_once(const product_context &context, const packed_matrix &w);
cudaError_t launch_few(const product_call &call);
cudaError_t prepare_few(product_context &context);
bool plan_few_beside(const product_context &context, const packed_matrix &w, int tokens, beside_call &call);

// product_some.cu: nf4 and int8, up to some_tokens tokens, on Hopper.
constexpr int some_tokens = 112;
cudaError_t launch_some(const product_call &call);
size_t some_workspace_bytes(const product_context &context);

// product_many.cu: any number of tokens, on Hopper.
cudaError_t launch_many(const product_call &call);
size_t many_workspace_bytes(const product_context &context);

// product_dense.cu: dequantize, then cuBLAS.
cublas_library *load_cublas();
void unload_cublas(cublas_library *cublas);
bool can_multiply_dense(const product_context &context, const packed_matrix &w);
size_t dense_workspace_bytes(const packed_matrix &w);
cudaError_t launch_dense(const product_call &call);
// y = a b of [n, n] bfloat16 matrices by cuBLAS alone: what a GPU's products can do at best. False without cuBLAS.
bool launch_square(const product_context &context, const __nv_bfloat16 *a, const __nv_bfloat16 *b, __nv_bfloat16 *y, int n,
                   cudaStream_t stream);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t align_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Launches a kernel that waits for the one before it by itself (wait_for_kernel_before), in clusters of so many blocks.
template <typename... parameters, typename... arguments>
cudaError_t launch_in_clusters(const product_call &call, unsigned blocks, void (*kernel)(parameters...), dim3 grid,
                               dim3 block, size_t shared_bytes, const arguments &...args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = call.stream;
  config.attrs = attributes;
  config.numAttrs = !call.context->hopper ? 0 : blocks > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... parameters, typename... arguments>
cudaError_t launch(const product_call &call, void (*kernel)(parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   const arguments &...args) {
  return launch_in_clusters(call, 1, kernel, grid, block, shared_bytes, args...);
}

}  // namespace adaptrt
#endif
