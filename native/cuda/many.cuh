// What product_many.cu divides and copies: its tiles, the runs of chunks that clusters work through, and tokens and weights on
// their way to shared memory.
#ifndef ADAPTRT_CUDA_MANY_CUH
#define ADAPTRT_CUDA_MANY_CUH
#include "hopper.cuh"
#include "launch.cuh"

// Other architectures get kernels without a body, for which what describes tiles is not used.
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#pragma nv_diag_suppress 177
#endif

namespace adaptrt {
namespace {

constexpr int multiplying_threads = 256, copying_threads = 128, threads = multiplying_threads + copying_threads;
constexpr int multiplying_registers = 232, copying_registers = 40;  // together not more than the kernel starts with
constexpr int cluster_blocks = 2;
constexpr int chunk_bytes = 2048;  // codes of a tile of 16 rows
constexpr int scale_bytes = 128;   // their scales, of at most four blocks of columns
constexpr int stages_at_most = 16;
constexpr int barrier_bytes = 1024;
constexpr int most_splits = 8;

template <weight_kind kind>
constexpr int chunk_blocks = chunk_bytes / tile_bytes(kind);

// A tile of a block of threads: `halves` products of 64 rows a warpgroup, each by n tokens.
template <int halves_, int n_>
struct shape {
  static constexpr int halves = halves_, n = n_, registers = halves * n / 2, vectors = registers / 4;
  static constexpr int rows = 128 * halves, row_tiles = rows / tile_rows;
  static constexpr bool splits = vectors % most_splits == 0;  // whether tiles may be shared equally

  static constexpr int token_stage_bytes = n * 128;
  static constexpr int token_stages = n >= 128 ? 4 : n == 64 ? 6 : stages_at_most;
  static constexpr int chunks_ahead = n < 128 ? 3 : 2;
  static constexpr int slot_bytes = halves * (chunk_bytes + scale_bytes);  // a warp's piece of a chunk

