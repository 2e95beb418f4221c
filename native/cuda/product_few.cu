// Products for up to 16 tokens: bound by the bytes of the weights, so everything serves the stream of loads.
//
// A block of threads keeps all tokens in shared memory and takes a run of tiles of 16 rows. A tile's blocks of 64
// columns lie one after another in memory, in chunks of 2 KB, and the chunks of all its tiles are dealt out to the
// warps evenly, a run to each: a warp loads its run into registers, a chunk or two ahead, decodes a block at a time and
// multiplies it on tensor cores (16 rows by 8 tokens, once or twice). Warps do not wait for each other until the end,
// when the sums of tiles that several warps share are added in the order of the columns. Where the tokens are too long
// for one block's shared memory, a cluster of two or four blocks shares the columns of its tiles.
#include "beside_warps.cuh"
#include "launch.cuh"

#include <algorithm>

namespace adaptrt {
namespace {

constexpr int warps_enough = 8;
constexpr int chunk_bytes = 2048, chunk_vectors = chunk_bytes / 512;  // codes; 16-byte loads of a lane

// By the number of products with 8 tokens. Decoding waits for shared memory, and many warps hide that better than many
// loads of few: of 8, 12, 16, 24 and 32 warps 24 were fastest for one product, 16 for two (H200, in the chain of a step).
template <int products>
struct few_shape {
  static constexpr int warps = products == 1 ? 24 : 16, chunks_ahead = products == 1 ? 1 : 2;
  static constexpr int registers = products == 1 ? 72 : 128, most_warps = products == 1 ? 24 : 16;  // that they allow
};

template <weight_kind kind>
constexpr int chunk_blocks = chunk_bytes / tile_bytes(kind);

// Offsets into shared memory. The pair table, for nf4, comes first.
struct shared_plan {
  int sums, block_sums, tokens, bytes;
};

struct few_arguments {
  packed_matrix w;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int tokens;
  product_output out;
  nf4_values codebook;
  int parts;  // of the columns: the blocks of a cluster
  int warps;  // that multiply
  shared_plan plan;
  beside_call beside;
};

// ---- the division of work ----

// A block's tiles and its part of their columns, in chunks; and the run of chunks of each of its warps, counted from the
// first tile's first.
struct division {
  int part, first_tile, tiles, first_chunk, row_chunks, chunks, warps;

