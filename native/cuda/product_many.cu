// Products for 9 tokens and more on Hopper (sm_90a).
//
// The matrix is cut into tiles of rows by tokens, the tiles into chunks of columns, and the chunks are dealt out evenly
// to clusters of multiprocessors ("stream-K"): each works through a run of chunks that may begin and end inside tiles.
// Two blocks form a cluster: they have neighbouring tiles of rows and do the same chunks, so that each fetches half of the
// tokens for both; or else tokens would take more of the L2's bandwidth than weights do. In a block one warp copies weights to
// shared memory and one copies tokens, both far ahead. Warpgroups decode weights into
// registers, scaled, and multiply while they decode the next ones. Where tokens are few and decoding is the work, two
// teams of warpgroups take turns at the blocks of columns and add their sums at the end. Tiles that several clusters
// share are summed by whichever finishes last, in the order of the columns, so that results do not depend on timing.
#include "hopper.cuh"
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr int team_threads = 256;  // two warpgroups
constexpr int copying_threads = 128;
constexpr int cluster_blocks = 2;
constexpr int chunk_bytes = 2048;  // codes of a tile of 16 rows
constexpr int scale_bytes = 128;   // scales of 16 rows and four blocks of columns
constexpr int stages_at_most = 16;
constexpr int barrier_bytes = 1024;

template <weight_kind kind>
constexpr int chunk_blocks = chunk_bytes / tile_bytes(kind);

// A tile of a block of threads: `halves` products of 64 rows a warpgroup, each by n tokens.
template <int teams_, int halves_, int n_>
struct shape {
  static constexpr int teams = teams_, halves = halves_, n = n_, registers = halves * n / 2;
  static constexpr int rows = 128 * halves, row_tiles = rows / tile_rows;
  static constexpr int multiplying_threads = teams * team_threads, threads = multiplying_threads + copying_threads;
  static constexpr int copying_registers = teams == 1 ? 56 : 64, multiplying_registers = teams == 1 ? 224 : 104;

  static constexpr int token_stage_bytes = n * 128, weight_stage_bytes = row_tiles * (chunk_bytes + scale_bytes);
  static constexpr int token_stages = n == 128 ? 5 : n == 64 ? 6 : stages_at_most;
  static constexpr int weight_stages = halves == 1 ? 4 : 2;
  static constexpr int sums_bytes = teams == 1 ? 0 : registers * team_threads * int(sizeof(float));

  static constexpr int barriers_at = pair_table_bytes, tokens_at = barriers_at + barrier_bytes;
  static constexpr int weights_at = tokens_at + token_stages * token_stage_bytes;
  static constexpr int sums_at = weights_at + weight_stages * weight_stage_bytes;
  static constexpr int shared_bytes = sums_at + sums_bytes;
  static_assert(token_stages % teams == 0, "a team keeps to its stages");
};

