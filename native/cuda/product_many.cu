// Products for more tokens than product_some.cu takes, on Hopper (sm_90a), and of bf16 for more than product_few.cu does.
//
// The matrix is cut into tiles of rows by tokens, the tiles into chunks of columns, and the chunks are dealt out
// evenly to clusters of two blocks of threads ("stream-K"): each works through a run of chunks that may begin and
// end inside tiles. The blocks of a cluster have neighbouring tiles of rows and do the same chunks, so that each
// fetches half of the tokens for both. In a block one warp fetches tokens, far ahead. Two warpgroups copy their own
// weights to shared memory, decode them into registers, scaled, and multiply.
//
// A warp that has tensor cores multiply out of its registers can do nothing else until they have read the last of
// them. So the two warpgroups take turns at the tensor cores, and what a warp does between two of its own products
// must be less than one takes: a tile's codes are looked up before the product of the tile before is begun, and come while
// it runs; only their scaling is left. With 256 tokens a tile a product takes twice the time, and decoding does not.
//
// A tile that several clusters share is summed by the one that has its end, in a fixed order. Runs are worked
// through from the end, tile by tile, so that the others, which do their part first, are done by then; and they
// have lower numbers, so that they are never waiting for a place to run. Where tiles are so few that a cluster would
// have but one part of one tile, all parts are equal instead, and each of a tile's clusters adds up a share of its sums
// when all have left theirs.
#include <algorithm>

#include "many.cuh"

// Other architectures get kernels without a body: some have no clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define IN_CLUSTERS
#else
#define IN_CLUSTERS __cluster_dims__(cluster_blocks)
#endif

namespace adaptrt {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- multiplying ----

// One store; the compiler makes two of an assignment.
__device__ inline void store_pair(float *to, const float2 &v) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}

constexpr int multipliers_barrier = 1;

template <weight_kind kind, typename s>
struct multiplier {
  static constexpr int n = s::n, halves = s::halves;
  static constexpr bool scaled = decoder<kind>::scaled;
  // Of a warp in a chunk. Where there is something to scale, it is while one product is in flight, into other registers,
  // which take turns over chunks since the number of tiles is even.
  static constexpr int tiles = chunk_blocks<kind> * halves, in_flight = scaled ? 1 : 0;
  static_assert(!scaled || tiles % 2 == 0, "registers take turns");

  const many_arguments &args;
  uint8_t *shared;
  stage_barriers &barriers;
  decoder<kind> decode;
  weight_stream<kind, s> &weights;
  ring<s::token_stages> tokens;
  uint32_t pairs[4][4];                 // of the tile at hand, unscaled, perhaps still on their way
  uint4 codes[decoder<kind>::vectors];  // of the next one
  __half2 scales, next_scales;
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

  __device__ void load_tile(int tile) { weights.load(codes, next_scales, tile % halves, tile / halves); }

  __device__ void look_up_tile() {
    for (int step = 0; step < 4; step++) decode.step(codes, step, pairs[step]);
    scales = next_scales;
  }

  __device__ void scale_tile(uint32_t (&a)[4][4]) const {
    __nv_bfloat162 upper = __float2bfloat162_rn(__low2float(scales));
    __nv_bfloat162 lower = __float2bfloat162_rn(__high2float(scales));
    for (int i = 0; i < 16; i++)
      a[i / 4][i % 4] = scaled ? scaled_pair(pairs[i / 4][i % 4], i % 2 ? lower : upper) : pairs[i / 4][i % 4];
  }

  __device__ void look_up_first() {
    wait_for_copies<s::chunks_ahead - 1>();
    __syncwarp();
    load_tile(0);
    look_up_tile();
  }

  __device__ void load_first_of_next_chunk() {
    wait_for_copies<s::chunks_ahead - 2>();
    __syncwarp();
    weights.slot = weights.after(weights.slot);
    load_tile(0);
  }

  __device__ void multiply_chunk(uint32_t (&a)[2][4][4]) {
#pragma unroll
    for (int i = 0; i < tiles; i++) {
      int half = i % halves;
      bool last = i == tiles - 1;
      last ? load_first_of_next_chunk() : load_tile(i + 1);
      scale_tile(a[i % 2]);
      look_up_tile();
      __syncwarp();
      if (last) weights.fetch();
      if (half == 0) wait_barrier(&barriers.tokens_full[tokens.stage], tokens.parity);
      multiply_tile(half, a[i % 2]);
      if (half == 0) release_tokens();
      if (half < halves - 1) continue;
      released = tokens.stage;
      tokens.next();
    }
  }