  __device__ division(const few_arguments &args, int chunk_blocks) {
    int groups = gridDim.x / args.parts, group = blockIdx.x / args.parts;
    int few = int(args.w.row_tiles) / groups, more = int(args.w.row_tiles) % groups;  // so many have one more
    int all_chunks = int(args.w.col_blocks) / chunk_blocks;
    part = blockIdx.x % args.parts;
    first_tile = few * group + min(group, more);
    tiles = few + (group < more);
    first_chunk = all_chunks * part / args.parts;
    row_chunks = all_chunks * (part + 1) / args.parts - first_chunk;
    chunks = tiles * row_chunks;
    warps = args.warps;
  }
  __device__ int first_of(int warp) const { return chunks * warp / warps; }
  __device__ int warp_of(int chunk) const { return ((chunk + 1) * warps - 1) / chunks; }
};

// ---- tokens in shared memory ----
// For each block of 64 columns and token 128 bytes, in the order in which lane 4n + t reads the operand of token n:
// two halves of four 16-byte pieces, piece t of half h for the steps 2h and 2h + 1. Odd tokens have their halves
// swapped and the blocks' pieces take turns, so that neither readers nor writers of eight pieces meet in a bank.

__device__ int token_piece(int n_tokens, int block, int token, int half, int t) {
  return (block * n_tokens + token) * 128 + (half ^ (token & 1)) * 64 + (t ^ (block & 3)) * 16;
}

__device__ __noinline__ uint4 last_columns(const __nv_bfloat16 *from, int64_t n) {
  union {
    uint4 vector;
    __nv_bfloat16 item[8];
  } v = {make_uint4(0, 0, 0, 0)};
  for (int i = 0; i < 8 && i < n; i++) v.item[i] = from[i];
  return v.vector;
}

__device__ uint4 eight_columns(const __nv_bfloat16 *row, int64_t col, int64_t cols) {
  if (col + 8 <= cols) return *reinterpret_cast<const uint4 *>(row + col);
  return last_columns(row + col, cols - col);
}

// `blocks` of columns from `first_block` on. A thread turns half a block at a time: piece t has word t of its four
// vectors.
__device__ void stage_tokens(uint8_t *tokens, const few_arguments &args, int first_block, int blocks) {
  int halves = blocks * 2;
  for (int i = threadIdx.x; i < halves * args.tokens; i += args.warps * 32) {
    int token = i / halves, block = (i - token * halves) / 2, half = i % 2;
    const __nv_bfloat16 *row = args.x + token * args.x_stride;
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      v[j] = eight_columns(row, int64_t(first_block + block) * block_cols + half * 32 + j * 8, args.w.cols);
#pragma unroll
    for (int t = 0; t < 4; t++)
      *reinterpret_cast<uint4 *>(tokens + token_piece(args.tokens, block, token, half, t)) =
          make_uint4(word_of(v[0], t), word_of(v[1], t), word_of(v[2], t), word_of(v[3], t));
  }
}

// ---- the stream of weights ----

// A lane's part of a chunk.
template <weight_kind kind>
struct weight_chunk {
  uint4 codes[chunk_vectors];
  __half2 scales[chunk_blocks<kind>];
};

// A warp's run on its way into registers.
template <weight_kind kind>
struct weight_stream {
  static constexpr int blocks = chunk_blocks<kind>, vectors = decoder<kind>::vectors;
  const uint8_t *codes;
  const __half2 *scales;
  int left;  // chunks still to be fetched
  int chunk, row_chunks, other_chunks;  // of the tile: the next, the block's, those of the cluster's other blocks
  uint64_t policy;

  __device__ weight_stream(const few_arguments &args, const division &by, int warp)
      : left(by.first_of(warp + 1) - by.first_of(warp)), chunk(by.first_of(warp) % by.row_chunks),
        row_chunks(by.row_chunks), other_chunks(int(args.w.col_blocks) / blocks - by.row_chunks),
        policy(evict_first_policy()) {
    int lane = threadIdx.x % 32, tile = by.first_tile + by.first_of(warp) / row_chunks;
    int64_t block = int64_t(tile) * args.w.col_blocks + (by.first_chunk + chunk) * blocks;
    codes = args.w.codes + block * tile_bytes(kind) + lane * 16;
    scales = args.w.scales + block * 8 + lane / 4;
  }
  // Block i of the next chunk; a chunk's blocks are fetched in order, then `step` goes on.
  __device__ void fetch(weight_chunk<kind> &to, int i) {
    if (left <= 0) return;
#pragma unroll
    for (int j = 0; j < vectors; j++)
      to.codes[i * vectors + j] = load_weights(codes + (i * vectors + j) * 512, policy);
    if constexpr (decoder<kind>::scaled) to.scales[i] = load_scales(scales + i * 8, policy);
  }
  __device__ void step() {
    int chunks = 1;
    if (++chunk == row_chunks) chunks += other_chunks, chunk = 0;
    codes += chunks * int64_t(chunk_bytes);
    scales += chunks * blocks * 8;
    left--;
  }
};

// ---- products ----

// Where a lane finds its tokens: those of lane 4g + t are g and, of the second product, g + 8; where there is no such
// token, any other: the columns of a product do not mix.
template <int products>
struct token_reader {
  uint32_t first[products], block_stride;
  int block;  // the next

