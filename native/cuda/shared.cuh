// Terms whose U and V many adapters of a batch have in common, as VeRA's: products of all tokens at once, on tensor
// cores. They are the first terms of the first adapters of stacks, so nothing that a stack does comes before them.
//
//   project   V x, of every token, once for all attach points that read x
//   extend    y += scale * e * U (d * (V x)), with the d and e of each token's adapter
#ifndef ADAPTRT_CUDA_SHARED_CUH
#define ADAPTRT_CUDA_SHARED_CUH
#include "record.cuh"

namespace adaptrt {

// A factor as bfloat16 with its columns along the sum, filled up with zeros to 64: V [rank, in] or U [out, rank].
struct dense_factor {
  const __nv_bfloat16 *data;
  int64_t rows, cols, stride;
};
dense_factor describe_dense(const factor &panels);
// `to` has memory for rows * stride values.
void launch_densify(const queue &q, const factor &panels, const dense_factor &to);

constexpr int64_t widest_shared = 512;  // ranks: those of a tile of tokens are held in shared memory
constexpr int project_splits = 4;       // parts of the columns that are summed by themselves

struct project_call {
  dense_factor v;
  const __nv_bfloat16 *x;  // [tokens, x_stride], zero beyond `cols`
  int64_t x_stride, cols;
  int tokens;
  float *out;  // [project_splits, tokens, projected_stride(rank)]
};
__host__ __device__ inline int64_t projected_stride(int64_t rank) { return (rank + 31) / 32 * 32; }
void launch_project(const queue &q, const project_call &call);

struct extend_member {
  common_term term;
  int32_t target;
  dense_factor u;
  const float *projected;
  int64_t row;  // of the launch's output
  int64_t rows;
};
struct extend_call {
  const application *applications;
  const int32_t *heads;  // the first application of each token's stack, or -1
  int tokens, n_members;
  extend_member members[most_members];
  float *y;  // [tokens, y_stride]
  int64_t y_stride;
  const term_record *records;  // [targets, tokens], or NULL: found by `heads`
};
void launch_extend(const queue &q, const extend_call &call, int multiprocessors);

}  // namespace adaptrt
#endif
