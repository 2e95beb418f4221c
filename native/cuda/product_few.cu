// Products for up to 8 tokens: bound by the bytes of the weights, so everything serves the stream of loads.
//
// A block of threads keeps all tokens in shared memory and takes a run of tiles of 16 rows. The tiles' blocks of 64
// columns lie one after another in memory and are dealt out to its warps evenly, a run to each: a warp copies its
// run through a small ring of its own, decodes a block at a time and multiplies it on tensor cores (16 rows by up
// to 8 tokens). Warps do not wait for each other until the end, when the sums of tiles that several warps share are
// added in the order of the columns.
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr int warps_at_most = 16, warps_enough = 8;
constexpr int chunk_bytes = 2048, scale_bytes = 128;  // codes copied at a time, and room for their scales
constexpr int slot_bytes = chunk_bytes + scale_bytes;
constexpr int chunks_ahead = 2;

template <weight_kind kind>
constexpr int chunk_blocks = chunk_bytes / tile_bytes(kind);

// Offsets into shared memory. The pair table, for nf4, comes first.
struct shared_plan {
  int weights, sums, tokens, bytes;
};

struct few_arguments {
  packed_matrix w;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int tokens;
  product_output out;
  nf4_values codebook;
  shared_plan plan;
};

// ---- tokens in shared memory ----
// For each block of 64 columns and token 128 bytes, in the order in which lane 4n + t reads the operand of token n:
// two halves of four 16-byte pieces, piece t of half h for the steps 2h and 2h + 1. Odd tokens have their halves
// swapped, so that the lanes of two tokens meet in no bank.

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

// ---- the division of work ----

// The tiles of a block of threads, and the run of blocks of columns of each of its warps, counted from the first
// tile's first.
struct division {
  int first_tile, tiles, blocks, warps;

  __device__ explicit division(const few_arguments &args) {
    int few = int(args.w.row_tiles) / gridDim.x, more = int(args.w.row_tiles) % gridDim.x;  // so many have one more
    first_tile = few * blockIdx.x + min(int(blockIdx.x), more);
    tiles = few + (int(blockIdx.x) < more);
    blocks = tiles * int(args.w.col_blocks);
    warps = blockDim.x / 32;
  }
  __device__ int first_of(int warp) const { return blocks * warp / warps; }
  __device__ int warp_of(int block) const { return ((block + 1) * warps - 1) / blocks; }
};

// ---- the stream of weights ----

// A warp's run on its way through a ring in shared memory. A lane copies just the codes that it will read.
template <weight_kind kind>
struct weight_stream {
  static constexpr int scale_vectors = decoder<kind>::scaled ? chunk_blocks<kind> * 2 : 0;
  const uint8_t *codes;
  const __half2 *scales;
  int chunks;  // still to be fetched
  uint32_t ring, slot;
  uint64_t policy;

  __device__ weight_stream(const few_arguments &args, int64_t first_block, int blocks, uint32_t ring)
      : chunks((blocks + chunk_blocks<kind> - 1) / chunk_blocks<kind>), ring(ring), slot(ring),
        policy(evict_first_policy()) {
    int lane = threadIdx.x % 32;
    codes = args.w.codes + first_block * tile_bytes(kind) + lane * 16;
    scales = args.w.scales + first_block * 8 + lane * 4;
  }
  // Every call counts as one more chunk on its way, even past the end. The last chunk may reach over the run's end.
  __device__ void fetch() {
    int lane = threadIdx.x % 32;
    if (chunks-- > 0) {
#pragma unroll
      for (int i = 0; i < chunk_bytes / 512; i++) copy_async(slot + i * 512 + lane * 16, codes + i * 512, policy);
      if (lane < scale_vectors) copy_async(slot + chunk_bytes + lane * 16, scales, policy);
      codes += chunk_bytes;
      scales += chunk_blocks<kind> * 8;
    }
    commit_copies();
    slot = slot == ring ? ring + slot_bytes : ring;
    static_assert(chunks_ahead == 2, "the ring has two slots");
  }
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
__device__ void multiply_block(float sums[4], uint32_t slot, int i, const uint4 tokens[2],
                               const decoder<kind> &decode) {
  int lane = threadIdx.x % 32;
  uint4 codes[decoder<kind>::vectors];
#pragma unroll
  for (int j = 0; j < decoder<kind>::vectors; j++)
    codes[j] = load_vector(slot + i * tile_bytes(kind) + j * 512 + lane * 16);
  uint32_t a[4][4];
#pragma unroll
  for (int s = 0; s < 4; s++) decode.step(codes, s, a[s]);
  float c[4] = {0, 0, 0, 0};
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const uint4 &b = tokens[s / 2];
    multiply_add(c, a[s], s % 2 ? b.z : b.x, s % 2 ? b.w : b.y);
  }
  float2 scale = make_float2(1, 1);
  if constexpr (decoder<kind>::scaled) scale = __half22float2(load_half2(slot + chunk_bytes + i * 32 + lane / 4 * 4));
  sums[0] += scale.x * c[0];
  sums[1] += scale.x * c[1];
  sums[2] += scale.y * c[2];
  sums[3] += scale.y * c[3];
}

// ---- sums: register i of lane 4g + t is of row g + 8 (i / 2) and token 2t + i % 2 ----

__device__ void write_whole_tile(const few_arguments &args, int tile, const float sums[4], float unit) {
  int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    int64_t row = int64_t(tile) * tile_rows + lane / 4 + i / 2 * 8;
    int token = lane % 4 * 2 + i % 2;
    if (row < args.w.rows && token < args.tokens) store_result(args.out, token, row, sums[i] * unit);
  }
}

// Of tiles that are not a warp's alone it has at most two parts: the end of one that another warp began, and the
// beginning or the middle of one that another warp ends.
enum tile_part : int { tile_end, tile_beginning };

