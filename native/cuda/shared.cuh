// Terms whose U and V many adapters of a batch have in common, as VeRA's: products of all tokens at once, on tensor
// cores. They are the first terms of the first adapters of stacks, so nothing that a stack does comes before them.
//
//   project.cu   hidden = scale * d * (V x), of every token, V x once for all attach points that read x
//   extend.cu    y += e * U hidden, and the gate, where nobody else reads the outputs of two
//
// d and e are those of each token's adapter; where it has none, or something else, hidden values are zeros.
#ifndef ADAPTRT_CUDA_SHARED_CUH
#define ADAPTRT_CUDA_SHARED_CUH
#include "lone.cuh"

namespace adaptrt {

// The panels of a factor whose values are bfloat16 (panels.cuh), `data` still empty.
factor describe_plain(const factor &panels);
void launch_plain(const queue &q, const factor &panels, const factor &to);

constexpr int64_t widest_shared = 512;  // ranks: those of a block's tokens are held in shared memory

// Hidden values of 32 ranks lie as the second operand of two products of 16 ranks, 16 bytes a lane.
__host__ __device__ inline int64_t hidden_stride(int64_t rank) { return (rank + BLOCK - 1) / BLOCK * BLOCK; }
__device__ inline int hidden_place(int rank) {
  return rank / 32 * 32 + rank / 2 % 4 * 8 + rank / 16 % 2 * 4 + rank / 8 % 2 * 2 + rank % 2;
}

struct common_member {
  common_term term;
  int32_t target;
  factor u;               // plain
  __nv_bfloat16 *hidden;  // [tokens, hidden_stride(rank)], ranks by hidden_place
  int64_t row;            // of the launch's output
  int64_t rows;
};
// All members of a launch, and whose they are.
struct common_call {
  const application *applications;
  const int32_t *heads;  // the first application of each token's stack, or -1
  int tokens, n_members;
  common_member members[most_members];
  float *y;  // [tokens, y_stride]
  int64_t y_stride;
  const term_record *records;  // [targets, tokens], or NULL: found by `heads`
};

struct project_call {
  const uint8_t *of;  // members' term.v
  factor v;           // plain
  const __nv_bfloat16 *x;  // [tokens, x_stride], zero beyond `cols`
  int64_t x_stride, cols;
};
void launch_project(const queue &q, const project_call &call, const common_call &common, bool clusters);

// Whether extend can apply a gate.
bool can_gate(const common_call &call);
void launch_extend(const queue &q, const common_call &call, const lone_gate *gate, const lone_device &device);

// What a member's term is for a token: nothing where it has none, or another one.
struct token_vectors {
  float scale;
  const float *d, *e;  // or NULL
};

__device__ inline token_vectors vectors_of(const common_member &m, const term_record &t) {
  bool ours = (t.width != 0) & (t.v == m.term.v) & (t.u == m.term.u);  // no branch: all of it is on its way at once
  return {ours ? t.scale : 0.f, ours ? t.d : nullptr, ours ? t.e : nullptr};
}

__device__ inline token_vectors vectors_of(const common_call &c, const common_member &m, int token) {
  if (token >= c.tokens) return {};
  if (c.records) return vectors_of(m, read_record(c.records + m.target * c.tokens + token));
  if (c.heads[token] < 0) return {};
  const attachment &what = c.applications[c.heads[token]].attachments[m.target];
  const term &t = what.first;
  if (!what.acts || !what.n_terms || !m.term.is(t)) return {};
  return {t.scale, t.d, t.e};
}

// The same of all members, read side by side.
__device__ inline void find_vectors(const common_call &c, int token, token_vectors (&out)[most_members]) {
  if (!c.records || token >= c.tokens) {
#pragma unroll
    for (int i = 0; i < most_members; i++)
      if (i < c.n_members) out[i] = vectors_of(c, c.members[i], token);
    return;
  }
  term_record t[most_members];
#pragma unroll
  for (int i = 0; i < most_members; i++)
    if (i < c.n_members) t[i] = read_record(c.records + c.members[i].target * c.tokens + token);
#pragma unroll
  for (int i = 0; i < most_members; i++)
    if (i < c.n_members) out[i] = vectors_of(c.members[i], t[i]);
}

}  // namespace adaptrt
#endif
