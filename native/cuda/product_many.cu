// Products for more tokens than product_some.cu takes, on Hopper (sm_90a), and of bf16 for more than product_few.cu does.
//
// The matrix is cut into tiles of rows by tokens, the tiles into chunks of columns, and the chunks are dealt out
// evenly to clusters of two blocks of threads ("stream-K"): each works through a run of chunks that may begin and
// end inside tiles. The blocks of a cluster have neighbouring tiles of rows and do the same chunks, so that each
// fetches half of the tokens for both. In a block one warp fetches tokens, far ahead. Warpgroups copy their own
// weights to shared memory, decode them into registers, scaled, and multiply while they decode the next ones. Where
// tokens are few and decoding is the work, two teams of warpgroups take turns at the blocks of columns and add
// their sums at the end.
//
// A tile that several clusters share is summed by the one that has its end, in a fixed order. Runs are worked
// through from the end, tile by tile, so that the others, which do their part first, are done by then; and they
// have lower numbers, so that they are never waiting for a place to run.
#include "hopper.cuh"
#include "launch.cuh"

// Other architectures get kernels without a body: some have no clusters, and what describes tiles is not used.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define IN_CLUSTERS
#else
#define IN_CLUSTERS __cluster_dims__(cluster_blocks)
#endif
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#pragma nv_diag_suppress 177
#endif

namespace adaptrt {
namespace {

constexpr int team_threads = 256;  // two warpgroups
constexpr int copying_threads = 128;
constexpr int cluster_blocks = 2;
constexpr int chunk_bytes = 2048;  // codes of a tile of 16 rows
constexpr int scale_bytes = 128;   // their scales, of at most four blocks of columns
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

  static constexpr int token_stage_bytes = n * 128;
  static constexpr int token_stages = n == 128 ? 4 : n == 64 ? 6 : stages_at_most;
  // A warp's piece of a chunk: of each of its row tiles, its team's blocks of columns.
  static constexpr int chunks_ahead = halves == 1 ? 3 : 2;
  static constexpr int slot_bytes = halves * (chunk_bytes + scale_bytes) / teams;
  static constexpr int sums_bytes = teams == 1 ? 0 : registers * team_threads * int(sizeof(float));

