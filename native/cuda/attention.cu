// softmax(scale q k^T) v with the online softmax of FlashAttention (arXiv:2205.14135), on the tensor cores of sm_80.
//
// A block has 16 rows, a row being a query head of a token, and a warp meets the context in tiles of 32 positions. Splits
// of the context go to blocks of their own; the last of them to end joins what all have left.
//
// Which column of a tile is which position, and which step of the sum is which dimension, is free as long as both
// operands agree. It is chosen so that every load of keys and values is 16 bytes: lane 4g + t reads dimensions
// 8t .. 8t+7 of every 32 of a key, and positions 8t .. 8t+7 of a dimension's values.
#include <math.h>

#include "attention.cuh"

namespace adaptrt {
namespace {

constexpr int warps = 4, tile = 32, rows = 16;

__device__ void multiply_add(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t pack(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}

// What a block knows of its rows.
struct rows_of_block {
  query_block block;
  int kv_head, first_head, heads;  // `heads` of the KV head's query heads, from first_head on
  int context;                     // positions that its last token sees
  float a_head;                    // 1 / heads

  __device__ rows_of_block(const attend_call &c) : block(c.blocks[blockIdx.x]) {
    int group = c.shape.heads / c.shape.kv_heads, chunks = (group + rows - 1) / rows;
    kv_head = blockIdx.y / chunks;
    int chunk = blockIdx.y % chunks;
    first_head = kv_head * group + chunk * rows;
    heads = min(rows, group - chunk * rows);
    context = block.position + block.n_tokens;
    a_head = 1.f / float(heads);
  }
  __device__ int used() const { return heads * block.n_tokens; }  // the rows that exist come first
  __device__ int token(int row) const { return int((float(row) + 0.5f) * a_head); }  // row / heads
  __device__ int head(int row) const { return first_head + row - token(row) * heads; }
  __device__ int last_position(int row) const { return row < used() ? block.position + token(row) : -1; }
};

// The state of a warp: its rows' queries, running maxima and sums, and what is accumulated of the output.
template <int dim>
struct attention_state {
  uint32_t q[dim / 16][4];
  float out[dim / 8][4];
  float highest[2], sum[2];  // of rows g and g + 8
  int last[2];               // positions that they see

  __device__ void load_queries(const attend_call &c, const rows_of_block &r, int g, int t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = g + 8 * half;
      last[half] = r.last_position(row);
      const uint4 *from = reinterpret_cast<const uint4 *>(
          c.queries + (int64_t(r.block.token + r.token(row)) * c.shape.heads + r.head(row)) * dim + 8 * t);
#pragma unroll
      for (int i = 0; i < dim / 32; i++) {
        uint4 v = row < r.used() ? from[4 * i] : make_uint4(0, 0, 0, 0);
        q[2 * i][half] = v.x, q[2 * i][2 + half] = v.y;
        q[2 * i + 1][half] = v.z, q[2 * i + 1][2 + half] = v.w;
      }
    }
#pragma unroll
    for (int n = 0; n < dim / 8; n++)
      for (int i = 0; i < 4; i++) out[n][i] = 0;
    highest[0] = highest[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }
};

__device__ const __half *page_of(const kv_cache &kv, int32_t pages, int position, int64_t offset) {
  return reinterpret_cast<const __half *>(kv.page_address[kv.pages[pages + position / kv.page_tokens]] + offset);
}

// Where a tile's pages are: one for all of it, but where pages are `small`. (Those are kernels of their own: instructions
// that are jumped over have to be fetched from far away, too.)
template <bool small>
struct tile_pages {
  const uint8_t *whole;
  __device__ tile_pages(const attend_call &c, const rows_of_block &r, int base)
      : whole(small ? nullptr : reinterpret_cast<const uint8_t *>(page_of(c.kv, r.block.pages, base, 0))) {}
  __device__ const __half *of(const attend_call &c, const rows_of_block &r, int position, int64_t offset) const {
    if constexpr (small) return page_of(c.kv, r.block.pages, position, offset);
    return reinterpret_cast<const __half *>(whole + offset);
  }
};

// scores[j][.]: row g (0, 1) and g + 8 (2, 3) at positions base + 8t + 2j + {0, 1}
template <int dim, bool small>
__device__ void score_tile(const attend_call &c, const rows_of_block &r, const attention_state<dim> &state,
                           const tile_pages<small> &pages, int base, int g, int t, float scores[4][4]) {
  int slots = c.kv.page_tokens;
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    uint4 values[2][dim / 32];  // many loads on their way before the first is used
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int position = min(base + g / 2 * 8 + 2 * (pair + j) + g % 2, r.context - 1);
      const __half *page = pages.of(c, r, position, c.kv.k_offset);
      const uint4 *key =
          reinterpret_cast<const uint4 *>(page + uint32_t(r.kv_head * slots + (position & (slots - 1))) * dim + 8 * t);
#pragma unroll
      for (int i = 0; i < dim / 32; i++) values[j][i] = key[4 * i];
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      for (int i = 0; i < 4; i++) scores[pair + j][i] = 0;
#pragma unroll
      for (int i = 0; i < dim / 32; i++) {
        multiply_add(scores[pair + j], state.q[2 * i], values[j][i].x, values[j][i].y);
        multiply_add(scores[pair + j], state.q[2 * i + 1], values[j][i].z, values[j][i].w);
      }
    }
  }
}

// Scales and, where the model wants it, caps all scores: one jump over what few models need.
__device__ void finish_scores(const attention_shape &shape, float scores[4][4]) {
#pragma unroll
  for (int j = 0; j < 16; j++) scores[j / 4][j % 4] *= shape.scale;
  if (shape.cap <= 0) return;
  float inverse = 1.f / shape.cap;
#pragma unroll
  for (int j = 0; j < 16; j++) scores[j / 4][j % 4] = shape.cap * tanhf(scores[j / 4][j % 4] * inverse);
}

// Turns scores into weights and brings what was accumulated to the new maximum.
template <int dim>
__device__ void soften_tile(const attend_call &c, attention_state<dim> &state, int base, int t, float scores[4][4]) {
  finish_scores(c.shape, scores);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int last = state.last[half];
    float before = state.highest[half], highest = before;
#pragma unroll
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 2; i++) {
        float &score = scores[j][2 * half + i];
        if (base + 8 * t + 2 * j + i > last) score = -INFINITY;
        highest = fmaxf(highest, score);
      }
    highest = fmaxf(highest, __shfl_xor_sync(all_lanes, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(all_lanes, highest, 2));
    state.highest[half] = highest;
    float finite = highest == -INFINITY ? 0.f : highest, shrink = __expf(before - finite);
    state.sum[half] *= shrink;
#pragma unroll
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 2; i++) {
        float &score = scores[j][2 * half + i];
        score = __expf(score - finite);
        state.sum[half] += score;
      }
#pragma unroll
    for (int n = 0; n < dim / 8; n++)
      for (int i = 0; i < 2; i++) state.out[n][2 * half + i] *= shrink;
  }
}

