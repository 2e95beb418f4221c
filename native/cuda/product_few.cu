// Products for up to 16 tokens: bound by the bytes of the weights, so everything serves the stream of loads.
//
// A block of threads takes a run of tiles of 16 rows, and each of its warps a span of columns of all of them. So a warp
// has its columns of the tokens in registers, for good; it multiplies a chunk of weights, its columns of a tile, on tensor
// cores (16 rows by 8 tokens, once or twice) and goes to the next tile, whose chunk is on its way meanwhile: the first one
// comes before the kernel before has ended. A warp leaves its sums in shared memory; when there is no more room for those,
// and at the end, the block adds up what belongs together, in the order of the columns.
//
// Where there are more columns than the warps can hold, they go over the tiles in several passes, each with other columns;
// where there are few, the warps form teams, each with other tiles. Long tokens are shared out, by columns, to a cluster of
// two or four blocks, which has more tiles instead; its blocks send each other their sums.
//
// After the kernel before only tokens are waited for, by each warp for its own. All loads of the loop wait on one scoreboard:
// who waits for one waits for all that are on their way. So where there are registers for two chunks, one is asked for as a
// whole when the one before has come.
#include "beside_warps.cuh"
#include "few_join.cuh"
#include "hopper.cuh"

namespace adaptrt {
namespace {

// ---- tokens: in the warp's shared memory, then in registers ----
// Each pass has its columns; for each of their blocks and token 128 bytes, eight pieces of eight columns, which take turns
// so that the same piece of eight tokens lies in different banks.

__device__ int token_piece(int n_tokens, int block, int token, int piece) {
  return (block * n_tokens + token) * 128 + ((piece ^ token) & 7) * 16;
}

// A lane's copies: of some tokens the same piece of a block, in every pass.
template <int span>
struct token_copies {
  static constexpr int pieces = span * 8, tokens_at_once = 32 / pieces;
  const few_arguments &args;
  int token, block, piece, col, end;  // where its columns end
  uint32_t to;

  __device__ token_copies(const few_arguments &args, const division &by, uint8_t *own)
      : args(args), token(threadIdx.x % 32 / pieces), block(threadIdx.x % pieces / 8), piece(threadIdx.x % 8),
        col(((by.first_span + by.column) * span + block) * block_cols + piece * 8),
        end(min((by.first_span + by.spans) * span * block_cols, int(args.w.cols))), to(shared_address(own)) {}
  __device__ void stage() {
    for (int pass = 0; pass < args.divided.passes; pass++) {
      const __nv_bfloat16 *from = args.x + token * args.x_stride;
#pragma unroll 1
      for (int i = token; i < args.tokens; i += tokens_at_once, from += tokens_at_once * args.x_stride)
        copy_columns(to + token_piece(args.tokens, block, i, piece), from, col, end);
      to += span * args.tokens * 128;
      col += args.divided.columns * span * block_cols;
    }
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
  }
};

// The operands of a pass. Where there is no such token, any other will do: the columns of a product do not mix.
template <int span, int products>
struct token_values {
  uint4 value[span][products][2];  // halves of a block

  __device__ void load(const uint8_t *own, const few_arguments &args, int pass) {
    int lane = threadIdx.x % 32;
    uint32_t from = shared_address(own) + pass * span * args.tokens * 128;
#pragma unroll
    for (int p = 0; p < products; p++) {
      int token = min(p * 8 + lane % 8, args.tokens - 1);
#pragma unroll
      for (int i = 0; i < span; i++) {
        uint32_t at = from + token_piece(args.tokens, i, token, lane / 8);
        value[i][p][0] = load_matrices(at);
        value[i][p][1] = load_matrices(at ^ 64);
      }
    }
  }
};

// ---- the stream of weights ----

// A lane's part of a chunk: codes of all blocks, and for 8 of its rows the scales of one block, which the lanes exchange.
template <weight_kind kind, int span>
struct weight_chunk {
  uint4 codes[span * decoder<kind>::vectors];
  __half2 scales;