  __device__ token_reader(uint8_t *tokens, int n_tokens) : block_stride(n_tokens * 128), block(0) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int p = 0; p < products; p++)
      first[p] = shared_address(tokens) + token_piece(n_tokens, 0, (lane / 4 + p * 8) % n_tokens, 0, lane % 4);
  }
  __device__ void load(uint4 (&b)[products][2]) {
#pragma unroll
    for (int p = 0; p < products; p++) {
      uint32_t at = (first[p] ^ (block & 3) * 16) + block * block_stride;
      b[p][0] = load_vector(at);
      b[p][1] = load_vector(at ^ 64);
    }
    block++;
  }
};

// Unscaled codes times tokens, a block's scale applied to its sum.
template <weight_kind kind, int products>
__device__ void multiply_block(float sums[products][4], const weight_chunk<kind> &chunk, int i,
                               const uint4 (&tokens)[products][2], const decoder<kind> &decode) {
  uint32_t a[4][4];
#pragma unroll
  for (int s = 0; s < 4; s++) decode.step(&chunk.codes[i * decoder<kind>::vectors], s, a[s]);
  float2 scale = make_float2(1, 1);
  if constexpr (decoder<kind>::scaled) scale = __half22float2(chunk.scales[i]);
#pragma unroll
  for (int p = 0; p < products; p++) {
    float c[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const uint4 &b = tokens[p][s / 2];
      multiply_add(c, a[s], s % 2 ? b.z : b.x, s % 2 ? b.w : b.y);
    }
    sums[p][0] += scale.x * c[0];
    sums[p][1] += scale.x * c[1];
    sums[p][2] += scale.y * c[2];
    sums[p][3] += scale.y * c[3];
  }
}

// ---- sums: register i of product p of lane 4g + t is of row g + 8 (i / 2) and token 8 p + 2t + i % 2 ----

// The result for an item of [tokens, 16] of the block's tile number `tile`.
template <bool adapted>
__device__ void put_result(uint8_t *shared, const few_arguments &args, const division &by, int tile, int item, float sum) {
  int64_t row = int64_t(by.first_tile + tile) * tile_rows + item % tile_rows;
  if constexpr (adapted) {
    changes at = changes_of(shared, args.beside, by.tiles, args.tokens);
    at.step(tile * args.tokens * tile_rows + item);
    sum = *at.delta + (args.beside.vectors ? *at.gain * sum : sum);
  }
  if (row < args.w.rows) store_result(args.out, item / tile_rows, row, sum);
}

// The block's sum for an item: the result, or the block's part of it.
template <bool adapted>
__device__ void put_sum(uint8_t *shared, const few_arguments &args, const division &by, int tile, int item, float sum) {
  if (args.parts > 1)
    reinterpret_cast<float *>(shared + args.plan.block_sums)[tile * args.tokens * tile_rows + item] = sum;
  else
    put_result<adapted>(shared, args, by, tile, item, sum);
}

// Of tiles that are not a warp's alone it has at most two parts: the end of one that another warp began, and the
// beginning or the middle of one that another warp ends.
enum tile_part : int { tile_end, tile_beginning };

__device__ float *part_of(uint8_t *shared, const few_arguments &args, int warp, tile_part part) {  // [tokens, 16]
  return reinterpret_cast<float *>(shared + args.plan.sums) + (warp * 2 + part) * args.tokens * tile_rows;
}

// What of its sums a lane has for tokens that there are: do_item(item of [tokens, 16], sum).
template <int products, typename work>
__device__ void for_each_item(int tokens, const float sums[products][4], work do_item) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4 * products; i++) {
    int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (token < tokens) do_item(token * tile_rows + lane / 4 + i % 4 / 2 * 8, sums[i / 4][i % 4]);
  }
}

template <bool adapted>
__device__ void join_warps(uint8_t *shared, const few_arguments &args, const division &by, float unit) {
  int n = args.tokens * tile_rows, chunks = by.row_chunks;
  for (int i = threadIdx.x; i < by.tiles * n; i += blockDim.x) {
    int tile = i / n, item = i % n, first = by.warp_of(tile * chunks), last = by.warp_of((tile + 1) * chunks - 1);
    if (first == last) continue;
    float sum = 0;
    for (int warp = first; warp < last; warp++) sum += part_of(shared, args, warp, tile_beginning)[item];
    sum += part_of(shared, args, last, tile_end)[item];
    put_sum<adapted>(shared, args, by, tile, item, sum * unit);
  }
}

