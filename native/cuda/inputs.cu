// Adapters at the embedding and at norms, and the input that W sees. All rare, so plain.
#include "adapters.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 256;

// One block a token. x' = R (g_in * x), adapter after adapter, between two rows of scratch.
__global__ void __launch_bounds__(threads) map_input(const map_call c) {
  wait_for_before();
  const token_tile &tile = c.tiles[blockIdx.x];
  for (int64_t token = tile.token; token < tile.token + tile.n_tokens; token++) {
    float *now = c.scratch + 2 * token * c.cols, *next = now + c.cols;
    for (int64_t i = threadIdx.x; i < c.cols; i += threads) now[i] = __bfloat162float(c.x[token * c.stride + i]);
    __syncthreads();
    for (int k = 0; k < tile.n; k++) {
      const attachment &what = application_of(c.applications, tile, k).attachments[c.target];
      if (!what.acts) continue;
      for (int64_t i = threadIdx.x; what.g_in && i < c.cols; i += threads) now[i] *= what.g_in[i];
      __syncthreads();
      if (!what.rotation) continue;
      int64_t block = what.rotation_block;
      for (int64_t i = threadIdx.x; i < c.cols; i += threads) {
        const float *row = what.rotation + i * block, *from = now + i / block * block;
        float sum = 0;
        for (int64_t j = 0; j < block; j++) sum += row[j] * from[j];
        next[i] = sum;
      }
      float *before = now;
      now = next, next = before;
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < c.cols; i += threads) c.out[token * c.stride + i] = __float2bfloat16(now[i]);
  }
}

// What a term adds to output `i` of a token, whose input is one-hot.
__device__ float embedded_term(const term &t, int32_t token, int64_t i) {
  float sum = 0;
  if (t.kind == ADRT_SPARSE) {  // the rows are the table's
    for (int32_t k = t.row_start[token]; k < t.row_start[token + 1]; k++) sum += t.columns[k] == i ? t.values[k] : 0.f;
    return t.scale * sum;
  }
  for (int64_t r = t.identity ? i : 0; r < (t.identity ? i + 1 : t.width); r++)
    sum += (t.identity ? 1.f : element(t.u, r, i)) * element(t.v, r, token) * (t.d ? t.d[r] : 1.f);
  return t.scale * sum * (t.e ? t.e[i] : 1.f);
}

__global__ void __launch_bounds__(threads) embed_adapters(const embed_call c) {
  wait_for_before();
  const token_tile &tile = c.tiles[blockIdx.x];
  int64_t i = blockIdx.y * int64_t(threads) + threadIdx.x;
  if (i >= c.width) return;
  for (int row = tile.token; row < tile.token + tile.n_tokens; row++) {
    int32_t token = c.tokens[row];
    float y = c.y[row * c.y_stride + i], constant = 0;
    for (int k = 0; k < tile.n; k++) {
      const attachment &what = application_of(c.applications, tile, k).attachments[c.target];
      if (what.acts && what.g_in) y *= what.g_in[token];
    }
    for (int k = 0; k < tile.n; k++) {
      const attachment &what = application_of(c.applications, tile, k).attachments[c.target];
      if (!what.acts) continue;
      for (int n = 0; n < what.n_terms; n++) y += embedded_term(term_of(what, n), token, i);
      if (what.g_out) {
        y *= what.g_out[i];
        if (what.scales_bias) constant *= what.g_out[i];
      }
      if (what.c) constant += what.c[i];
    }
    c.y[row * c.y_stride + i] = y + constant;
  }
}

__global__ void __launch_bounds__(threads) gain(const gain_call c) {
  wait_for_before();
  const token_tile &tile = c.tiles[blockIdx.x];
  int64_t i = blockIdx.y * int64_t(threads) + threadIdx.x;
  if (i >= c.width) return;
  float factor = 1;
  for (int k = 0; k < tile.n; k++) {
    const attachment &what = application_of(c.applications, tile, k).attachments[c.target];
    if (what.acts && what.g_out) factor *= what.g_out[i];
  }
  for (int64_t token = tile.token; token < tile.token + tile.n_tokens; token++) {
    float y = c.y.wide ? c.y.wide[token * c.y.wide_stride + i]
                       : __bfloat162float(c.y.narrow[token * c.y.narrow_stride + i]);
    c.y.put(token, i, y * factor);
  }
}

}  // namespace

void launch_map(const queue &q, const map_call &call, int n_tiles) {
  launch(q, map_input, dim3(unsigned(n_tiles)), threads, 0, call);
}

void launch_embed_adapters(const queue &q, const embed_call &call, int n_tiles) {
  launch(q, embed_adapters, dim3(unsigned(n_tiles), blocks_of(call.width, threads)), threads, 0, call);
}

void launch_gain(const queue &q, const gain_call &call, int n_tiles) {
  launch(q, gain, dim3(unsigned(n_tiles), blocks_of(call.width, threads)), threads, 0, call);
}

}  // namespace adaptrt
