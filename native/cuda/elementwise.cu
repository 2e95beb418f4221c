#include "elementwise.cuh"

#include <algorithm>

namespace adaptrt {
namespace {

constexpr int norm_threads = 1024, cached = 8;  // values of a thread that stay in registers
constexpr int threads = 256;

__device__ float block_sum(float v) {
  __shared__ float parts[warp_size];
  v = warp_sum(v);
  if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = v;
  __syncthreads();
  int lane = threadIdx.x % warp_size;
  return warp_sum(lane < int(blockDim.x) / warp_size ? parts[lane] : 0.f);
}

// x of the norm; with two sources their sum, kept.
__device__ float norm_input(const norm_call &c, int64_t token, int64_t i) {
  float v = c.a.data[token * c.a.stride + i];
  if (c.b.data) {
    v += c.b.data[token * c.b.stride + i];
    c.sum.put(token, i, v);
  }
  return v;
}

// One block a token.
__global__ void __launch_bounds__(norm_threads) norm(const norm_call c) {
  int64_t token = blockIdx.x;
  float weight[cached], kept[cached], squares = 0;
#pragma unroll
  for (int j = 0; j < cached; j++) {
    int64_t i = threadIdx.x + int64_t(j) * blockDim.x;
    weight[j] = i < c.width ? c.weight[i] : 0.f;
  }
  wait_for_before();
#pragma unroll
  for (int j = 0; j < cached; j++) {
    int64_t i = threadIdx.x + int64_t(j) * blockDim.x;
    kept[j] = i < c.width ? norm_input(c, token, i) : 0.f;
    squares += kept[j] * kept[j];
  }
  for (int64_t i = threadIdx.x + int64_t(cached) * blockDim.x; i < c.width; i += blockDim.x) {
    float v = norm_input(c, token, i);
    squares += v * v;
  }
  float scale = 1.f / sqrtf(block_sum(squares) / float(c.width) + c.eps);
#pragma unroll
  for (int j = 0; j < cached; j++) {
    int64_t i = threadIdx.x + int64_t(j) * blockDim.x;
    if (i < c.width) c.out.put(token, i, kept[j] * scale * weight[j]);
  }
  source x = c.b.data ? source{c.sum.wide, c.sum.wide_stride} : c.a;
  for (int64_t i = threadIdx.x + int64_t(cached) * blockDim.x; i < c.width; i += blockDim.x)
    c.out.put(token, i, x.data[token * x.stride + i] * scale * c.weight[i]);
}

__device__ float combined(const combine_call &c, float a, int64_t token, int64_t i) {
  if (c.kind == combination::scale) {
    float scaled = a * c.factor;
    return c.cap > 0 ? c.cap * tanhf(scaled / c.cap) : scaled;
  }
  float b = c.b.data[token * c.b.stride + i];
  if (c.kind == combination::add) return a + b;
  if (c.kind == combination::silu) return a / (1.f + expf(-a)) * b;
  float inner = 0.79788456f * (a + 0.044715f * a * a * a);  // sqrt(2 / pi)
  return 0.5f * a * (1.f + tanhf(inner)) * b;
}

__global__ void __launch_bounds__(threads) combine(const combine_call c) {
  wait_for_before();
  int64_t token = blockIdx.y;
  for (int64_t i = blockIdx.x * int64_t(threads) + threadIdx.x; i < c.width; i += int64_t(gridDim.x) * threads)
    c.out.put(token, i, combined(c, c.a.data[token * c.a.stride + i], token, i));
}

__global__ void __launch_bounds__(threads) gather(const __nv_bfloat16 *x, int64_t stride, const int32_t *rows,
                                                  __nv_bfloat16 *out) {
  wait_for_before();
  const __nv_bfloat16 *from = x + rows[blockIdx.x] * stride;
  for (int64_t i = threadIdx.x; i < stride; i += threads) out[blockIdx.x * stride + i] = from[i];
}

}  // namespace

void launch_norm(const queue &q, const norm_call &call, int tokens) {
  int64_t wanted = (call.width + warp_size - 1) / warp_size * warp_size;
  launch(q, norm, dim3(unsigned(tokens)), unsigned(std::min<int64_t>(norm_threads, wanted)), 0, call);
}

void launch_combine(const queue &q, const combine_call &call, int tokens) {
  constexpr int most_in_y = 65535;
  combine_call part = call;
  for (int done = 0; done < tokens; done += most_in_y) {
    part.a.data = call.a.data + done * call.a.stride;
    if (call.b.data) part.b.data = call.b.data + done * call.b.stride;
    if (call.out.wide) part.out.wide = call.out.wide + done * call.out.wide_stride;
    if (call.out.narrow) part.out.narrow = call.out.narrow + done * call.out.narrow_stride;
    dim3 grid(blocks_of(call.width, threads), unsigned(std::min(most_in_y, tokens - done)));
    launch(q, combine, grid, threads, 0, part);
  }
}

void launch_gather(const queue &q, const __nv_bfloat16 *x, int64_t stride, const int32_t *rows, int n,
                   __nv_bfloat16 *out) {
  launch(q, gather, dim3(unsigned(n)), threads, 0, x, stride, rows, out);
}

}  // namespace adaptrt
