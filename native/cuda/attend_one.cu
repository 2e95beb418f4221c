// Attention of tokens of sequences of their own, from q, k and v as the product leaves them: rotation, the storing of k
// and v, and attention in one launch.
//
// Everything but the token itself is on its way before the kernel before ends: its sequence's keys and values, which
// were stored by steps before. So what is left between two products is one trip to L2 and the arithmetic. The token's
// own key and value never come out of the cache: they join as one more part of the context, beside those of the warps.
//
// A warp meets the context in tiles of 32 positions. Keys, and values as they lie, are the 16 rows of a tensor core's
// product, and up to 8 query heads of a KV head its 8 columns. Which position is which row is free as long as keys and
// values agree; it is chosen as in attention.cu, so that every load is 16 bytes.
#include <math.h>

#include "attention.cuh"

namespace adaptrt {
namespace {

constexpr int warps = 4, tile = 32, most_heads = 8, most_together = 2;

__device__ void multiply_add(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ uint32_t pack(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ float2 unpack(uint32_t pair) { return __half22float2(*reinterpret_cast<__half2 *>(&pair)); }

// An 8 x 8 matrix of halves, two of a row in each lane, turned.
__device__ uint32_t transposed(uint32_t pair) {
  uint32_t turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

// What of the eight lanes with the same t
__device__ float most_of_column(float v) {
  for (int step = 4; step < warp_size; step *= 2) v = fmaxf(v, __shfl_xor_sync(all_lanes, v, step));
  return v;
}
__device__ float sum_of_column(float v) {
  for (int step = 4; step < warp_size; step *= 2) v += __shfl_xor_sync(all_lanes, v, step);
  return v;
}

struct place {
  query_block block;
  int warp, g, t, kv_head, heads, first_head;

  __device__ place(const attend_one_call &c)
      : block(c.blocks[blockIdx.x]), warp(threadIdx.x / warp_size), g(threadIdx.x % warp_size / 4), t(threadIdx.x % 4),
        kv_head(blockIdx.y * blockDim.y + threadIdx.y), heads(c.shape.heads / c.shape.kv_heads),
        first_head(kv_head * heads) {}
  __device__ int before() const { return block.position; }  // positions that are in the cache
  __device__ uint8_t *page(const kv_cache &kv, int position) const {
    return kv.page_address[kv.pages[block.pages + position / kv.page_tokens]];
  }
};

// Keys and values of 32 positions, on their way: lane 4g + t has dimensions 8t .. 8t+7 of every 32 of the keys at
// positions 8 (g / 2) + g % 2 + 2j, and positions 8t .. 8t+7 of the values of dimensions g + 8n.
template <int dim>
struct context_tile {
  uint4 keys[4][dim / 32], values[dim / 8];

  __device__ void load(const attend_one_call &c, const place &p, int base) {
    int slots = c.kv.page_tokens, slot = base & (slots - 1);
    const uint8_t *page = p.page(c.kv, base);
    const __half *k = reinterpret_cast<const __half *>(page + c.kv.k_offset) + (int64_t(p.kv_head) * slots + slot) * dim;
    const __half *v = reinterpret_cast<const __half *>(page + c.kv.v_offset) + int64_t(p.kv_head) * dim * slots + slot;
#pragma unroll
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < dim / 32; i++)
        keys[j][i] = *reinterpret_cast<const uint4 *>(k + (8 * (p.g / 2) + p.g % 2 + 2 * j) * dim + 32 * i + 8 * p.t);
#pragma unroll
    for (int n = 0; n < dim / 8; n++) values[n] = *reinterpret_cast<const uint4 *>(v + (8 * n + p.g) * slots + 8 * p.t);
  }
  // Beyond the context anything may lie, and 0 times NaN is no 0.
  __device__ void clear_values_from(int left) {
    uint32_t mask[4];
#pragma unroll
    for (int i = 0; i < 4; i++) mask[i] = left >= 2 * i + 2 ? 0xffffffffu : left == 2 * i + 1 ? 0xffffu : 0u;
#pragma unroll
    for (int n = 0; n < dim / 8; n++)
      values[n] = make_uint4(values[n].x & mask[0], values[n].y & mask[1], values[n].z & mask[2], values[n].w & mask[3]);
  }
};

// A head on its way: dimensions 8t .. 8t+7 of every 32.
template <int dim>
struct raw_head {
  float4 v[dim / 32][2];
  __device__ void load(const float *x, int t) {
#pragma unroll
    for (int i = 0; i < dim / 32; i++)
      for (int k = 0; k < 2; k++) v[i][k] = __ldcg(reinterpret_cast<const float4 *>(x + 32 * i + 8 * t + 4 * k));
  }
};

// The same, rotated; as halves, which is how the cache has it. `cosines`: [dim / 2], then as many sines.
template <int dim>
struct rotated_head {
  uint4 v[dim / 32];

  __device__ rotated_head(const raw_head<dim> &x, const float *cosines, int t) {
#pragma unroll
    for (int i = 0; i < dim / 64; i++) {
      uint32_t words[2][4];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float4 c = *reinterpret_cast<const float4 *>(cosines + 32 * i + 8 * t + 4 * k);
        const float4 s = *reinterpret_cast<const float4 *>(cosines + dim / 2 + 32 * i + 8 * t + 4 * k);
        const float4 &low = x.v[i][k], &high = x.v[i + dim / 64][k];
        words[0][2 * k] = pack(low.x * c.x - high.x * s.x, low.y * c.y - high.y * s.y);
        words[0][2 * k + 1] = pack(low.z * c.z - high.z * s.z, low.w * c.w - high.w * s.w);
        words[1][2 * k] = pack(high.x * c.x + low.x * s.x, high.y * c.y + low.y * s.y);
        words[1][2 * k + 1] = pack(high.z * c.z + low.z * s.z, high.w * c.w + low.w * s.w);
      }
      v[i] = make_uint4(words[0][0], words[0][1], words[0][2], words[0][3]);
      v[i + dim / 64] = make_uint4(words[1][0], words[1][1], words[1][2], words[1][3]);
    }
  }
  // The whole product with another head, in all four lanes that have it.
  __device__ float times(const rotated_head &other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < dim / 32; i++) {
      const uint32_t a[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
      const uint32_t b[4] = {other.v[i].x, other.v[i].y, other.v[i].z, other.v[i].w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        float2 x = unpack(a[k]), y = unpack(b[k]);
        sum += x.x * y.x + x.y * y.y;
      }
    }
    sum += __shfl_xor_sync(all_lanes, sum, 1);
    return sum + __shfl_xor_sync(all_lanes, sum, 2);
  }
};

__device__ float finished(const attention_shape &shape, float score) {
  score *= shape.scale;
  return shape.cap > 0 ? shape.cap * tanhf(score / shape.cap) : score;
}

// What a warp knows of heads 2t and 2t + 1: running maxima and sums; and of them dimensions g and g + 8 of every 16.
template <int dim>
struct accumulated {
  float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, out[dim / 16][4] = {};

  __device__ void add(const attend_one_call &c, const place &p, const rotated_head<dim> &q, context_tile<dim> &context,
                      int base) {
    float scores[2][4] = {};
#pragma unroll
    for (int s = 0; s < 2; s++)
      for (int i = 0; i < dim / 32; i++) {
        const uint4 &upper = context.keys[2 * s][i], &lower = context.keys[2 * s + 1][i];
        multiply_add(scores[s], upper.x, lower.x, upper.y, lower.y, q.v[i].x, q.v[i].y);
        multiply_add(scores[s], upper.z, lower.z, upper.w, lower.w, q.v[i].z, q.v[i].w);
      }
    soften(c, p, base, scores);
    context.clear_values_from(p.before() - (base + 8 * p.t));
#pragma unroll
    for (int s = 0; s < 2; s++) {
      uint32_t b0 = transposed(pack(scores[s][0], scores[s][1])), b1 = transposed(pack(scores[s][2], scores[s][3]));
#pragma unroll
      for (int n = 0; n < dim / 16; n++) {
        const uint4 &upper = context.values[2 * n], &lower = context.values[2 * n + 1];
        if (s == 0)
          multiply_add(out[n], upper.x, lower.x, upper.y, lower.y, b0, b1);
        else
          multiply_add(out[n], upper.z, lower.z, upper.w, lower.w, b0, b1);
      }
    }
  }
  // Turns scores into weights and brings what was accumulated to the new maximum.
  __device__ void soften(const attend_one_call &c, const place &p, int base, float scores[2][4]) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float top = highest[k];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float &score = scores[j / 2][j % 2 * 2 + k];
        score = finished(c.shape, score);
        if (base + 8 * (p.g / 2) + p.g % 2 + 2 * j >= p.before()) score = -INFINITY;
        top = fmaxf(top, score);
      }
      top = most_of_column(top);  // finite: a tile has at least one position
      float shrink = __expf(highest[k] - top);
      highest[k] = top;
      sum[k] *= shrink;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float &score = scores[j / 2][j % 2 * 2 + k];
        score = __expf(score - top);
        sum[k] += score;
      }
#pragma unroll
      for (int n = 0; n < dim / 16; n++) out[n][k] *= shrink, out[n][2 + k] *= shrink;
    }
  }
};

