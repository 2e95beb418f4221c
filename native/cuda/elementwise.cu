#include "elementwise.cuh"

#include <algorithm>

namespace adaptrt {
namespace {

constexpr int norm_threads = 1024, most_cached = 8;  // values of a thread that stay in registers
template <int n>
constexpr int most_registers = n == 4 ? 40 : 64;  // 40 leave room for a block of shrink_lone to start meanwhile
constexpr int threads = 128;  // so few that a block finds room beside a product's with adapters

__device__ float block_sum(float v) {
  __shared__ float parts[warp_size];
  v = warp_sum(v);
  if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = v;
  __syncthreads();
  int lane = threadIdx.x % warp_size;
  return warp_sum(lane < int(blockDim.x) / warp_size ? parts[lane] : 0.f);
}

template <int n>
__device__ void load_values(const float *from, float (&to)[n]) {
  if constexpr (n == 4)
    *reinterpret_cast<float4 *>(to) = *reinterpret_cast<const float4 *>(from);
  else
    to[0] = from[0];
}

template <int n>
__device__ void put_values(const destination &to, int64_t token, int column, const float (&values)[n]) {
  if constexpr (n == 4) {
    to.put_four(token, column, *reinterpret_cast<const float4 *>(values));
  } else {
    to.put(token, column, values[0]);
  }
}

// A row of the norm's input: a, or a + b, which is kept when it is read.
template <int n>
struct norm_row {
  const norm_call &c;
  int64_t token;
  const float *a, *b;

  __device__ norm_row(const norm_call &c)
      : c(c), token(blockIdx.x), a(c.a.data + token * c.a.stride), b(c.b.data + token * c.b.stride) {}
  __device__ void load(int column, float (&sum)[n]) const {
    float more[n] = {};
    load_values(a + column, sum);
    if (c.b.data) load_values(b + column, more);
    for (int k = 0; k < n; k++) sum[k] += more[k];
  }
  __device__ float keep(int column, const float (&sum)[n]) const {  // the sum of squares
    float squares = 0;
    if (c.b.data) put_values(c.sum, token, column, sum);
    for (int k = 0; k < n; k++) squares += sum[k] * sum[k];
    return squares;
  }
  __device__ void put(int column, const float (&sum)[n], const float (&weight)[n], float scale) const {
    float out[n];
    for (int k = 0; k < n; k++) out[k] = sum[k] * scale * weight[k];
    put_values(c.out, token, column, out);
  }
};

// One block a token, a thread n neighbouring values at a time. One multiprocessor does it all, so instructions count;
// and all loads are on their way before anything is stored, which they might read for all that the compiler knows.
template <int n>
__global__ void __maxnreg__(most_registers<n>) norm(const norm_call c) {
  constexpr int cached = most_cached / n;
  const norm_row<n> row(c);
  int width = int(c.width), first = int(threadIdx.x) * n, step = int(blockDim.x) * n;
  float weight[cached][n] = {}, kept[cached][n] = {}, squares = 0;
#pragma unroll
  for (int j = 0; j < cached; j++)
    if (first + j * step < width) load_values(c.weight + first + j * step, weight[j]);
  wait_for_before();
#pragma unroll
  for (int j = 0; j < cached; j++)
    if (first + j * step < width) row.load(first + j * step, kept[j]);
#pragma unroll
  for (int j = 0; j < cached; j++)
    if (first + j * step < width) squares += row.keep(first + j * step, kept[j]);
  for (int i = first + cached * step; i < width; i += step) {
    float more[n];
    row.load(i, more);
    squares += row.keep(i, more);
  }
  float scale = rsqrtf(block_sum(squares) / float(width) + c.eps);
#pragma unroll
  for (int j = 0; j < cached; j++)
    if (first + j * step < width) row.put(first + j * step, kept[j], weight[j], scale);
  for (int i = first + cached * step; i < width; i += step) {
    float more[n], gain[n];
    load_values(c.weight + i, gain);
    if (c.b.data)
      load_values(c.sum.wide + row.token * c.sum.wide_stride + i, more);
    else
      row.load(i, more);
    row.put(i, more, gain, scale);
  }
}

__device__ float combined(const combine_call &c, float a, int64_t token, int64_t i) {
  if (c.kind == combination::scale) {
    float scaled = a * c.factor;
    return c.cap > 0 ? c.cap * tanhf(scaled / c.cap) : scaled;
  }
  float b = c.b.data[token * c.b.stride + i];
  return c.kind == combination::add ? a + b : gated(c.kind, a, b);
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

static bool in_fours(const source &x) { return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 4 == 0; }
static bool in_fours(const destination &y) {
  return reinterpret_cast<uintptr_t>(y.wide) % 16 == 0 && y.wide_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(y.narrow) % 8 == 0 && y.narrow_stride % 4 == 0;
}

void launch_norm(const queue &q, const norm_call &call, int tokens) {
  bool fours = call.width % 4 == 0 && in_fours(call.a) && in_fours(call.b) && in_fours(call.sum) && in_fours(call.out);
  int64_t lanes = fours ? call.width / 4 : call.width, wanted = (lanes + warp_size - 1) / warp_size * warp_size;
  launch(q, fours ? norm<4> : norm<1>, dim3(unsigned(tokens)), unsigned(std::min<int64_t>(norm_threads, wanted)), 0,
         call);
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
