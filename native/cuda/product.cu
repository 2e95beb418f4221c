// Which kernel multiplies.
#include <algorithm>
#include <new>

#include "beside.cuh"
#include "quant_tables.h"
#include "launch.cuh"

namespace adaptrt {

static cudaError_t find_tensor_map_encoder(product_context *context) {
  void *function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  context->encode_tensor_map = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  return cudaSuccess;
}

cudaError_t describe_tokens(const product_call &call, int n, CUtensorMap *map) {
  cuuint64_t sizes[2] = {cuuint64_t(call.w.cols), cuuint64_t(call.tokens)};
  cuuint64_t strides[1] = {cuuint64_t(call.x_stride) * sizeof(__nv_bfloat16)};
  cuuint32_t box[2] = {block_cols, cuuint32_t(n)}, steps[2] = {1, 1};
  CUresult status = call.context->encode_tensor_map(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16 *>(call.x), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t product_create(int device, product_context **out) {
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess) return status;
  if (int(properties.reservedSharedMemPerBlock) != shared_start) return cudaErrorNotSupported;
  product_context *context = new (std::nothrow) product_context();
  if (!context) return cudaErrorMemoryAllocation;
  context->device = device;
  context->multiprocessors = properties.multiProcessorCount;
  context->shared_bytes = int(properties.sharedMemPerBlockOptin);
  context->hopper = properties.major == 9;
  for (int i = 0; i < 16; i++) context->codebook.value[i] = __float2bfloat16(NF4_CODEBOOK[i]);
  status = context->hopper ? find_tensor_map_encoder(context) : cudaSuccess;
  if (status == cudaSuccess) status = prepare_few(*context);
  if (status != cudaSuccess) {
    product_destroy(context);
    return status;
  }
  context->cublas = load_cublas();
  *out = context;
  return cudaSuccess;
}

void product_destroy(product_context *context) {
  if (context) unload_cublas(context->cublas);
  delete context;
}

// Which kernels are best for how many tokens, measured on an H200 (spec/performance.md).
enum class way { few, some, many, dense };

static way choose(const product_context &context, const packed_matrix &w, int tokens) {
  int dense_from = !context.hopper ? 64 : w.kind == weight_kind::nf4 ? 4096 : 1024, at_once = few_tokens_at_once(context, w);
  if (at_once == 0 && !context.hopper) dense_from = 1;  // rows too long for the shared memory of a small GPU
  if (tokens >= dense_from && can_multiply_dense(context, w)) return way::dense;
  bool much = w.kind == weight_kind::nf4 && w.row_tiles * w.col_blocks >= int64_t(300) * context.multiprocessors;
  if (context.hopper && tokens > 8 && tokens <= some_tokens && much) return way::some;
  if (!context.hopper || tokens <= at_once) return way::few;
  return tokens <= some_tokens && w.kind != weight_kind::bf16 ? way::some : way::many;
}

size_t product_workspace_bytes(const product_context *context, const packed_matrix &w, int max_tokens) {
  size_t most = workspace_zero_bytes;
  if (context->hopper) most = std::max(some_workspace_bytes(*context), many_workspace_bytes(*context));
  if (choose(*context, w, max_tokens) == way::dense) most = std::max(most, dense_workspace_bytes(w));
  return most;
}

// Tokens in groups that fit into the kernel for few of them.
static cudaError_t launch_in_groups(product_call call) {
  int at_once = few_tokens_at_once(*call.context, call.w), tokens = call.tokens;
  if (at_once < 1) return cudaErrorInvalidValue;
  size_t item = call.out.bf16 ? sizeof(__nv_bfloat16) : sizeof(float);
  for (int done = 0; done < tokens; done += call.tokens) {
    call.tokens = tokens - done < at_once ? tokens - done : at_once;
    cudaError_t status = launch_few(call);
    if (status != cudaSuccess) return status;
    call.x += call.tokens * call.x_stride;
    call.out.y = static_cast<uint8_t *>(call.out.y) + call.tokens * call.out.stride * item;
  }
  return cudaSuccess;
}

bool plan_beside(const product_context *context, const packed_matrix &w, int tokens, beside_call &call) {
  return choose(*context, w, tokens) == way::few && tokens <= few_tokens_at_once(*context, w) &&
         plan_few_beside(*context, w, tokens, call);
}

bool leaves_room_after(const product_context *context, const packed_matrix &w, int tokens) {
  return tokens <= 8 && choose(*context, w, tokens) == way::few;
}

cudaError_t launch_product(const product_context *context, const packed_matrix &w, const __nv_bfloat16 *x,
                           int64_t x_stride, int tokens, const product_output &out, void *workspace,
                           cudaStream_t stream, const beside_call *beside, bool ready) {
  if (tokens < 1) return tokens ? cudaErrorInvalidValue : cudaSuccess;
  product_call call = {context, w, x, x_stride, tokens, out, workspace, stream, beside, ready};
  switch (choose(*context, w, tokens)) {
    case way::dense: return launch_dense(call);
    case way::some: return launch_some(call);
    case way::many: return launch_many(call);
    default: return launch_in_groups(call);
  }
}

}  // namespace adaptrt