// Eight positions of a dimension's values, from `position` on, out of pages of fewer than eight.
__device__ uint4 gather_values(const attend_call &c, const rows_of_block &r, uint32_t row, int position) {
  __half values[8];
  for (int i = 0; i < 8; i++) {
    bool inside = position + i < r.context;
    const __half *mine = inside ? page_of(c.kv, r.block.pages, position + i, c.kv.v_offset) : nullptr;
    values[i] = inside ? mine[row + ((position + i) & (c.kv.page_tokens - 1))] : __half(0.f);
  }
  return *reinterpret_cast<uint4 *>(values);
}

// Keeps the first `left` of eight halves; beyond the context anything may lie, and 0 times NaN is no 0.
struct context_mask {
  uint32_t words[4];
  __device__ explicit context_mask(int left) {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = left >= 2 * i + 2 ? 0xffffffffu : left == 2 * i + 1 ? 0xffffu : 0u;
  }
  __device__ uint4 of(const uint4 &v) const {
    return make_uint4(v.x & words[0], v.y & words[1], v.z & words[2], v.w & words[3]);
  }
};

// A tile's values on their way: those of 8 dimensions times `together`, from dimension 8 `first` + g on.
template <int dim, bool small>
struct tile_values {
  static constexpr int together = dim / 8 < 8 ? dim / 8 : 8;
  uint4 v[together];

