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

  __device__ rows_of_block(const attend_call &c) : block(c.blocks[blockIdx.x]) {
    int group = c.shape.heads / c.shape.kv_heads, chunks = (group + rows - 1) / rows;
    kv_head = blockIdx.y / chunks;
    int chunk = blockIdx.y % chunks;
    first_head = kv_head * group + chunk * rows;
    heads = min(rows, group - chunk * rows);
    context = block.position + block.n_tokens;
  }
  __device__ int token(int row) const { return row / heads; }
  __device__ int head(int row) const { return first_head + row % heads; }
  __device__ bool has(int row) const { return token(row) < block.n_tokens; }
  __device__ int last_position(int row) const { return has(row) ? block.position + token(row) : -1; }
};

// The state of a warp: its rows' queries, running maxima and sums, and what is accumulated of the output.
template <int dim>
struct attention_state {
  uint32_t q[dim / 16][4];
  float out[dim / 8][4];
  float highest[2], sum[2];  // of rows g and g + 8

  __device__ void load_queries(const attend_call &c, const rows_of_block &r, int g, int t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = g + 8 * half;
      const uint4 *from = reinterpret_cast<const uint4 *>(
          c.queries + (int64_t(r.block.token + r.token(row)) * c.shape.heads + r.head(row)) * dim + 8 * t);
#pragma unroll
      for (int i = 0; i < dim / 32; i++) {
        uint4 v = r.has(row) ? from[4 * i] : make_uint4(0, 0, 0, 0);
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

// Where a tile's pages are: one for all of it where a page holds a tile.
struct tile_pages {
  const uint8_t *whole;
  __device__ tile_pages(const attend_call &c, const rows_of_block &r, int base)
      : whole(c.kv.page_tokens >= tile ? reinterpret_cast<const uint8_t *>(page_of(c.kv, r.block.pages, base, 0))
                                       : nullptr) {}
  __device__ const __half *of(const attend_call &c, const rows_of_block &r, int position, int64_t offset) const {
    return whole ? reinterpret_cast<const __half *>(whole + offset) : page_of(c.kv, r.block.pages, position, offset);
  }
};

// scores[j][.]: row g (0, 1) and g + 8 (2, 3) at positions base + 8t + 2j + {0, 1}
template <int dim>
__device__ void score_tile(const attend_call &c, const rows_of_block &r, const attention_state<dim> &state,
                           const tile_pages &pages, int base, int g, int t, float scores[4][4]) {
  int slots = c.kv.page_tokens;
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    uint4 values[2][dim / 32];  // many loads on their way before the first is used
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int position = min(base + g / 2 * 8 + 2 * (pair + j) + g % 2, r.context - 1);
      const __half *page = pages.of(c, r, position, c.kv.k_offset);
      const uint4 *key = reinterpret_cast<const uint4 *>(
          page + (int64_t(r.kv_head) * slots + (position & (slots - 1))) * dim + 8 * t);
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

__device__ float final_score(const attention_shape &shape, float score, bool seen) {
  score *= shape.scale;
  if (shape.cap > 0) score = shape.cap * tanhf(score / shape.cap);
  return seen ? score : -INFINITY;
}

// Turns scores into weights and brings what was accumulated to the new maximum.
template <int dim>
__device__ void soften_tile(const attend_call &c, const rows_of_block &r, attention_state<dim> &state, int base, int g,
                            int t, float scores[4][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int last = r.last_position(g + 8 * half);
    float before = state.highest[half], highest = before;
#pragma unroll
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 2; i++) {
        float &score = scores[j][2 * half + i];
        score = final_score(c.shape, score, base + 8 * t + 2 * j + i <= last);
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
__device__ uint4 gather_values(const attend_call &c, const rows_of_block &r, int64_t row, int position) {
  __half values[8];
  for (int i = 0; i < 8; i++) {
    bool inside = position + i < r.context;
    const __half *mine = inside ? page_of(c.kv, r.block.pages, position + i, c.kv.v_offset) : nullptr;
    values[i] = inside ? mine[row + ((position + i) & (c.kv.page_tokens - 1))] : __half(0.f);
  }
  return *reinterpret_cast<uint4 *>(values);
}

// The first `left` of eight halves; beyond the context anything may lie, and 0 times NaN is no 0.
__device__ uint4 first_halves(uint4 v, int left) {
  uint32_t *words = reinterpret_cast<uint32_t *>(&v);
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] &= left >= 2 * i + 2 ? 0xffffffffu : left == 2 * i + 1 ? 0xffffu : 0u;
  return v;
}

template <int dim>
__device__ void add_values(const attend_call &c, const rows_of_block &r, attention_state<dim> &state,
                           const tile_pages &pages, int base, int g, int t, const float scores[4][4]) {
  uint32_t weights[2][4];
#pragma unroll
  for (int k = 0; k < 2; k++)
    for (int i = 0; i < 4; i++) weights[k][i] = pack(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1]);
  int position = base + 8 * t, left = r.context - position, slots = c.kv.page_tokens;
  const __half *page = pages.of(c, r, min(position, r.context - 1), c.kv.v_offset) + (position & (slots - 1));
  constexpr int together = dim / 8 < 8 ? dim / 8 : 8;
#pragma unroll
  for (int first = 0; first < dim / 8; first += together) {
    uint4 v[together];
#pragma unroll
    for (int n = 0; n < together; n++) {
      int64_t row = (int64_t(r.kv_head) * dim + 8 * (first + n) + g) * slots;
      v[n] = make_uint4(0, 0, 0, 0);
      if (slots < 8)
        v[n] = gather_values(c, r, row, position);
      else if (left > 0)
        v[n] = *reinterpret_cast<const uint4 *>(page + row);
    }
#pragma unroll
    for (int n = 0; n < together; n++) {
      if (left < 8) v[n] = first_halves(v[n], left);
      multiply_add(state.out[first + n], weights[0], v[n].x, v[n].y);
      multiply_add(state.out[first + n], weights[1], v[n].z, v[n].w);
    }
  }
}

// The four warps' results as one: out[row][d], and each row's maximum and sum, in shared memory.
template <int dim>
struct joined_rows {
  float out[rows][dim], highest[rows], sum[rows];
};

template <int dim>
__device__ void join_warps(attention_state<dim> &state, joined_rows<dim> &joined, int warp, int g, int t) {
  __shared__ float highest[warps][rows], sum[warps][rows];
  for (int half = 0; half < 2; half++) {
    state.sum[half] += __shfl_xor_sync(all_lanes, state.sum[half], 1);
    state.sum[half] += __shfl_xor_sync(all_lanes, state.sum[half], 2);
    highest[warp][g + 8 * half] = state.highest[half];
    sum[warp][g + 8 * half] = state.sum[half];
  }
  __syncthreads();
  if (threadIdx.x < rows) {
    float top = -INFINITY, total = 0;
    for (int w = 0; w < warps; w++) top = fmaxf(top, highest[w][threadIdx.x]);
    for (int w = 0; w < warps; w++)
      total += top == -INFINITY ? 0.f : sum[w][threadIdx.x] * __expf(highest[w][threadIdx.x] - top);
    joined.highest[threadIdx.x] = top;
    joined.sum[threadIdx.x] = total;
  }
  for (int w = 0; w < warps; w++) {
    __syncthreads();
    if (w != warp) continue;
    for (int half = 0; half < 2; half++) {
      int row = g + 8 * half;
      float top = joined.highest[row], factor = top == -INFINITY ? 0.f : __expf(state.highest[half] - top);
#pragma unroll
      for (int n = 0; n < dim / 8; n++)
        for (int i = 0; i < 2; i++) {
          float &out = joined.out[row][8 * n + 2 * t + i];
          out = (w ? out : 0.f) + state.out[n][2 * half + i] * factor;
        }
    }
  }
  __syncthreads();
}

__device__ void write_row(const attend_call &c, const rows_of_block &r, int row, int d, float value) {
  if (d < c.shape.head_dim) c.out.put(r.block.token + r.token(row), int64_t(r.head(row)) * c.shape.head_dim + d, value);
}

// One split's rows in c.partial: the output, then maxima and sums.
template <int dim>
__device__ joined_rows<dim> *partial_of(const attend_call &c, int split) {
  int64_t mine = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  return reinterpret_cast<joined_rows<dim> *>(c.partial) + mine * c.splits + split;
}

// Whether this block is the last of its splits to come here; what the others wrote can then be read.
__device__ bool is_last_split(const attend_call &c) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (!threadIdx.x) {
    int32_t *arrived = c.arrived + int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
    last = atomicAdd(arrived, 1) == c.splits - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// The last split's block to end joins them all.
template <int dim>
__device__ void join_splits(const attend_call &c, const rows_of_block &r, const joined_rows<dim> &joined) {
  __shared__ float factor[rows][most_splits], sum[rows];
  joined_rows<dim> *mine = partial_of<dim>(c, blockIdx.z), *first = partial_of<dim>(c, 0);
  int used = r.heads * r.block.n_tokens;  // the rows that exist come first
  for (int i = threadIdx.x; i < used * dim; i += blockDim.x) mine->out[i / dim][i % dim] = joined.out[i / dim][i % dim];
  if (threadIdx.x < used) {
    mine->highest[threadIdx.x] = joined.highest[threadIdx.x];
    mine->sum[threadIdx.x] = joined.sum[threadIdx.x];
  }
  if (!is_last_split(c)) return;
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
    write_row(c, r, row, d, out / sum[row]);
  }
}

template <int dim>
__global__ void __launch_bounds__(warps *warp_size) attend(const attend_call c) {
  __shared__ joined_rows<dim> joined;
  int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const rows_of_block r(c);
  int first = (int(blockIdx.z) * warps + warp) * tile, step = warps * c.splits * tile;
  tile_pages pages(c, r, min(first, r.context - 1));
  attention_state<dim> state;
  wait_for_before();
  state.load_queries(c, r, g, t);
  for (int base = first; base < r.context; base += step) {
    float scores[4][4];
    if (base > first) pages = tile_pages(c, r, base);
    score_tile(c, r, state, pages, base, g, t, scores);
    soften_tile(c, r, state, base, g, t, scores);
    add_values(c, r, state, pages, base, g, t, scores);
  }
  join_warps(state, joined, warp, g, t);
  if (c.splits > 1) {
    join_splits(c, r, joined);
    return;
  }
  for (int i = threadIdx.x; i < rows * dim; i += blockDim.x)
    if (r.has(i / dim)) write_row(c, r, i / dim, i % dim, joined.out[i / dim][i % dim] / joined.sum[i / dim]);
}

}  // namespace

int64_t attention_partial_floats(const attention_shape &shape, int64_t n_blocks, int splits) {
  if (splits < 2) return 0;
  return n_blocks * shape.kv_heads * shape.head_chunks() * splits * rows * (padded_head(shape.head_dim) + 2);
}

void launch_attend(const queue &q, const attend_call &call) {
  dim3 grid(unsigned(call.n_blocks), unsigned(call.shape.kv_heads * call.shape.head_chunks()), unsigned(call.splits));
  unsigned block = warps * warp_size;
  switch (call.kv.dim) {
    case 32: return launch(q, attend<32>, grid, block, 0, call);
    case 64: return launch(q, attend<64>, grid, block, 0, call);
    case 128: return launch(q, attend<128>, grid, block, 0, call);
    default: return launch(q, attend<256>, grid, block, 0, call);
  }
}

}  // namespace adaptrt
