// Products for 9 tokens and more on Hopper (sm_90a).
//
// The matrix is cut into tiles of rows by tokens, the tiles into chunks of columns, and the chunks are dealt out evenly
// to the multiprocessors ("stream-K"): a block of threads works through a run of chunks that may begin and end inside tiles. In
// a block one warp copies weights to shared memory and one copies tokens, both far ahead; two warpgroups decode weights
// into registers, scaled, and multiply while they decode the next ones. Tiles that several blocks share are summed by
// whichever finishes last, in the order of the columns, so that results do not depend on timing.
#include "hopper.cuh"
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr int warpgroups = 2;
constexpr int multiplying_threads = warpgroups * 128;
constexpr int all_threads = multiplying_threads + 128;  // a third warpgroup copies
constexpr int copying_registers = 56, multiplying_registers = 224;
constexpr int chunk_bytes = 2048;  // codes of a tile of 16 rows
constexpr int scale_bytes = 128;   // scales of 16 rows and four blocks of columns
constexpr int barrier_bytes = 1024;
constexpr int tokens_below_table = 60 * 1024;
constexpr int weights_above_table = 98 * 1024;

template <weight_kind kind>
constexpr int chunk_blocks = chunk_bytes / tile_bytes(kind);

// `halves` products of 64 rows a warpgroup, each by n tokens.
template <int halves, int n>
struct shape {
  static constexpr int rows = warpgroups * halves * 64, row_tiles = rows / tile_rows;
  static constexpr int token_stage_bytes = n * 128, weight_stage_bytes = row_tiles * (chunk_bytes + scale_bytes);
  static constexpr int fitting = tokens_below_table / token_stage_bytes;
  static constexpr int token_stages = fitting < 8 ? fitting : 8;
  static constexpr int weight_stages = weights_above_table / weight_stage_bytes;
};

struct many_arguments {
  packed_matrix w;
  int tokens;
  product_output out;
  nf4_values codebook;
  int chunks, token_tiles;
  int64_t all_chunks;  // of all tiles
  int table;           // its offset in shared memory
  uint32_t *arrived;   // [blocks], zero: parts of the split tile that starts in a block
  float *parts;        // [2 * blocks, registers, multiplying_threads]
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct stage_barriers {
  uint64_t tokens_full[8], tokens_empty[8], weights_full[8], weights_empty[8];
  uint32_t parts_before;  // of a split tile
};

// ---- the division of work ----

// The chunks that a block has of one tile.
struct segment {
  int64_t tile;
  int first, n;
};

__device__ int64_t first_chunk_of(const many_arguments &args, int64_t block) {
  return args.all_chunks * block / gridDim.x;
}

__device__ segment segment_at(const many_arguments &args, int64_t chunk, int64_t end) {
  segment s = {chunk / args.chunks, int(chunk % args.chunks), 0};
  int64_t left = end - chunk;
  s.n = left < args.chunks - s.first ? int(left) : args.chunks - s.first;
  return s;
}

template <typename work>
__device__ void for_each_segment(const many_arguments &args, work do_segment) {
  int64_t end = first_chunk_of(args, blockIdx.x + 1);
  for (int64_t chunk = first_chunk_of(args, blockIdx.x); chunk < end;) {
    segment s = segment_at(args, chunk, end);
    do_segment(s);
    chunk += s.n;
  }
}

// A place in a ring of stages, and the parity of its barriers' phase.
template <int stages>
struct ring {
  int stage = 0, parity = 0;
  __device__ void next() {
    if (++stage < stages) return;
    stage = 0;
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
    int64_t tile = seg.tile / args.token_tiles * s::row_tiles;
    int there = args.w.row_tiles - tile < s::row_tiles ? int(args.w.row_tiles - tile) : s::row_tiles;
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
        copy_to_shared(stage + s::row_tiles * chunk_bytes + lane * scale_bytes, args.w.scales + block / 4 * 32,
                       scale_bytes, &barriers.weights_full[at.stage], policy);
    }
  });
}

