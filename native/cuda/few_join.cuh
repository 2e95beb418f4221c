// The sums of a product for up to 16 tokens (product_few.cu): from registers of each warp, through shared memory, and in a
// cluster through that of other blocks, to results. Register i of product p of lane 4g + t is of row g + 8 (i / 2) and token
// 8 p + 2t + i % 2.
#ifndef ADAPTRT_CUDA_FEW_JOIN_CUH
#define ADAPTRT_CUDA_FEW_JOIN_CUH
#include "beside_parts.cuh"
#include "few_work.cuh"
#include "hopper.cuh"

namespace adaptrt {

// In shared memory, for each product 16 rows of 8 tokens, whose pairs take turns: neither writers of pairs nor readers of
// rows meet in a bank.
__device__ inline int sum_place(int row, int token) {
  return token / 8 * product_sums + row * 8 + ((token / 2 ^ row / 4) & 3) * 2 + token % 2;
}

template <int products>
__device__ inline void leave_sums(float *to, float sums[products][4], bool add) {
  int lane = threadIdx.x % 32;
  float2 *place[2 * products];
#pragma unroll
  for (int i = 0; i < 2 * products; i++)
    place[i] = reinterpret_cast<float2 *>(to + sum_place(lane / 4 + i % 2 * 8, i / 2 * 8 + lane % 4 * 2));
  if (add) {
#pragma unroll
    for (int i = 0; i < 2 * products; i++) {
      sums[i / 2][i % 2 * 2] += place[i]->x;
      sums[i / 2][i % 2 * 2 + 1] += place[i]->y;
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * products; i++) *place[i] = make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
}

// Sums of a cluster's parts: each block adds up those of every so manieth item, which all blocks send to it.
struct cluster_sums {
  uint64_t *barrier;
  float *inbox;  // [part, item]
  int parts, part, items;

  __device__ cluster_sums(uint8_t *shared, const few_arguments &args, const division &by)
      : barrier(reinterpret_cast<uint64_t *>(shared + args.plan.inbox)), inbox(reinterpret_cast<float *>(barrier + 1)),
        parts(args.divided.parts), part(by.part), items(by.tiles * args.tokens * tile_rows / parts) {}
#if __CUDA_ARCH__ >= 900
  __device__ void begin() {
    if (threadIdx.x == 0) {
      init_barrier(barrier, 1);
      publish_barriers();
      expect_bytes(barrier, items * parts * sizeof(float));
    }
    arrive_at_cluster();
  }
  __device__ void send(int item, float sum) {
    send_to_cluster(inbox + part * items + item / parts, sum, barrier, item % parts);
  }
  __device__ float sum_of(int item) {  // of mine
    float sum = 0;
    for (int i = 0; i < parts; i++) sum += inbox[i * items + item / parts];
    return sum;
  }
#endif
};

// A result: of the block's tile `tile`, a token, and a row of the tile's.
struct result_place {
  int tile, token, row;
  __device__ result_place(const few_arguments &args, int first_tile, int of_block, int row)
      : tile(first_tile + args.by_tokens(of_block)), token(of_block - args.by_tokens(of_block) * args.tokens), row(row) {}
  __device__ int item(const few_arguments &args) const { return (tile * args.tokens + token) * tile_rows + row; }
};

template <bool adapted>
__device__ inline void put_result(uint8_t *shared, const few_arguments &args, const division &by, const result_place &at,
                                  float sum) {
  int64_t row = int64_t(by.first_tile + at.tile) * tile_rows + at.row;
  if constexpr (adapted) {
    changes change = changes_of(shared, args.beside, by.tiles, args.tokens);
    change.step(at.item(args));
    sum = *change.delta + (args.beside.vectors ? *change.gain * sum : sum);
  }
  if (row < args.w.rows) store_result(args.out, at.token, row, sum);
}

// The block's sum: the result, or the block's part of it.
template <bool adapted>
__device__ inline void put_sum(uint8_t *shared, const few_arguments &args, const division &by, const result_place &at,
                               float sum) {
#if __CUDA_ARCH__ >= 900
  if (args.divided.parts > 1) {
    cluster_sums(shared, args, by).send(at.item(args), sum);
    return;
  }
#endif
  put_result<adapted>(shared, args, by, at, sum);
}

__device__ inline void wait_for_changes(const few_arguments &args) {
  sync_threads(changes_barrier, (args.warps + warps_beside) * 32);
}

template <int columns>
__device__ inline void add_columns(float &sum, const float *&from, int stride) {
#pragma unroll
  for (int i = 0; i < columns; i++, from += stride) sum += *from;
}
__device__ inline float sum_of_columns(const float *from, int stride, int columns) {
  float sum = 0;
#pragma unroll 1
  for (; columns >= 8; columns -= 8) add_columns<8>(sum, from, stride);
  if (columns & 4) add_columns<4>(sum, from, stride);
  if (columns & 2) add_columns<2>(sum, from, stride);
  if (columns & 1) add_columns<1>(sum, from, stride);
  return sum;
}

// The warps' sums of the rounds from `first` to `end`. What adapters change is awaited by whole warps, when they have their
// first sums.
template <int products, bool adapted>
__device__ inline void join_warps(uint8_t *shared, const few_arguments &args, const division &by, int first, int end,
                                  float unit) {
  int teams = args.divided.teams, first_tile = first * teams, row = threadIdx.x % tile_rows;
  int count = (min(end * teams, by.tiles) - first_tile) * args.tokens, stride = args.plan.warp_bytes / int(sizeof(float));
  bool waits = adapted && first == 0;
#pragma unroll 1
  for (int i = threadIdx.x / 32 * 2; i < count; i += args.warps * 2) {
    int mine = i + threadIdx.x % 32 / tile_rows;
    const result_place at(args, 0, min(mine, count - 1), row);
    int round = args.by_teams(at.tile), team = at.tile - round * teams;
    const float *from = reinterpret_cast<float *>(own_memory(shared, args, team, 0) + args.plan.sums) +
                        round * products * product_sums + sum_place(row, at.token);
    float sum = sum_of_columns(from, stride, args.divided.columns) * unit;
    if (waits) wait_for_changes(args);
    waits = false;
    if (mine < count) put_sum<adapted>(shared, args, by, result_place(args, first_tile, mine, row), sum);
  }
  if (waits) wait_for_changes(args);
}

// The block's share of the cluster's results.
template <bool adapted>
__device__ inline void join_blocks(uint8_t *shared, const few_arguments &args, const division &by) {
#if __CUDA_ARCH__ >= 900
  cluster_sums sums(shared, args, by);
  wait_barrier(sums.barrier, 0);
  int count = by.tiles * args.tokens * tile_rows;
  for (int i = threadIdx.x * sums.parts + by.part; i < count; i += args.warps * 32 * sums.parts)
    put_result<adapted>(shared, args, by, result_place(args, 0, i / tile_rows, i % tile_rows), sums.sum_of(i));
#endif
}

}  // namespace adaptrt
#endif
