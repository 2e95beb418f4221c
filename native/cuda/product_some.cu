// Products for 9 to 112 tokens on Hopper (sm_90a): too many for product_few.cu, bound by decoding rather than by the tensor
// cores, which product_many.cu is for.
//
// A block of threads takes a run of tiles of 16 rows, one a warp, and all columns or a part of them; where it has more
// tiles than warps it goes through the columns several times. Weights come into registers, a chunk ahead, are decoded and
// scaled there and are the first operand of a warpgroup's products, while other warpgroups decode; tokens come through a
// ring in shared memory that one thread fills. Where rows are too few for all multiprocessors, several blocks ("splits")
// share the columns of the same rows. Each leaves its sums, and when all have, each adds up a share of them, in the order of
// the columns. They are neighbours, so that they run at the same time: blocks that wait for others that have no place yet
// are the last ones, and those before them leave.
#include <algorithm>

#include "hopper.cuh"
#include "launch.cuh"

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#pragma nv_diag_suppress 177  // other architectures get a kernel without a body
#endif

namespace adaptrt {
namespace {

constexpr int warpgroups = 4, warps = warpgroups * 4, multiplying_threads = warps * 32;
constexpr int copying_threads = 128, threads = multiplying_threads + copying_threads;  // one of them copies
constexpr int multiplying_registers = 112, copying_registers = 24;  // together not more than the kernel starts with
constexpr int chunk_bytes = 2048, chunk_vectors = chunk_bytes / 512;  // codes of a row tile; 16-byte loads of a lane
constexpr int chunks_announced = 2;  // ahead of the one that comes into registers
constexpr int most_splits = 8;

template <weight_kind kind>
constexpr int chunk_blocks = chunk_bytes / tile_bytes(kind);

template <int n>  // whether registers hold two chunks besides the sums of n tokens
constexpr bool room_for_two = n <= 64;

// The ring of stages, each n tokens of a block of columns.
constexpr int most_stages = 16, shared_bytes_at_most = 227 * 1024;
constexpr int barriers_at = pair_table_bytes, tokens_at = barriers_at + 1024;

template <int n>
constexpr int stage_bytes = n * block_cols * int(sizeof(__nv_bfloat16));

template <int n>  // whole chunks of them
constexpr int stages = std::min(most_stages, (shared_bytes_at_most - tokens_at) / stage_bytes<n>) / chunk_vectors * chunk_vectors;

template <int n>
constexpr int shared_bytes = tokens_at + stages<n> * stage_bytes<n>;

struct some_arguments {
  packed_matrix w;
  int tokens;
  product_output out;
  nf4_values codebook;
  int splits;
  int tiles, more;  // of the splits of one group of rows; the first `more` groups have one more
  int passes, pass_tiles;
  uint32_t *counts;  // [groups], zero
  float4 *parts;     // [groups, splits, n / 8, multiplying_threads]
  bool ready;        // tokens are there when a block starts
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct stage_barriers {
  uint64_t full[most_stages], empty[most_stages];
};

// ---- the division of work ----

// What a block has: tiles of rows, and a part of the columns in chunks. Splits are a power of two.
struct division {
  int group, split, first_tile, tiles, passes, pass_tiles, first_chunk, chunks;