// The cluster's blocks share the adding of their parts, too.
template <bool adapted>
__device__ void join_blocks(uint8_t *shared, const few_arguments &args, const division &by) {
#if __CUDA_ARCH__ >= 900
  wait_for_writes_of_cluster();
  uint32_t mine = shared_address(shared + args.plan.block_sums);
  int n = args.tokens * tile_rows;
  for (int i = threadIdx.x * args.parts + by.part; i < by.tiles * n; i += blockDim.x * args.parts) {
    float sum = 0;
    for (int part = 0; part < args.parts; part++) sum += load_of_cluster(mine + i * 4, part);
    put_result<adapted>(shared, args, by, i / n, i % n, sum);
  }
  wait_for_writes_of_cluster();  // the others still read what this block has left
#endif
}

// A warp's place in its run, and the sums of the tile there.
template <weight_kind kind, int products, bool adapted>
struct run_of_warp {
  const few_arguments &args;
  const division &by;
  uint8_t *shared;
  int warp, tile, chunk;
  bool whole;  // all of the tile so far is this warp's
  bool changes_there = false;
  float unit;
  token_reader<products> tokens;
  decoder<kind> decode;
  float sums[products][4];

  __device__ run_of_warp(const few_arguments &args, uint8_t *shared, const division &by, int warp, float unit)
      : args(args), by(by), shared(shared), warp(warp), unit(unit),
        tokens(shared + args.plan.tokens, args.tokens),
        decode{uint32_t(shared_address(shared) - shared_start + threadIdx.x % 32 * 4)} {
    int first = by.first_of(warp);
    tile = first / by.row_chunks, chunk = first % by.row_chunks;
    whole = chunk == 0;
    tokens.block = chunk * chunk_blocks<kind>;
    clear();
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4 * products; i++) sums[i / 4][i % 4] = 0;
  }
  __device__ void multiply(weight_chunk<kind> &weights, weight_stream<kind> &stream) {
#pragma unroll
    for (int i = 0; i < chunk_blocks<kind>; i++) {
      uint4 b[products][2];
      tokens.load(b);
      multiply_block<kind, products>(sums, weights, i, b, decode);
      stream.fetch(weights, i);
    }
    stream.step();
    if (++chunk == by.row_chunks) end_tile();
  }
  __device__ void end_tile() {
    if (whole)
      put_tile();
    else
      leave_part(tile_end);
    tile++, chunk = 0, whole = true;
    tokens.block = 0;
    clear();
  }
  __device__ void put_tile() {
    await_changes();
    for_each_item<products>(args.tokens, sums,
                            [&](int item, float sum) { put_sum<adapted>(shared, args, by, tile, item, sum * unit); });
  }
  __device__ void end_run() {
    if (chunk > 0) leave_part(tile_beginning);
    await_changes();
  }
  // Once for every warp.
  __device__ void await_changes() {
    if (adapted && !changes_there) sync_threads(changes_barrier, blockDim.x);
    changes_there = true;
  }
  __device__ void leave_part(tile_part part) {
    float *to = part_of(shared, args, warp, part);
    for_each_item<products>(args.tokens, sums, [&](int item, float sum) { to[item] = sum; });
  }
};

