// Products for up to 8 tokens: bound by the bytes of the weights, so everything serves the stream of loads.
//
// A block of threads keeps all tokens in shared memory and walks over tiles of 16 rows. Its warps take turns at the
// parts of the tiles' columns: each multiplies its part on tensor cores (16 rows by up to 8 tokens), block after block of 64
// columns, and reloads the registers of a block as soon as it is done. The sums of the parts meet in shared memory, where one
// more warp adds them in a fixed order. No warp waits for another, as long as it is not several tiles ahead.
#include "barrier.cuh"
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr int multiplying_warps = 15;  // and one more to add sums
constexpr int all_threads = (multiplying_warps + 1) * 32;
// Half of a multiprocessor for each block: the next product's can start beside it and load its first weights.
constexpr int blocks_beside = 2;
constexpr int chunk_vectors = 4;  // 16-byte loads of a lane in flight
constexpr int chunk_bytes = chunk_vectors * 512;
constexpr int parts_at_most = 16;
constexpr int tiles_in_flight = 2;

template <weight_kind kind>
constexpr int chunk_blocks = chunk_vectors / decoder<kind>::vectors;

// A row's columns: `chunks` chunks in `parts` parts of `part_chunks`, the last one perhaps shorter.
struct division {
  int chunks, part_chunks, parts;
};

// Offsets into shared memory. The pair table, for nf4, comes first.
struct shared_plan {
  int barriers, sums, tokens, bytes;
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

// Of the tile that is number n of a block of threads: its sums are at n % tiles_in_flight.
struct tile_barriers {
  uint64_t full[tiles_in_flight], empty[tiles_in_flight];
};

// ---- tokens in shared memory ----
// For each block of 64 columns and token 128 bytes, in the order in which lane 4n + t reads the operand of token n: two
// halves of four 16-byte pieces, piece t of half h for the steps 2h and 2h + 1. Odd tokens have their halves swapped, so that
// the lanes of two tokens meet in no bank.

__device__ int token_piece(int n_tokens, int block, int token, int half, int t) {
  return (block * n_tokens + token) * 128 + (half ^ (token & 1)) * 64 + t * 16;
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

__device__ void spread_columns(uint8_t *tokens, const uint4 &v, int n_tokens, int token, int vector) {
  int step = vector % 8 / 2, word = step % 2 * 2 + vector % 2;
  int turn = threadIdx.x / 8;  // lanes 8 apart write the same banks unless they take turns
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int t = (j + turn) % 4;
    int at = token_piece(n_tokens, vector / 8, token, step / 2, t) + word * 4;
    *reinterpret_cast<uint32_t *>(tokens + at) = word_of(v, t);
  }
}

__device__ void stage_tokens(uint8_t *tokens, const few_arguments &args) {
  constexpr int at_once = 4;  // loads in flight
  for (int i = threadIdx.x; i < args.w.col_blocks * 8; i += all_threads) {
    for (int first = 0; first < args.tokens; first += at_once) {
      uint4 v[at_once];
#pragma unroll
      for (int j = 0; j < at_once; j++)
        if (first + j < args.tokens) v[j] = eight_columns(args.x + (first + j) * args.x_stride, i * 8, args.w.cols);
#pragma unroll
      for (int j = 0; j < at_once; j++)
        if (first + j < args.tokens) spread_columns(tokens, v[j], args.tokens, first + j, i);
    }
  }
}

// ---- the way through the matrix ----

struct position {
  int tile;
  int turn;  // which of the tiles of this block of threads
  int part, chunk;
};

__device__ void next_part(position &p, const few_arguments &args, int turns) {
  p.part += turns;
  while (p.part >= args.by.parts) {
    p.part -= args.by.parts;
    p.turn++;
    p.tile += gridDim.x;
  }
  p.chunk = p.part * args.by.part_chunks;
}

__device__ position first_position(const few_arguments &args) {
  position p = {int(blockIdx.x), 0, 0, 0};
  next_part(p, args, threadIdx.x / 32);
  return p;
}

// True when the part goes on.
__device__ bool advance(position &p, const few_arguments &args) {
  p.chunk++;
  if (p.chunk < args.by.chunks && p.chunk < (p.part + 1) * args.by.part_chunks) return true;
  next_part(p, args, multiplying_warps);
  return false;
}

// The weights of a chunk that a lane holds.
template <weight_kind kind>
struct chunk {
  uint4 codes[chunk_vectors];
  __half2 scales[chunk_blocks<kind>];
};

template <weight_kind kind>
struct chunk_source {
  const uint8_t *codes;
  const __half2 *scales;
  uint64_t policy;