  __device__ division(const some_arguments &args, int chunk_blocks)
      : passes(args.passes), pass_tiles(args.pass_tiles) {
    int log_splits = 31 - __clz(args.splits), all_chunks = int(args.w.col_blocks) / chunk_blocks;
    group = int(blockIdx.x) >> log_splits, split = int(blockIdx.x) & (args.splits - 1);
    first_tile = args.tiles * group + min(group, args.more);
    tiles = args.tiles + (group < args.more);
    first_chunk = all_chunks * split >> log_splits;
    chunks = (all_chunks * (split + 1) >> log_splits) - first_chunk;
  }
  __device__ int first_of(int pass) const { return first_tile + pass_tiles * pass; }
  __device__ int tiles_of(int pass) const { return min(pass_tiles, tiles - pass_tiles * pass); }
};

// A chunk's place in the ring, and the parity of its barriers' phase.
template <int stages, int blocks>
struct ring {
  int stage = 0, parity = 0;
  __device__ void next() {
    stage += blocks;
    if (stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// ---- tokens ----

template <int n>
__device__ void prepare(const CUtensorMap &x, stage_barriers &barriers) {
  prefetch_map(x);
  for (int i = 0; i < stages<n>; i++) {
    init_barrier(&barriers.full[i], 1);
    init_barrier(&barriers.empty[i], warpgroups);
  }
  publish_barriers();
}

template <weight_kind kind, int n>
__device__ void fetch_tokens(const division &by, const CUtensorMap &x, stage_barriers &barriers, uint8_t *shared) {
  ring<stages<n>, 1> at;
  int first = by.first_chunk * chunk_blocks<kind>, end = first + by.chunks * chunk_blocks<kind>;
  for (int pass = 0; pass < by.passes; pass++)
    for (int block = first; block < end; block++, at.next()) {
      wait_barrier(&barriers.empty[at.stage], at.parity ^ 1);
      expect_bytes(&barriers.full[at.stage], stage_bytes<n>);
      copy_box(shared + tokens_at + at.stage * stage_bytes<n>, x, block * block_cols, 0,
               &barriers.full[at.stage]);
    }
}

// ---- weights ----

// Not `.nc`, as others load weights: the compiler moves such loads down to just before they are waited for.
__device__ uint4 fetch_codes(const void *from, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from), "l"(policy) : "memory");
  return v;
}
__device__ __half2 fetch_scales(const __half2 *from, uint64_t policy) {
  uint32_t bits;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
               : "=r"(bits) : "l"(from), "l"(policy) : "memory");
  return *reinterpret_cast<__half2 *>(&bits);
}

// A lane's part of a chunk.
template <weight_kind kind>
struct weight_chunk {
  uint4 codes[chunk_vectors];
  __half2 scales[chunk_blocks<kind>];
};

// A warp's tiles, pass after pass, on their way into registers, and `announced`: to L2 before.
template <weight_kind kind, bool announced>
struct weight_stream {
  static constexpr int blocks = chunk_blocks<kind>, vectors = decoder<kind>::vectors;
  const some_arguments &args;
  const division &by;
  const uint8_t *codes;
  const __half2 *scales;
  int pass, chunk;
  bool present;  // there is a tile for this warp
  uint64_t policy;

