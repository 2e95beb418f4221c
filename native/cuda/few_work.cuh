// A product for up to 16 tokens as its kernel sees it (product_few.cu), and how a block finds its part of the work.
#ifndef ADAPTRT_CUDA_FEW_WORK_CUH
#define ADAPTRT_CUDA_FEW_WORK_CUH
#include "few.cuh"

namespace adaptrt {

// Divides by what is the same for all; right for n below 2^32 / by.
struct divider {
  uint32_t by, inverse;
  __device__ int operator()(int n) const { return by == 1 ? n : int(__umulhi(unsigned(n), inverse)); }
};
inline divider divider_by(int by) { return {uint32_t(by), uint32_t((uint64_t(1) << 32) / uint64_t(by) + 1)}; }

struct few_arguments {
  packed_matrix w;
  const __nv_bfloat16 *x;
  int64_t x_stride;
  int tokens;
  product_output out;
  nf4_values codebook;
  few_division divided;
  int warps;  // that multiply; more are beside them
  shared_plan plan;
  divider by_tokens, by_teams;
  beside_call beside;
};

// A block's tiles and spans, and this warp's place among the block's.
struct division {
  int part, first_tile, tiles, rounds, first_span, spans, column, team;

  __device__ division(const few_division &d, int all_spans) {
    int group = blockIdx.y;
    part = blockIdx.x;
    first_tile = d.group_tiles * group + min(group, d.one_more);
    tiles = d.group_tiles + (group < d.one_more);
    rounds = d.rounds - ((d.rounds - 1) * d.teams >= tiles);
    first_span = d.spans * part;
    spans = min(d.spans, all_spans - first_span);
    team = d.teams == 1 ? 0 : threadIdx.x / 32 / unsigned(d.columns);
    column = threadIdx.x / 32 - team * d.columns;
  }
};

// Where a warp is: round after round, pass for pass, until sums are joined; then on from there.
struct place {
  int first, end;   // the rounds whose sums are joined together
  int round, pass;
  int own_end;      // of the rounds that have a chunk for this warp: teams' tiles and passes' spans may not come out even

  __device__ place(const few_division &d, const division &by) : first(0), round(0), pass(0) { begin(d, by); }
  __device__ void begin(const few_division &d, const division &by) {
    end = min(first + d.rounds_at_once, by.rounds);
    own_end = span(d, by) >= by.spans ? 0 : end * d.teams + by.team - d.teams < by.tiles ? end : end - 1;
  }
  // True where it does not go on with the next round of the same pass.
  __device__ bool step(const few_division &d, const division &by) {
    if (++round < end) return false;
    if (++pass == d.passes) pass = 0, first = round;
    round = first;
    begin(d, by);
    return true;
  }
  __device__ bool ended(const division &by) const { return first >= by.rounds; }
  __device__ bool has_chunk() const { return round < own_end; }
  __device__ int span(const few_division &d, const division &by) const { return pass * d.columns + by.column; }
};

__device__ inline uint8_t *own_memory(uint8_t *shared, const few_arguments &args, int team, int column) {
  return shared + args.plan.warps + (team * args.divided.columns + column) * args.plan.warp_bytes;
}

}  // namespace adaptrt
#endif
