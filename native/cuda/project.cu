// V x of terms in common. A block has a tile of V's rows and tokens and a part of the columns, which its warps share. The
// blocks of a tile are a cluster: each adds up the sums that all their warps send it, of eight tokens, and makes hidden
// values of them for all members. GPUs without clusters have one block a tile.
#include "hopper.cuh"
#include "panels.cuh"
#include "shared.cuh"

namespace adaptrt {
namespace {

constexpr int warps = 8, threads = warps * warp_size;
constexpr int blocks_at_once = 2;  // of a multiprocessor: there are not as many whole clusters of one block each as needed
constexpr int cluster_splits = 8;  // parts of the columns
constexpr int tile_ranks = 32, group_tokens = 8;
constexpr int step_cols = 32, ahead = 2;  // steps on their way; those of V from before x is there
constexpr int piece_bytes = tile_bytes(weight_kind::bf16), step_bytes = piece_bytes / 2;

// What a block has of the tokens, and each warp: the tile's ranks, up to four groups of tokens, a piece of the columns.
template <int splits>
struct tile_shape {
  static constexpr int tokens = splits * group_tokens;  // a group for each block
  static constexpr int groups = splits < 4 ? splits : 4, token_tiles = splits / groups;
  static constexpr int pieces = warps / token_tiles, all_pieces = splits * pieces;
};
constexpr int part_floats = tile_ranks * group_tokens;  // of the sums of a piece, for a group

// sums[m][n][i]: of row 16m + g + i / 2 * 8, and of token 8n + 2t + i % 2, in lane 4g + t.
template <int groups>
using tile_sums = float[2][groups][4];

// Where a lane's four are in a part: apart from each other both for who sends and for who adds up.
__device__ int place_in_part(int m, int g, int t) { return (m * warp_size + t * 8 + (g ^ 2 * t)) * 4; }

__device__ uint4 load16(const void *at) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// ---- V x: a warp's part ----

// Half a piece (panels.cuh) of each of the tile's two times 16 ranks, and its inputs of the tokens.
template <int groups>
struct step_operands {
  uint4 v[2][2], x[groups];

  __device__ void load_v(const uint8_t *const (&from)[2], int step) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int k = 0; k < 2; k++) v[m][k] = load16(from[m] + step * step_bytes + k * (step_bytes / 2));
  }
  // A lane has 16 of a piece's 64 inputs.
  __device__ void load_x(const __nv_bfloat16 *const (&from)[groups], int step) {
#pragma unroll
    for (int n = 0; n < groups; n++) x[n] = load16(from[n] + step / 2 * BLOCK + step % 2 * 8);
  }
  __device__ void multiply(tile_sums<groups> &sums) const {
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const uint32_t a[4] = {v[m][k].x, v[m][k].y, v[m][k].z, v[m][k].w};
#pragma unroll
        for (int n = 0; n < groups; n++) multiply_add(sums[m][n], a, word_of(x[n], 2 * k), word_of(x[n], 2 * k + 1));
      }
  }
};