  static constexpr int barriers_at = pair_table_bytes, tokens_at = barriers_at + barrier_bytes;
  static constexpr int weights_at = tokens_at + token_stages * token_stage_bytes;
  static constexpr int sums_at = weights_at + multiplying_threads / 32 * chunks_ahead * slot_bytes;
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
  uint32_t *ready;     // [blocks], zero: that a block's part of a tile which ends in another cluster is there
  float *parts;        // [blocks, registers, team_threads]
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct stage_barriers {
  uint64_t tokens_full[stages_at_most], tokens_empty[stages_at_most];
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

// From the end of the run to its beginning; the chunks of a tile in their order.
template <typename work>
__device__ void for_each_segment(const many_arguments &args, work do_segment) {
  int64_t begin = first_chunk_of(args, this_cluster());
  for (int64_t end = first_chunk_of(args, this_cluster() + 1); end > begin;) {
    int64_t tile = (end - 1) / args.chunks, first = max(tile * args.chunks, begin);
    do_segment(segment{tile, int(first - tile * args.chunks), int(end - first)});
    end = first;
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

// The weights of a warp on their way through its ring in shared memory, chunk after chunk of all its segments. A
// lane copies just the codes that it will read.
template <weight_kind kind, typename s>
struct weight_stream {
  static constexpr int vectors = decoder<kind>::vectors, team_blocks = chunk_blocks<kind> / s::teams;
  static constexpr int codes_bytes = team_blocks * tile_bytes(kind);  // of a row tile

  const many_arguments &args;
  int team, row_tile[s::halves];
  uint32_t ring, slot;  // slot: the oldest
  uint64_t policy;
  int64_t begin, end;    // of what is left of the run after the segment at hand
  int64_t first_row_tile;  // of this block of threads
  int chunk, left;       // of the segment: the next to be fetched, and how many there are

  __device__ weight_stream(const many_arguments &args, uint8_t *shared, int team)
      : args(args), team(team), slot(0), policy(evict_first_policy()) {
    ring = shared_address(shared + s::weights_at) + threadIdx.x / 32 * s::chunks_ahead * s::slot_bytes;
    begin = first_chunk_of(args, this_cluster());
    end = first_chunk_of(args, this_cluster() + 1);
    begin_segment();
  }
  __device__ void begin_segment() {  // as in for_each_segment
    int64_t tile = (end - 1) / args.chunks, first = max(tile * args.chunks, begin);
    first_row_tile = row_tile_of(args, tile, s::row_tiles);
    chunk = int(first - tile * args.chunks);
    left = int(end - first);
    end = first;
  }

  __device__ uint32_t at(int half) const { return ring + (slot * s::halves + half) * (s::slot_bytes / s::halves); }

  // Every call counts as one more chunk on its way, even past the end.
  __device__ void fetch() {
    if (left > 0) {
#pragma unroll
      for (int h = 0; h < s::halves; h++) fetch_tile(first_row_tile + row_tile[h], at(h));
      chunk++;
      if (--left == 0 && begin < end) begin_segment();
    }
    commit_copies();
    step();
  }
  __device__ void step() { slot = slot + 1 < s::chunks_ahead ? slot + 1 : 0; }

  __device__ void fetch_tile(int64_t row_tile, uint32_t to) const {
    if (row_tile >= args.w.row_tiles) return;
    int lane = threadIdx.x % 32;
    int64_t block = row_tile * args.w.col_blocks + chunk * chunk_blocks<kind> + team;
    const uint8_t *codes = args.w.codes + block * tile_bytes(kind) + lane * 16;
#pragma unroll
    for (int j = 0; j < team_blocks; j++)
#pragma unroll
      for (int i = 0; i < vectors; i++)
        copy_async(to + j * tile_bytes(kind) + i * 512 + lane * 16, codes + j * s::teams * tile_bytes(kind) + i * 512,
                   policy);
    if (decoder<kind>::scaled && lane < team_blocks * 2)  // 32 bytes a block
      copy_async(to + codes_bytes + lane * 16, args.w.scales + (block + lane / 2 * s::teams) * 8 + lane % 2 * 4, policy);
  }

  __device__ void load(uint4 (&codes)[vectors], __half2 &scales, int half, int j) const {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < vectors; i++) codes[i] = load_vector(at(half) + j * tile_bytes(kind) + i * 512 + lane * 16);
    if constexpr (decoder<kind>::scaled) scales = load_half2(at(half) + codes_bytes + j * 32 + lane / 4 * 4);
  }
};

// ---- multiplying ----

enum : int { team_barrier = 1, multipliers_barrier, sums_left, sums_taken };

template <weight_kind kind, typename s>
struct multiplier {
  static constexpr int n = s::n, halves = s::halves;
  // Of a chunk, by a team: so many tiles of a warp. One product is in flight while the next tile is decoded into
  // the other registers, which takes turns over chunks only if their number is even.
  static constexpr int team_blocks = weight_stream<kind, s>::team_blocks;
  static constexpr int in_flight = team_blocks * halves % 2 == 0 ? 1 : 0;

  const many_arguments &args;
  uint8_t *shared;
  stage_barriers &barriers;
  int team;
  decoder<kind> decode;
  weight_stream<kind, s> &weights;
  ring<s::token_stages, s::teams> tokens;
  float sums[halves][n / 2];
  int released;  // the stage of tokens that the products in flight read, or -1

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < s::registers; i++) sum(i) = 0;
  }

  __device__ float &sum(int i) { return sums[i / (n / 2)][i % (n / 2)]; }

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

  __device__ void multiply_chunk(uint32_t (&a)[2][4][4]) {
    wait_for_copies<s::chunks_ahead - 1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < team_blocks; j++) {
#pragma unroll
      for (int h = 0; h < halves; h++) {
        int buffer = (j * halves + h) % 2;
        uint4 codes[decoder<kind>::vectors];
        __half2 scales = {};
        weights.load(codes, scales, h, j);
        decode_tile<kind>(a[buffer], codes, scales, decode);
        if (h == 0) wait_barrier(&barriers.tokens_full[tokens.stage], tokens.parity);
        multiply_tile(h, a[buffer]);
        if (h == 0) release_tokens();
      }
      released = tokens.stage;
      tokens.next();
    }
    __syncwarp();
    weights.fetch();
  }