template <weight_kind kind, typename s, int n>
__device__ void fetch_tokens(const many_arguments &args, const CUtensorMap &x, stage_barriers &barriers,
                             uint8_t *stages) {
  wait_for_kernel_before();
  if (threadIdx.x % 32) return;
  ring<s::token_stages> at;
  for_each_segment(args, [&](const segment &seg) {
    int token = int(seg.tile % args.token_tiles) * n, end = (seg.first + seg.n) * chunk_blocks<kind>;
    for (int block = seg.first * chunk_blocks<kind>; block < end; block++, at.next()) {
      wait_barrier(&barriers.tokens_empty[at.stage], at.parity ^ 1);
      expect_bytes(&barriers.tokens_full[at.stage], s::token_stage_bytes);
      copy_box_to_shared(stages + at.stage * s::token_stage_bytes, x, block * block_cols, token,
                         &barriers.tokens_full[at.stage]);
    }
  });
}

// ---- multiplying ----

__device__ uint32_t scaled(uint32_t pair, __nv_bfloat162 by) {
  __nv_bfloat162 product = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&pair), by);
  return *reinterpret_cast<uint32_t *>(&product);
}

// A tile of 16 rows by 64 columns, as the operand of four steps.
template <weight_kind kind>
__device__ void decode_tile(uint32_t (&a)[4][4], const uint8_t *codes, __half2 scales, const decoder<kind> &decode) {
  uint4 v[decoder<kind>::vectors];
#pragma unroll
  for (int i = 0; i < decoder<kind>::vectors; i++)
    v[i] = *reinterpret_cast<const uint4 *>(codes + i * 512 + threadIdx.x % 32 * 16);
  __nv_bfloat162 upper = __float2bfloat162_rn(__low2float(scales)), lower = __float2bfloat162_rn(__high2float(scales));
#pragma unroll
  for (int step = 0; step < 4; step++) {
    decode.step(v, step, a[step]);
    if constexpr (decoder<kind>::scaled)
      for (int r = 0; r < 4; r++) a[step][r] = scaled(a[step][r], r % 2 ? lower : upper);
  }
}

template <weight_kind kind, int halves, int n>
struct multiplier {
  using s = shape<halves, n>;
  const many_arguments &args;
  stage_barriers &barriers;
  const uint8_t *token_stages, *weight_stages;
  decoder<kind> decode;
  ring<s::token_stages> tokens;
  ring<s::weight_stages> weights;
  float sums[halves][n / 2];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < halves; h++)