  __device__ void multiply_segment(const segment &seg) {
    uint32_t a[2][4][4];
    released = -1;
    clear();
    for (int chunk = 0; chunk < seg.n; chunk++) multiply_chunk(a);
    products_wait<0>();
    release_tokens();
  }

  // Where a lane's sums of a tile go: lane 4g + t has those of rows g and g + 8 of its row tile and of tokens 2t and
  // 2t + 1 of each eight, as four registers in a row. Lanes exchange some, so that each has two neighbouring rows.
  struct place {
    int64_t row;
    int token;
  };

  __device__ place place_of(int tile) const {
    int g = threadIdx.x % 32 / 4;
    int64_t row_tile = row_tile_of(args, tile, s::row_tiles) + weights.row_tile;
    return {row_tile * tile_rows + (g % 2 ? g + 7 : g), tile % args.token_tiles * n + int(threadIdx.x) % 4 * 2};
  }

  __device__ static float2 neighbours(float upper, float lower) {
    bool odd = threadIdx.x / 4 % 2;
    float other = __shfl_xor_sync(0xffffffffu, odd ? upper : lower, 4);
    return odd ? make_float2(other, lower) : make_float2(upper, other);
  }

  __device__ void write_vector(const place &first, int vector, const float4 &v, float unit) const {
    int64_t row = first.row + vector / (n / 8) * 4 * tile_rows;
    int token = first.token + vector % (n / 8) * 8;
    float2 pairs[2] = {neighbours(v.x * unit, v.z * unit), neighbours(v.y * unit, v.w * unit)};
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (token + i < args.tokens && row < args.w.rows) write_pair(token + i, row, pairs[i]);
  }

  __device__ void write_pair(int token, int64_t row, const float2 &v) const {
    if (args.plain) {
      store_pair(static_cast<float *>(args.out.y) + token * args.out.stride + row, v);
      return;
    }
    store_result(args.out, token, row, v.x);
    if (row + 1 < args.w.rows) store_result(args.out, token, row + 1, v.y);
  }

  __device__ float4 vector_of(int i) {
    return make_float4(sum(4 * i), sum(4 * i + 1), sum(4 * i + 2), sum(4 * i + 3));
  }

  __device__ void write_tile(int tile, float unit) {
    place first = place_of(tile);
    if (args.plain) return write_plain(first, unit);
#pragma unroll
    for (int i = 0; i < s::vectors; i++) write_vector(first, i, vector_of(i), unit);
  }

  // The same in less code, which runs once a tile and has to be fetched.
  __device__ void write_plain(const place &first, float unit) {
    int64_t stride = args.out.stride;
#pragma unroll
    for (int half = 0; half < halves; half++) {
      int64_t row = first.row + half * 4 * tile_rows;
      int tokens = row < args.w.rows ? args.tokens - first.token : 0;
      float *to = static_cast<float *>(args.out.y) + first.token * stride + row;
#pragma unroll
      for (int i = 0; i < n / 8; i++, to += 8 * stride) {
        float4 v = vector_of(half * (n / 8) + i);
        float2 even = neighbours(v.x * unit, v.z * unit), odd = neighbours(v.y * unit, v.w * unit);
        if (i * 8 < tokens) store_pair(to, even);
        if (i * 8 + 1 < tokens) store_pair(to + stride, odd);
      }
    }
  }

  __device__ int block_in(int cluster) const { return cluster * cluster_blocks + rank_in_cluster(); }

  __device__ float4 *part_of(int cluster) const {
    return args.parts + int64_t(block_in(cluster)) * s::vectors * multiplying_threads + threadIdx.x;
  }

  __device__ void leave_part() {
    float4 *to = part_of(this_cluster());
#pragma unroll
    for (int i = 0; i < s::vectors; i++) __stcg(to + i * multiplying_threads, vector_of(i));
    wait_with<multiplying_threads>(multipliers_barrier);
  }

