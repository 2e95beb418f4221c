// What kernels for many tokens need to know of each at an attach point, in one place: to follow pointers from one table to
// the next costs every launch a microsecond and more.
#ifndef ADAPTRT_CUDA_RECORD_CUH
#define ADAPTRT_CUDA_RECORD_CUH
#include "adapters.cuh"

namespace adaptrt {

// The first term of a token's first adapter.
struct alignas(16) term_record {
  const uint8_t *v, *u;
  const float *v_scales, *u_scales, *d, *e, *g_out;  // as in term and attachment
  float scale;
  int32_t width;  // 0 where there is none
  int64_t row;    // of hidden values
};

// Fills [targets, tokens] records for a step. The embedding, which is launched without overlap, has to come between: then
// kernels may read records before what is before them has ended.
void launch_resolve(const queue &q, const application *applications, const int32_t *heads, int tokens, int targets,
                    term_record *records);

// All of it on its way at once: taken field by field, each would be waited for.
template <typename record>
__device__ inline record read_record(const record *from) {
  constexpr int n = sizeof(record) / sizeof(uint4);
  uint4 words[n];
#pragma unroll
  for (int i = 0; i < n; i++)
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                 : "l"(reinterpret_cast<const uint4 *>(from) + i));
  record out;
  memcpy(&out, words, sizeof(out));
  return out;
}

}  // namespace adaptrt
#endif