  __device__ weight_stream(const some_arguments &args, const division &by)
      : args(args), by(by), pass(0), chunk(0), policy(evict_first_policy()) {
    begin_tile();
  }
  __device__ void begin_tile() {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    present = pass < by.passes && warp < by.tiles_of(pass);
    int64_t block = int64_t(by.first_of(pass) + warp) * args.w.col_blocks + by.first_chunk * blocks;
    codes = args.w.codes + block * tile_bytes(kind) + lane * 16;
    scales = args.w.scales + block * 8 + lane / 4;
  }
  // n blocks of the next chunk; after its last one the stream goes on.
  template <int first, int n>
  __device__ void fetch(weight_chunk<kind> &to) {
    if (present) {
      if (first == 0 && announced) announce_chunk();
#pragma unroll
      for (int i = first; i < first + n; i++) {
#pragma unroll
        for (int j = 0; j < vectors; j++)
          to.codes[i * vectors + j] = fetch_codes(codes + (i * vectors + j) * 512, policy);
        if constexpr (decoder<kind>::scaled) to.scales[i] = fetch_scales(scales + i * 8, policy);
      }
    }
    if (first + n == blocks) step();
  }
  // A line of codes a lane, and one of scales.
  __device__ void announce_chunk() const {
    if (chunk + chunks_announced >= by.chunks) return;
    int lane = threadIdx.x % 32;
    const void *line = lane < 16 ? codes + chunks_announced * chunk_bytes + lane * (128 - 16)
                                 : static_cast<const void *>(scales + chunks_announced * blocks * 8);
    if (lane <= 16) asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
  }
  __device__ void step() {
    codes += chunk_bytes;
    scales += blocks * 8;
    if (++chunk < by.chunks) return;
    chunk = 0;
    pass++;
    begin_tile();
  }
};

// ---- barriers ----

// Barrier 0 is the whole block's, 1 that of those who multiply, the others are for each warpgroup.
__device__ void wait_for_block() { asm volatile("bar.sync 0, %0;" ::"n"(threads) : "memory"); }
__device__ void arrive_at_block() { asm volatile("bar.arrive 0, %0;" ::"n"(threads) : "memory"); }
__device__ void wait_for_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(multiplying_threads) : "memory"); }
__device__ void wait_for_warpgroup() { asm volatile("bar.sync %0, 128;" ::"r"(2 + int(threadIdx.x) / 128) : "memory"); }

// What a block wrote before it counts itself in is seen by who has seen it counted.
__device__ void count_in(uint32_t *count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ void wait_for_count(uint32_t *count, uint32_t wanted) {
  uint32_t value = 0;
  while (value < wanted) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
}

// ---- multiplying ----

template <weight_kind kind, int n>
struct multiplier {
  static constexpr int blocks = chunk_blocks<kind>, sums_of_thread = n / 2;


  const some_arguments &args;
  const division &by;
  uint8_t *shared;
  stage_barriers &barriers;
  decoder<kind> decode;
  weight_stream<kind, !room_for_two<n>> &stream;
  weight_chunk<kind> &weights;
  ring<stages<n>, blocks> tokens;
  float sums[sums_of_thread];

  __device__ void release(int stage) {
    if (threadIdx.x % 128 == 0) arrive(&barriers.empty[stage]);
  }

  // Without room for a second chunk, half of the next one takes the place of that half of this one which was decoded, once
  // the other half is there: whoever waits for one load waits for all before it.
  __device__ void refill(int i, bool first_chunk) {
    constexpr int half = blocks / 2;
    if (i == 0 && !first_chunk) stream.template fetch<half, half>(weights);
    if (i == half) stream.template fetch<0, half>(weights);
  }

  __device__ void multiply_block(int i, bool first_chunk) {
    int stage = tokens.stage + i;
    uint64_t b = describe_operand(shared + tokens_at) + stage * (stage_bytes<n> >> 4);
    uint32_t a[4][4];
    decode_tile<kind>(a, &weights.codes[i * decoder<kind>::vectors], weights.scales[i], decode);
    if constexpr (!room_for_two<n>) refill(i, first_chunk);
    wait_barrier(&barriers.full[stage], tokens.parity);
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; step++) warpgroup_product<n>(sums, a[step], b + step * operand_step);
    products_commit();
    products_wait<0>();
    release(stage);
  }

  __device__ void multiply_pass(bool first_chunk) {
#pragma unroll 1
    for (int chunk = 0; chunk < by.chunks; chunk++, tokens.next()) {
      weight_chunk<kind> next;
      if constexpr (room_for_two<n>) stream.template fetch<0, blocks>(next);
#pragma unroll
      for (int i = 0; i < blocks; i++) multiply_block(i, first_chunk);
      if constexpr (room_for_two<n>) weights = next;
      first_chunk = false;
    }
  }

  // A warpgroup without tiles lets the tokens pass, together, as a warp left far behind would miss a whole round of the
  // ring. It has no tiles in passes to come, either.
  __device__ void skip_pass() {
    for (int chunk = 0; chunk < by.chunks; chunk++, tokens.next()) {
#pragma unroll 1
      for (int i = 0; i < blocks; i++) {
        wait_barrier(&barriers.full[tokens.stage + i], tokens.parity);
        wait_for_warpgroup();
        release(tokens.stage + i);
      }
    }
  }

  // Sum i is of row g + 8 (i / 2 % 2) of the warp's tile and token 8 (i / 4) + 2t + i % 2, in lane 4g + t.
  __device__ int token_of(int i) const { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }
  __device__ int64_t row_of(int tile, int i) const {
    return int64_t(tile) * tile_rows + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
  }

  // Short code, since it runs once.
  template <typename store>
  __device__ void for_each_sum(int tile, store store_sum) const {
    int64_t row = row_of(tile, 0), at = token_of(0) * args.out.stride + row;
    bool upper = row < args.w.rows, lower = row + 8 < args.w.rows;
#pragma unroll
    for (int i = 0; i < sums_of_thread; i += 4, at += 8 * args.out.stride)
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        if (token_of(i + odd) >= args.tokens) continue;
        if (upper) store_sum(at + odd * args.out.stride, sums[i + odd]);
        if (lower) store_sum(at + odd * args.out.stride + 8, sums[i + 2 + odd]);
      }
  }

  __device__ void write_tile(int tile, float unit) const {
    float *y = static_cast<float *>(args.out.y);
    __nv_bfloat16 *rounded = static_cast<__nv_bfloat16 *>(args.out.y);
    if (args.out.bf16)
      for_each_sum(tile, [&](int64_t i, float sum) { rounded[i] = __float2bfloat16(sum * unit); });
    else if (args.out.accumulate)
      for_each_sum(tile, [&](int64_t i, float sum) { y[i] += sum * unit; });
    else
      for_each_sum(tile, [&](int64_t i, float sum) { y[i] = sum * unit; });
  }