// Steps of V that come later, into L2: a line a lane.
__device__ void bring(const uint8_t *from, int begin, int end) {
  constexpr int line = 128;
  for (int at = begin * step_bytes + threadIdx.x % warp_size * line; at < end * step_bytes; at += warp_size * line)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

// `meanwhile`: what is done while the first columns of V are on their way.
template <int groups, typename work>
__device__ void sum_columns(tile_sums<groups> &sums, const project_call &c, int tokens, int first_token, int piece,
                            int all_pieces, const work &meanwhile) {
  int lane = threadIdx.x % warp_size;
  const uint8_t *v[2];
  const __nv_bfloat16 *x[groups];
#pragma unroll
  for (int m = 0; m < 2; m++) {
    int of_ranks = min(int(blockIdx.y) * (tile_ranks / panel_ranks) + m, int(rank_pieces(c.v)) - 1);
    v[m] = c.v.data + of_ranks * block_pieces(c.v) * piece_bytes + lane * 16;
  }
#pragma unroll
  for (int n = 0; n < groups; n++)
    x[n] = c.x + min(first_token + n * group_tokens + lane / 4, tokens - 1) * c.x_stride + lane % 4 * 16;
  int steps = int((c.cols + step_cols - 1) / step_cols);
  int begin = steps * piece / all_pieces, end = steps * (piece + 1) / all_pieces;
  step_operands<groups> of[ahead];
#pragma unroll
  for (int k = 0; k < ahead; k++)
    if (begin + k < end) of[k].load_v(v, begin + k);
#pragma unroll
  for (int m = 0; m < 2; m++) bring(v[m] - lane * 16, begin + ahead, end);
  meanwhile();
  wait_and_let_next_start();
#pragma unroll
  for (int k = 0; k < ahead; k++)
    if (begin + k < end) of[k].load_x(x, begin + k);
  for (int at = begin; at < end; at += ahead)
#pragma unroll
    for (int k = 0; k < ahead; k++) {
      if (at + k < end) of[k].multiply(sums);
      if (at + k + ahead < end) of[k].load_v(v, at + k + ahead), of[k].load_x(x, at + k + ahead);
    }
}

// ---- hidden values: a warp has a token of the block's group, a lane a rank ----

// A value, or 1 without any; on its way until it is used, which a branch would not leave it.
__device__ float load_or_one(const float *at) {
  float v;
  asm volatile("{.reg .pred there; setp.ne.u64 there, %1, 0; mov.f32 %0, 1.0; @there ld.global.f32 %0, [%1];}"
               : "=f"(v)
               : "l"(at));
  return v;
}

// What V x is multiplied with, for each member.
struct lane_factors {
  float scale[most_members], d[most_members];

  __device__ void find(const common_call &common, int token, int rank, bool there) {
    token_vectors vectors[most_members] = {};
    find_vectors(common, token, vectors);
#pragma unroll
    for (int i = 0; i < most_members; i++) {
      scale[i] = there ? vectors[i].scale : 0.f;
      d[i] = load_or_one(there && vectors[i].d ? vectors[i].d + rank : nullptr);
    }
  }
};

// The sums of all pieces, added up in their order.
template <int all_pieces>
__device__ void put_hidden(const float *parts, const lane_factors &factors, const project_call &c,
                           const common_call &common, int token, int rank) {
  int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  int64_t stride = hidden_stride(c.v.rows), at = token * stride + hidden_place(rank);
  if (token >= common.tokens || rank >= stride) return;
  parts += place_in_part(lane / 16, lane % 8, warp / 2) + lane / 8 % 2 * 2 + warp % 2;
  float sum = 0;
#pragma unroll
  for (int piece = 0; piece < all_pieces; piece++) sum += parts[piece * part_floats];
#pragma unroll
  for (int i = 0; i < most_members; i++)
    if (i < common.n_members && common.members[i].term.v == c.of)
      common.members[i].hidden[at] = __float2bfloat16(factors.scale[i] * factors.d[i] * sum);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool has_clusters = true;
#else
constexpr bool has_clusters = false;
#endif

// Blocks are [parts of the columns, tiles of ranks, tiles of tokens].
template <int splits>
__global__ void __launch_bounds__(threads, blocks_at_once)
    project(const __grid_constant__ project_call c, const __grid_constant__ common_call common) {
  using shape = tile_shape<splits>;
  __shared__ __align__(16) float parts[shape::all_pieces * part_floats];
  __shared__ uint64_t arrived;
  constexpr bool clusters = splits > 1;
  if constexpr (clusters && !has_clusters) return;  // is not launched there
  int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, split = blockIdx.x;
  if (clusters && threadIdx.x == 0) {
    init_barrier(&arrived, 1);
    publish_barriers();
    expect_bytes(&arrived, sizeof(parts));
  }
  if (clusters) arrive_at_cluster();
  int first_token = int(blockIdx.z) * shape::tokens, token = first_token + split * group_tokens + warp;
  int rank = int(blockIdx.y) * tile_ranks + lane, piece = split * shape::pieces + warp / shape::token_tiles;
  int first_group = warp % shape::token_tiles * shape::groups;
  lane_factors factors;
  tile_sums<shape::groups> sums = {};
  sum_columns(sums, c, common.tokens, first_token + first_group * group_tokens, piece, shape::all_pieces,
              [&] { factors.find(common, token, rank, rank < c.v.rows); });
  if (clusters) wait_at_cluster();  // all barriers are there
#pragma unroll
  for (int n = 0; n < shape::groups; n++)
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const float(&four)[4] = sums[m][n];
      float *to = parts + piece * part_floats + place_in_part(m, lane / 4, lane % 4);
      if (clusters)
        send_four_to_cluster(to, four, &arrived, first_group + n);
      else
        *reinterpret_cast<float4 *>(to) = make_float4(four[0], four[1], four[2], four[3]);
    }
  if (clusters)
    wait_barrier(&arrived, 0);
  else
    __syncthreads();
  put_hidden<shape::all_pieces>(parts, factors, c, common, token, rank);
}

template <int splits>
void launch_splits(const queue &q, const project_call &call, const common_call &common) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {splits, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = q.overlap;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(splits, blocks_of(hidden_stride(call.v.rows), tile_ranks),
                        blocks_of(common.tokens, tile_shape<splits>::tokens));
  config.blockDim = threads;
  config.stream = q.stream;
  config.attrs = attributes;
  config.numAttrs = splits > 1 ? 2 : 0;
  check(cudaLaunchKernelEx(&config, project<splits>, call, common), "launch of a kernel");
}

}  // namespace

void launch_project(const queue &q, const project_call &call, const common_call &common, bool clusters) {
  if (clusters)
    launch_splits<cluster_splits>(q, call, common);
  else
    launch_splits<1>(q, call, common);
}

}  // namespace adaptrt