template <weight_kind kind, int products, bool adapted>
__device__ void multiply_run(const few_arguments &args, uint8_t *shared, const division &by, int warp, float unit) {
  constexpr int chunks_ahead = few_shape<products>::chunks_ahead;
  int left = by.first_of(warp + 1) - by.first_of(warp);
  weight_stream<kind> stream(args, by, warp);
  weight_chunk<kind> weights[chunks_ahead];
#pragma unroll
  for (int k = 0; k < chunks_ahead; k++, stream.step())
#pragma unroll
    for (int i = 0; i < chunk_blocks<kind>; i++) stream.fetch(weights[k], i);
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, args.warps * 32);
  wait_for_kernel_before();
  let_next_kernel_start();
  stage_tokens(shared + args.plan.tokens, args, by.first_chunk * chunk_blocks<kind>, by.row_chunks * chunk_blocks<kind>);
  if constexpr (adapted)
    sync_threads(tokens_barrier, args.warps * 32);
  else
    __syncthreads();
  run_of_warp<kind, products, adapted> run(args, shared, by, warp, unit);
  while (left > 0) {
#pragma unroll
    for (int k = 0; k < chunks_ahead; k++)
      if (left-- > 0) run.multiply(weights[k], stream);
  }
  run.end_run();
}

// What the warps do that do not multiply.
__device__ void adapt(const few_arguments &args, uint8_t *shared, const division &by, int warp) {
  auto run = [&](auto kind) {
    int columns = int((args.w.cols + block_cols - 1) / block_cols);
    beside_warps<decltype(kind)::value>{args.beside,   args.x,        args.x_stride, int(args.w.rows),
                                        columns,       args.tokens,   by.first_tile, by.tiles,
                                        warp,          0,             int(threadIdx.x % 32), shared}.run();
  };
  switch (args.beside.kind) {
    case weight_kind::nf4: return run(std::integral_constant<weight_kind, weight_kind::nf4>());
    case weight_kind::int8: return run(std::integral_constant<weight_kind, weight_kind::int8>());
    default: return run(std::integral_constant<weight_kind, weight_kind::bf16>());
  }
}

template <weight_kind kind, int products, bool adapted>
__global__ void __maxnreg__(few_shape<products>::registers) product_few(const __grid_constant__ few_arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  division by(args, chunk_blocks<kind>);
  int warp = threadIdx.x / 32;
  float unit = decoder<kind>::scaled ? *args.w.unit : 1.f;
  if (!adapted || warp < args.warps)
    multiply_run<kind, products, adapted>(args, shared, by, warp, unit);
  else
    adapt(args, shared, by, warp - args.warps);
  __syncthreads();
  join_warps<adapted>(shared, args, by, unit);
  if (args.parts > 1) join_blocks<adapted>(shared, args, by);
}

// ---- launching ----

// How a product is divided; no warps where there is no room.
struct few_plan {
  int parts, groups, warps;
  shared_plan shared;
};

int groups_of(const product_context &context, const packed_matrix &w, int parts) {
  int64_t most = parts == 1 ? context.multiprocessors : context.pairs;
  return int(most < w.row_tiles ? most : w.row_tiles);
}

shared_plan plan_shared(const packed_matrix &w, int tokens, int parts, int groups, int warps) {
  int tile_sums = tokens * tile_rows * int(sizeof(float)), tiles = int(ceil_div(w.row_tiles, groups));
  shared_plan plan;
  plan.sums = w.kind == weight_kind::nf4 ? pair_table_bytes : 0;
  plan.block_sums = plan.sums + warps * 2 * tile_sums;
  plan.tokens = int(align_up(plan.block_sums + (parts > 1 ? tiles * tile_sums : 0), 128));
  plan.bytes = int(plan.tokens + align_up(ceil_div(w.col_blocks, parts), col_blocks_step) * tokens * 128);
  return plan;
}

