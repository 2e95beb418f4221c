// Rotary embedding, and attention over the paged KV cache.
//
// Keys and values are f16. In a page, a layer's K is [kv_heads][slots][dim] and its V [kv_heads][dim][slots], dim
// being head_dim filled up with zeros to 32, 64, 128 or 256: both then arrive in registers as operands of a tensor core.
#ifndef ADAPTRT_CUDA_ATTENTION_CUH
#define ADAPTRT_CUDA_ATTENTION_CUH
#include "kernel.cuh"

namespace adaptrt {

// Consecutive tokens of a run that one block works on: their query heads of one KV head are the 16 rows of a tensor core's
// product.
struct query_block {
  int32_t token, n_tokens, position, pages;  // of the first token; where the run's pages start
};

struct kv_cache {
  uint8_t *const *page_address;  // by page number
  const int32_t *pages;          // of the runs, one after the other
  int32_t page_tokens, dim;
  int64_t k_offset, v_offset;    // of this layer, bytes into a page
};

struct attention_shape {
  int32_t heads, kv_heads, head_dim;
  float scale, cap;
  int rows() const { return heads / kv_heads < 16 ? heads / kv_heads : 16; }  // heads of one block
  int tokens_a_block() const { return 16 / rows(); }
  int head_chunks() const { return (heads / kv_heads + 15) / 16; }
};

constexpr int largest_head = 256, most_splits = 32;
inline int padded_head(int head_dim) { return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// cos_sin: [tokens][2][half], of one set of inverse frequencies
void launch_fill_rope(const queue &q, const int32_t *positions, int tokens, const float *inverse, int half,
                      float factor, float *cos_sin);

struct rope_call {
  source x;
  destination out;
  const float *cos_sin;
  int32_t heads, half;
};
void launch_rope(const queue &q, const rope_call &call, int tokens);

// Rotates q and k where asked for, stores k and v in the pages and leaves q in f16.
struct store_call {
  source q, k, v;
  const float *q_cos_sin, *k_cos_sin;  // NULL: no rotation
  const int32_t *positions, *token_pages;
  kv_cache kv;
  attention_shape shape;
  __half *queries;  // [tokens, heads, dim]
};
void launch_store(const queue &q, const store_call &call, int tokens);

struct attend_call {
  const __half *queries;
  const query_block *blocks;
  int32_t n_blocks, splits;
  kv_cache kv;
  attention_shape shape;
  float *partial;    // of splits; attention_partial_floats()
  int32_t *arrived;  // [n_blocks * kv_heads * head_chunks], zero between launches
  destination out;
};
void launch_attend(const queue &q, const attend_call &call);

// The whole of it for runs of one token, none of which sees the other's: rotates q and k, stores k and v, attends.
struct attend_one_call {
  source q, k, v;
  const float *cos_sin;
  const query_block *blocks;
  int32_t n_blocks, splits;
  kv_cache kv;
  attention_shape shape;
  float *partial;
  int32_t *arrived;
  destination out;
};
bool can_attend_one(const attention_shape &shape, const kv_cache &kv);
void launch_attend_one(const queue &q, const attend_one_call &call);

// Whether this block of threads is the last of its splits to come here; what the others wrote can then be read.
__device__ inline bool is_last_split(int32_t *arrived, int splits) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (!threadIdx.x) {
    last = atomicAdd(arrived, 1) == splits - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}
int64_t attention_partial_floats(const attention_shape &shape, int64_t n_blocks, int splits);

}  // namespace adaptrt
#endif