struct many_arguments {
  packed_matrix w;
  int tokens;
  product_output out;
  nf4_values codebook;
  int chunks, token_tiles;
  int64_t all_chunks;  // of all tiles
  uint32_t *arrived;   // [blocks], zero: parts of the split tile that starts in a cluster
  float *parts;        // [2 * blocks, registers, team_threads]
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct stage_barriers {
  uint64_t tokens_full[stages_at_most], tokens_empty[stages_at_most];
  uint64_t weights_full[stages_at_most], weights_empty[stages_at_most];
  uint32_t parts_before;  // of a split tile
};

// ---- the division of work ----

// The chunks that a cluster has of one tile: of neighbouring rows in its blocks.
struct segment {
  int64_t tile;
  int first, n;
};

__device__ int64_t clusters() { return gridDim.x / cluster_blocks; }
__device__ int64_t this_cluster() { return blockIdx.x / cluster_blocks; }

__device__ int64_t first_chunk_of(const many_arguments &args, int64_t cluster) {
  return args.all_chunks * cluster / clusters();
}

__device__ int64_t row_tile_of(const many_arguments &args, int64_t tile, int row_tiles) {  // the first of this block
  return (tile / args.token_tiles * cluster_blocks + rank_in_cluster()) * row_tiles;
}

__device__ segment segment_at(const many_arguments &args, int64_t chunk, int64_t end) {
  segment s = {chunk / args.chunks, int(chunk % args.chunks), 0};
  int64_t left = end - chunk;
  s.n = left < args.chunks - s.first ? int(left) : args.chunks - s.first;
  return s;
}

template <typename work>
__device__ void for_each_segment(const many_arguments &args, work do_segment) {
  int64_t end = first_chunk_of(args, this_cluster() + 1);
  for (int64_t chunk = first_chunk_of(args, this_cluster()); chunk < end;) {
    segment s = segment_at(args, chunk, end);
    do_segment(s);
    chunk += s.n;
  }
}

// A place in a ring of stages, and the parity of its barriers' phase.
template <int stages, int step = 1>
struct ring {
  int stage = 0, parity = 0;
  __device__ void next() {
    stage += step;
    if (stage < stages) return;
    stage -= stages;
    parity ^= 1;
  }
};

// ---- copying ----

template <weight_kind kind, typename s>
__device__ void fetch_weights(const many_arguments &args, stage_barriers &barriers, uint8_t *stages) {
  ring<s::weight_stages> at;
  int lane = threadIdx.x % 32;  // a lane copies for a tile of 16 rows
  uint64_t policy = evict_first_policy();
  constexpr uint32_t bytes = chunk_bytes + (decoder<kind>::scaled ? scale_bytes : 0);
  for_each_segment(args, [&](const segment &seg) {
    int64_t tile = row_tile_of(args, seg.tile, s::row_tiles);
    int there = int(min(max(args.w.row_tiles - tile, int64_t(0)), int64_t(s::row_tiles)));
    for (int chunk = seg.first; chunk < seg.first + seg.n; chunk++, at.next()) {
      uint8_t *stage = stages + at.stage * s::weight_stage_bytes;
      wait_barrier(&barriers.weights_empty[at.stage], at.parity ^ 1);
      if (lane == 0) expect_bytes(&barriers.weights_full[at.stage], there * bytes);
      __syncwarp();
      if (lane >= there) continue;
      int64_t block = (tile + lane) * args.w.col_blocks + chunk * chunk_blocks<kind>;
      copy_to_shared(stage + lane * chunk_bytes, args.w.codes + block * tile_bytes(kind), chunk_bytes,
                     &barriers.weights_full[at.stage], policy);
      if constexpr (decoder<kind>::scaled)
        copy_to_shared(stage + s::row_tiles * chunk_bytes + lane * scale_bytes, args.w.scales + block / 4 * 4 * 8,
                       scale_bytes, &barriers.weights_full[at.stage], policy);
    }
  });
}

template <weight_kind kind, typename s>
__device__ void fetch_tokens(const many_arguments &args, const CUtensorMap &x, stage_barriers &barriers,
                             uint8_t *stages) {
  wait_for_kernel_before();
  if (threadIdx.x % 32) return;
  constexpr int share = s::n / cluster_blocks;  // tokens that this block fetches for the cluster
  int rank = rank_in_cluster();
  ring<s::token_stages> at;
  for_each_segment(args, [&](const segment &seg) {
    int token = int(seg.tile % args.token_tiles) * s::n, end = (seg.first + seg.n) * chunk_blocks<kind>;
    for (int block = seg.first * chunk_blocks<kind>; block < end; block++, at.next()) {
      wait_barrier(&barriers.tokens_empty[at.stage], at.parity ^ 1);
      expect_bytes(&barriers.tokens_full[at.stage], s::token_stage_bytes);
      copy_box_to_cluster(stages + at.stage * s::token_stage_bytes + rank * share * 128, x, block * block_cols,
                          token + rank * share, &barriers.tokens_full[at.stage], (1 << cluster_blocks) - 1);
    }
  });
}

// ---- multiplying ----

template <weight_kind kind>
__device__ void load_tile(uint4 (&codes)[decoder<kind>::vectors], const uint8_t *tile) {
#pragma unroll
  for (int i = 0; i < decoder<kind>::vectors; i++)
    codes[i] = *reinterpret_cast<const uint4 *>(tile + i * 512 + threadIdx.x % 32 * 16);
}

// Barriers of warps: 0 is __syncthreads.
enum : int { team_barrier = 1, multipliers_barrier, sums_left, sums_taken };

template <int threads>
__device__ void wait_with(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
}
template <int threads>
__device__ void arrive_at(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
}

__device__ inline uint32_t count_up(uint32_t *counter) {  // what was written before is seen by who counts later
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

template <weight_kind kind, typename s>
struct multiplier {
  static constexpr int n = s::n, halves = s::halves;
  // Of a chunk, by a team: so many tiles of a warp. One product is in flight while the next tile is decoded into the
  // other registers, which takes turns over chunks only if their number is even.
  static constexpr int team_blocks = chunk_blocks<kind> / s::teams;
  static constexpr int in_flight = team_blocks * halves % 2 == 0 ? 1 : 0;

  const many_arguments &args;
  uint8_t *shared;
  stage_barriers &barriers;
  int team;
  decoder<kind> decode;
  ring<s::token_stages, s::teams> tokens;
  ring<s::weight_stages> weights;
  float sums[halves][n / 2];
  int released;  // the stage of tokens that the products in flight read, or -1

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < s::registers; i++) sum(i) = 0;
  }