  // Of the clusters that have the tile's beginning, with as many loads in flight as registers allow.
  __device__ void add_parts(int first_cluster) {
    constexpr int batch = s::registers < 32 ? s::registers : 32;
    int clusters = this_cluster() - first_cluster, thread = threadIdx.x;
    if (thread < clusters) await(args.ready + block_in(first_cluster + thread) * most_splits);
    wait_with<multiplying_threads>(multipliers_barrier);
#pragma unroll
    for (int first = 0; first < s::registers; first += batch) {
      for (int cluster = first_cluster; cluster < this_cluster(); cluster++) {
        float4 v[batch / 4];
#pragma unroll
        for (int i = 0; i < batch / 4; i++) v[i] = __ldcg(part_of(cluster) + (first / 4 + i) * multiplying_threads);
#pragma unroll
        for (int i = 0; i < batch; i += 4) {
          sum(first + i) += v[i / 4].x, sum(first + i + 1) += v[i / 4].y;
          sum(first + i + 2) += v[i / 4].z, sum(first + i + 3) += v[i / 4].w;
        }
      }
    }
  }

  // All clusters of a tile leave their sums, and each adds up an equal share of them, in the clusters' order.
  template <int splits>
  __device__ void add_share(int tile, float unit) {
    constexpr int share = s::vectors / splits, at_once = share < 16 / splits ? share : 16 / splits;
    int mine = this_cluster() % splits, first_cluster = this_cluster() - mine, other = threadIdx.x;
    leave_part();
    if (other < splits && other != mine) {
      announce(args.ready + block_in(first_cluster + other) * most_splits + mine);
      await(args.ready + block_in(this_cluster()) * most_splits + other);
    }
    wait_with<multiplying_threads>(multipliers_barrier);
    place first = place_of(tile);
    const float4 *from = part_of(first_cluster);
    for (int i = mine * share; i < (mine + 1) * share; i += at_once) {
      float4 v[splits][at_once];
#pragma unroll
      for (int k = 0; k < splits; k++)
#pragma unroll
        for (int j = 0; j < at_once; j++)
          v[k][j] = __ldcg(from + (k * cluster_blocks * s::vectors + i + j) * multiplying_threads);
#pragma unroll
      for (int j = 0; j < at_once; j++) {
#pragma unroll
        for (int k = 1; k < splits; k++)
          v[0][j].x += v[k][j].x, v[0][j].y += v[k][j].y, v[0][j].z += v[k][j].z, v[0][j].w += v[k][j].w;
        write_vector(first, i + j, v[0][j], unit);
      }
    }
  }

  __device__ int cluster_of(int chunk) const {
    int cluster = int(int64_t(chunk) * clusters() / args.all_chunks);
    while (first_chunk_of(args, cluster + 1) <= chunk) cluster++;
    while (first_chunk_of(args, cluster) > chunk) cluster--;
    return cluster;
  }

  __device__ void finish_segment(const segment &seg, float unit) {
    if constexpr (s::splits) {
      if (args.splits == 2) return add_share<2>(seg.tile, unit);
      if (args.splits == 4) return add_share<4>(seg.tile, unit);
      if (args.splits == 8) return add_share<8>(seg.tile, unit);
    }
    if (seg.first + seg.n < args.chunks) {
      leave_part();
      if (threadIdx.x == 0) announce(args.ready + block_in(this_cluster()) * most_splits);
      return;
    }
    if (seg.first > 0) add_parts(cluster_of(seg.tile * args.chunks));
    write_tile(seg.tile, unit);
  }

  __device__ void run() {
    float unit = scaled ? *args.w.unit : 1.f;
    look_up_first();
    wait_for_kernel_before();
    for_each_segment(args, [&](const segment &seg) {
      multiply_segment(seg);
      finish_segment(seg, unit);
    });
  }
};

template <weight_kind kind, typename s>
__device__ void multiply_many(const many_arguments &args, const CUtensorMap &x, uint8_t *shared) {
  stage_barriers &barriers = *reinterpret_cast<stage_barriers *>(shared + s::barriers_at);
  let_next_kernel_start();
  if (threadIdx.x < stages_at_most) {
    init_barrier(&barriers.tokens_full[threadIdx.x], 1);
    init_barrier(&barriers.tokens_empty[threadIdx.x], 2 * cluster_blocks);  // their warpgroups
    publish_barriers();
  }
  wait_for_cluster();
  if (threadIdx.x >= multiplying_threads) {
    limit_registers<copying_registers>();
    if (threadIdx.x / 32 == multiplying_threads / 32)
      fetch_tokens<kind, s>(args, x, barriers, shared + s::tokens_at);
  } else {
    take_registers<multiplying_registers>();
    weight_stream<kind, s> weights(args, shared, threadIdx.x / 128 * s::halves * 4 + threadIdx.x % 128 / 32);
    for (int i = 0; i < s::chunks_ahead; i++) weights.fetch();
    if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, multiplying_threads);
    wait_with<multiplying_threads>(multipliers_barrier);
    decoder<kind> decode = {shared_address(shared) - shared_start + threadIdx.x % 32 * 4};
    multiplier<kind, s> m = {args, shared, barriers, decode, weights};
    m.run();
  }
  wait_for_cluster();  // the other block still arrives at this one's barriers
}
#endif

