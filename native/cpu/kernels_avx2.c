/* Kernels for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "elementwise.h"
#include "quant_tables.h"

enum { LANES = 8, TILE_ROWS = 1 };
typedef __m256 vec;

static inline vec v_zero(void) { return _mm256_setzero_ps(); }
static inline vec v_set1(float x) { return _mm256_set1_ps(x); }
static inline vec v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vec v) { _mm256_storeu_ps(p, v); }
static inline vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline float v_sum(vec v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline vec v_items(int dtype, const uint8_t *items) {
  if (dtype == ADRT_F32) return _mm256_loadu_ps((const float *)(const void *)items);
  __m128i half = _mm_loadu_si128((const __m128i *)(const void *)items);
  if (dtype == ADRT_F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* vpermps picks from 8 entries by the low 3 bits; bit 3, moved to the sign, picks between the two halves. */
static inline vec nf4_lookup(__m256i codes) {
  vec low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_CODEBOOK), codes);
  vec high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_CODEBOOK + 8), codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

static inline vec v_weights(int dtype, const uint8_t *block, int i) {
  if (dtype == ADRT_NF4) { /* of each 16 bytes: 16 high nibbles in two vecs, then 16 low ones */
    const uint8_t *bytes = block + i / 4 * 16 + i % 2 * LANES;
    __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)bytes));
    return nf4_lookup(i % 4 < 2 ? _mm256_srli_epi32(codes, 4) : codes);
  }
  if (dtype == ADRT_INT8) {
    __m128i codes = _mm_loadl_epi64((const __m128i *)(const void *)(block + i * LANES));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
  return v_items(dtype, block + i * LANES * (dtype == ADRT_F32 ? 4 : 2));
}

#include "product.h"

static bool ready(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const kernels cpu_kernels_avx2 = {.name = "avx2", .isa = ADRT_ISA_AVX2, .ready = ready, COMMON_KERNELS};
#else
typedef int not_for_this_cpu;
#endif