  __device__ float &sum(int i) { return sums[i / (n / 2)][i % (n / 2)]; }

  __device__ int row_tile(int half) const {  // of this warp, in the tile of the block
    int warp = threadIdx.x % team_threads / 32;
    return (warp / 4 * halves + half) * 4 + warp % 4;
  }

  __device__ void release_tokens() {
    if (released >= 0 && threadIdx.x % 128 < cluster_blocks)
      arrive_in_cluster(&barriers.tokens_empty[released], threadIdx.x % 128);
    released = -1;
  }

  __device__ void multiply_tile(int half, const uint32_t (&a)[4][4]) {
    uint64_t b = describe_operand(shared + s::tokens_at + tokens.stage * s::token_stage_bytes);
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; step++) warpgroup_product<n>(sums[half], a[step], b + step * operand_step);
    products_commit();
    products_wait<in_flight>();
  }

  __device__ void multiply_chunk(uint32_t (&a)[2][4][4], int chunk) {
    const uint8_t *stage = shared + s::weights_at + weights.stage * s::weight_stage_bytes;
    const __half2 *scales = reinterpret_cast<const __half2 *>(stage + s::row_tiles * chunk_bytes) +
                            chunk * chunk_blocks<kind> % 4 * 8 + threadIdx.x % 32 / 4;
    wait_barrier(&barriers.weights_full[weights.stage], weights.parity);
#pragma unroll
    for (int j = 0; j < team_blocks; j++) {
      int block = j * s::teams + team;
#pragma unroll
      for (int h = 0; h < halves; h++) {
        int tile = row_tile(h), buffer = (j * halves + h) % 2;
        uint4 codes[decoder<kind>::vectors];
        load_tile<kind>(codes, stage + tile * chunk_bytes + block * tile_bytes(kind));
        decode_tile<kind>(a[buffer], codes, scales[tile * 32 + block * 8], decode);
        if (h == 0) wait_barrier(&barriers.tokens_full[tokens.stage], tokens.parity);
        multiply_tile(h, a[buffer]);
        if (h == 0) release_tokens();
      }
      released = tokens.stage;
      tokens.next();
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_barrier(&barriers.weights_empty[weights.stage]);
    weights.next();
  }

  __device__ void multiply_segment(const segment &seg) {
    uint32_t a[2][4][4];
    released = -1;
    clear();
    for (int chunk = seg.first; chunk < seg.first + seg.n; chunk++) multiply_chunk(a, chunk);
    products_wait<0>();
    release_tokens();
  }

  // True in the team that then has the sums of both.
  __device__ bool add_teams(bool first_time) {
    if constexpr (s::teams == 1) return true;
    float *left = reinterpret_cast<float *>(shared + s::sums_at) + threadIdx.x % team_threads;
    if (team == 1) {
      if (!first_time) wait_with<2 * team_threads>(sums_taken);
#pragma unroll
      for (int i = 0; i < s::registers; i++) left[i * team_threads] = sum(i);
      arrive_at<2 * team_threads>(sums_left);
      return false;
    }
    wait_with<2 * team_threads>(sums_left);
#pragma unroll
    for (int i = 0; i < s::registers; i++) sum(i) += left[i * team_threads];
    arrive_at<2 * team_threads>(sums_taken);
    return true;
  }

  // Register i of a half belongs to row 16 tile + g + 8 (i / 2 % 2) and token 8 (i / 4) + 2 t + i % 2 of lane 4g + t.
  template <typename store>
  __device__ void for_each_sum(int64_t tile, store store_sum) {
    int64_t first_row = row_tile_of(args, tile, s::row_tiles) * tile_rows + threadIdx.x % 32 / 4;
    int first_token = int(tile % args.token_tiles) * n + threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < halves; h++) {
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        int64_t row = first_row + row_tile(h) * tile_rows + lower * 8;
        if (row >= args.w.rows) continue;
#pragma unroll
        for (int i = 0; i < n / 4; i++) {
          int token = first_token + i / 2 * 8 + i % 2;
          if (token < args.tokens) store_sum(token * args.out.stride + row, sums[h][i / 2 * 4 + lower * 2 + i % 2]);
        }
      }
    }
  }

  __device__ void write_tile(int64_t tile, float unit) {
    float *y = static_cast<float *>(args.out.y);
    __nv_bfloat16 *rounded = static_cast<__nv_bfloat16 *>(args.out.y);
    if (args.out.bf16)
      for_each_sum(tile, [&](int64_t i, float v) { rounded[i] = __float2bfloat16(v * unit); });
    else if (args.out.accumulate)
      for_each_sum(tile, [&](int64_t i, float v) { y[i] += v * unit; });
    else
      for_each_sum(tile, [&](int64_t i, float v) { y[i] = v * unit; });
  }

  __device__ float *part(int64_t slot) const {
    return args.parts + (slot * cluster_blocks + rank_in_cluster()) * s::registers * team_threads +
           threadIdx.x % team_threads;
  }

  __device__ void leave_part(int64_t slot) {
#pragma unroll
    for (int i = 0; i < s::registers; i++) __stcg(part(slot) + i * team_threads, sum(i));
  }

  // The sum of parts, in order, with as many loads in flight as registers allow.
  __device__ void add_parts(int64_t first_cluster, int64_t last_cluster) {
    constexpr int batch = s::registers < 32 ? s::registers : 32, at_once = s::registers > 32 ? 2 : 32 / batch;
    clear();
#pragma unroll
    for (int first = 0; first < s::registers; first += batch) {
      for (int64_t cluster = first_cluster; cluster <= last_cluster; cluster += at_once) {
        float v[at_once][batch];
#pragma unroll
        for (int j = 0; j < at_once; j++) {
          const float *from = part(2 * (cluster + j) + (cluster + j > first_cluster)) + first * team_threads;
#pragma unroll
          for (int i = 0; i < batch; i++) v[j][i] = cluster + j <= last_cluster ? __ldcg(from + i * team_threads) : 0.f;
        }
#pragma unroll
        for (int j = 0; j < at_once; j++)
          for (int i = 0; i < batch; i++) sum(first + i) += v[j][i];
      }
    }
  }

  // A cluster leaves at most two parts: of the tile that it ends in, at 2 cluster, and of one that started before, at
  // 2 cluster + 1. True in the cluster that is the last of those with a part in the tile; it then has the whole sums.
  __device__ bool share(const segment &seg) {
    int64_t begin = seg.tile * args.chunks;
    int64_t first_cluster = cluster_of(begin), last_cluster = cluster_of(begin + args.chunks - 1);
    leave_part(2 * this_cluster() + (this_cluster() != first_cluster));
    uint32_t *arrived = args.arrived + first_cluster * cluster_blocks + rank_in_cluster();
    wait_with<team_threads>(team_barrier);
    if (threadIdx.x % team_threads == 0) barriers.parts_before = count_up(arrived);
    wait_with<team_threads>(team_barrier);
    if (barriers.parts_before != last_cluster - first_cluster) return false;
    if (threadIdx.x % team_threads == 0) *arrived = 0;
    add_parts(first_cluster, last_cluster);
    return true;
  }

  __device__ int64_t cluster_of(int64_t chunk) const {
    int64_t cluster = chunk * clusters() / args.all_chunks;
    while (first_chunk_of(args, cluster + 1) <= chunk) cluster++;
    while (first_chunk_of(args, cluster) > chunk) cluster--;
    return cluster;
  }

  __device__ void run() {
    float unit = decoder<kind>::scaled ? *args.w.unit : 1.f;
    bool first_time = true;
    tokens.stage = team;
    wait_for_kernel_before();
    for_each_segment(args, [&](const segment &seg) {
      multiply_segment(seg);
      if (add_teams(first_time) && (seg.n == args.chunks || share(seg))) write_tile(seg.tile, unit);
      first_time = false;
    });
  }
};

