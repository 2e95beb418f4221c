// Products for up to 8 tokens: bound by the bytes of the weights, so everything serves the stream of loads.
//
// A block of threads keeps all tokens in shared memory and walks over tiles of 16 rows. Its warps take turns at the
// parts of the tiles' columns: each has the next chunks of its own weights on their way to its own piece of shared memory,
// decodes a block of 64 columns at a time and multiplies it on tensor cores (16 rows by up to 8 tokens). The sums of the parts
// meet in shared memory, where one more warp adds them in a fixed order. No warp waits for another, as long as it is not
// several tiles ahead.
#include "barrier.cuh"
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr int warps_at_most = 24, warps_at_least = 8;  // one of them adds sums
constexpr int chunk_bytes = 2048, scale_bytes = 128;    // of a tile's codes, and room for their scales
constexpr int slot_bytes = chunk_bytes + scale_bytes;
constexpr int chunks_ahead = 2;
constexpr int parts_at_most = 16;
constexpr int tiles_in_flight = 2;

template <weight_kind kind>
constexpr int chunk_blocks = chunk_bytes / tile_bytes(kind);

// A row's columns: `chunks` chunks in `parts` parts of `part_chunks`, the last one perhaps shorter.
struct division {
  int chunks, part_chunks, parts;
};

// Offsets into shared memory. The pair table, for nf4, comes first.
struct shared_plan {
  int barriers, weights, sums, tokens, bytes;
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
  int warps;  // that multiply
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
  for (int i = threadIdx.x; i < args.w.col_blocks * 8; i += blockDim.x) {
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
  next_part(p, args, args.warps);
  return false;
}

// A warp's own ring of chunks in shared memory. A lane copies just the codes that it will read.
template <weight_kind kind>
struct chunk_ring {
  uint32_t slots, slot;
  uint64_t policy;
  position next;  // to be fetched

  // Every call counts as one more chunk on its way, even past the end.
  __device__ void fetch(const few_arguments &args) {
    if (next.tile < args.w.row_tiles) {
      int lane = threadIdx.x % 32;
      uint32_t block = next.tile * uint32_t(args.w.col_blocks) + next.chunk * chunk_blocks<kind>;
      const uint8_t *codes = args.w.codes + uint64_t(block) * tile_bytes(kind) + lane * 16;
#pragma unroll
      for (int i = 0; i < chunk_bytes / 512; i++) copy_async(slot + i * 512 + lane * 16, codes + i * 512, policy);
      constexpr int scale_vectors = decoder<kind>::scaled ? chunk_blocks<kind> * 2 : 0;
      if (lane < scale_vectors)
        copy_async(slot + chunk_bytes + lane * 16, args.w.scales + uint64_t(block) * 8 + lane * 4, policy);
      advance(next, args);
    }
    commit_copies();
    step();
  }
  __device__ void step() { slot = slot + slot_bytes < slots + chunks_ahead * slot_bytes ? slot + slot_bytes : slots; }
};

// ---- products ----

__device__ void multiply_add(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where there is no such token the registers keep what they had: the columns of a product do not mix.
__device__ void load_if(bool there, uint4 &v, uint32_t address) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(address), "r"(int(there)));
}

// Unscaled codes times tokens, a block's scale applied to its sum.
template <weight_kind kind>
__device__ void multiply_block(float sums[4], const uint4 *codes, __half2 scales, const uint4 tokens[2],
                               const decoder<kind> &decode) {
  uint32_t a[4][4];
#pragma unroll
  for (int s = 0; s < 4; s++) decode.step(codes, s, a[s]);
  float c[2][4] = {};  // two sums, so that one need not wait for the other
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const uint4 &b = tokens[s / 2];
    multiply_add(c[s % 2], a[s], s % 2 ? b.z : b.x, s % 2 ? b.w : b.y);
  }
  float2 scale = decoder<kind>::scaled ? __half22float2(scales) : make_float2(1, 1);
  sums[0] += scale.x * (c[0][0] + c[1][0]);
  sums[1] += scale.x * (c[0][1] + c[1][1]);
  sums[2] += scale.y * (c[0][2] + c[1][2]);
  sums[3] += scale.y * (c[0][3] + c[1][3]);
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
__device__ void multiply_parts(uint8_t *shared, tile_barriers &barriers, const few_arguments &args,
                               chunk_ring<kind> &ring) {
  int lane = threadIdx.x % 32, token = lane / 4;
  bool there = token < args.tokens;
  decoder<kind> decode = {uint32_t(lane * 4)};
  uint32_t tokens = shared_address(shared + args.plan.tokens) + token_piece(args.tokens, 0, token, 0, lane % 4);
  uint32_t block_stride = args.tokens * 128;
  uint4 b[2] = {};
  float sums[4] = {0, 0, 0, 0};
  for (position now = first_position(args); now.tile < args.w.row_tiles;) {
    wait_for_copies<chunks_ahead - 1>();
    __syncwarp();
    uint32_t at = tokens + now.chunk * chunk_blocks<kind> * block_stride;
#pragma unroll
    for (int i = 0; i < chunk_blocks<kind>; i++, at += block_stride) {
      uint4 codes[decoder<kind>::vectors];
#pragma unroll
      for (int j = 0; j < decoder<kind>::vectors; j++)
        codes[j] = load_vector(ring.slot + i * tile_bytes(kind) + j * 512 + lane * 16);
      __half2 scales = decoder<kind>::scaled ? load_half2(ring.slot + chunk_bytes + i * 32 + lane / 4 * 4) : __half2();
      load_if(there, b[0], at);
      load_if(there, b[1], at ^ 64);
      multiply_block<kind>(sums, codes, scales, b, decode);
    }
    __syncwarp();
    ring.fetch(args);
    position before = now;
    if (advance(now, args)) continue;
    leave_sums(shared, barriers, args, before, sums);
    for (int i = 0; i < 4; i++) sums[i] = 0;
  }
}