  __device__ void multiply_segment(const segment &seg) {
    uint32_t a[2][4][4];
    released = -1;
    clear();
    for (int chunk = 0; chunk < seg.n; chunk++) multiply_chunk(a);
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

  // Register i of a half belongs to row 16 tile + g + 8 (i / 2 % 2) and token 8 (i / 4) + 2 t + i % 2 of lane 4g +
  // t.
  template <typename store>
  __device__ void for_each_sum(int64_t tile, store store_sum) {
    int64_t first_row = row_tile_of(args, tile, s::row_tiles) * tile_rows + threadIdx.x % 32 / 4;
    int first_token = int(tile % args.token_tiles) * n + threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < halves; h++) {
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        int64_t row = first_row + weights.row_tile[h] * tile_rows + lower * 8;
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

  __device__ int64_t block_in(int64_t cluster) const { return cluster * cluster_blocks + rank_in_cluster(); }

  __device__ float *part_of(int64_t cluster) const {
    return args.parts + block_in(cluster) * s::registers * team_threads + threadIdx.x % team_threads;
  }

  __device__ void leave_part() {
    float *to = part_of(this_cluster());
#pragma unroll
    for (int i = 0; i < s::registers; i++) __stcg(to + i * team_threads, sum(i));
    wait_with<team_threads>(team_barrier);
    if (threadIdx.x % team_threads == 0) announce(args.ready + block_in(this_cluster()));
  }

  // Of the clusters that have the tile's beginning, with as many loads in flight as registers allow.
  __device__ void add_parts(int64_t first_cluster) {
    constexpr int batch = s::registers < 32 ? s::registers : 32, at_once = s::registers > 32 ? 1 : 32 / batch;
    int64_t clusters = this_cluster() - first_cluster, thread = threadIdx.x % team_threads;
    if (thread < clusters) await(args.ready + block_in(first_cluster + thread));
    wait_with<team_threads>(team_barrier);
#pragma unroll
    for (int first = 0; first < s::registers; first += batch) {
      for (int64_t cluster = first_cluster; cluster < this_cluster(); cluster += at_once) {
        float v[at_once][batch];
#pragma unroll
        for (int j = 0; j < at_once; j++)
#pragma unroll
          for (int i = 0; i < batch; i++)
            v[j][i] = cluster + j < this_cluster() ? __ldcg(part_of(cluster + j) + (first + i) * team_threads) : 0.f;
#pragma unroll
        for (int j = 0; j < at_once; j++)
#pragma unroll
          for (int i = 0; i < batch; i++) sum(first + i) += v[j][i];
      }
    }
  }

  __device__ int64_t cluster_of(int64_t chunk) const {
    int64_t cluster = chunk * clusters() / args.all_chunks;
    while (first_chunk_of(args, cluster + 1) <= chunk) cluster++;
    while (first_chunk_of(args, cluster) > chunk) cluster--;
    return cluster;
  }

  __device__ void finish_segment(const segment &seg, float unit) {
    if (seg.first + seg.n < args.chunks) {
      leave_part();
      return;
    }
    if (seg.first > 0) add_parts(cluster_of(seg.tile * args.chunks));
    write_tile(seg.tile, unit);
  }

  __device__ void run() {
    float unit = decoder<kind>::scaled ? *args.w.unit : 1.f;
    bool first_time = true;
    tokens.stage = team;
    wait_for_kernel_before();
    for_each_segment(args, [&](const segment &seg) {
      multiply_segment(seg);
      if (add_teams(first_time)) finish_segment(seg, unit);
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
    publish_barriers();
  }
  wait_for_cluster();
  if (threadIdx.x >= s::multiplying_threads) {
    limit_registers<s::copying_registers>();
    if (threadIdx.x / 32 == s::multiplying_threads / 32)
      fetch_tokens<kind, s>(args, x, barriers, shared + s::tokens_at);
  } else {
    take_registers<s::multiplying_registers>();
    int team = threadIdx.x / team_threads, warp = threadIdx.x % team_threads / 32;
    weight_stream<kind, s> weights(args, shared, team);
    for (int h = 0; h < s::halves; h++) weights.row_tile[h] = (warp / 4 * s::halves + h) * 4 + warp % 4;
    for (int i = 0; i < s::chunks_ahead; i++) weights.fetch();
    if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, s::multiplying_threads);
    wait_with<s::multiplying_threads>(multipliers_barrier);
    decoder<kind> decode = {shared_address(shared) - shared_start + threadIdx.x % 32 * 4};
    multiplier<kind, s> m = {args, shared, barriers, team, decode, weights};
    m.run();
  }
  wait_for_cluster();  // the other block still arrives at this one's barriers
}
#endif

template <weight_kind kind, typename s>
__global__ void IN_CLUSTERS __launch_bounds__(s::threads, 1)
    product_many(const __grid_constant__ many_arguments args, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  multiply_many<kind, s>(args, x, shared);
#else
  __trap();  // built for no sm_90a: better a fault than no result
#endif
}

// ---- launching ----

template <weight_kind kind, typename s>
cudaError_t launch_shape(const product_call &call) {
  CUtensorMap x;
  cudaError_t status = describe_tokens(call, s::n / cluster_blocks, &x);
  if (status != cudaSuccess) return status;
  many_arguments args = {};
  args.w = call.w;
  args.tokens = call.tokens;
  args.out = call.out;
  args.codebook = call.context->codebook;
  args.chunks = int(call.w.col_blocks / chunk_blocks<kind>);
  args.token_tiles = int(ceil_div(call.tokens, s::n));
  args.all_chunks = ceil_div(call.w.rows, s::rows * cluster_blocks) * args.token_tiles * args.chunks;
  args.ready = static_cast<uint32_t *>(call.workspace);
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
  return workspace_zero_bytes + size_t(context.multiprocessors) * part;
}

cudaError_t launch_many(const product_call &call) {
  switch (call.w.kind) {
    case weight_kind::nf4: return launch_kind<weight_kind::nf4>(call);
    case weight_kind::int8: return launch_kind<weight_kind::int8>(call);
    default: return launch_kind<weight_kind::bf16>(call);
  }
}

}  // namespace adaptrt