template <weight_kind kind, typename s>
__device__ void multiply_many(const many_arguments &args, const CUtensorMap &x, uint8_t *shared) {
  stage_barriers &barriers = *reinterpret_cast<stage_barriers *>(shared + s::barriers_at);
  let_next_kernel_start();
  if (threadIdx.x < stages_at_most) {
    init_barrier(&barriers.tokens_full[threadIdx.x], 1);
    init_barrier(&barriers.tokens_empty[threadIdx.x], 2 * cluster_blocks);  // the warpgroups of a team
    init_barrier(&barriers.weights_full[threadIdx.x], 1);
    init_barrier(&barriers.weights_empty[threadIdx.x], s::multiplying_threads / 32);
    publish_barriers();
  }
  wait_for_cluster();
  if (threadIdx.x >= s::multiplying_threads) {
    limit_registers<s::copying_registers>();
    int warp = (threadIdx.x - s::multiplying_threads) / 32;
    if (warp == 0) fetch_weights<kind, s>(args, barriers, shared + s::weights_at);
    if (warp == 1) fetch_tokens<kind, s>(args, x, barriers, shared + s::tokens_at);
  } else {
    take_registers<s::multiplying_registers>();
    if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, s::multiplying_threads);
    wait_with<s::multiplying_threads>(multipliers_barrier);
    multiplier<kind, s> m = {args, shared, barriers, int(threadIdx.x) / team_threads,
                           {shared_address(shared) - shared_start + threadIdx.x % 32 * 4}};
    m.run();
  }
  wait_for_cluster();  // the other block still arrives at this one's barriers
}
#endif

