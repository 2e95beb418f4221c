// How product_some.cu divides a product among blocks of threads.
//
// A block has a run of tiles of 16 rows, one a warp, and all columns; where that are more tiles than warps it goes through
// the columns several times. Where rows are too few for all multiprocessors, several blocks ("splits") share the columns
// of the same rows. Where as many warpgroups as each block can fill leave over so few tiles that half of the blocks can
// have them, two neighbours each take half of the columns of four of these in one more warpgroup: so all blocks but a few
// have the same work.
#ifndef ADAPTRT_CUDA_SOME_DIVISION_CUH
#define ADAPTRT_CUDA_SOME_DIVISION_CUH
#include <algorithm>

#include "launch.cuh"

namespace adaptrt {

constexpr int some_warps = 16, warpgroup_tiles = 4, most_splits = 8;

struct some_division {
  int row_tiles;
  int groups, splits;        // no groups where it cannot be
  int tiles, more;           // of the splits of one group of rows; the first `more` groups have one more
  int passes, pass_tiles;
  int first_shared, shared;  // fours of tiles from a tile on, whose columns two neighbours share
};

#ifdef __CUDACC__

// What a block has: tiles of rows, and a part of the columns in chunks. Splits are a power of two.
struct block_share {
  int group, split, first_tile, tiles, passes, pass_tiles, first_chunk, chunks;

  __device__ block_share(const some_division &all, int all_chunks) : passes(all.passes), pass_tiles(all.pass_tiles) {
    int log_splits = 31 - __clz(all.splits);
    group = int(blockIdx.x) >> log_splits, split = int(blockIdx.x) & (all.splits - 1);
    first_tile = all.tiles * group + min(group, all.more);
    tiles = all.tiles + (group < all.more);
    first_chunk = all_chunks * split >> log_splits;
    chunks = (all_chunks * (split + 1) >> log_splits) - first_chunk;
  }
  __device__ int first_of(int pass) const { return first_tile + pass_tiles * pass; }
  __device__ int tiles_of(int pass) const { return min(pass_tiles, tiles - pass_tiles * pass); }
};

// What a warpgroup has of the block's chunks: all, or one of two halves of four tiles' that are shared.
struct warpgroup_share {
  int four, half;  // or none: -1
  int before, chunks, after;

  __device__ warpgroup_share(const some_division &all, const block_share &block) {
    four = int(blockIdx.x) / 2, half = int(blockIdx.x) % 2;
    if (four >= all.shared || int(threadIdx.x) / 128 != block.tiles / warpgroup_tiles) four = half = -1;
    before = half == 1 ? block.chunks / 2 : 0;
    after = half == 0 ? block.chunks - block.chunks / 2 : 0;
    chunks = block.chunks - before - after;
  }
  __device__ bool is_half() const { return half >= 0; }
  __device__ bool has_tiles(const block_share &block, int pass) const {
    return is_half() || int(threadIdx.x) / 128 * warpgroup_tiles < block.tiles_of(pass);
  }
  __device__ bool has_tile(const some_division &all, const block_share &block, int pass) const {  // for this warp
    return is_half() ? tile_of(all, block, pass) < all.row_tiles : int(threadIdx.x) / 32 < block.tiles_of(pass);
  }
  __device__ int tile_of(const some_division &all, const block_share &block, int pass) const {  // this warp's
    int warp = threadIdx.x / 32;
    return is_half() ? all.first_shared + four * warpgroup_tiles + warp % warpgroup_tiles : block.first_of(pass) + warp;
  }
};

#endif

// A block's time, roughly, in clocks as measured on an H200, of a product with n tokens.
inline int64_t some_clocks(const some_division &d, int chunks, int chunk_blocks, int n) {
  int block_clocks = std::max(45 * d.pass_tiles, int(ceil_div(d.pass_tiles, warpgroup_tiles)) * n * 3);
  int64_t clocks = int64_t(d.passes) * ceil_div(chunks, d.splits) * chunk_blocks * std::max(block_clocks, 500);
  return d.splits > 1 ? clocks + 2000 + 40 * n : clocks;
}

inline some_division divide(const product_context &context, const packed_matrix &w, int chunks, int splits) {
  some_division d = {int(w.row_tiles), 0, splits};
  int tiles = d.row_tiles, groups = std::min(context.multiprocessors / splits, tiles);
  if (groups < 1 || chunks < splits) return d;
  int most = int(ceil_div(tiles, groups));
  d.passes = int(ceil_div(most, some_warps));
  if (splits > 1 && d.passes > 1) return d;
  d.groups = groups;
  d.pass_tiles = int(ceil_div(most, d.passes));
  d.tiles = tiles / groups, d.more = tiles % groups;
  return d;
}

// Of a division with one pass and no splits.
inline some_division share_halves(some_division d, int chunks) {
  int fours = int(ceil_div(d.row_tiles, warpgroup_tiles)), own = fours / d.groups, left_over = fours % d.groups;
  if (d.splits > 1 || d.passes > 1 || own < 1 || left_over < 1 || left_over > d.groups / 2 || chunks < 2) return d;
  d.tiles = d.pass_tiles = own * warpgroup_tiles, d.more = 0;
  d.first_shared = d.tiles * d.groups, d.shared = left_over;
  return d;
}

inline some_division fastest_division(const product_context &context, const packed_matrix &w, int chunk_blocks, int n) {
  int chunks = int(w.col_blocks) / chunk_blocks;
  some_division best = divide(context, w, chunks, 1);
  for (int splits = 2; splits <= most_splits; splits *= 2) {
    some_division d = divide(context, w, chunks, splits);
    if (d.groups > 0 && some_clocks(d, chunks, chunk_blocks, n) < some_clocks(best, chunks, chunk_blocks, n)) best = d;
  }
  return best.groups > 0 ? share_halves(best, chunks) : best;
}

}  // namespace adaptrt
#endif
