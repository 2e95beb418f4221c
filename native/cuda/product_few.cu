// Products for up to 8 tokens: bound by the bytes of the weights, so everything serves the stream of loads.
//
// A block of threads keeps all tokens in shared memory and walks over tiles of 16 rows, one or a few at a time. Several
// warps share the columns of a tile: each takes chunks of 2048 bytes of codes, with the next ones already on their way
// into registers, multiplies them on tensor cores (16 rows by up to 8 tokens) and leaves its sums in shared memory, where
// they are added in a fixed order.
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr int warps_at_most = 16;
constexpr int chunk_vectors = 4;  // 16-byte loads of a lane
constexpr int chunk_bytes = chunk_vectors * 512;
constexpr int chunks_ahead = 3;

// How a block is divided: `tiles` tiles at a time, each shared by `warps` warps.
struct division {
  int tiles, warps;
};

// Shared memory below and above the pair table: sums and as many blocks of columns of the tokens as there is room for,
// then the rest of the tokens.
struct shared_plan {
  int table_at, tokens_at, blocks_below, bytes;
};

struct few_arguments {
  packed_matrix w;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int tokens;
  product_output out;
  nf4_values codebook;
  division by;
  shared_plan plan;
};

template <weight_kind kind>
constexpr int chunk_blocks = chunk_vectors / decoder<kind>::vectors;

// ---- tokens in shared memory ----
// For each block of 64 columns and token 128 bytes, in the order in which lane 4n + t reads the operand of token n: two
// halves of four 16-byte pieces, piece t of half h for the steps 2h and 2h + 1. Odd tokens have their halves swapped, so that
// the lanes of two tokens meet in no bank.

__device__ int token_piece(const few_arguments &args, int block, int token, int half, int t) {
  int above = block >= args.plan.blocks_below ? args.plan.table_at + pair_table_bytes - args.plan.tokens_at -
                                                    args.plan.blocks_below * args.tokens * 128
                                              : 0;
  return args.plan.tokens_at + above + (block * args.tokens + token) * 128 + (half ^ (token & 1)) * 64 + t * 16;
}

__device__ uint4 eight_columns(const __nv_bfloat16 *row, int64_t col, int64_t cols) {
  if (col + 8 <= cols) return *reinterpret_cast<const uint4 *>(row + col);
  union {
    uint4 vector;
    __nv_bfloat16 item[8];
  } v = {make_uint4(0, 0, 0, 0)};
  for (int i = 0; i < 8; i++)
    if (col + i < cols) v.item[i] = row[col + i];
  return v.vector;
}

__device__ void stage_tokens(uint8_t *shared, const few_arguments &args) {
  int64_t vectors = args.w.col_blocks * 8;
  int turn = threadIdx.x / 8 % 4;  // lanes 8 apart write the same banks unless they take turns
  for (int token = 0; token < args.tokens; token++) {
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      uint4 v = eight_columns(args.x + token * args.x_stride, i * 8, args.w.cols);
      int step = i % 8 / 2, word = step % 2 * 2 + i % 2;
      for (int j = 0; j < 4; j++) {
        int t = (j + turn) % 4;
        reinterpret_cast<uint32_t *>(shared + token_piece(args, int(i / 8), token, step / 2, t))[word] = word_of(v, t);
      }
    }
  }
}

// ---- the stream of weights ----

template <weight_kind kind>
struct chunk {
  uint4 codes[chunk_vectors];
  __half2 scales[chunk_blocks<kind>];
};

// A warp's way through the matrix: of each tile that is its own, every chunk that is its own.
template <weight_kind kind>
struct chunk_stream {
  const few_arguments &args;
  int chunks, first;  // of a tile, and the warp's first
  int64_t tile;
  int at;
  uint64_t policy;

  __device__ void fetch_next(chunk<kind> &c) {
    if (tile >= args.w.row_tiles) return;
    int lane = threadIdx.x % 32;
    int64_t block = tile * args.w.col_blocks + at * chunk_blocks<kind>;
    const uint8_t *codes = args.w.codes + block * tile_bytes(kind) + lane * 16;
#pragma unroll
    for (int i = 0; i < chunk_vectors; i++) c.codes[i] = load_once(codes + i * 512, policy);
    if constexpr (decoder<kind>::scaled) {
      const __half2 *scales = args.w.scales + block * 8 + lane / 4;
#pragma unroll
      for (int i = 0; i < chunk_blocks<kind>; i++) c.scales[i] = __ldg(scales + i * 8);
    }
    at += args.by.warps;
    if (at < chunks) return;
    at = first;
    tile += gridDim.x * args.by.tiles;
  }
};