  // This split's share of what the same warps of all splits left, four sums at a time and as many as there are registers for.
  template <int splits>
  __device__ void join(int tile, float unit) const {
    constexpr int fours = sums_of_thread / 4, share = (fours + splits - 1) / splits, at_once = most_splits / splits;
    const float4 *parts = args.parts + int64_t(by.group) * splits * fours * multiplying_threads + threadIdx.x;
    int end = min(by.split * share + share, fours);
#pragma unroll 1
    for (int first = by.split * share; first < end; first += at_once) {
      float4 v[at_once][splits];
#pragma unroll
      for (int i = 0; i < at_once; i++)
#pragma unroll
        for (int split = 0; split < splits; split++)
          v[i][split] = first + i < end ? __ldcg(parts + (split * fours + first + i) * multiplying_threads) : float4();
#pragma unroll
      for (int i = 0; i < at_once; i++) {
        float4 sum = v[i][0];
#pragma unroll
        for (int split = 1; split < splits; split++)
          sum.x += v[i][split].x, sum.y += v[i][split].y, sum.z += v[i][split].z, sum.w += v[i][split].w;
        if (first + i < end) store_four(tile, first + i, sum, unit);
      }
    }
  }

  __device__ void store_four(int tile, int four, const float4 &sum, float unit) const {
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int token = token_of(4 * four + i);
      int64_t row = row_of(tile, i);
      if (token < args.tokens && row < args.w.rows) store_result(args.out, token, row, v[i] * unit);
    }
  }

  __device__ void leave_part() const {
    constexpr int fours = sums_of_thread / 4;
    float4 *part = args.parts + int64_t(by.group * args.splits + by.split) * fours * multiplying_threads + threadIdx.x;
#pragma unroll
    for (int i = 0; i < fours; i++)
      __stcg(part + i * multiplying_threads, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  }

  __device__ void join_splits(float unit) const {
    int warp = threadIdx.x / 32, tile = by.first_tile + warp;
    if (warp < by.tiles) leave_part();
    wait_for_multipliers();
    uint32_t *count = args.counts + by.group, splits = args.splits;
    if (threadIdx.x == 0) {
      count_in(count);
      wait_for_count(count, splits);
    }
    wait_for_multipliers();
    if (warp < by.tiles) {
      if (splits == 2) join<2>(tile, unit);
      if (splits == 4) join<4>(tile, unit);
      if (splits == 8) join<8>(tile, unit);
    }
    if (threadIdx.x == 0 && atomicAdd(count, 1) == 2 * splits - 1) *count = 0;  // the last to have seen it
  }

  // Read at the end: to wait for it is to wait for the first weights, too.
  __device__ float unit() const { return decoder<kind>::scaled ? *args.w.unit : 1.f; }

  __device__ void run() {
    int warp = threadIdx.x / 32;
    for (int pass = 0; pass < by.passes; pass++) {
      int tiles = by.tiles_of(pass);
#pragma unroll
      for (int i = 0; i < sums_of_thread; i++) sums[i] = 0;
      if (warp / 4 * 4 < tiles)
        multiply_pass(pass == 0);
      else
        skip_pass();
      if (args.splits > 1) return join_splits(unit());
      if (warp < tiles) write_tile(by.first_of(pass) + warp, unit());
    }
  }
};

template <weight_kind kind, int n>
__device__ void multiply_some(const some_arguments &args, const CUtensorMap &x, uint8_t *shared) {
  stage_barriers &barriers = *reinterpret_cast<stage_barriers *>(shared + barriers_at);
  let_next_kernel_start();
  division by(args, chunk_blocks<kind>);
  if (threadIdx.x >= multiplying_threads) {
    limit_registers<copying_registers>();
    if (threadIdx.x == multiplying_threads) prepare<n>(x, barriers);
    __syncwarp();
    arrive_at_block();
    if (!args.ready) wait_for_kernel_before();
    if (threadIdx.x == multiplying_threads) fetch_tokens<kind, n>(by, x, barriers, shared);
  } else {
    take_registers<multiplying_registers>();
    weight_stream<kind, !room_for_two<n>> stream(args, by);
    weight_chunk<kind> weights = {};
    stream.template fetch<0, chunk_blocks<kind>>(weights);
    if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, multiplying_threads);
    wait_for_block();
    if (!args.ready) wait_for_kernel_before();
    decoder<kind> decode = {shared_address(shared) - shared_start + threadIdx.x % 32 * 4};
    multiplier<kind, n> m = {args, by, shared, barriers, decode, stream, weights};
    m.run();
  }
  if (args.ready) wait_for_kernel_before();  // the kernel after this one relies on it, too
}
#endif

