// The adapter normal form on the device (spec/adapters.md), for a batch of many stacks.
//
//   map      x' = R (g_in * x), the input that W sees, where an adapter has either
//   shrink   hidden = scale * d * (V x), beside the product with W; sparse and Kronecker terms have theirs
//   expand   y = g_out * (y + e * U hidden ...) + bias + c, after both
//
// An adapter is a table of attachments on the device, one for each attach point, so that a step uploads only which
// tokens have which stack, however many attach points there are. A launch covers all adapters of the batch, and up to
// `most_members` attach points that read the same input.
#ifndef ADAPTRT_CUDA_ADAPTERS_CUH
#define ADAPTRT_CUDA_ADAPTERS_CUH
#include "factor.cuh"

namespace adaptrt {

struct term {
  int32_t kind;        // adrt_term_kind
  bool identity;       // y += e * hidden: no U
  float scale;
  int64_t width;       // values of hidden for a token
  int64_t hidden;      // where they start among those of the attachment's terms
  factor v, u;         // u transposed, [rank, out]; of a Kronecker term W1 is u, as it is, and W2 is v
  const float *d, *e;  // or NULL
  const int32_t *row_start, *columns;
  const float *values;
};

// The first term lies in the attachment: most have one, and each pointer to follow costs a kernel half a microsecond.
struct attachment {
  bool acts;
  bool scales_bias;
  int32_t n_terms;
  const term *terms;
  term first;
  const float *g_in, *rotation, *g_out, *c;  // or NULL
  int64_t rotation_block;
};

// U and V of a term that is left to shared.cuh; by where V and U lie, or NULL.
struct common_term {
  const uint8_t *v, *u;
  __device__ bool is(const term &t) const { return v && t.v.data == v && t.u.data == u; }
};

// One adapter of the stack of a segment: consecutive tokens (or rows of logits) with one stack.
struct application {
  const attachment *attachments;  // by attach point
  int32_t place;                  // in the stack
  int32_t token, n_tokens;        // the segment
  int64_t rows_before;            // rows of hidden values of the applications before this one
};

// Tokens of one segment, and its applications [first, first + n) in stacking order; the first of them lies here, too.
struct token_tile {
  int32_t token, n_tokens, first, n;
  application head;
};
constexpr int expand_tokens = 4, shrink_tokens = 8;

constexpr int most_members = 4;
struct member {
  int32_t target;
  int64_t row, rows;    // of the launch's output
  int64_t hidden;       // where it starts in an application's hidden values, a token
  const float *bias;    // or NULL
  common_term elsewhere;  // the first term of first adapters that have it is not of these kernels
};

struct adapter_call {
  const application *applications;
  const token_tile *tiles;
  int32_t n_tiles, n_members;
  member members[most_members];
  const __nv_bfloat16 *x;  // [tokens, x_stride], zero beyond `cols`
  int64_t x_stride, cols;
  float *hidden;           // for each application, then member, then term: [n_tokens, the term's width]
  int64_t hidden_width;    // floats a row of an application
  float *y;  // [tokens, y_stride]
  int64_t y_stride;
};

// `tiles` of shrink_tokens, each with one application; `chunks`: the most pieces of hidden that an application has.
void launch_shrink(const queue &q, const adapter_call &call, int64_t chunks, int multiprocessors);
__host__ __device__ inline int64_t shrink_chunks(int64_t width) { return (width + 15) / 16; }  // pieces of a term
// `tiles` of expand_tokens; `single`: all of one token
void launch_expand(const queue &q, const adapter_call &call, bool single, int multiprocessors);

struct map_call {
  const application *applications;
  const token_tile *tiles;
  int32_t target;
  const __nv_bfloat16 *x;
  __nv_bfloat16 *out;  // the same stride
  int64_t stride, cols;
  float *scratch;      // [tokens, 2, cols]
};
void launch_map(const queue &q, const map_call &call, int n_tiles);

struct embed_call {
  const application *applications;
  const token_tile *tiles;
  const int32_t *tokens;
  int32_t target;
  float *y;
  int64_t y_stride, width;
};
void launch_embed_adapters(const queue &q, const embed_call &call, int n_tiles);

// y *= g_out, for norms
struct gain_call {
  const application *applications;
  const token_tile *tiles;
  int32_t target;
  destination y;
  int64_t width;
};
void launch_gain(const queue &q, const gain_call &call, int n_tiles);

__device__ inline bool is_elsewhere(const member &m, const application &a, int k, const term &t) {
  return k == 0 && a.place == 0 && m.elsewhere.is(t);
}

__device__ inline const term &term_of(const attachment &a, int k) { return k ? a.terms[k] : a.first; }

__device__ inline const application &application_of(const application *all, const token_tile &tile, int i) {
  return i ? all[tile.first + i] : tile.head;
}

// Where an application's hidden values of a member's term start.
__device__ inline int64_t hidden_start(const adapter_call &c, const application &a, const member &m, const term &t) {
  return a.rows_before * c.hidden_width + a.n_tokens * (m.hidden + t.hidden);
}

}  // namespace adaptrt
#endif