// One head's dimensions d .. d+3 of several parts of the context, brought to the highest score of all.
struct partial_row {
  float4 out;
  float highest, sum;
  __device__ void add(const float4 &v, float factor, float sum_of_part) {
    out.x += v.x * factor, out.y += v.y * factor, out.z += v.z * factor, out.w += v.w * factor;
    sum += sum_of_part * factor;
  }
};

// What a split leaves in c.partial, which has room for the 16 heads of attention.cu.
template <int dim>
struct split_rows {
  float out[most_heads][dim], highest[most_heads], sum[most_heads];

  __device__ void put(int head, int d, const partial_row &row) {
    *reinterpret_cast<float4 *>(&out[head][d]) = row.out;
    if (d == 0) highest[head] = row.highest, sum[head] = row.sum;
  }
};

// A warp's: a lane knows a split.
template <int dim>
__device__ partial_row join_splits(const split_rows<dim> *splits, int n, int head, int d) {
  int lane = threadIdx.x % warp_size;
  float highest = lane < n ? __ldcg(&splits[lane].highest[head]) : -INFINITY, top = highest;
  for (int step = warp_size / 2; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
  float factor = __expf(highest - top), sum = lane < n ? __ldcg(&splits[lane].sum[head]) : 0.f;
  partial_row row = {{0, 0, 0, 0}, top, 0};
#pragma unroll 8
  for (int s = 0; s < n; s++)
    row.add(__ldcg(reinterpret_cast<const float4 *>(&splits[s].out[head][d])), __shfl_sync(all_lanes, factor, s),
            __shfl_sync(all_lanes, sum, s));
  return row;
}

// The parts of the context side by side: one of each warp, and the token itself, whose sum is 1 and whose output is its
// value.
template <int dim>
struct alignas(16) context_parts {
  static constexpr int stride = dim + 4;  // no two lanes meet in a bank
  float out[warps][most_heads][stride], highest[warps + 1][most_heads], sum[warps][most_heads], value[dim];

  __device__ void put(const place &p, accumulated<dim> &mine) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      int head = 2 * p.t + k;
      float sum_of_all = sum_of_column(mine.sum[k]);
      if (head >= p.heads) continue;
      highest[p.warp][head] = mine.highest[k];
      sum[p.warp][head] = sum_of_all;
#pragma unroll
      for (int n = 0; n < dim / 16; n++) {
        out[p.warp][head][16 * n + p.g] = mine.out[n][k];
        out[p.warp][head][16 * n + p.g + 8] = mine.out[n][2 + k];
      }
    }
  }
  // One head's dimensions d .. d+3 of all parts.
  __device__ partial_row joined(int head, int d) const {
    partial_row row = {{0, 0, 0, 0}, highest[warps][head], 0};
#pragma unroll
    for (int w = 0; w < warps; w++) row.highest = fmaxf(row.highest, highest[w][head]);
    float finite = row.highest == -INFINITY ? 0.f : row.highest, factor = __expf(highest[warps][head] - finite);
    row.add(*reinterpret_cast<const float4 *>(&value[d]), factor, 1);
#pragma unroll
    for (int w = 0; w < warps; w++)
      row.add(*reinterpret_cast<const float4 *>(&out[w][head][d]), __expf(highest[w][head] - finite), sum[w][head]);
    return row;
  }
};

