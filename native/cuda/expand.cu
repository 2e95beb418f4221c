// y = g_out * (y + e * U hidden ...) + bias + c, in stacking order, for all adapters of a batch in one launch.
#include <algorithm>

#include "adapters.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 64, outputs = 8;  // neighbouring outputs of a thread

// What a thread accumulates: `outputs` rows of y for the tokens of a tile.
template <int n_tokens>
struct accumulated {
  float y[n_tokens][outputs];
  float constant[outputs];  // the bias and every c
};

// One term's hidden values of a tile: token k has them at data + k * width.
struct hidden_values {
  const float *data;
  int64_t width;
  int n_tokens;
  __device__ float operator()(int token, int64_t i) const {
    return token < n_tokens ? data[token * width + i] : 0.f;
  }
};

template <int dtype, int n_tokens>
__device__ void low_rank(const factor &u, const hidden_values &hidden, int64_t row, float sum[n_tokens][outputs]) {
  nf4_bytes nf4 = make_nf4_bytes();
#pragma unroll 8
  for (int64_t r = 0; r < hidden.width; r++) {
    float weights[outputs];
    load8<dtype>(u, r, row, nf4, weights);
#pragma unroll
    for (int k = 0; k < n_tokens; k++) {
      float h = hidden(k, r);
#pragma unroll
      for (int j = 0; j < outputs; j++) sum[k][j] += weights[j] * h;
    }
  }
}

// Output `row` of a term that has no U, or a Kronecker product's W1.
__device__ float other_output(const term &t, const hidden_values &hidden, int token, int64_t row) {
  if (t.kind != ADRT_KRONECKER) return hidden(token, row);
  float sum = 0;
  for (int64_t b = 0; b < t.u.cols; b++)
    sum += element(t.u, row / t.v.rows, b) * hidden(token, b * t.v.rows + row % t.v.rows);
  return sum;
}

template <int n_tokens>
__device__ void add_term(const term &t, const hidden_values &hidden, int64_t row, int64_t rows,
                         accumulated<n_tokens> &acc) {
  float sum[n_tokens][outputs] = {};
  if (t.kind == ADRT_LOW_RANK && !t.identity) {
    with_dtype(t.u.dtype, [&](auto dtype) { low_rank<decltype(dtype)::value, n_tokens>(t.u, hidden, row, sum); });
  } else {
#pragma unroll
    for (int k = 0; k < n_tokens; k++)
#pragma unroll
      for (int j = 0; j < outputs; j++)
        if (row + j < rows && k < hidden.n_tokens) sum[k][j] = other_output(t, hidden, k, row + j);
  }
#pragma unroll
  for (int j = 0; j < outputs; j++) {
    float e = t.e && row + j < rows ? t.e[row + j] : 1.f;
#pragma unroll
    for (int k = 0; k < n_tokens; k++) acc.y[k][j] += e * sum[k][j];
  }
}

template <int n_tokens>
__device__ void apply_vectors(const attachment &what, int64_t row, int64_t rows, accumulated<n_tokens> &acc) {
#pragma unroll
  for (int j = 0; j < outputs; j++) {
    if (row + j >= rows) continue;
    if (what.g_out) {
      float gain = what.g_out[row + j];
#pragma unroll
      for (int k = 0; k < n_tokens; k++) acc.y[k][j] *= gain;
      if (what.scales_bias) acc.constant[j] *= gain;
    }
    if (what.c) acc.constant[j] += what.c[row + j];
  }
}

// The part of the first term's U that this block reads.
__device__ void prefetch_first(const member &m, const token_tile &tile, int64_t row) {
  if (!tile.n) return;
  const attachment &what = tile.head.attachments[m.target];
  const term &t = what.first;
  if (!what.acts || !what.n_terms || t.kind != ADRT_LOW_RANK || t.identity) return;
  prefetch(t.u, 0, t.width, row, min(int64_t(threads * outputs), m.rows - row));
}

template <int n_tokens>
__device__ void expand_member(const adapter_call &c, const member &m, const token_tile &tile, int64_t row) {
  accumulated<n_tokens> acc;
  float *y = c.y + tile.token * c.y_stride + m.row + row;
#pragma unroll
  for (int j = 0; j < outputs; j++) {
    bool inside = row + j < m.rows;
    acc.constant[j] = m.bias && inside ? m.bias[row + j] : 0.f;
#pragma unroll
    for (int k = 0; k < n_tokens; k++)
      acc.y[k][j] = inside && k < tile.n_tokens ? y[k * c.y_stride + j] : 0.f;
  }
  for (int i = 0; i < tile.n; i++) {
    const application &a = application_of(c.applications, tile, i);
    const attachment &what = a.attachments[m.target];
    if (!what.acts) continue;
    for (int k = 0; k < what.n_terms; k++) {
      const term &t = term_of(what, k);
      const float *hidden = c.hidden + hidden_start(c, a, m, t) + (tile.token - a.token) * t.width;
      add_term(t, {hidden, t.width, tile.n_tokens}, row, m.rows, acc);
    }
    apply_vectors(what, row, m.rows, acc);
  }
#pragma unroll
  for (int j = 0; j < outputs; j++)
#pragma unroll
    for (int k = 0; k < n_tokens; k++)
      if (row + j < m.rows && k < tile.n_tokens) y[k * c.y_stride + j] = acc.y[k][j] + acc.constant[j];
}

// One block a run of rows and tile of tokens; the members' rows lie one after the other.
template <int n_tokens>
__global__ void __launch_bounds__(threads) expand(const __grid_constant__ adapter_call c) {
  const token_tile &tile = c.tiles[blockIdx.y];
  int64_t block = blockIdx.x;
  for (int i = 0; i < c.n_members; i++) {
    const member &m = c.members[i];
    int64_t blocks = (m.rows + threads * outputs - 1) / (threads * outputs);
    if (block < blocks) {
      int64_t row = (block * threads + threadIdx.x) * outputs;
      prefetch_first(m, tile, block * threads * outputs);
      wait_for_before();
      if (row < m.rows) expand_member<n_tokens>(c, m, tile, row);
      return;
    }
    block -= blocks;
  }
}

}  // namespace

void launch_expand(const queue &q, const adapter_call &call, bool single) {
  constexpr int most_in_y = 65535;
  unsigned blocks = 0;
  for (int i = 0; i < call.n_members; i++) blocks += blocks_of(call.members[i].rows, threads * outputs);
  adapter_call part = call;
  for (int done = 0; done < call.n_tiles; done += most_in_y) {
    part.tiles = call.tiles + done;
    dim3 grid(blocks, unsigned(std::min(most_in_y, call.n_tiles - done)));
    if (single)
      launch(q, expand<1>, grid, threads, 0, part);
    else
      launch(q, expand<expand_tokens>, grid, threads, 0, part);
  }
}

}  // namespace adaptrt