#pragma unroll
      for (int i = 0; i < n / 2; i++) sums[h][i] = 0;
  }

  __device__ int row_tile(int half) const {  // of this warp, in the tile of the block
    int warp = threadIdx.x / 32;
    return (warp / 4 * halves + half) * 4 + warp % 4;
  }

  // While the tensor cores work on one decoded tile the next one is decoded, into the other registers.
  __device__ void multiply_chunk(uint32_t (&a)[2][4][4], int &released) {
    const uint8_t *stage = weight_stages + weights.stage * s::weight_stage_bytes;
    wait_barrier(&barriers.weights_full[weights.stage], weights.parity);
    const __half2 *scales = reinterpret_cast<const __half2 *>(stage + s::row_tiles * chunk_bytes);
#pragma unroll
    for (int i = 0; i < chunk_blocks<kind>; i++) {
#pragma unroll
      for (int h = 0; h < halves; h++) {
        constexpr int blocks = chunk_blocks<kind>;
        int tile = row_tile(h), buffer = (i * halves + h) % 2;
        __half2 scale = scales[tile * 32 + threadIdx.x % 32 / 4 * 4 + (blocks == 4 ? i : scale_block + i)];
        decode_tile<kind>(a[buffer], stage + tile * chunk_bytes + i * tile_bytes(kind), scale, decode);
        if (h == 0) wait_barrier(&barriers.tokens_full[tokens.stage], tokens.parity);
        uint64_t b = describe_operand(token_stages + tokens.stage * s::token_stage_bytes);
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; step++) warpgroup_product<n>(sums[h], a[buffer][step], b + step * operand_step);
        products_commit();
        products_wait<1>();
        if (h == 0) release_tokens(released);
      }
      released = tokens.stage;
      tokens.next();
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_barrier(&barriers.weights_empty[weights.stage]);
    weights.next();
  }

  int scale_block = 0;  // of the chunk's first block, among the four that share 128 bytes of scales

  __device__ void release_tokens(int &stage) {
    if (stage >= 0 && threadIdx.x % 128 == 0) arrive_barrier(&barriers.tokens_empty[stage]);
    stage = -1;
  }

  __device__ void multiply_segment(const segment &seg) {
    uint32_t a[2][4][4];
    int released = -1;
    clear();
    for (int chunk = seg.first; chunk < seg.first + seg.n; chunk++) {
      scale_block = chunk * chunk_blocks<kind> % 4;
      multiply_chunk(a, released);
    }
    products_wait<0>();
    release_tokens(released);
  }

  // Register i of a half belongs to row 16 tile + g + 8 (i / 2 % 2) and token 8 (i / 4) + 2 t + i % 2 of lane 4g + t.
  __device__ void write_tile(int64_t tile, float unit) const {
    int64_t first_row = tile / args.token_tiles * s::rows, first_token = tile % args.token_tiles * n;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < halves; h++) {
#pragma unroll
      for (int i = 0; i < n / 2; i++) {
        int64_t row = first_row + row_tile(h) * tile_rows + lane / 4 + i / 2 % 2 * 8;
        int64_t token = first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < args.w.rows && token < args.tokens) store_result(args.out, token, row, sums[h][i] * unit);
      }
    }
  }

  __device__ float *part(int64_t slot) const {
    return args.parts + slot * (halves * n / 2) * multiplying_threads + threadIdx.x;
  }

  __device__ void leave_part(int64_t slot) const {
#pragma unroll
    for (int i = 0; i < halves * n / 2; i++) __stcg(part(slot) + i * multiplying_threads, sums[i / (n / 2)][i % (n / 2)]);
  }

  __device__ void add_part(int64_t slot) {
#pragma unroll
    for (int i = 0; i < halves * n / 2; i++) sums[i / (n / 2)][i % (n / 2)] += __ldcg(part(slot) + i * multiplying_threads);
  }

  // True in the block that is the last of those with a part in the tile.
  __device__ bool is_last(int64_t first_block, int64_t last_block) const {
    __threadfence();
    wait_for_multipliers();
    if (threadIdx.x == 0) barriers.parts_before = atomicAdd(args.arrived + first_block, 1);
    wait_for_multipliers();
    bool last = barriers.parts_before == last_block - first_block;
    wait_for_multipliers();
    __threadfence();
    if (last && threadIdx.x == 0) args.arrived[first_block] = 0;
    return last;
  }

  __device__ static void wait_for_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(multiplying_threads) : "memory"); }

  // A block leaves at most two parts: of the tile that it ends in, at 2 block, and of one that started before, at 2 block + 1.
  __device__ bool share(const segment &seg) {
    int64_t begin = seg.tile * args.chunks, end = begin + args.chunks - 1;
    int64_t first_block = block_of(begin), last_block = block_of(end);
    leave_part(2 * int64_t(blockIdx.x) + (blockIdx.x != first_block));
    if (!is_last(first_block, last_block)) return false;
    clear();
    add_part(2 * first_block);
    for (int64_t block = first_block + 1; block <= last_block; block++) add_part(2 * block + 1);
    return true;
  }

  __device__ int64_t block_of(int64_t chunk) const {
    int64_t block = chunk * gridDim.x / args.all_chunks;
    while (first_chunk_of(args, block + 1) <= chunk) block++;
    while (first_chunk_of(args, block) > chunk) block--;
    return block;
  }

  __device__ void run() {
    float unit = decoder<kind>::scaled ? *args.w.unit : 1.f;
    wait_for_kernel_before();
    for_each_segment(args, [&](const segment &seg) {
      multiply_segment(seg);
      if (seg.n == args.chunks || share(seg)) write_tile(seg.tile, unit);
    });
  }
};