  __device__ void seek(const packed_matrix &w, const position &p) {
    int lane = threadIdx.x % 32;
    uint32_t block = p.tile * uint32_t(w.col_blocks) + p.chunk * chunk_blocks<kind>;
    codes = w.codes + uint64_t(block) * tile_bytes(kind) + lane * 16;
    if constexpr (decoder<kind>::scaled) scales = w.scales + uint64_t(block) * 8 + lane / 4;
  }
  __device__ void fetch_block(chunk<kind> &c, int i) const {
    constexpr int vectors = decoder<kind>::vectors;
#pragma unroll
    for (int j = i * vectors; j < (i + 1) * vectors; j++) c.codes[j] = load_once(codes + j * 512, policy);
    if constexpr (decoder<kind>::scaled) c.scales[i] = __ldg(scales + i * 8);
  }
};

// ---- products ----

__device__ void multiply_add(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What a lane holds of the tokens' operand for one block.
struct token_registers {
  uint4 half[2];
};

// Where there is no such token the registers keep what they had: the columns of a product do not mix.
__device__ void load_if(bool there, uint4 &v, uint32_t address) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(address), "r"(int(there)));
}

// Unscaled codes times tokens, a block's scale applied to its sum.
template <weight_kind kind>
__device__ void multiply_block(float sums[4], const uint4 *codes, __half2 scales, const token_registers &b,
                               const decoder<kind> &decode) {
  float c[4] = {0, 0, 0, 0};
#pragma unroll
  for (int s = 0; s < 4; s++) {
    uint32_t a[4];
    decode.step(codes, s, a);
    const uint4 &tokens = b.half[s / 2];
    multiply_add(c, a, s % 2 ? tokens.z : tokens.x, s % 2 ? tokens.w : tokens.y);
  }
  float2 scale = decoder<kind>::scaled ? __half22float2(scales) : make_float2(1, 1);
  sums[0] += scale.x * c[0];
  sums[1] += scale.x * c[1];
  sums[2] += scale.y * c[2];
  sums[3] += scale.y * c[3];
}

// ---- sums: [tiles_in_flight, parts, tokens, 16 rows] ----

__device__ float *sums_of(uint8_t *shared, const few_arguments &args, int turn, int part) {
  float *sums = reinterpret_cast<float *>(shared + args.plan.sums);
  return sums + (turn % tiles_in_flight * args.by.parts + part) * args.tokens * tile_rows;
}

__device__ void leave_sums(uint8_t *shared, tile_barriers &barriers, const few_arguments &args, const position &p,
                           const float sums[4]) {
  int slot = p.turn % tiles_in_flight, round = p.turn / tiles_in_flight;
  if (round > 0) wait_barrier(&barriers.empty[slot], (round - 1) % 2);
  float *of_part = sums_of(shared, args, p.turn, p.part);
  int g = threadIdx.x % 32 / 4, token = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++)
    if (token + i % 2 < args.tokens) of_part[(token + i % 2) * tile_rows + g + i / 2 * 8] = sums[i];
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive_barrier(&barriers.full[slot]);
}

__device__ void write_tile(const float *sums, const few_arguments &args, int64_t tile, float unit) {
  int n = args.tokens * tile_rows;
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    int64_t row = tile * tile_rows + i % tile_rows;
    if (row >= args.w.rows) continue;
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < args.by.parts; part++) sum += sums[part * n + i];
    store_result(args.out, i / tile_rows, row, sum * unit);
  }
}

__device__ void write_tiles(uint8_t *shared, tile_barriers &barriers, const few_arguments &args) {
  float unit = args.w.scales ? *args.w.unit : 1.f;
  int turn = 0;
  for (int64_t tile = blockIdx.x; tile < args.w.row_tiles; tile += gridDim.x, turn++) {
    int slot = turn % tiles_in_flight;
    wait_barrier(&barriers.full[slot], turn / tiles_in_flight % 2);
    write_tile(sums_of(shared, args, turn, 0), args, tile, unit);
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_barrier(&barriers.empty[slot]);
  }
}

