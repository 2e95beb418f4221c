// What the terms and vectors of adapters do to outputs: what kernels for it share.
#ifndef ADAPTRT_CUDA_EXPAND_CUH
#define ADAPTRT_CUDA_EXPAND_CUH
#include "adapters.cuh"
#include "panels.cuh"

namespace adaptrt {

// A warp does 64 outputs at a time for a tile of tokens, on tensor cores: 16 outputs by 16 ranks times the hidden
// values of 16 ranks in 8 columns. A column has the upper or the lower half of a token's values as bfloat16, whose sum
// is exact enough. With four tokens the columns are theirs, and lane 4g + t has outputs 2g and 2g + 1 of all four steps
// for token t. With one token the columns are those of the steps, so that the lane has two outputs of step t.
template <bool single>
struct lane_outputs {
  static constexpr int steps = single ? 1 : 4;
  float y[steps][2], constant[steps][2];  // the bias and every c

  static __device__ int lane() { return threadIdx.x % warp_size; }
  static __device__ int token() { return single ? 0 : lane() % 4; }
  static __device__ int row(int step) { return 16 * (single ? lane() % 4 : step) + lane() / 4 * 2; }
};

// One term's hidden values of a tile: token k has them at data + k * width.
struct hidden_values {
  const float *data;
  int64_t width;
  int tokens;
  __device__ float at(int token, int64_t i) const {
    return token < tokens && i < width ? data[token * width + i] : 0.f;
  }
};

__device__ inline uint32_t pair_of(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}

// A lane's four values of a column of 16 ranks: 2t, 2t + 1, 2t + 8 and 2t + 9.
struct lane_ranks {
  float v[4];
  static __device__ int rank(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

  __device__ void load(const hidden_values &hidden, int token, int64_t first_rank) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = hidden.at(token, first_rank + rank(i));
  }
  // The scales of a piece's ranks that the lane has; of bf16 there are none.
  template <weight_kind kind>
  static __device__ void load_scales(const float *scales, float2 by[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      if constexpr (kind != weight_kind::bf16) by[i] = __ldg(reinterpret_cast<const float2 *>(scales + rank(2 * i)));
  }
  // The two registers of the lane's half of the column, times the ranks' scales.
  template <weight_kind kind>
  __device__ void column(const float2 by[2], uint32_t b[2]) const {
    bool lower = threadIdx.x / 4 % 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float h[2] = {v[i], v[i + 1]};
      if constexpr (kind != weight_kind::bf16) h[0] *= by[i / 2].x, h[1] *= by[i / 2].y;
      uint32_t upper = pair_of(h[0], h[1]);
      float rest[2] = {h[0] - __uint_as_float(upper << 16), h[1] - __uint_as_float(upper & 0xffff0000)};
      b[i / 2] = lower ? pair_of(rest[0], rest[1]) : upper;
    }
  }
  template <weight_kind kind>
  __device__ void column(const float *scales, uint32_t b[2]) const {
    float2 by[2];
    load_scales<kind>(scales, by);
    column<kind>(by, b);
  }
};

// 64 outputs by 16 ranks.
template <weight_kind kind, bool single>
__device__ void multiply_piece(const piece_codes<kind> &codes, const uint32_t b[2], float (*c)[4]) {
  int step_of_column = threadIdx.x % warp_size / 8;
#pragma unroll
  for (int s = 0; s < 4; s++) {
    uint32_t a[4];
    codes.step(s, a);
    bool mine = !single || step_of_column == s;
    multiply_add(c[single ? 0 : s], a, mine ? b[0] : 0, mine ? b[1] : 0);
  }
}

template <weight_kind kind, bool single>
__device__ void low_rank(const factor u, const hidden_values &hidden, int64_t block, float (*sum)[2]) {
  constexpr int steps = lane_outputs<single>::steps;
  int ranks = int(rank_pieces(u)), token = single ? 0 : threadIdx.x % warp_size / 8;
  float c[steps][4] = {};
#pragma unroll 1
  for (int r = 0; r < ranks; r++) {
    int64_t piece = block * ranks + r;
    piece_codes<kind> codes;
    codes.load(u, piece);
    lane_ranks values;
    values.load(hidden, token, r * panel_ranks);
    uint32_t b[2];
    values.template column<kind>(u.scales + piece * panel_ranks, b);
    multiply_piece<kind, single>(codes, b, c);
  }
#pragma unroll
  for (int s = 0; s < steps; s++) sum[s][0] = c[s][0] + c[s][1], sum[s][1] = c[s][2] + c[s][3];
}

// Output `row` of a term that has no U, or a Kronecker product's W1.
__device__ inline float other_output(const term &t, const hidden_values &hidden, int token, int64_t row) {
  if (t.kind != ADRT_KRONECKER) return hidden.at(token, row);
  float sum = 0;
  for (int64_t b = 0; b < t.u.cols; b++)
    sum += element(t.u, row / t.v.rows, b) * hidden.at(token, b * t.v.rows + row % t.v.rows);
  return sum;
}

template <bool single>
__device__ __noinline__ void other_outputs(const term &t, const hidden_values &hidden, int64_t block, int64_t rows,
                                           float (*sum)[2]) {
  using lane = lane_outputs<single>;
  for (int i = 0; i < 2 * lane::steps; i++) {
    int64_t row = block * BLOCK + lane::row(i / 2) + i % 2;
    if (row < rows) sum[i / 2][i % 2] = other_output(t, hidden, lane::token(), row);
  }
}

// A lane's part of a vector of outputs, or `otherwise`.
template <bool single>
__device__ void load_vector_of(const float *vector, int64_t block, int64_t rows, float otherwise, float (*out)[2]) {
  using lane = lane_outputs<single>;
#pragma unroll
  for (int i = 0; i < 2 * lane::steps; i++) {
    int64_t row = block * BLOCK + lane::row(i / 2) + i % 2;
    out[i / 2][i % 2] = vector && row < rows ? __ldg(vector + row) : otherwise;
  }
}

template <bool single>
__device__ void add_term(const term &t, const hidden_values &hidden, int64_t block, int64_t rows,
                         lane_outputs<single> &out) {
  constexpr int steps = lane_outputs<single>::steps;
  float sum[steps][2] = {}, e[steps][2];
  load_vector_of<single>(t.e, block, rows, 1.f, e);
  if (t.kind == ADRT_LOW_RANK && !t.identity)
    with_kind(t.u.dtype, [&](auto kind) { low_rank<decltype(kind)::value, single>(t.u, hidden, block, sum); });
  else
    other_outputs<single>(t, hidden, block, rows, sum);
#pragma unroll
  for (int i = 0; i < 2 * steps; i++) out.y[i / 2][i % 2] += e[i / 2][i % 2] * sum[i / 2][i % 2];
}

template <bool single>
__device__ void apply_vectors(const attachment &what, int64_t block, int64_t rows, lane_outputs<single> &out) {
  constexpr int steps = lane_outputs<single>::steps;
  const float *g_out = what.g_out, *c = what.c;
  if (!g_out && !c) return;
  bool scales_bias = what.scales_bias;
  float gains[steps][2], constants[steps][2];
  load_vector_of<single>(g_out, block, rows, 1.f, gains);
  load_vector_of<single>(c, block, rows, 0.f, constants);
#pragma unroll
  for (int i = 0; i < 2 * steps; i++) {
    float &constant = out.constant[i / 2][i % 2], gain = gains[i / 2][i % 2];
    out.y[i / 2][i % 2] *= gain;
    constant = (scales_bias ? gain : 1.f) * constant + constants[i / 2][i % 2];
  }
}

// The stack of a tile, in its order.
template <bool single>
__device__ void apply_stack(const adapter_call &c, const member &m, const token_tile &tile, int64_t block,
                            lane_outputs<single> &out) {
  for (int i = 0; i < tile.n; i++) {
    const application &a = application_of(c.applications, tile, i);
    const attachment &what = a.attachments[m.target];
    if (!what.acts) continue;
    for (int k = 0; k < what.n_terms; k++) {
      const term &t = term_of(what, k);
      if (is_elsewhere(m, a, k, t)) continue;
      const float *hidden = c.hidden + hidden_start(c, a, m, t) + (tile.token - a.token) * t.width;
      add_term(t, {hidden, t.width, tile.n_tokens}, block, m.rows, out);
    }
    apply_vectors(what, block, m.rows, out);
  }
}

// What most tokens have: one adapter with one low-rank term there, at most a gain, no constants.
struct lone_term {
  bool there;
  int width;
  const float *hidden, *e, *g_out;
  factor u;