template <weight_kind kind, typename s>
__global__ void __cluster_dims__(cluster_blocks) __launch_bounds__(s::threads, 1)
    product_many(const __grid_constant__ many_arguments args, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  multiply_many<kind, s>(args, x, shared);
#endif
}

// ---- launching ----

// Columns in boxes of 64, tokens in boxes of n: what one block fetches.
cudaError_t describe_tokens(const product_call &call, int n, CUtensorMap *map) {
  cuuint64_t sizes[2] = {cuuint64_t(call.w.cols), cuuint64_t(call.tokens)};
  cuuint64_t strides[1] = {cuuint64_t(call.x_stride) * sizeof(__nv_bfloat16)};
  cuuint32_t box[2] = {block_cols, cuuint32_t(n)}, steps[2] = {1, 1};
  CUresult status = call.context->encode_tensor_map(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16 *>(call.x), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <weight_kind kind, typename s>
cudaError_t launch_shape(const product_call &call) {
  CUtensorMap x;
  cudaError_t status = describe_tokens(call, s::n / cluster_blocks, &x);
  if (status != cudaSuccess) return status;
  many_arguments args = {call.w, call.tokens, call.out, call.context->codebook};
  args.chunks = int(call.w.col_blocks / chunk_blocks<kind>);
  args.token_tiles = int(ceil_div(call.tokens, s::n));
  args.all_chunks = ceil_div(call.w.rows, s::rows * cluster_blocks) * args.token_tiles * args.chunks;
  args.arrived = static_cast<uint32_t *>(call.workspace);
  args.parts = reinterpret_cast<float *>(static_cast<uint8_t *>(call.workspace) + workspace_zero_bytes);
  int64_t clusters = call.context->multiprocessors / cluster_blocks;
  if (clusters > args.all_chunks) clusters = args.all_chunks;
  status =
      cudaFuncSetAttribute(product_many<kind, s>, cudaFuncAttributeMaxDynamicSharedMemorySize, s::shared_bytes);
  if (status != cudaSuccess) return status;
  return launch(call, product_many<kind, s>, dim3(unsigned(clusters * cluster_blocks)), dim3(s::threads),
                s::shared_bytes, args, x);
}

using largest_shape = shape<1, 2, 128>;

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  constexpr int teams = kind == weight_kind::bf16 ? 1 : 2;  // a chunk of bf16 is one block of columns
  if (call.tokens <= 16) return launch_shape<kind, shape<teams, 1, 16>>(call);
  if (call.tokens <= 32) return launch_shape<kind, shape<teams, 1, 32>>(call);
  if (call.tokens <= 64) return launch_shape<kind, shape<teams, 1, 64>>(call);
  return launch_shape<kind, largest_shape>(call);
}

}  // namespace

size_t many_workspace_bytes(const product_context &context) {
  size_t part = size_t(largest_shape::registers) * team_threads * sizeof(float);
  return workspace_zero_bytes + 2 * size_t(context.multiprocessors) * part;
}

cudaError_t launch_many(const product_call &call) {
  switch (call.w.kind) {
    case weight_kind::nf4: return launch_kind<weight_kind::nf4>(call);
    case weight_kind::int8: return launch_kind<weight_kind::int8>(call);
    default: return launch_kind<weight_kind::bf16>(call);
  }
}

}  // namespace adaptrt