template <weight_kind kind>
__device__ void multiply_parts(uint8_t *shared, tile_barriers &barriers, const few_arguments &args, position now,
                               chunk<kind> &weights, chunk_source<kind> &source) {
  int lane = threadIdx.x % 32, token = lane / 4;
  bool there = token < args.tokens;
  decoder<kind> decode = {uint32_t(lane * 4)};
  uint32_t tokens = shared_address(shared + args.plan.tokens) + token_piece(args.tokens, 0, token, 0, lane % 4);
  uint32_t block_stride = args.tokens * 128;
  token_registers b = {};
  float sums[4] = {0, 0, 0, 0};
  while (now.tile < args.w.row_tiles) {
    position next = now;
    bool goes_on = advance(next, args), more = next.tile < args.w.row_tiles;
    if (more) source.seek(args.w, next);
    uint32_t at = tokens + now.chunk * chunk_blocks<kind> * block_stride;
#pragma unroll
    for (int i = 0; i < chunk_blocks<kind>; i++, at += block_stride) {
      load_if(there, b.half[0], at);
      load_if(there, b.half[1], at ^ 64);
      multiply_block<kind>(sums, weights.codes + i * decoder<kind>::vectors, weights.scales[i], b, decode);
      if (more) source.fetch_block(weights, i);
    }
    if (!goes_on) {
      leave_sums(shared, barriers, args, now, sums);
      for (int i = 0; i < 4; i++) sums[i] = 0;
    }
    now = next;
  }
}

template <weight_kind kind>
__global__ void __launch_bounds__(all_threads, blocks_beside) product_few(const __grid_constant__ few_arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  tile_barriers &barriers = *reinterpret_cast<tile_barriers *>(shared + args.plan.barriers);
  bool multiplies = threadIdx.x / 32 < multiplying_warps;

  let_next_kernel_start();
  position start = first_position(args);
  chunk_source<kind> source = {nullptr, nullptr, evict_first_policy()};
  chunk<kind> weights = {};
  if (multiplies && start.tile < args.w.row_tiles) {
    source.seek(args.w, start);
#pragma unroll
    for (int i = 0; i < chunk_blocks<kind>; i++) source.fetch_block(weights, i);
  }
  if (threadIdx.x < tiles_in_flight) {
    init_barrier(&barriers.full[threadIdx.x], args.by.parts);
    init_barrier(&barriers.empty[threadIdx.x], 1);
  }
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, all_threads);
  wait_for_kernel_before();
  stage_tokens(shared + args.plan.tokens, args);
  __syncthreads();

  if (multiplies)
    multiply_parts<kind>(shared, barriers, args, start, weights, source);
  else
    write_tiles(shared, barriers, args);
}

// ---- launching ----

division divide(const packed_matrix &w) {
  int chunks = int(w.col_blocks * tile_bytes(w.kind) / chunk_bytes);
  int part_chunks = int(ceil_div(chunks, parts_at_most));
  return {chunks, part_chunks, int(ceil_div(chunks, part_chunks))};
}

shared_plan plan_shared(const packed_matrix &w, int tokens) {
  int64_t barriers = w.kind == weight_kind::nf4 ? pair_table_bytes : 0;
  int64_t sums = align_up(barriers + sizeof(tile_barriers), 128);
  int64_t staged = sums + tiles_in_flight * divide(w).parts * tokens * tile_rows * int64_t(sizeof(float));
  return {int(barriers), int(sums), int(staged), int(staged + w.col_blocks * tokens * 128)};
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  shared_plan plan = plan_shared(call.w, call.tokens);
  few_arguments args = {call.w,   call.x, call.x_stride, call.tokens, call.out, call.context->codebook,
                        divide(call.w), plan};
  int64_t blocks = call.context->multiprocessors;
  if (blocks > call.w.row_tiles) blocks = call.w.row_tiles;
  return launch(call, product_few<kind>, dim3(unsigned(blocks)), dim3(all_threads), size_t(plan.bytes), args);
}

}  // namespace

int few_tokens_at_once(const product_context &context, const packed_matrix &w) {
  int tokens = few_tokens;
  while (tokens > 0 && plan_shared(w, tokens).bytes > context.shared_bytes) tokens--;
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
