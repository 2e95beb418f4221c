/* The vectors of AVX-512 (F, BW, VL, DQ), for the tables with and without VNNI. */
#ifndef CPU_KERNELS_AVX512_H
#define CPU_KERNELS_AVX512_H
#include <immintrin.h>

#include "elementwise.h"
#include "quant_tables.h"

enum { LANES = 16, TILE_ROWS = 2 };
typedef __m512 vec;

static inline vec v_zero(void) { return _mm512_setzero_ps(); }
static inline vec v_set1(float x) { return _mm512_set1_ps(x); }
static inline vec v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vec v) { _mm512_storeu_ps(p, v); }
static inline vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline float v_sum(vec v) { return _mm512_reduce_add_ps(v); }

static inline vec v_items(int dtype, const uint8_t *items) {
  if (dtype == ADRT_F32) return _mm512_loadu_ps(items);
  __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)items);
  if (dtype == ADRT_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline vec v_weights(int dtype, const uint8_t *block, int i) {
  if (dtype == ADRT_NF4) { /* vpermps reads only the low 4 bits of a lane: the other nibble needs no mask */
    __m512i codes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(block + i / 2 * LANES)));
    if (i % 2 == 0) codes = _mm512_srli_epi32(codes, 4);
    return _mm512_permutexvar_ps(codes, _mm512_loadu_ps(NF4_CODEBOOK));
  }
  if (dtype == ADRT_INT8) {
    __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)(block + i * LANES));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  return v_items(dtype, block + i * LANES * (dtype == ADRT_F32 ? 4 : 2));
}

#include "product.h"

static inline bool has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#endif