template <weight_kind kind, int halves, int n>
__device__ void multiply_many(const many_arguments &args, const CUtensorMap &x, uint8_t *shared) {
  using s = shape<halves, n>;
  stage_barriers &barriers = *reinterpret_cast<stage_barriers *>(shared);
  uint8_t *token_stages = shared + barrier_bytes, *table = shared + args.table;
  uint8_t *weight_stages = table + pair_table_bytes;
  let_next_kernel_start();
  if (threadIdx.x < 8) {
    init_barrier(&barriers.tokens_full[threadIdx.x], 1);
    init_barrier(&barriers.tokens_empty[threadIdx.x], warpgroups);
    init_barrier(&barriers.weights_full[threadIdx.x], 1);
    init_barrier(&barriers.weights_empty[threadIdx.x], multiplying_threads / 32);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= multiplying_threads) {
    limit_registers<copying_registers>();
    int warp = (threadIdx.x - multiplying_threads) / 32;
    if (warp == 0) fetch_weights<kind, s>(args, barriers, weight_stages);
    if (warp == 1) fetch_tokens<kind, s, n>(args, x, barriers, token_stages);
  } else {
    take_registers<multiplying_registers>();
    if constexpr (kind == weight_kind::nf4) fill_pair_table(table, args.codebook, multiplying_threads);
    multiplier<kind, halves, n>::wait_for_multipliers();
    decoder<kind> decode = {shared_address(table) + threadIdx.x % 32 * 4};
    multiplier<kind, halves, n> m = {args, barriers, token_stages, weight_stages, decode};
    m.run();
  }
}
#endif

template <weight_kind kind, int halves, int n>
__global__ void __launch_bounds__(all_threads, 1)
    product_many(const __grid_constant__ many_arguments args, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  multiply_many<kind, halves, n>(args, x, shared);
#endif
}

// ---- launching ----

template <int halves, int n>
int64_t tiles_of(const packed_matrix &w, int tokens) {
  return ceil_div(w.rows, shape<halves, n>::rows) * ceil_div(tokens, n);
}

template <int halves, int n>
size_t workspace_of(const product_context &context) {
  return workspace_zero_bytes + 2 * size_t(context.multiprocessors) * shape<halves, n>::rows * n * sizeof(float);
}

// Columns in boxes of 64, tokens in boxes of n.
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

template <weight_kind kind, int halves, int n>
cudaError_t launch_shape(const product_call &call) {
  using s = shape<halves, n>;
  CUtensorMap x;
  cudaError_t status = describe_tokens(call, n, &x);
  if (status != cudaSuccess) return status;
  int table = int(align_up(call.context->shared_start, pair_table_bytes)) - call.context->shared_start;
  int bytes = table + pair_table_bytes + s::weight_stages * s::weight_stage_bytes;
  many_arguments args = {call.w, call.tokens, call.out, call.context->codebook};
  args.chunks = int(call.w.col_blocks / chunk_blocks<kind>);
  args.token_tiles = int(ceil_div(call.tokens, n));
  args.all_chunks = tiles_of<halves, n>(call.w, call.tokens) * args.chunks;
  args.table = table;
  args.arrived = static_cast<uint32_t *>(call.workspace);
  args.parts = reinterpret_cast<float *>(static_cast<uint8_t *>(call.workspace) + workspace_zero_bytes);
  int64_t blocks = call.context->multiprocessors;
  if (blocks > args.all_chunks) blocks = args.all_chunks;
  status = cudaFuncSetAttribute(product_many<kind, halves, n>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  return launch(call, product_many<kind, halves, n>, dim3(unsigned(blocks)), dim3(all_threads), size_t(bytes), args, x);
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  if (call.tokens <= 8) return launch_shape<kind, 1, 8>(call);
  if (call.tokens <= 16) return launch_shape<kind, 1, 16>(call);
  if (call.tokens <= 32) return launch_shape<kind, 1, 32>(call);
  if (call.tokens <= 64) return launch_shape<kind, 1, 64>(call);
  return launch_shape<kind, 2, 128>(call);
}

}  // namespace

size_t many_workspace_bytes(const product_context &context) { return workspace_of<2, 128>(context); }

cudaError_t launch_many(const product_call &call) {
  switch (call.w.kind) {
    case weight_kind::nf4: return launch_kind<weight_kind::nf4>(call);
    case weight_kind::int8: return launch_kind<weight_kind::int8>(call);
    default: return launch_kind<weight_kind::bf16>(call);
  }
}

}  // namespace adaptrt
