// The order of V and U for tensor cores, and how lanes read it.
//
// A piece has 16 ranks by 64 inputs (of V) or outputs (of U): 512 bytes of nf4, 1024 of int8, 2048 of bf16, of which a
// lane takes 16 at a time. It is the first operand of four products of 16 by 16 (tile.cuh says what lanes and registers
// have). Neighbours along the sum share a register: inputs of V, ranks of U.
//
//   V   16 ranks by 16 of the inputs a step; lane 4g + t has ranks g and g + 8 and, over the four steps, inputs 16t to
//       16t + 15, so that it reads x in two pieces of 16 bytes. Pieces of 16 ranks lie one after the other.
//   U   16 of the outputs by 16 ranks a step; the lane has outputs 2g and 2g + 1 of the step's, neighbours in memory.
//       Pieces of the same outputs lie one after the other.
#ifndef ADAPTRT_CUDA_PANELS_CUH
#define ADAPTRT_CUDA_PANELS_CUH
#include "decode.cuh"
#include "factor.cuh"

namespace adaptrt {

constexpr int panel_ranks = 16;

__host__ __device__ constexpr weight_kind panel_kind(int32_t dtype) {
  return dtype == ADRT_NF4 ? weight_kind::nf4 : dtype == ADRT_INT8 ? weight_kind::int8 : weight_kind::bf16;
}

__host__ __device__ inline int64_t rank_pieces(const factor &f) { return (f.rows + panel_ranks - 1) / panel_ranks; }
__host__ __device__ inline int64_t block_pieces(const factor &f) { return f.stride / BLOCK; }

// The piece of the ranks from 16 * rank_piece on and inputs or outputs from 64 * block on.
__host__ __device__ inline int64_t piece_of(const factor &f, int64_t rank_piece, int64_t block) {
  return f.form == factor_form::v_panels ? rank_piece * block_pieces(f) + block : block * rank_pieces(f) + rank_piece;
}

// Where rank `r` and input or output `c` are in a piece.
__host__ __device__ inline tile_place place_in_piece(factor_form form, int r, int c) {
  if (form == factor_form::v_panels) return {r % 8 * 4 + c / 16, c / 4 % 4, r / 8 + c / 2 % 2 * 2, c % 2};
  return {c % 16 / 2 * 4 + r / 2 % 4, c / 16, c % 2 + r / 8 * 2, r % 2};
}

// One value.
__device__ inline float panel_element(const factor &f, int64_t rank, int64_t col) {
  int64_t piece = piece_of(f, rank / panel_ranks, col / BLOCK);
  tile_place place = place_in_piece(f.form, int(rank % panel_ranks), int(col % BLOCK));
  weight_kind kind = panel_kind(f.dtype);
  const uint8_t *at = f.data + piece * tile_bytes(kind) + byte_in_tile(kind, place);
  if (kind == weight_kind::bf16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(at));
  float scale = f.scales[piece * panel_ranks + rank % panel_ranks];
  if (kind == weight_kind::int8) return scale * float(int8_t(*at));
  uint32_t first, second;
  decode_nf4(*at, nf4_as_bf16(), first, second);
  return scale * __uint_as_float(place.odd ? first & 0xffff0000 : first << 16);
}

// A lane's codes of a piece.
template <weight_kind kind>
struct piece_codes {
  static constexpr int vectors = tile_bytes(kind) / 512;
  uint4 vector[vectors];

  __device__ void load(const factor &f, int64_t piece) { load(f.data, piece); }
  __device__ void load(const uint8_t *pieces, int64_t piece) {
    const uint8_t *at = pieces + piece * tile_bytes(kind) + threadIdx.x % 32 * 16;
#pragma unroll
    for (int i = 0; i < vectors; i++) {
      uint4 &v = vector[i];
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at + i * 512));
    }
  }

  // The operand of a step, without scales.
  __device__ void step(int s, uint32_t a[4]) const {
    if constexpr (kind == weight_kind::nf4) {
      uint32_t word = word_of(vector[0], s);
      nf4_bytes values = nf4_as_bf16();
      decode_nf4(word, values, a[0], a[1]);
      decode_nf4(word >> 16, values, a[2], a[3]);
    } else {
      decoder<kind>().step(vector, s, a);
    }
  }
};

__device__ inline void multiply_add(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Calls `call` with the kind of a factor's values as a constant.
template <typename callable>
__device__ inline void with_kind(int32_t dtype, const callable &call) {
  switch (dtype) {
    case ADRT_NF4: return call(std::integral_constant<weight_kind, weight_kind::nf4>());
    case ADRT_INT8: return call(std::integral_constant<weight_kind, weight_kind::int8>());
    default: return call(std::integral_constant<weight_kind, weight_kind::bf16>());
  }
}

}  // namespace adaptrt
#endif