template <weight_kind kind, int n>
__global__ void __launch_bounds__(threads, 1)
    product_some(const __grid_constant__ some_arguments args, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  multiply_some<kind, n>(args, x, shared);
#else
  __trap();  // built for no sm_90a: better a fault than no result
#endif
}

// ---- launching ----

// How a product is divided; no groups where it cannot be.
struct some_plan {
  int groups, splits, passes, pass_tiles;
  int64_t clocks;  // of a block, roughly, as measured on an H200
};

some_plan divide(const product_context &context, const packed_matrix &w, int chunk_blocks, int n, int splits) {
  some_plan plan = {0, splits};
  int tiles = int(w.row_tiles), chunks = int(w.col_blocks) / chunk_blocks;
  int groups = std::min(context.multiprocessors / splits, tiles);
  if (groups < 1 || chunks < splits) return plan;
  int most = int(ceil_div(tiles, groups));
  plan.passes = int(ceil_div(most, warps));
  if (splits > 1 && plan.passes > 1) return plan;
  plan.groups = groups;
  plan.pass_tiles = int(ceil_div(most, plan.passes));
  int block_clocks = std::max(45 * plan.pass_tiles, int(ceil_div(plan.pass_tiles, 4)) * n * 3);
  plan.clocks = int64_t(plan.passes) * ceil_div(chunks, splits) * chunk_blocks * std::max(block_clocks, 500);
  if (splits > 1) plan.clocks += 2000 + 40 * n;
  return plan;
}

some_plan fastest(const product_context &context, const packed_matrix &w, int chunk_blocks, int n) {
  some_plan best = divide(context, w, chunk_blocks, n, 1);
  for (int splits = 2; splits <= most_splits; splits *= 2) {
    some_plan plan = divide(context, w, chunk_blocks, n, splits);
    if (plan.groups > 0 && plan.clocks < best.clocks) best = plan;
  }
  return best;
}

template <weight_kind kind, int n>
cudaError_t launch_shape(const product_call &call) {
  some_plan plan = fastest(*call.context, call.w, chunk_blocks<kind>, n);
  if (plan.groups == 0) return cudaErrorInvalidValue;
  CUtensorMap x;
  cudaError_t status = describe_tokens(call, n, &x);
  if (status != cudaSuccess) return status;
  some_arguments args = {};
  args.w = call.w;
  args.tokens = call.tokens;
  args.out = call.out;
  args.codebook = call.context->codebook;
  args.splits = plan.splits;
  args.tiles = int(call.w.row_tiles) / plan.groups, args.more = int(call.w.row_tiles) % plan.groups;
  args.passes = plan.passes, args.pass_tiles = plan.pass_tiles;
  args.ready = call.ready;
  args.counts = static_cast<uint32_t *>(call.workspace);
  args.parts = reinterpret_cast<float4 *>(static_cast<uint8_t *>(call.workspace) + workspace_zero_bytes);
  status = cudaFuncSetAttribute(product_some<kind, n>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<n>);
  if (status != cudaSuccess) return status;
  return launch(call, product_some<kind, n>, dim3(unsigned(plan.groups * plan.splits)), dim3(threads), shared_bytes<n>,
                args, x);
}

template <weight_kind kind>
cudaError_t launch_kind(const product_call &call) {
  if (call.tokens <= 16) return launch_shape<kind, 16>(call);
  if (call.tokens <= 32) return launch_shape<kind, 32>(call);
  if (call.tokens <= 64) return launch_shape<kind, 64>(call);
  return launch_shape<kind, some_tokens>(call);
}

}  // namespace

size_t some_workspace_bytes(const product_context &context) {
  return workspace_zero_bytes + size_t(context.multiprocessors) * multiplying_threads * (some_tokens / 2) * sizeof(float);
}

cudaError_t launch_some(const product_call &call) {
  switch (call.w.kind) {
    case weight_kind::nf4: return launch_kind<weight_kind::nf4>(call);
    case weight_kind::int8: return launch_kind<weight_kind::int8>(call);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace adaptrt
