// Products for 9 to 112 tokens on Hopper (sm_90a): too many for product_few.cu, bound by decoding rather than by the tensor
// cores, which product_many.cu is for.
//
// A block of threads has tiles of 16 rows, one a warp, and all columns or a part of them (some_division.cuh). Weights come
// into registers, a chunk ahead, are decoded and scaled there and are the first operand of a warpgroup's products, while
// other warpgroups decode; tokens come through a ring in shared memory that one thread fills. What limits it is shared
// memory: lookups, the tokens that products read and what arrives take turns there, and are busy nearly all the time.
//
// Where several blocks ("splits") share the columns of the same rows, each leaves its sums, and when all have, each adds
// up a share of them, in the order of the columns. They are neighbours, so that they run at the same time: blocks that wait
// for others that have no place yet are the last ones, and those before them leave. Of two neighbours that have halves of
// the columns of four tiles, the second waits for the first.
#include "hopper.cuh"
#include "some_division.cuh"

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#pragma nv_diag_suppress 177  // other architectures get a kernel without a body
#endif

namespace adaptrt {
namespace {

constexpr int warpgroups = some_warps / 4, multiplying_threads = some_warps * 32;
constexpr int copying_threads = 128, threads = multiplying_threads + copying_threads;  // one of them copies
constexpr int multiplying_registers = 112, copying_registers = 24;  // together not more than the kernel starts with
constexpr int chunk_bytes = 2048, chunk_vectors = chunk_bytes / 512;  // codes of a row tile; 16-byte loads of a lane
constexpr int chunks_announced = 2;  // ahead of the one that comes into registers

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
  some_division division;
  uint32_t *counts;  // [groups], or of shared fours of tiles; zero
  float4 *parts;     // [groups, splits, n / 8, multiplying_threads], or [shared fours, n / 8, 128]
  bool ready;        // tokens are there when a block starts
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct stage_barriers {
  uint64_t full[most_stages], empty[most_stages];
};

// ---- tokens ----

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
__device__ void fetch_tokens(const block_share &by, const CUtensorMap &x, stage_barriers &barriers, uint8_t *shared) {
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
  __half2 scales;  // of the chunk's [blocks, 8] pairs the one of the lane's number
};

// A warp's weights of a pass on their way into registers, and `announced`: to L2 before.
template <weight_kind kind, bool announced>
struct weight_stream {
  static constexpr int blocks = chunk_blocks<kind>, vectors = decoder<kind>::vectors;
  const uint8_t *codes;
  const __half2 *scales;
  int left;  // chunks, none where there is no tile for this warp
  uint64_t policy = evict_first_policy();

  __device__ void begin(const some_arguments &args, const block_share &by, const warpgroup_share &own, int pass,
                        weight_chunk<kind> &first) {
    int lane = threadIdx.x % 32;
    left = own.has_tile(args.division, by, pass) ? own.chunks : 0;
    int64_t block = int64_t(own.tile_of(args.division, by, pass)) * args.w.col_blocks + (by.first_chunk + own.before) * blocks;
    codes = args.w.codes + block * tile_bytes(kind) + lane * 16;
    scales = args.w.scales + block * 8 + lane % (blocks * 8);
    fetch<0, blocks>(first);
  }
  // n blocks of the next chunk.
  template <int first, int n>
  __device__ void fetch(weight_chunk<kind> &to) {
    if (left > 0) {
      if (first == 0 && announced && left > chunks_announced) announce_chunk();
#pragma unroll
      for (int i = first * vectors; i < (first + n) * vectors; i++) to.codes[i] = fetch_codes(codes + i * 512, policy);
      if constexpr (first == 0) to.scales = fetch_scales(scales, policy);
    }
    if (first + n < blocks) return;
    codes += chunk_bytes;
    scales += blocks * 8;
    left--;
  }
  // A line of codes a lane, and one of scales.
  __device__ void announce_chunk() const {
    int lane = threadIdx.x % 32;
    const void *line = lane ? codes + chunks_announced * chunk_bytes + (lane - 1) * 128 - lane * 16
                            : static_cast<const void *>(scales + chunks_announced * blocks * 8);
    if (lane <= 16) asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
  }
};

// ---- barriers ----

// Barrier 0 is the whole block's, 1 that of those who multiply, the others are for each warpgroup.
__device__ void wait_for_block() { asm volatile("bar.sync 0, %0;" ::"n"(threads) : "memory"); }
__device__ void arrive_at_block() { asm volatile("bar.arrive 0, %0;" ::"n"(threads) : "memory"); }
__device__ void wait_for_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(multiplying_threads) : "memory"); }
__device__ void wait_for_warpgroup() { asm volatile("bar.sync %0, 128;" ::"r"(2 + int(threadIdx.x) / 128) : "memory"); }

