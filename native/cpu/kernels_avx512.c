/* Kernels for AVX-512 without VNNI: integer products of 16-bit words. */
#include <pthread.h>

#include "kernels_avx512.h"

typedef struct {
  __m512i words[2];
} codes;
typedef __m512i ints;

#include "integer.h"
#include "forms.h"

INLINE vec v_from_ints(ints v) { return _mm512_cvtepi32_ps(v); }
INLINE __m512i load_512(const void *p) { return _mm512_loadu_si512(p); }
INLINE __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }

static int16_t codebook[32]; /* twice: vpermw reads 5 bits of an index, so the next nibble's lowest needs no mask */

static void fill_tables(void) {
  for (int i = 0; i < 32; i++) codebook[i] = nf4_word(i % 16);
}

/* Of the four nibbles of 16 bits the first and second, then the third and fourth; of bytes the high nibble is first. */
INLINE codes unpack(int form, const uint8_t *block) {
  codes c;
  if (form == INT8_WORDS) {
    for (int i = 0; i < 2; i++) c.words[i] = _mm512_cvtepi8_epi16(load_256(block + 32 * i));
    return c;
  }
  const __m512i table = load_512(codebook), twice = _mm512_broadcast_i64x4(load_256(block));
  const __m512i shift = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_setzero_si256(), 1);
  c.words[0] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(twice, shift), table);
  c.words[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_srlv_epi16(twice, shift), 8), table);
  return c;
}

INLINE int column_of_nf4(int form, int i) { return (void)form, i % 16 * 4 + i / 16; }

INLINE ints dot(int form, codes w, const uint8_t *x, int32_t start) {
  (void)form, (void)start;
  return _mm512_add_epi32(_mm512_madd_epi16(w.words[0], load_512(x)), _mm512_madd_epi16(w.words[1], load_512(x + 64)));
}

static bool ready(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (!has_avx512()) return false;
  pthread_once(&once, fill_tables);
  return true;
}

const kernels cpu_kernels_avx512 = {
    .name = "avx512",
    .isa = ADRT_ISA_AVX512,
    .ready = ready,
    WORDS_KERNELS,
    COMMON_KERNELS,
};