// The token's own part, for the first split; elsewhere it has no weight. All its loads are one trip.
template <int dim>
struct own_token {
  static constexpr int keeper = warps - 1;  // the warp that has least to do
  uint8_t *page;
  raw_head<dim> k;
  float v;

  __device__ own_token(const attend_one_call &c, const place &p) : page(p.page(c.kv, p.before())) {}
  __device__ void load(const attend_one_call &c, const place &p) {
    int64_t head = int64_t(p.kv_head) * dim;
    if (p.warp == keeper) k.load(c.k.data + p.block.token * c.k.stride + head, p.t);
    if (threadIdx.x < dim) v = __ldcg(c.v.data + p.block.token * c.v.stride + head + threadIdx.x);
  }
  __device__ void put(const attend_one_call &c, const place &p, const rotated_head<dim> &q, const float *cosines,
                      context_parts<dim> &parts) const {
    bool mine = blockIdx.z == 0;
    int slots = c.kv.page_tokens, slot = p.before() & (slots - 1);
    if (p.warp == keeper) {
      const rotated_head<dim> rotated(k, cosines, p.t);
      float score = finished(c.shape, q.times(rotated));
      if (p.t == 0) parts.highest[warps][p.g] = mine ? score : -INFINITY;
      __half *to = reinterpret_cast<__half *>(page + c.kv.k_offset);
      to += (int64_t(p.kv_head) * slots + slot) * dim + 8 * p.t;
#pragma unroll
      for (int i = 0; i < dim / 32; i++)
        if (mine && p.g == 0) *reinterpret_cast<uint4 *>(to + 32 * i) = rotated.v[i];
    }
    if (threadIdx.x >= dim) return;
    __half value = __float2half(v);
    parts.value[threadIdx.x] = __half2float(value);
    __half *to = reinterpret_cast<__half *>(page + c.kv.v_offset);
    if (mine) to[(int64_t(p.kv_head) * dim + threadIdx.x) * slots + slot] = value;
  }
};