// What a block wrote before it counts itself in is seen by who has seen it counted. The count after `last` is zero.
__device__ void count_in(uint32_t *count, uint32_t last) {
  asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(count), "r"(last) : "memory");
}
__device__ void count_out(uint32_t *count, uint32_t last) {
  asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(count), "r"(last) : "memory");
}
__device__ void wait_for_count(uint32_t *count, uint32_t wanted) {
  uint32_t value = 0;
  while (value < wanted) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
}

// ---- multiplying ----

template <weight_kind kind, int n>
struct multiplier {
  static constexpr int blocks = chunk_blocks<kind>, sums_of_thread = n / 2, fours = sums_of_thread / 4;

  const some_arguments &args;
  const block_share &by;
  const warpgroup_share &own;
  uint8_t *shared;
  stage_barriers &barriers;
  uint32_t lane;
  weight_stream<kind, !room_for_two<n>> &stream;
  weight_chunk<kind> &weights;
  ring<stages<n>, blocks> tokens;
  float sums[sums_of_thread];

  __device__ void release(int stage) {
    if (threadIdx.x % 128 == 0) arrive(&barriers.empty[stage]);
  }

  // The operand of four steps of a chunk's block, scaled. `scales`: of the lane's number, as bf16.
  __device__ void decode_block(uint32_t (&a)[4][4], int i, __nv_bfloat162 scales) const {
    __nv_bfloat162 pair = __shfl_sync(~0u, scales, i * 8 + int(lane) / 4);
    __nv_bfloat162 upper = __low2bfloat162(pair), lower = __high2bfloat162(pair);
    decoder<kind> decode = {lane * 4};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      decode.step(&weights.codes[i * decoder<kind>::vectors], step, a[step]);
      for (int r = 0; r < 4; r++) a[step][r] = scaled_pair(a[step][r], r % 2 ? lower : upper);
    }
  }

  // Without room for a second chunk, half of the next one takes the place of that half of this one which was decoded, once
  // the other half is there: whoever waits for one load waits for all before it.
  __device__ void refill(int i, bool first_chunk, weight_chunk<kind> &next) {
    constexpr int half = blocks / 2;
    if (i == 0 && !first_chunk) stream.template fetch<half, half>(weights);
    if (i != half) return;
    stream.template fetch<0, half>(next);
    for (int j = 0; j < half * decoder<kind>::vectors; j++) weights.codes[j] = next.codes[j];
  }

  __device__ void multiply_chunk(bool first_chunk) {
    weight_chunk<kind> next;
    uint64_t b = describe_operand(shared + tokens_at) + uint32_t(tokens.stage * (stage_bytes<n> >> 4));
    __nv_bfloat162 scales = __floats2bfloat162_rn(__low2float(weights.scales), __high2float(weights.scales));
#pragma unroll
    for (int i = 0; i < blocks; i++) {
      uint32_t a[4][4];
      decode_block(a, i, scales);
      if constexpr (!room_for_two<n>) refill(i, first_chunk, next);
      wait_barrier(&barriers.full[tokens.stage + i], tokens.parity);
      products_begin();
#pragma unroll
      for (int step = 0; step < 4; step++)
        warpgroup_product<n>(sums, a[step], b + i * (stage_bytes<n> >> 4) + step * operand_step);
      products_commit();
      if (room_for_two<n> && i == 0) stream.template fetch<0, blocks>(next);
      products_wait<0>();
      release(tokens.stage + i);
    }
    if (room_for_two<n>)
      weights = next;
    else
      weights.scales = next.scales;
  }

  __device__ void multiply(int chunks) {
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++, tokens.next()) multiply_chunk(chunk == 0);
  }

  // A warpgroup without tiles lets the tokens pass, together: a warp left far behind would miss a whole round of the ring.
  __device__ void skip(int chunks) {
    for (int chunk = 0; chunk < chunks; chunk++, tokens.next()) {
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

  __device__ float4 four(int i) const { return make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]); }

  // A warp's four sums at a time: a share of them stays here, the others are for the same warp of other splits.
  template <int splits>
  static constexpr int share = (fours + splits - 1) / splits;

  template <int splits>
  __device__ float4 own_four(int i) const {
    float4 v = {};
#pragma unroll
    for (int split = 0; split < splits; split++)
      if (split == by.split && split * share<splits> + i < fours) v = four(split * share<splits> + i);
    return v;
  }

  template <int splits>
  __device__ float4 *part_of(int split) const {
    return args.parts + int64_t(by.group * splits + split) * fours * multiplying_threads + threadIdx.x;
  }

  template <int splits>
  __device__ void leave_part() const {
    float4 *part = part_of<splits>(by.split);
#pragma unroll
    for (int i = 0; i < fours; i++)
      if (i / share<splits> != by.split) __stcg(part + i * multiplying_threads, four(i));
  }

  // As many at once as there are registers for.
  template <int splits>
  __device__ void join(int tile, float unit) const {
    constexpr int at_once = most_splits / splits;
#pragma unroll
    for (int done = 0; done < share<splits>; done += at_once) {
      float4 v[at_once][splits];
      int first = by.split * share<splits> + done;
      auto there = [&](int i) { return done + i < share<splits> && first + i < fours; };
#pragma unroll
      for (int i = 0; i < at_once; i++)
#pragma unroll
        for (int split = 0; split < splits; split++)
          v[i][split] = split == by.split ? own_four<splits>(done + i)
                        : there(i)        ? __ldcg(part_of<splits>(split) + (first + i) * multiplying_threads)
                                          : float4();
#pragma unroll
      for (int i = 0; i < at_once; i++) {
        float4 sum = v[i][0];
#pragma unroll
        for (int split = 1; split < splits; split++)
          sum.x += v[i][split].x, sum.y += v[i][split].y, sum.z += v[i][split].z, sum.w += v[i][split].w;
        if (there(i)) store_four(tile, first + i, sum, unit);
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

  template <int splits>
  __device__ void join_splits(float unit) const {
    bool has_tile = int(threadIdx.x) / 32 < by.tiles;
    if (has_tile) leave_part<splits>();
    wait_for_multipliers();
    if (threadIdx.x == 0) {  // in when its part is left, out when all are in
      uint32_t *count = args.counts + by.group, last = 2 * splits - 1;
      count_in(count, last);
      wait_for_count(count, splits);
      count_out(count, last);
    }
    wait_for_multipliers();
    if (has_tile) join<splits>(by.first_tile + threadIdx.x / 32, unit);
  }

  // The first of two neighbours leaves its sums, the second adds them to its own.
  __device__ void join_halves() {
    float4 *part = args.parts + int64_t(own.four) * fours * 128 + threadIdx.x % 128;
    bool leave = own.half == 0, speaks = threadIdx.x % 128 == 0;
    if (!leave && speaks) await(args.counts + own.four);
    if (!leave) wait_for_warpgroup();
#pragma unroll
    for (int i = 0; i < fours; i++) {
      float4 v = leave ? four(i) : __ldcg(part + i * 128);
      if (leave)
        __stcg(part + i * 128, v);
      else
        sums[4 * i] += v.x, sums[4 * i + 1] += v.y, sums[4 * i + 2] += v.z, sums[4 * i + 3] += v.w;
    }
    if (leave) wait_for_warpgroup();
    if (leave && speaks) announce(args.counts + own.four);
  }

  // Read at the end: to wait for it is to wait for the first weights, too.
  __device__ float unit() const { return decoder<kind>::scaled ? *args.w.unit : 1.f; }

  __device__ void run() {
    for (int pass = 0; pass < by.passes; pass++) {
      bool idle = !own.has_tiles(by, pass);
#pragma unroll
      for (int i = 0; i < sums_of_thread; i++) sums[i] = 0;
      skip(idle ? by.chunks : own.before);
      if (!idle) multiply(own.chunks);
      if (own.is_half()) join_halves();
      skip(own.after);
      if (args.division.splits == 2) return join_splits<2>(unit());
      if (args.division.splits == 4) return join_splits<4>(unit());
      if (args.division.splits == 8) return join_splits<8>(unit());
      if (pass + 1 < by.passes) stream.begin(args, by, own, pass + 1, weights);
      if (!own.has_tile(args.division, by, pass) || own.half == 0) continue;
      store_sums(args.out, unit(), [&](auto store) { for_each_sum(own.tile_of(args.division, by, pass), store); });
    }
  }
};

template <weight_kind kind, int n>
__device__ void multiply_some(const some_arguments &args, const CUtensorMap &x, uint8_t *shared) {
  stage_barriers &barriers = *reinterpret_cast<stage_barriers *>(shared + barriers_at);
  let_next_kernel_start();
  block_share by(args.division, int(args.w.col_blocks) / chunk_blocks<kind>);
  warpgroup_share own(args.division, by);
  if (threadIdx.x >= multiplying_threads) {
    limit_registers<copying_registers>();
    if (threadIdx.x == multiplying_threads) prepare<n>(x, barriers);
    __syncwarp();
    arrive_at_block();
    if (!args.ready) wait_for_kernel_before();
    if (threadIdx.x == multiplying_threads) fetch_tokens<kind, n>(by, x, barriers, shared);
  } else {
    take_registers<multiplying_registers>();
    weight_stream<kind, !room_for_two<n>> stream;
    weight_chunk<kind> weights = {};
    stream.begin(args, by, own, 0, weights);
    if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, multiplying_threads);
    wait_for_block();
    if (!args.ready) wait_for_kernel_before();
    uint32_t lane = threadIdx.x % 32;
    if (room_for_two<n>) lane = __shfl_sync(~0u, lane, lane);  // so that it is kept, not read from where it is again and again
    multiplier<kind, n> m = {args, by, own, shared, barriers, lane, stream, weights};
    m.run();
  }
  if (args.ready) wait_for_kernel_before();  // the kernel after this one relies on it, too
}
#endif

template <weight_kind kind, int n>
__global__ void __launch_bounds__(threads, 1)
    product_some(const __grid_constant__ some_arguments args, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  uint8_t *shared = static_cast<uint8_t *>(__cvta_shared_to_generic(shared_start));  // known without clusters
  multiply_some<kind, n>(args, x, shared);
#else
  __trap();  // built for no sm_90a: better a fault than no result
#endif
}

// ---- launching ----

template <weight_kind kind, int n>
cudaError_t launch_shape(const product_call &call) {
  some_division division = fastest_division(*call.context, call.w, chunk_blocks<kind>, n);
  if (division.groups == 0) return cudaErrorInvalidValue;
  CUtensorMap x;
  cudaError_t status = describe_tokens(call, n, &x);
  if (status != cudaSuccess) return status;
  some_arguments args = {};
  args.w = call.w;
  args.tokens = call.tokens;
  args.out = call.out;
  args.codebook = call.context->codebook;
  args.division = division;
  args.ready = call.ready;
  args.counts = static_cast<uint32_t *>(call.workspace);
  args.parts = reinterpret_cast<float4 *>(static_cast<uint8_t *>(call.workspace) + workspace_zero_bytes);
  status = cudaFuncSetAttribute(product_some<kind, n>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<n>);
  if (status != cudaSuccess) return status;
  return launch(call, product_some<kind, n>, dim3(unsigned(division.groups * division.splits)), dim3(threads), shared_bytes<n>,
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