// ---- products ----

__device__ void multiply_add(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Unscaled codes times tokens, a block's scale applied to its sum.
template <weight_kind kind>
__device__ void multiply_block(float sums[4], const uint4 *codes, __half2 scales, const uint4 tokens[2],
                               const decoder<kind> &decode) {
  float c[4] = {0, 0, 0, 0};
#pragma unroll
  for (int s = 0; s < 4; s++) {
    uint32_t a[4];
    decode.step(codes, s, a);
    const uint4 &b = tokens[s / 2];
    multiply_add(c, a, s % 2 ? b.z : b.x, s % 2 ? b.w : b.y);
  }
  float2 scale = decoder<kind>::scaled ? __half22float2(scales) : make_float2(1, 1);
  sums[0] += scale.x * c[0];
  sums[1] += scale.x * c[1];
  sums[2] += scale.y * c[2];
  sums[3] += scale.y * c[3];
}

// What a lane holds of the tokens' operand for one block. Two of them in turn, so that loading the next need not wait.
struct token_registers {
  uint4 half[2];
};

// Where there is no such token the registers keep what they had: the columns of a product do not mix.
__device__ void load_if(bool there, uint4 &v, uint32_t address) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(address), "r"(int(there)));
}

template <weight_kind kind>
__device__ void multiply_chunk(float sums[4], const chunk<kind> &c, token_registers b[2], uint32_t shared,
                               const few_arguments &args, int first_block, const decoder<kind> &decode) {
  int token = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < chunk_blocks<kind>; i++) {
    uint32_t at = shared + token_piece(args, first_block + i, token, 0, t);
    load_if(token < args.tokens, b[i % 2].half[0], at);
    load_if(token < args.tokens, b[i % 2].half[1], at ^ 64);
    multiply_block<kind>(sums, c.codes + i * decoder<kind>::vectors, c.scales[i], b[i % 2].half, decode);
  }
}

// ---- sums of a tile: [tiles, warps, tokens, 16 rows], two buffers in turn ----

__device__ void leave_sums(float *partials, const float sums[4], int n_tokens) {
  float *of_warp = partials + threadIdx.x / 32 * n_tokens * tile_rows;
  int g = threadIdx.x % 32 / 4, token = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++)
    if (token + i % 2 < n_tokens) of_warp[(token + i % 2) * tile_rows + g + i / 2 * 8] = sums[i];
}

__device__ void write_sums(const float *partials, const few_arguments &args, int64_t first_tile, float unit) {
  int n = args.tokens * tile_rows;
  for (int i = threadIdx.x; i < n * args.by.tiles; i += blockDim.x) {
    int tile = i / n, j = i % n;
    int64_t row = (first_tile + tile) * tile_rows + j % tile_rows;
    if (row >= args.w.rows) continue;
    const float *of_tile = partials + tile * args.by.warps * n + j;
    float sum = 0;
    for (int warp = 0; warp < args.by.warps; warp++) sum += of_tile[warp * n];
    store_result(args.out, j / tile_rows, row, sum * unit);
  }
}