template <weight_kind kind, typename s>
__global__ void IN_CLUSTERS __launch_bounds__(threads, 1)
    product_many(const __grid_constant__ many_arguments args, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  multiply_many<kind, s>(args, x, shared);
#else
  __trap();  // built for no sm_90a: better a fault than no result
#endif
}

// ---- launching ----

// How many clusters share each tile equally, or 1: where the time that their parts take is at most 1.5 times that of runs
// which have all clusters work, but cross tiles.
template <typename s>
int equal_splits(const many_arguments &args, int64_t clusters) {
  int64_t tiles = args.all_chunks / args.chunks;
  int best = 1;
  for (int splits = 2; s::splits && splits <= most_splits; splits *= 2) {
    bool fits = tiles * splits <= clusters && splits <= args.chunks;
    if (fits && 2 * ceil_div(args.chunks, splits) * clusters <= int64_t(3) * args.all_chunks) best = splits;
  }
  return best;
}

template <weight_kind kind, typename s>
cudaError_t launch_shape(const product_call &call) {
  CUtensorMap x;
  cudaError_t status = describe_tokens(call, s::n / cluster_blocks, &x);
  if (status != cudaSuccess) return status;
  const product_output &out = call.out;
  many_arguments args = {};
  args.w = call.w;
  args.tokens = call.tokens;
  args.out = out;
  args.codebook = call.context->codebook;
  args.chunks = int(call.w.col_blocks / chunk_blocks<kind>);
  args.token_tiles = int(ceil_div(call.tokens, s::n));
  args.all_chunks = int(ceil_div(call.w.rows, s::rows * cluster_blocks) * args.token_tiles * args.chunks);
  args.plain = !out.bf16 && !out.accumulate && call.w.rows % 2 == 0 && out.stride % 2 == 0 &&
               reinterpret_cast<uintptr_t>(out.y) % sizeof(float2) == 0;
  args.ready = static_cast<uint32_t *>(call.workspace);
  args.parts = reinterpret_cast<float4 *>(static_cast<uint8_t *>(call.workspace) + workspace_zero_bytes);
  int64_t clusters = std::min(call.context->multiprocessors / cluster_blocks, args.all_chunks);
  args.splits = equal_splits<s>(args, clusters);
  if (args.splits > 1) clusters = args.all_chunks / args.chunks * args.splits;
  status = cudaFuncSetAttribute(product_many<kind, s>, cudaFuncAttributeMaxDynamicSharedMemorySize, s::shared_bytes);
  if (status != cudaSuccess) return status;
  return launch(call, product_many<kind, s>, dim3(unsigned(clusters * cluster_blocks)), dim3(threads),
                s::shared_bytes, args, x);
}

using widest_shape = shape<1, 256>;
using tallest_shape = shape<2, 128>;
static_assert(widest_shape::registers == tallest_shape::registers, "their parts take the same room");

// Of 256 tokens a tile, unless they would fill few of the last one: those of 128 take 0.58 of the time.
template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  if constexpr (kind == weight_kind::bf16) {
    if (call.tokens <= 16) return launch_shape<kind, shape<1, 16>>(call);
    if (call.tokens <= 32) return launch_shape<kind, shape<1, 32>>(call);
    if (call.tokens <= 64) return launch_shape<kind, shape<1, 64>>(call);
  }
  int64_t narrow_tiles = ceil_div(call.tokens, 128);
  return narrow_tiles == 1 || narrow_tiles == 3 ? launch_shape<kind, tallest_shape>(call) : launch_shape<kind, widest_shape>(call);
}

}  // namespace

size_t many_workspace_bytes(const product_context &context) {
  size_t part = size_t(widest_shape::registers) * multiplying_threads * sizeof(float);
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