__device__ void write_row(const attend_one_call &c, const place &p, int dim, int head, int d, const partial_row &row) {
  float inverse = 1.f / row.sum;
  float4 v = make_float4(row.out.x * inverse, row.out.y * inverse, row.out.z * inverse, row.out.w * inverse);
  c.out.put_four(p.block.token, int64_t(p.first_head + head) * dim + d, v);
}

// The output, by the only split or the last of them to end; a warp has a head at a time, a lane four dimensions.
template <int dim>
__device__ void write_rows(const attend_one_call &c, const place &p, const context_parts<dim> &parts) {
  int d = threadIdx.x % warp_size * 4;
  if (c.splits == 1) {
    for (int h = p.warp; h < p.heads && d < dim; h += warps) write_row(c, p, dim, h, d, parts.joined(h, d));
    return;
  }
  int64_t index = int64_t(blockIdx.x) * c.shape.kv_heads + p.kv_head;
  split_rows<dim> *splits = reinterpret_cast<split_rows<dim> *>(c.partial) + index * c.splits;
  for (int h = p.warp; h < p.heads && d < dim; h += warps) splits[blockIdx.z].put(h, d, parts.joined(h, d));
  if (!is_last_split(c.arrived + index, c.splits)) return;
  for (int h = p.warp; h < p.heads; h += warps) {
    partial_row row = join_splits(splits, c.splits, h, d < dim ? d : 0);
    if (d < dim) write_row(c, p, dim, h, d, row);
  }
}

template <int dim>
__global__ void __launch_bounds__(warps *warp_size *most_together, 1) attend_one(const attend_one_call c) {
  __shared__ context_parts<dim> all[most_together];
  __shared__ __align__(16) float cosines[dim];  // and sines
  const place p(c);
  context_parts<dim> &parts = all[threadIdx.y];
  int first = (int(blockIdx.z) * warps + p.warp) * tile, step = warps * c.splits * tile;
  context_tile<dim> context;
  if (first < p.before()) context.load(c, p, first);
  for (int i = threadIdx.x + threadIdx.y * blockDim.x; i < dim; i += blockDim.x * blockDim.y)
    cosines[i] = c.cos_sin[int64_t(p.block.token) * dim + i];
  own_token<dim> token(c, p);
  __syncthreads();
  wait_for_before();
  raw_head<dim> raw;
  int head = min(p.g, p.heads - 1);  // columns of heads that are not there do not matter
  raw.load(c.q.data + p.block.token * c.q.stride + int64_t(p.first_head + head) * dim, p.t);
  token.load(c, p);
  const rotated_head<dim> q(raw, cosines, p.t);
  token.put(c, p, q, cosines, parts);
  accumulated<dim> mine;
  for (int base = first; base < p.before(); base += step) {
    if (base > first) context.load(c, p, base);
    mine.add(c, p, q, context, base);
  }
  parts.put(p, mine);
  __syncthreads();
  write_rows(c, p, parts);
}

}  // namespace

bool can_attend_one(const attention_shape &shape, const kv_cache &kv) {
  return (kv.dim == 64 || kv.dim == 128) && kv.dim == shape.head_dim && shape.heads / shape.kv_heads <= most_heads &&
         kv.page_tokens >= tile;
}

// KV heads share blocks where there is one split, so that the next product's blocks find room on more multiprocessors.
void launch_attend_one(const queue &q, const attend_one_call &call) {
  unsigned together = call.splits == 1 && call.shape.kv_heads % most_together == 0 ? most_together : 1;
  dim3 grid(unsigned(call.n_blocks), unsigned(call.shape.kv_heads) / together, unsigned(call.splits));
  launch(q, call.kv.dim == 64 ? attend_one<64> : attend_one<128>, grid, dim3(warps * warp_size, together), 0, call);
}

}  // namespace adaptrt