  __device__ lone_term(const adapter_call &c, const member &m, const token_tile &tile) : there(false) {
    if (tile.n != 1) return;
    const attachment &what = tile.head.attachments[m.target];
    const term &t = what.first;
    there = what.acts && what.n_terms == 1 && !what.c && !m.bias && t.kind == ADRT_LOW_RANK &&
            !t.identity && !m.elsewhere.is(t) && tile.n_tokens == 1;
    if (!there) return;
    width = int(t.width), e = t.e, g_out = what.g_out, u = t.u;
    hidden = c.hidden + hidden_start(c, tile.head, m, t) + (tile.token - tile.head.token) * t.width;
  }
};

// y = g_out * (y + e * U hidden) for the outputs of some blocks.
template <weight_kind kind>
__device__ void expand_run(const lone_term &t, float *y, int64_t rows, int64_t first, int64_t end) {
  using lane = lane_outputs<true>;
  int ranks = (t.width + panel_ranks - 1) / panel_ranks;
  hidden_values hidden = {t.hidden, t.width, 1};
  lane_ranks values;
  values.load(hidden, 0, 0);
#pragma unroll 2
  for (int64_t block = first; block < end; block++) {
    float c[1][4] = {}, old[2], e[1][2], gain[1][2];
    int64_t row = block * BLOCK + lane::row(0);
    load_vector_of<true>(t.e, block, rows, 1.f, e);
    load_vector_of<true>(t.g_out, block, rows, 1.f, gain);
    for (int i = 0; i < 2; i++) old[i] = row + i < rows ? y[row + i] : 0.f;
    for (int r = 0; r < ranks; r++) {
      int64_t piece = block * ranks + r;
      piece_codes<kind> codes;
      codes.load(t.u, piece);
      if (ranks > 1) values.load(hidden, 0, r * panel_ranks);
      uint32_t b[2];
      values.template column<kind>(t.u.scales + piece * panel_ranks, b);
      multiply_piece<kind, true>(codes, b, c);
    }
    for (int i = 0; i < 2; i++)
      if (row + i < rows) y[row + i] = gain[0][i] * (old[i] + e[0][i] * (c[0][2 * i] + c[0][2 * i + 1]));
  }
}

}  // namespace adaptrt
#endif