  // Where none is ever fetched it makes no difference: it is multiplied by zeros, and is finite.
  __device__ weight_chunk() {
    if constexpr (decoder<kind>::scaled) scales = __float2half2_rn(0);
    else for (uint4 &v : codes) v = make_uint4(0, 0, 0, 0);
  }
  __device__ float2 scales_of(int block) const {
    if constexpr (!decoder<kind>::scaled) return make_float2(1, 1);
    return __half22float2(__shfl_sync(0xffffffffu, scales, (threadIdx.x & 28) | block));
  }
};

// A warp's chunks on their way into registers.
template <weight_kind kind, int span>
struct weight_stream {
  static constexpr int vectors = decoder<kind>::vectors;
  const few_arguments &args;
  const division &by;
  place at;
  const uint8_t *codes;
  const __half2 *scales;
  uint64_t policy;

  __device__ weight_stream(const few_arguments &args, const division &by)
      : args(args), by(by), at(args.divided, by), policy(evict_first_policy()) {
    find_chunk();
  }
  __device__ void find_chunk() {
    int lane = threadIdx.x % 32, tile = by.first_tile + at.round * args.divided.teams + by.team;
    int block = tile * args.divided.tile_blocks + (by.first_span + at.span(args.divided, by)) * span;
    codes = args.w.codes + int64_t(block) * tile_bytes(kind) + lane * 16;
    scales = args.w.scales + int64_t(block + lane % span) * 8 + lane / 4;
  }
  // Block i of the next chunk; a chunk's blocks are fetched in order, then `step` goes on.
  __device__ void fetch(weight_chunk<kind, span> &to, int i) {
    if (!at.has_chunk()) return;
#pragma unroll
    for (int j = 0; j < vectors; j++)
      to.codes[i * vectors + j] = load_weights(codes + (i * vectors + j) * 512, policy);
    if (decoder<kind>::scaled && i == span - 1) to.scales = load_scales(scales, policy);
  }
  __device__ void fetch(weight_chunk<kind, span> &to) {
#pragma unroll
    for (int i = 0; i < span; i++) fetch(to, i);
    step();
  }
  __device__ void step() {
    int blocks = args.divided.tile_blocks * args.divided.teams;
    codes += int64_t(blocks) * tile_bytes(kind);
    scales += int64_t(blocks) * 8;
    if (at.step(args.divided, by)) find_chunk();
  }
};

// ---- products ----

// Unscaled codes times tokens, a block's scale applied to its sum.
template <weight_kind kind, int span, int products>
__device__ void multiply_block(float sums[products][4], const weight_chunk<kind, span> &chunk, int i,
                               const uint4 (&tokens)[products][2], const decoder<kind> &decode) {
  uint32_t a[4][4];
#pragma unroll
  for (int s = 0; s < 4; s++) decode.step(&chunk.codes[i * decoder<kind>::vectors], s, a[s]);
  float2 scale = chunk.scales_of(i);
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

// ---- a warp's run over the tiles ----

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool moves_registers = true;
template <int registers, bool more>
__device__ void set_registers() {
  if constexpr (more)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
#else
constexpr bool moves_registers = false;
template <int registers, bool more>
__device__ void set_registers() {}
#endif

// A warp on its way.
template <weight_kind kind, int span, int products, bool adapted>
struct warp_run {
  static constexpr bool ahead = kind == weight_kind::nf4 && products == 1 && (!adapted || moves_registers);
  const few_arguments &args;
  const division &by;
  uint8_t *own;
  decoder<kind> decode;
  place at;
  token_values<span, products> tokens;
  float *to;  // the sums of this round

  __device__ warp_run(const few_arguments &args, const division &by, uint8_t *shared, uint8_t *own)
      : args(args), by(by), own(own),
        decode{uint32_t(shared_address(shared) - shared_start + threadIdx.x % 32 * 4)}, at(args.divided, by) {
    begin();
  }
  __device__ void begin() {
    if (args.divided.passes > 1 || at.first == 0) tokens.load(own, args, at.pass);
    __syncwarp();  // sums may lie over the tokens
    to = reinterpret_cast<float *>(own + args.plan.sums);
  }
  __device__ void multiply(weight_chunk<kind, span> &weights, weight_chunk<kind, span> &next,
                           weight_stream<kind, span> &stream) {
    float sums[products][4] = {};
    if (ahead) stream.fetch(next);
#pragma unroll
    for (int i = 0; i < span; i++) {
      multiply_block<kind, span, products>(sums, weights, i, tokens.value[i], decode);
      if (!ahead) stream.fetch(weights, i);
    }
    if (ahead) weights = next;
    else stream.step();
    leave_sums<products>(to, sums, at.pass > 0);
    to += products * product_sums;
    if (at.step(args.divided, by)) begin();
  }
};

// A barrier of the warps that multiply.
template <bool adapted>
__device__ void sync_multipliers(const few_arguments &args) {
  if constexpr (adapted)
    sync_threads(multipliers_barrier, args.warps * 32);
  else
    __syncthreads();
}

template <weight_kind kind, int products, bool adapted>
__device__ void multiply(const few_arguments &args, uint8_t *shared, const division &by) {
  constexpr int span = span_of(kind, products);
  weight_stream<kind, span> stream(args, by);
  weight_chunk<kind, span> weights, next;
  stream.fetch(weights);
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, args.warps * 32);
  float unit = decoder<kind>::scaled ? *args.w.unit : 1.f;
#if __CUDA_ARCH__ >= 900
  if (args.divided.parts > 1) cluster_sums(shared, args, by).begin();
#endif
  sync_multipliers<adapted>(args);
  uint8_t *own = own_memory(shared, args, by.team, by.column);
  token_copies<span> tokens(args, by, own);
  wait_for_kernel_before();
  let_next_kernel_start();
  tokens.stage();
  warp_run<kind, span, products, adapted> run(args, by, shared, own);
  while (!run.at.ended(by)) {
    int first = run.at.first;
    do run.multiply(weights, next, stream);
    while (run.at.first == first);
    sync_multipliers<adapted>(args);
#if __CUDA_ARCH__ >= 900
    if (args.divided.parts > 1 && first == 0) wait_at_cluster();
#endif
    join_warps<products, adapted>(shared, args, by, first, run.at.first, unit);
    if (!run.at.ended(by)) sync_multipliers<adapted>(args);
  }
  if (args.divided.parts > 1) join_blocks<adapted>(shared, args, by);
}

// What the warps do that do not multiply. Barriers of the cluster count them, too.
__device__ void adapt(const few_arguments &args, uint8_t *shared, const division &by) {
  let_next_kernel_start();  // which it can when all warps have said so
#if __CUDA_ARCH__ >= 900
  if (args.divided.parts > 1) arrive_at_cluster();
#endif
  auto run = [&](auto kind) {
    int columns = int((args.w.cols + block_cols - 1) / block_cols);
    int warp = int(threadIdx.x / 32) - most_warps, lane = int(threadIdx.x % 32);
    beside_warps<decltype(kind)::value>{args.beside, args.x,        args.x_stride, int(args.w.rows), columns,
                                        args.tokens, by.first_tile, by.tiles,      warp,             0,
                                        lane,        args.warps,    shared}.run();
  };
  switch (args.beside.kind) {
    case weight_kind::nf4: run(std::integral_constant<weight_kind, weight_kind::nf4>()); break;
    case weight_kind::int8: run(std::integral_constant<weight_kind, weight_kind::int8>()); break;
    default: run(std::integral_constant<weight_kind, weight_kind::bf16>());
  }
#if __CUDA_ARCH__ >= 900
  if (args.divided.parts > 1) wait_at_cluster();
#endif
}

// Warps that have nothing to do are there for their registers.
template <weight_kind kind, int products, bool adapted>
__global__ void __maxnreg__(adapted ? registers_at_start : registers_of(products))
    product_few(const __grid_constant__ few_arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto divided = [&] { return division(args.divided, args.divided.tile_blocks / span_of(kind, products)); };
  int warp = threadIdx.x / 32;
  if (!adapted) {
    multiply<kind, products, adapted>(args, shared, divided());
  } else if (warp < most_warps) {
    set_registers<registers_of(products), true>();
    if (warp < args.warps) multiply<kind, products, adapted>(args, shared, divided());
  } else {
    set_registers<registers_beside, false>();
    adapt(args, shared, divided());
  }
}

// ---- launching ----

template <weight_kind kind, int products, bool adapted>
cudaError_t launch_products(const product_call &call) {
  few_plan plan = plan_few(*call.context, call.w, call.tokens, call.beside);
  const few_division &d = plan.divided;
  few_arguments args = {call.w,   call.x, call.x_stride, call.tokens, call.out, call.context->codebook,
                        d, d.columns * d.teams, plan.shared, divider_by(call.tokens), divider_by(d.teams)};
  int warps = args.warps, bytes = plan.shared.bytes;
  if (adapted) {
    args.beside = *call.beside;
    warps = most_warps + warps_beside;
    bytes = args.beside.plan.bytes;
  }
  return launch_in_clusters(call, unsigned(d.parts), product_few<kind, products, adapted>,
                            dim3(unsigned(d.parts), unsigned(d.groups)), dim3(unsigned(warps * 32)), size_t(bytes), args);
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  if (call.beside) return launch_products<kind, 1, true>(call);
  return call.tokens <= 8 ? launch_products<kind, 1, false>(call) : launch_products<kind, 2, false>(call);
}

template <weight_kind kind>
cudaError_t prepare_kind(const product_context &context) {
  for (auto kernel : {product_few<kind, 1, false>, product_few<kind, 1, true>, product_few<kind, 2, false>}) {
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// How many clusters of so many blocks run at once.
cudaError_t count_clusters(product_context &context, int blocks) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(most_warps * 32);
  config.dynamicSmemBytes = size_t(context.shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&context.clusters[blocks], product_few<weight_kind::nf4, 2, false>, &config);
}

}  // namespace

int few_tokens_at_once(const product_context &context, const packed_matrix &w) {
  int tokens = few_tokens;
  while (tokens > 0 && plan_few(context, w, tokens).divided.groups == 0) tokens--;
  return tokens;
}

bool plan_few_beside(const product_context &context, const packed_matrix &w, int tokens, beside_call &call) {
  if (tokens > most_tokens_beside) return false;
  few_division alone = plan_few(context, w, tokens).divided;
  int columns = int(ceil_div(w.cols, block_cols));
  if (alone.groups == 0 || !divide_beside(call, columns, alone.parts * alone.groups)) return false;
  few_plan plan = plan_few(context, w, tokens, &call);
  const few_division &d = plan.divided;
  if (d.groups != alone.groups || d.parts != alone.parts) return false;
  plan_room_beside(call, int(ceil_div(w.row_tiles, d.groups)), tokens, columns, plan.shared.bytes, context.shared_bytes);
  return true;
}

cudaError_t prepare_few(product_context &context) {
  cudaError_t status = cudaSuccess;
  for (auto prepare :
       {prepare_kind<weight_kind::nf4>, prepare_kind<weight_kind::int8>, prepare_kind<weight_kind::bf16>})
    if (status == cudaSuccess) status = prepare(context);
  context.clusters[1] = context.multiprocessors;
  for (int blocks = 2; context.hopper && blocks <= most_parts && status == cudaSuccess; blocks *= 2)
    status = count_clusters(context, blocks);
  return status;
}

cudaError_t launch_few(const product_call &call) {
  switch (call.w.kind) {
    case weight_kind::nf4: return launch_kind<weight_kind::nf4>(call);
    case weight_kind::int8: return launch_kind<weight_kind::int8>(call);
    default: return launch_kind<weight_kind::bf16>(call);
  }
}

}  // namespace adaptrt
