/* The vectors of AVX2 with FMA and F16C, and how weights become integers there, for the tables with and without VNNI.
 * The including file defines dot(). */
#ifndef CPU_KERNELS_AVX2_H
#define CPU_KERNELS_AVX2_H
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>

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

typedef struct {
  __m256i v[4]; /* words; of bytes two */
} codes;
typedef __m256i ints;

#include "integer.h"
#include "forms.h"

/* The low and high bytes of words, and bytes; each twice, since vpshufb looks up in halves. */
static uint8_t codebook_low[32], codebook_high[32], codebook_bytes[32];

static void fill_tables(void) {
  for (int i = 0; i < 32; i++) {
    codebook_low[i] = (uint8_t)nf4_word(i % 16);
    codebook_high[i] = (uint8_t)(nf4_word(i % 16) >> 8);
    codebook_bytes[i] = nf4_byte(i % 16);
  }
}

INLINE vec v_from_ints(ints v) { return _mm256_cvtepi32_ps(v); }
INLINE __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }

/* The words of 32 nibbles: those of bytes 0-7 and 16-23, then the others. */
INLINE void look_up_words(__m256i nibbles, __m256i *out) {
  __m256i low = _mm256_shuffle_epi8(load_256(codebook_low), nibbles);
  __m256i high = _mm256_shuffle_epi8(load_256(codebook_high), nibbles);
  out[0] = _mm256_unpacklo_epi8(low, high);
  out[1] = _mm256_unpackhi_epi8(low, high);
}

/* High nibbles, which are the even columns, then the low ones; words in the order of look_up_words. */
INLINE int column_of_nf4(int form, int i) {
  int word = i % 16 / 8 * 16 + i / 16 % 2 * 8 + i % 8;
  return 2 * (form == NF4_BYTES ? i % 32 : word) + i / 32;
}

INLINE codes unpack(int form, const uint8_t *block) {
  codes c;
  if (form == INT8_WORDS) {
    for (int i = 0; i < 4; i++)
      c.v[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(block + 16 * i)));
    return c;
  }
  const __m256i nibble = _mm256_set1_epi8(15), bytes = load_256(block);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), low = _mm256_and_si256(bytes, nibble);
  if (form == NF4_BYTES) {
    c.v[0] = _mm256_shuffle_epi8(load_256(codebook_bytes), high);
    c.v[1] = _mm256_shuffle_epi8(load_256(codebook_bytes), low);
  } else {
    look_up_words(high, c.v);
    look_up_words(low, c.v + 2);
  }
  return c;
}

/* Not every Clang has a name for it. */
static inline bool has_f16c(void) {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static inline bool has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

#endif