__device__ float *part_of(uint8_t *shared, const few_arguments &args, int warp, tile_part part) {  // [tokens, 16]
  return reinterpret_cast<float *>(shared + args.plan.sums) + (warp * 2 + part) * args.tokens * tile_rows;
}

__device__ void leave_part(float *to, const few_arguments &args, const float sums[4]) {
  int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    int token = lane % 4 * 2 + i % 2;
    if (token < args.tokens) to[token * tile_rows + lane / 4 + i / 2 * 8] = sums[i];
  }
}

__device__ void write_shared_tiles(uint8_t *shared, const few_arguments &args, const division &by, float unit) {
  int n = args.tokens * tile_rows, cols = int(args.w.col_blocks);
  for (int i = threadIdx.x; i < by.tiles * n; i += blockDim.x) {
    int tile = i / n, item = i % n, first = by.warp_of(tile * cols), last = by.warp_of((tile + 1) * cols - 1);
    int64_t row = int64_t(by.first_tile + tile) * tile_rows + item % tile_rows;
    if (first == last || row >= args.w.rows) continue;
    float sum = 0;
    for (int warp = first; warp < last; warp++) sum += part_of(shared, args, warp, tile_beginning)[item];
    sum += part_of(shared, args, last, tile_end)[item];
    store_result(args.out, item / tile_rows, row, sum * unit);
  }
}

template <weight_kind kind>
__device__ void multiply_run(uint8_t *shared, const few_arguments &args, const division &by,
                             weight_stream<kind> &stream, float unit) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = lane / 4;
  int block = by.first_of(warp), end = by.first_of(warp + 1), cols = int(args.w.col_blocks);
  int tile = block / cols, col = block % cols;
  bool there = token < args.tokens, whole = col == 0;
  uint32_t first_tokens = shared_address(shared + args.plan.tokens) + token_piece(args.tokens, 0, token, 0, lane % 4);
  uint32_t block_stride = args.tokens * 128, tokens = first_tokens + col * block_stride;
  decoder<kind> decode = {shared_address(shared) - shared_start + lane * 4};
  uint4 b[2] = {};
  float sums[4] = {0, 0, 0, 0};
  while (block < end) {
    wait_for_copies<chunks_ahead - 1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < chunk_blocks<kind>; i++) {
      if (block + i >= end) break;
      load_if(there, b[0], tokens);
      load_if(there, b[1], tokens ^ 64);
      multiply_block<kind>(sums, stream.slot, i, b, decode);
      tokens += block_stride;
      if (++col < cols) continue;
      if (whole)
        write_whole_tile(args, by.first_tile + tile, sums, unit);
      else
        leave_part(part_of(shared, args, warp, tile_end), args, sums);
      tile++, col = 0, whole = true, tokens = first_tokens;
      sums[0] = sums[1] = sums[2] = sums[3] = 0;
    }
    block += chunk_blocks<kind>;
    __syncwarp();
    stream.fetch();
  }
  if (col > 0) leave_part(part_of(shared, args, warp, tile_beginning), args, sums);
}

template <weight_kind kind>
__global__ void __launch_bounds__(warps_at_most * 32, 1) product_few(const __grid_constant__ few_arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  division by(args);
  int warp = threadIdx.x / 32, first = by.first_of(warp);
  weight_stream<kind> stream(args, int64_t(by.first_tile) * args.w.col_blocks + first, by.first_of(warp + 1) - first,
                             shared_address(shared + args.plan.weights) + warp * chunks_ahead * slot_bytes);
  for (int i = 0; i < chunks_ahead; i++) stream.fetch();
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, blockDim.x);
  float unit = decoder<kind>::scaled ? *args.w.unit : 1.f;
  wait_for_kernel_before();
  let_next_kernel_start();  // not earlier: next_sees_input
  stage_tokens(shared + args.plan.tokens, args);
  __syncthreads();
  multiply_run<kind>(shared, args, by, stream, unit);
  __syncthreads();
  write_shared_tiles(shared, args, by, unit);
}

// ---- launching ----

shared_plan plan_shared(const packed_matrix &w, int tokens, int warps) {
  shared_plan plan;
  plan.weights = w.kind == weight_kind::nf4 ? pair_table_bytes : 0;
  plan.sums = plan.weights + warps * chunks_ahead * slot_bytes;
  plan.tokens = plan.sums + warps * 2 * tokens * tile_rows * int(sizeof(float));
  plan.bytes = int(plan.tokens + w.col_blocks * tokens * 128);
  return plan;
}

// As many warps as there is shared memory for, or 0.
int warps_for(const product_context &context, const packed_matrix &w, int tokens) {
  int warps = warps_at_most;
  while (warps > 0 && plan_shared(w, tokens, warps).bytes > context.shared_bytes) warps--;
  return warps;
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  int warps = warps_for(*call.context, call.w, call.tokens);
  shared_plan plan = plan_shared(call.w, call.tokens, warps);
  few_arguments args = {call.w, call.x, call.x_stride, call.tokens, call.out, call.context->codebook, plan};
  int64_t blocks = call.context->multiprocessors;
  if (blocks > call.w.row_tiles) blocks = call.w.row_tiles;
  return launch(call, product_few<kind>, dim3(unsigned(blocks)), dim3(warps * 32), size_t(plan.bytes), args);
}

}  // namespace

// So many that enough warps have room beside them, or one with any warps, or none.
int few_tokens_at_once(const product_context &context, const packed_matrix &w) {
  int tokens = few_tokens;
  while (tokens > 1 && warps_for(context, w, tokens) < warps_enough) tokens--;
  return warps_for(context, w, tokens) > 0 ? tokens : 0;
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