  __device__ void load(const attend_call &c, const rows_of_block &r, const tile_pages<small> &pages, int base, int g,
                       int t, int first) {
    int position = base + 8 * t, left = r.context - position, slots = c.kv.page_tokens;
    const __half *page = pages.of(c, r, min(position, r.context - 1), c.kv.v_offset) + (position & (slots - 1));
#pragma unroll
    for (int n = 0; n < together; n++) {
      uint32_t row = uint32_t(r.kv_head * dim + 8 * (first + n) + g) * slots;
      v[n] = make_uint4(0, 0, 0, 0);
      if (small && slots < 8)
        v[n] = gather_values(c, r, row, position);
      else if (left > 0)
        v[n] = *reinterpret_cast<const uint4 *>(page + row);
    }
  }
};

// `values`: the first of the tile's, which the caller has loaded.
template <int dim, bool small>
__device__ void add_values(const attend_call &c, const rows_of_block &r, attention_state<dim> &state,
                           const tile_pages<small> &pages, int base, int g, int t, const float scores[4][4],
                           tile_values<dim, small> &values) {
  constexpr int together = tile_values<dim, small>::together;
  uint32_t weights[2][4];
#pragma unroll
  for (int k = 0; k < 2; k++)
    for (int i = 0; i < 4; i++) weights[k][i] = pack(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1]);
  const context_mask mask(r.context - (base + 8 * t));
#pragma unroll
  for (int first = 0; first < dim / 8; first += together) {
    if (first) values.load(c, r, pages, base, g, t, first);
#pragma unroll
    for (int n = 0; n < together; n++) {
      uint4 v = mask.of(values.v[n]);
      multiply_add(state.out[first + n], weights[0], v.x, v.y);
      multiply_add(state.out[first + n], weights[1], v.z, v.w);
    }
  }
}

// The warps' results side by side in shared memory, and each row's as one: its output is the sum over warps of
// out[warp][row] * factor[warp][row].
template <int dim>
struct warp_results {
  static constexpr int stride = dim + 8;  // rows 4 apart meet in no bank
  float out[warps][rows][stride], highest[warps][rows], factor[warps][rows], top[rows], sum[rows];
  __device__ float joined(int row, int d) const {
    float v = 0;
#pragma unroll
    for (int w = 0; w < warps; w++) v += out[w][row][d] * factor[w][row];
    return v;
  }
};

template <int dim>
__device__ void join_warps(attention_state<dim> &state, warp_results<dim> &all, int used, int warp, int g, int t) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = g + 8 * half;
    state.sum[half] += __shfl_xor_sync(all_lanes, state.sum[half], 1);
    state.sum[half] += __shfl_xor_sync(all_lanes, state.sum[half], 2);
    all.highest[warp][row] = state.highest[half];
    all.factor[warp][row] = state.sum[half];
    if (row >= used) continue;
#pragma unroll
    for (int n = 0; n < dim / 8; n++)
      *reinterpret_cast<float2 *>(&all.out[warp][row][8 * n + 2 * t]) =
          make_float2(state.out[n][2 * half], state.out[n][2 * half + 1]);
  }
  __syncthreads();
  if (threadIdx.x < rows) {
    int row = threadIdx.x;
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int w = 0; w < warps; w++) top = fmaxf(top, all.highest[w][row]);
#pragma unroll
    for (int w = 0; w < warps; w++) {
      float factor = top == -INFINITY ? 0.f : __expf(all.highest[w][row] - top);
      total += all.factor[w][row] * factor;
      all.factor[w][row] = factor;
    }
    all.top[row] = top;
    all.sum[row] = total;
  }
  __syncthreads();
}

__device__ void write_row(const attend_call &c, const rows_of_block &r, int row, int d, float value) {
  if (d < c.shape.head_dim) c.out.put(r.block.token + r.token(row), int64_t(r.head(row)) * c.shape.head_dim + d, value);
}

// One split's rows in c.partial.
template <int dim>
struct split_rows {
  float out[rows][dim], highest[rows], sum[rows];
};

template <int dim>
__device__ split_rows<dim> *partial_of(const attend_call &c, int split) {
  int64_t mine = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  return reinterpret_cast<split_rows<dim> *>(c.partial) + mine * c.splits + split;
}

