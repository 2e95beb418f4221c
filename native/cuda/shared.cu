// U and V of terms in common as bfloat16.
#include "shared.cuh"

#include <algorithm>

#include "panels.cuh"

namespace adaptrt {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads) make_plain(const factor f, const factor to) {
  wait_for_before();
  int64_t count = rank_pieces(to) * panel_ranks * to.stride, step = int64_t(gridDim.x) * threads;
  for (int64_t i = blockIdx.x * int64_t(threads) + threadIdx.x; i < count; i += step) {
    int64_t rank = i / to.stride, col = i % to.stride;
    uint8_t *piece = const_cast<uint8_t *>(to.data) +
                     piece_of(to, rank / panel_ranks, col / BLOCK) * tile_bytes(weight_kind::bf16);
    tile_place place = place_in_piece(to.form, int(rank % panel_ranks), int(col % BLOCK));
    *reinterpret_cast<__nv_bfloat16 *>(piece + byte_in_tile(weight_kind::bf16, place)) =
        __float2bfloat16(panel_element(f, rank, col));
  }
}

}  // namespace

factor describe_plain(const factor &panels) {
  factor plain = panels;
  plain.dtype = ADRT_BF16, plain.data = nullptr, plain.scales = nullptr;
  return plain;
}

void launch_plain(const queue &q, const factor &panels, const factor &to) {
  constexpr unsigned most_blocks = 4096;
  dim3 grid(std::min(most_blocks, blocks_of(rank_pieces(to) * panel_ranks * to.stride, threads)));
  launch(q, make_plain, grid, threads, 0, panels, to);
}

}  // namespace adaptrt
