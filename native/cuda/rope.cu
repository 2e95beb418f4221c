// Rotary embedding, alone or on the way into the KV cache.
#include "attention.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 128;

__global__ void fill_rope(const int32_t *positions, const float *inverse, int half, float factor, float *cos_sin) {
  wait_for_before();
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    float sine, cosine;
    sincosf(__fmul_rn(float(positions[blockIdx.x]), inverse[i]), &sine, &cosine);
    cos_sin[blockIdx.x * int64_t(2 * half) + i] = cosine * factor;
    cos_sin[blockIdx.x * int64_t(2 * half) + half + i] = sine * factor;
  }
}

// Value i of a head after rotation by a token's cos and sin.
__device__ float rotated(const float *x, int i, int half, const float *cosines) {
  const float *sines = cosines + half;
  return i < half ? x[i] * cosines[i] - x[i + half] * sines[i]
                  : x[i] * cosines[i - half] + x[i - half] * sines[i - half];
}

// One block a token and head. It may rotate in place, so all is read before anything is written.
__global__ void rope(const rope_call c) {
  wait_for_before();
  int64_t token = blockIdx.x, head = int64_t(blockIdx.y) * 2 * c.half;
  const float *x = c.x.data + token * c.x.stride + head, *cosines = c.cos_sin + token * 2 * c.half;
  for (int i = threadIdx.x; i < c.half; i += blockDim.x) {
    float first = rotated(x, i, c.half, cosines), second = rotated(x, i + c.half, c.half, cosines);
    c.out.put(token, head + i, first);
    c.out.put(token, head + c.half + i, second);
  }
}

__device__ float head_value(const source &x, const float *cos_sin, int64_t token, int head, int i, int dim) {
  const float *values = x.data + token * x.stride + int64_t(head) * dim;
  return cos_sin ? rotated(values, i, dim / 2, cos_sin + token * dim) : values[i];
}

// One block a token and head: first the query heads, then those of k, then those of v.
__global__ void store(const store_call c) {
  int64_t token = blockIdx.x;
  int head = blockIdx.y, dim = c.shape.head_dim, padded = c.kv.dim, slots = c.kv.page_tokens;
  int32_t position = c.positions[token], slot = position & (slots - 1);
  uint8_t *page = c.kv.page_address[c.kv.pages[c.token_pages[token] + position / slots]];
  wait_for_before();
  if (head < c.shape.heads) {
    __half *out = c.queries + (token * c.shape.heads + head) * padded;
    for (int i = threadIdx.x; i < padded; i += blockDim.x)
      out[i] = __float2half(i < dim ? head_value(c.q, c.q_cos_sin, token, head, i, dim) : 0.f);
    return;
  }
  head -= c.shape.heads;
  if (head < c.shape.kv_heads) {
    __half *out = reinterpret_cast<__half *>(page + c.kv.k_offset) + (int64_t(head) * slots + slot) * padded;
    for (int i = threadIdx.x; i < dim; i += blockDim.x)
      out[i] = __float2half(head_value(c.k, c.k_cos_sin, token, head, i, dim));
    return;
  }
  head -= c.shape.kv_heads;
  __half *out = reinterpret_cast<__half *>(page + c.kv.v_offset) + int64_t(head) * padded * slots + slot;
  for (int i = threadIdx.x; i < dim; i += blockDim.x)
    out[int64_t(i) * slots] = __float2half(head_value(c.v, nullptr, token, head, i, dim));
}

}  // namespace

void launch_fill_rope(const queue &q, const int32_t *positions, int tokens, const float *inverse, int half,
                      float factor, float *cos_sin) {
  launch(q, fill_rope, dim3(unsigned(tokens)), threads, 0, positions, inverse, half, factor, cos_sin);
}

void launch_rope(const queue &q, const rope_call &call, int tokens) {
  launch(q, rope, dim3(unsigned(tokens), unsigned(call.heads)), threads, 0, call);
}

void launch_store(const queue &q, const store_call &call, int tokens) {
  int heads = call.shape.heads + 2 * call.shape.kv_heads;
  launch(q, store, dim3(unsigned(tokens), unsigned(heads)), threads, 0, call);
}

}  // namespace adaptrt