template <weight_kind kind>
__global__ void __launch_bounds__(warps_at_most * 32, 1) product_few(const __grid_constant__ few_arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  float *partials = reinterpret_cast<float *>(shared);
  int warp = threadIdx.x / 32, first = warp % args.by.warps;
  int chunks = int(args.w.col_blocks) / chunk_blocks<kind>;

  let_next_kernel_start();
  int64_t tiles = int64_t(blockIdx.x) * args.by.tiles;  // the first of those at hand
  chunk_stream<kind> stream = {args, chunks, first, tiles + warp / args.by.warps, first, evict_first_policy()};
  chunk<kind> ahead[chunks_ahead];
#pragma unroll
  for (int i = 0; i < chunks_ahead; i++) stream.fetch_next(ahead[i]);
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared + args.plan.table_at, args.codebook);
  float unit = decoder<kind>::scaled ? *args.w.unit : 1.f;
  decoder<kind> decode = {shared_address(shared + args.plan.table_at) + threadIdx.x % 32 * 4};
  wait_for_kernel_before();
  stage_tokens(shared, args);
  __syncthreads();

  int at = first, buffer = 0;
  float sums[4] = {0, 0, 0, 0};
  token_registers b[2] = {};
  while (tiles < args.w.row_tiles) {
#pragma unroll
    for (int i = 0; i < chunks_ahead; i++) {
      if (tiles >= args.w.row_tiles) break;
      multiply_chunk<kind>(sums, ahead[i], b, shared_address(shared), args, at * chunk_blocks<kind>, decode);
      stream.fetch_next(ahead[i]);
      at += args.by.warps;
      if (at < chunks) continue;

      float *at_hand = partials + buffer * (blockDim.x / 32) * args.tokens * tile_rows;
      leave_sums(at_hand, sums, args.tokens);
      __syncthreads();
      write_sums(at_hand, args, tiles, unit);  // the next tiles' sums go into the other buffer
      buffer ^= 1;
      at = first;
      tiles += gridDim.x * args.by.tiles;
      for (int j = 0; j < 4; j++) sums[j] = 0;
    }
  }
}

// ---- launching ----

// The number of warps, of at least half of those there may be, that leaves the fewest idle in the last round of chunks.
division divide(const packed_matrix &w) {
  int chunks = int(w.col_blocks * tile_bytes(w.kind) / chunk_bytes);
  if (chunks <= warps_at_most) return {warps_at_most / chunks, chunks};
  int best = warps_at_most;
  for (int warps = warps_at_most; warps >= warps_at_most / 2; warps--)
    if (ceil_div(chunks, warps) * warps < ceil_div(chunks, best) * best) best = warps;
  return {1, best};
}

shared_plan plan_shared(const product_context &context, const packed_matrix &w, int tokens) {
  division by = divide(w);
  int64_t tokens_at = align_up(2 * by.tiles * by.warps * tokens * tile_rows * int64_t(sizeof(float)), 128);
  if (w.kind != weight_kind::nf4) return {0, int(tokens_at), int(w.col_blocks), int(tokens_at + w.col_blocks * tokens * 128)};
  int64_t table_at = align_up(context.shared_start, pair_table_bytes) - context.shared_start;
  int64_t below = (table_at - tokens_at) / (tokens * 128);
  if (below > w.col_blocks) below = w.col_blocks;
  return {int(table_at), int(tokens_at), int(below),
          int(table_at + pair_table_bytes + (w.col_blocks - below) * tokens * 128)};
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  division by = divide(call.w);
  shared_plan plan = plan_shared(*call.context, call.w, call.tokens);
  few_arguments args = {call.w,  call.x, call.x_stride, call.tokens, call.out, call.context->codebook, by, plan};
  int64_t steps = ceil_div(call.w.row_tiles, by.tiles), blocks = call.context->multiprocessors;
  if (blocks > steps) blocks = steps;
  return launch(call, product_few<kind>, dim3(unsigned(blocks)), dim3(unsigned(by.tiles * by.warps * 32)),
                size_t(plan.bytes), args);
}

}  // namespace

int few_tokens_at_once(const product_context &context, const packed_matrix &w) {
  int tokens = few_tokens;
  while (tokens > 0 && plan_shared(context, w, tokens).bytes > context.shared_bytes) tokens--;
  return tokens;
}

cudaError_t prepare_few(const product_context &context) {
  void (*kernels[])(few_arguments) = {product_few<weight_kind::nf4>, product_few<weight_kind::int8>,
                                      product_few<weight_kind::bf16>};
  for (auto kernel : kernels) {
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t launch_few(const product_call &call) {
  switch (call.w.kind) {
    case weight_kind::nf4: return launch_kind<weight_kind::nf4>(call);
    case weight_kind::int8: return launch_kind<weight_kind::int8>(call);
    default: return launch_kind<weight_kind::bf16>(call);
  }
}

}  // namespace adaptrt
