/* Kernels for AVX2: integer products of 16-bit words. vpmaddubsw multiplies bytes, but saturates at pairs of nf4's, and
 * with signs moved from weights to activations, so that it does not, bytes take as many operations as words. */
#include "kernels_avx2.h"

INLINE ints dot(int form, codes w, const uint8_t *x, int32_t start) {
  (void)form, (void)start;
  __m256i sum[4];
  for (int i = 0; i < 4; i++) sum[i] = _mm256_madd_epi16(w.v[i], load_256(x + 32 * i));
  return _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3]));
}

static bool ready(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (!has_avx2()) return false;
  pthread_once(&once, fill_tables);
  return true;
}

const kernels cpu_kernels_avx2 = {
    .name = "avx2",
    .isa = ADRT_ISA_AVX2,
    .ready = ready,
    WORDS_KERNELS,
    COMMON_KERNELS,
};