  static constexpr int barriers_at = pair_table_bytes, tokens_at = barriers_at + barrier_bytes;
  static constexpr int weights_at = tokens_at + token_stages * token_stage_bytes;
  static constexpr int shared_bytes = weights_at + multiplying_threads / 32 * chunks_ahead * slot_bytes;
};

struct many_arguments {
  packed_matrix w;
  int tokens;
  product_output out;
  nf4_values codebook;
  int chunks, token_tiles;
  int all_chunks;      // of all tiles
  int splits;          // so many clusters share each tile equally; 1 where runs may cross tiles
  bool plain;          // outputs are float, stored, and pairs of neighbours aligned as such
  uint32_t *ready;     // [blocks, most_splits], zero: that parts of a tile which is another cluster's are there
  float4 *parts;       // [blocks, vectors, multiplying_threads]
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct stage_barriers {
  uint64_t tokens_full[stages_at_most], tokens_empty[stages_at_most];
};

// ---- the division of work ----

// The chunks that a cluster has of one tile: of neighbouring rows in its blocks.
struct segment {
  int tile, first, n;
};

__device__ int clusters() { return gridDim.x / cluster_blocks; }
__device__ int this_cluster() { return blockIdx.x / cluster_blocks; }

__device__ int first_chunk_of(const many_arguments &args, int cluster) {
  return int(int64_t(args.all_chunks) * cluster / clusters());
}

__device__ int64_t row_tile_of(const many_arguments &args, int tile, int row_tiles) {  // the first of this block
  return int64_t(tile / args.token_tiles * cluster_blocks + rank_in_cluster()) * row_tiles;
}

// From the end of the run to its beginning; the chunks of a tile in their order.
template <typename work>
__device__ void for_each_segment(const many_arguments &args, work do_segment) {
  int begin = first_chunk_of(args, this_cluster());
  for (int end = first_chunk_of(args, this_cluster() + 1); end > begin;) {
    int tile = (end - 1) / args.chunks, first = max(tile * args.chunks, begin);
    do_segment(segment{tile, first - tile * args.chunks, end - first});
    end = first;
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
__device__ void fetch_tokens(const many_arguments &args, const CUtensorMap &x, stage_barriers &barriers,
                             uint8_t *stages) {
  wait_for_kernel_before();
  if (threadIdx.x % 32) return;
  constexpr int share = s::n / cluster_blocks;  // tokens that this block fetches for the cluster
  int rank = rank_in_cluster();
  ring<s::token_stages> at;
  for_each_segment(args, [&](const segment &seg) {
    int token = seg.tile % args.token_tiles * s::n, end = (seg.first + seg.n) * chunk_blocks<kind>;
    for (int block = seg.first * chunk_blocks<kind>; block < end; block++, at.next()) {
      wait_barrier(&barriers.tokens_empty[at.stage], at.parity ^ 1);
      expect_bytes(&barriers.tokens_full[at.stage], s::token_stage_bytes);
      copy_box_to_cluster(stages + at.stage * s::token_stage_bytes + rank * share * 128, x, block * block_cols,
                          token + rank * share, &barriers.tokens_full[at.stage], (1 << cluster_blocks) - 1);
    }
  });
}

// The weights of a warp on their way through its ring in shared memory, chunk after chunk of all its segments. A
// lane copies just the codes that it will read.
template <weight_kind kind, typename s>
struct weight_stream {
  static constexpr int vectors = decoder<kind>::vectors, tile_slot_bytes = chunk_bytes + scale_bytes;

  const many_arguments &args;
  int row_tile;                   // of the warp's first product, in a tile
  uint32_t ring, slot, empty;     // of the ring: the chunk at hand, and where the next goes
  uint64_t policy;
  int begin, end;                 // of what is left of the run after the segment at hand
  int64_t first_row_tile;         // of this block of threads
  int chunk, left;                // of the segment: the next to be fetched, and how many there are

  __device__ weight_stream(const many_arguments &args, uint8_t *shared, int row_tile)
      : args(args), row_tile(row_tile), slot(0), empty(0), policy(evict_first_policy()) {
    ring = shared_address(shared + s::weights_at) + threadIdx.x / 32 * s::chunks_ahead * s::slot_bytes;
    begin = first_chunk_of(args, this_cluster());
    end = first_chunk_of(args, this_cluster() + 1);
    begin_segment();
  }
  __device__ void begin_segment() {  // as in for_each_segment
    int tile = (end - 1) / args.chunks, first = max(tile * args.chunks, begin);
    first_row_tile = row_tile_of(args, tile, s::row_tiles);
    chunk = first - tile * args.chunks;
    left = end - first;
    end = first;
  }

  __device__ uint32_t at(uint32_t slot, int half) const { return ring + slot * s::slot_bytes + half * tile_slot_bytes; }

  // Every call counts as one more chunk on its way, even past the end.
  __device__ void fetch() {
    if (left > 0) {
#pragma unroll
      for (int h = 0; h < s::halves; h++) fetch_tile(first_row_tile + row_tile + h * 4, at(empty, h));
      chunk++;
      if (--left == 0 && begin < end) begin_segment();
    }
    commit_copies();
    empty = after(empty);
  }
  __device__ static uint32_t after(uint32_t slot) { return slot + 1 < s::chunks_ahead ? slot + 1 : 0; }

  __device__ void fetch_tile(int64_t row_tile, uint32_t to) const {
    if (row_tile >= args.w.row_tiles) return;
    int lane = threadIdx.x % 32;
    int64_t block = row_tile * args.w.col_blocks + chunk * chunk_blocks<kind>;
    const uint8_t *codes = args.w.codes + block * tile_bytes(kind) + lane * 16;
#pragma unroll
    for (int j = 0; j < chunk_blocks<kind>; j++)
#pragma unroll
      for (int i = 0; i < vectors; i++)
        copy_async(to + j * tile_bytes(kind) + i * 512 + lane * 16, codes + j * tile_bytes(kind) + i * 512, policy);
    if (decoder<kind>::scaled && lane < chunk_blocks<kind> * 2)  // 32 bytes a block
      copy_async(to + chunk_bytes + lane * 16, args.w.scales + block * 8 + lane * 4, policy);
  }

  __device__ void load(uint4 (&codes)[vectors], __half2 &scales, int half, int j) const {
    uint32_t from = at(slot, half), lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < vectors; i++) codes[i] = load_vector(from + j * tile_bytes(kind) + i * 512 + lane * 16);
    if constexpr (decoder<kind>::scaled) scales = load_half2(from + chunk_bytes + j * 32 + lane / 4 * 4);
  }
};
#endif

}  // namespace
}  // namespace adaptrt
#endif