// The last split's block to end joins them all.
template <int dim>
__device__ void join_splits(const attend_call &c, const rows_of_block &r, const warp_results<dim> &all, int used) {
  __shared__ float factor[rows][most_splits], sum[rows];
  split_rows<dim> *mine = partial_of<dim>(c, blockIdx.z), *first = partial_of<dim>(c, 0);
  for (int i = threadIdx.x; i < used * dim; i += blockDim.x) mine->out[i / dim][i % dim] = all.joined(i / dim, i % dim);
  if (threadIdx.x < used) {
    mine->highest[threadIdx.x] = all.top[threadIdx.x];
    mine->sum[threadIdx.x] = all.sum[threadIdx.x];
  }
  if (!is_last_split(c.arrived + int64_t(blockIdx.x) * gridDim.y + blockIdx.y, c.splits)) return;
  for (int i = threadIdx.x; i < used * c.splits; i += blockDim.x)
    factor[i / c.splits][i % c.splits] = __ldcg(&first[i % c.splits].highest[i / c.splits]);
  __syncthreads();
  if (threadIdx.x < used) {
    float highest = -INFINITY, total = 0;
    for (int s = 0; s < c.splits; s++) highest = fmaxf(highest, factor[threadIdx.x][s]);
#pragma unroll 4
    for (int s = 0; s < c.splits; s++) {
      float &one = factor[threadIdx.x][s];
      one = __expf(one - highest);
      total += one * __ldcg(&first[s].sum[threadIdx.x]);
    }
    sum[threadIdx.x] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < used * dim; i += blockDim.x) {
    int row = i / dim, d = i % dim;
    float out = 0;
#pragma unroll 8
    for (int s = 0; s < c.splits; s++) out += __ldcg(&first[s].out[row][d]) * factor[row][s];
    write_row(c, r, row, d, __fdividef(out, sum[row]));
  }
}

template <int dim, bool small>
__global__ void __launch_bounds__(warps *warp_size, dim > 128 ? 2 : 3) attend(const attend_call c) {
  extern __shared__ __align__(16) uint8_t shared[];
  warp_results<dim> &all = *reinterpret_cast<warp_results<dim> *>(shared);
  int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const rows_of_block r(c);
  int first = (int(blockIdx.z) * warps + warp) * tile, step = warps * c.splits * tile;
  int used = r.used();
  tile_pages<small> pages(c, r, min(first, r.context - 1));
  attention_state<dim> state;
  wait_for_before();
  state.load_queries(c, r, g, t);
  for (int base = first; base < r.context; base += step) {
    float scores[4][4];
    tile_values<dim, small> values;
    if (base > first) pages = tile_pages<small>(c, r, base);
    values.load(c, r, pages, base, g, t, 0);  // on their way while keys are multiplied
    score_tile(c, r, state, pages, base, g, t, scores);
    soften_tile(c, state, base, t, scores);
    add_values(c, r, state, pages, base, g, t, scores, values);
  }
  join_warps(state, all, used, warp, g, t);
  if (c.splits > 1) {
    join_splits(c, r, all, used);
    return;
  }
  for (int i = threadIdx.x; i < used * dim; i += blockDim.x)
    write_row(c, r, i / dim, i % dim, __fdividef(all.joined(i / dim, i % dim), all.sum[i / dim]));
}

template <int dim>
void launch_dim(const queue &q, const attend_call &call, dim3 grid) {
  size_t bytes = sizeof(warp_results<dim>);
  auto kernel = call.kv.page_tokens < tile ? attend<dim, true> : attend<dim, false>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "attention");
  launch(q, kernel, grid, warps * warp_size, bytes, call);
}

}  // namespace

int64_t attention_partial_floats(const attention_shape &shape, int64_t n_blocks, int splits) {
  if (splits < 2) return 0;
  return n_blocks * shape.kv_heads * shape.head_chunks() * splits * rows * (padded_head(shape.head_dim) + 2);
}

void launch_attend(const queue &q, const attend_call &call) {
  dim3 grid(unsigned(call.n_blocks), unsigned(call.shape.kv_heads * call.shape.head_chunks()), unsigned(call.splits));
  switch (call.kv.dim) {
    case 32: return launch_dim<32>(q, call, grid);
    case 64: return launch_dim<64>(q, call, grid);
    case 128: return launch_dim<128>(q, call, grid);
    default: return launch_dim<256>(q, call, grid);
  }
}

}  // namespace adaptrt