// As few parts as give enough warps room, as many warps as there is shared memory for, beside so many others.
few_plan plan_few(const product_context &context, const packed_matrix &w, int tokens,
                  const beside_call *beside = nullptr) {
  few_plan plan = {};
  for (int parts = 1; parts <= most_parts && plan.warps < warps_enough; parts++) {
    int groups = groups_of(context, w, parts);
    int warps = tokens <= 8 ? few_shape<1>::warps : few_shape<2>::warps;
    int most = tokens <= 8 ? few_shape<1>::most_warps : few_shape<2>::most_warps, others = 0;
    if (groups == 0) break;
    if (beside) warps = std::min(warps, most - beside->v_warps - beside->u_warps);
    if (beside) others = least_beside(*beside, int(ceil_div(w.row_tiles, groups)), tokens);
    while (warps > 0 && plan_shared(w, tokens, parts, groups, warps).bytes + others > context.shared_bytes) warps--;
    if (warps > plan.warps) plan = {parts, groups, warps, plan_shared(w, tokens, parts, groups, warps)};
  }
  return plan;
}

template <weight_kind kind, int products, bool adapted>
cudaError_t launch_products(const product_call &call) {
  few_plan plan = plan_few(*call.context, call.w, call.tokens, call.beside);
  few_arguments args = {call.w,  call.x,     call.x_stride, call.tokens, call.out, call.context->codebook,
                        plan.parts, plan.warps, plan.shared};
  int threads = plan.warps * 32, bytes = plan.shared.bytes;
  if (adapted) {
    args.beside = *call.beside;
    threads += (args.beside.v_warps + args.beside.u_warps) * 32;
    bytes = args.beside.plan.bytes;
  }
  return launch_in_clusters(call, unsigned(plan.parts), product_few<kind, products, adapted>,
                            dim3(unsigned(plan.groups * plan.parts)), dim3(unsigned(threads)), size_t(bytes), args);
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  if (call.beside)
    return call.tokens <= 8 ? launch_products<kind, 1, true>(call) : launch_products<kind, 2, true>(call);
  return call.tokens <= 8 ? launch_products<kind, 1, false>(call) : launch_products<kind, 2, false>(call);
}

template <weight_kind kind>
cudaError_t prepare_kind(const product_context &context) {
  for (auto kernel : {product_few<kind, 1, false>, product_few<kind, 1, true>, product_few<kind, 2, false>,
                      product_few<kind, 2, true>}) {
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// How many clusters of two blocks run at once.
cudaError_t count_pairs(product_context &context) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(few_shape<2>::warps * 32);
  config.dynamicSmemBytes = size_t(context.shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&context.pairs, product_few<weight_kind::nf4, 2, false>, &config);
}

}  // namespace

// So many that enough warps have room beside them, or one with any warps, or none.
int few_tokens_at_once(const product_context &context, const packed_matrix &w) {
  int tokens = few_tokens;
  while (tokens > 1 && plan_few(context, w, tokens).warps < warps_enough) tokens--;
  return plan_few(context, w, tokens).warps > 0 ? tokens : 0;
}

bool plan_few_beside(const product_context &context, const packed_matrix &w, int tokens, beside_call &call) {
  int groups = groups_of(context, w, 1), columns = int(ceil_div(w.cols, block_cols));
  if (!divide_beside(call, columns, groups)) return false;
  few_plan plan = plan_few(context, w, tokens, &call);
  if (plan.warps < warps_enough) return false;
  int tiles = int(ceil_div(w.row_tiles, plan.groups));
  plan_room_beside(call, tiles, tokens, columns, plan.shared.bytes, context.shared_bytes);
  return true;
}

cudaError_t prepare_few(product_context &context) {
  for (auto prepare :
       {prepare_kind<weight_kind::nf4>, prepare_kind<weight_kind::int8>, prepare_kind<weight_kind::bf16>}) {
    cudaError_t status = prepare(context);
    if (status != cudaSuccess) return status;
  }
  return context.hopper ? count_pairs(context) : cudaSuccess;
}

cudaError_t launch_few(const product_call &call) {
  switch (call.w.kind) {
    case weight_kind::nf4: return launch_kind<weight_kind::nf4>(call);
    case weight_kind::int8: return launch_kind<weight_kind::int8>(call);
    default: return launch_kind<weight_kind::bf16>(call);
  }
}

}  // namespace adaptrt