template <weight_kind kind>
__global__ void __launch_bounds__(warps_at_most * 32, 1) product_few(const __grid_constant__ few_arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  tile_barriers &barriers = *reinterpret_cast<tile_barriers *>(shared + args.plan.barriers);
  int warp = threadIdx.x / 32;

  let_next_kernel_start();
  uint32_t slots = shared_address(shared + args.plan.weights) + warp * chunks_ahead * slot_bytes;
  chunk_ring<kind> ring = {slots, slots, evict_first_policy(), first_position(args)};
  if (warp < args.warps)
    for (int i = 0; i < chunks_ahead; i++) ring.fetch(args);
  if (threadIdx.x < tiles_in_flight) {
    init_barrier(&barriers.full[threadIdx.x], args.by.parts);
    init_barrier(&barriers.empty[threadIdx.x], 1);
  }
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, blockDim.x);
  wait_for_kernel_before();
  stage_tokens(shared + args.plan.tokens, args);
  __syncthreads();

  if (warp < args.warps)
    multiply_parts<kind>(shared, barriers, args, ring);
  else
    write_tiles(shared, barriers, args);
}

// ---- launching ----

division divide(const packed_matrix &w) {
  int chunks = int(w.col_blocks * tile_bytes(w.kind) / chunk_bytes);
  int part_chunks = int(ceil_div(chunks, parts_at_most));
  return {chunks, part_chunks, int(ceil_div(chunks, part_chunks))};
}

shared_plan plan_shared(const packed_matrix &w, int tokens, int warps) {
  shared_plan plan;
  plan.barriers = w.kind == weight_kind::nf4 ? pair_table_bytes : 0;
  plan.weights = int(align_up(plan.barriers + sizeof(tile_barriers), 128));
  plan.sums = plan.weights + warps * chunks_ahead * slot_bytes;
  plan.tokens = plan.sums + tiles_in_flight * divide(w).parts * tokens * tile_rows * int(sizeof(float));
  plan.bytes = int(plan.tokens + w.col_blocks * tokens * 128);
  return plan;
}

// As many warps as there is shared memory for; 0 when there is not enough for a few.
int warps_for(const product_context &context, const packed_matrix &w, int tokens) {
  int warps = warps_at_most - 1;
  while (warps >= warps_at_least - 1 && plan_shared(w, tokens, warps).bytes > context.shared_bytes) warps--;
  return warps >= warps_at_least - 1 ? warps : 0;
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  int warps = warps_for(*call.context, call.w, call.tokens);
  shared_plan plan = plan_shared(call.w, call.tokens, warps);
  few_arguments args = {call.w,   call.x, call.x_stride, call.tokens, call.out, call.context->codebook,
                        divide(call.w), plan, warps};
  int64_t blocks = call.context->multiprocessors;
  if (blocks > call.w.row_tiles) blocks = call.w.row_tiles;
  return launch(call, product_few<kind>, dim3(unsigned(blocks)), dim3((warps + 1) * 32), size_t(plan.bytes), args);
}

}  // namespace

int few_tokens_at_once(const product_context &context, const packed_matrix &w) {
  int tokens = few_tokens;
  while (tokens > 0 && !warps_for(context, w, tokens)) tokens--;
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
