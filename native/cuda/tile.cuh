// The order of weights inside a packed tile of 16 rows by 64 columns (product.cuh).
//
// A tensor core takes 16 rows by 16 columns at a step; lane 4g + t then holds four registers of two neighbouring
// columns each: row g and g + 8 of columns 2t and 2t + 1, and the same of columns 2t + 8 and 2t + 9. A tile is four
// such steps. Its bytes are ordered so that a lane reads 16 of them at once and finds its registers in order.
#ifndef ADAPTRT_CUDA_TILE_CUH
#define ADAPTRT_CUDA_TILE_CUH
#include "product.cuh"

namespace adaptrt {

constexpr int tile_items = tile_rows * block_cols;

// nf4: a byte is a register, its high nibble the first column; int8 and bf16: one and two bytes an item.
__host__ __device__ constexpr int tile_bytes(weight_kind kind) {
  return kind == weight_kind::nf4 ? tile_items / 2 : kind == weight_kind::int8 ? tile_items : 2 * tile_items;
}

struct tile_place {
  int lane, step, reg, odd;
};

__host__ __device__ inline tile_place place_in_tile(int row, int col) {
  return {(row % 8) * 4 + (col % 8) / 2, col / 16, row / 8 + 2 * ((col % 16) / 8), col % 2};
}

// Where an item starts in a tile, in bytes; for nf4 the byte that holds it.
__host__ __device__ inline int byte_in_tile(weight_kind kind, const tile_place &p) {
  switch (kind) {
    case weight_kind::nf4: return p.lane * 16 + p.step * 4 + p.reg;
    case weight_kind::int8: return (p.step / 2) * 512 + p.lane * 16 + (p.step % 2) * 8 + p.reg * 2 + p.odd;
    default: return p.step * 512 + p.lane * 16 + p.reg * 4 + p.odd * 2;
  }
}

}  // namespace adaptrt
#endif
