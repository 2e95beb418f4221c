/* Kernels for AVX-VNNI, the dot products of CPUs without AVX-512; compilers older than the instructions leave it out. */
#if defined(__AVXVNNI__)
#include "kernels_avx2.h"

INLINE ints dot(int form, codes w, const uint8_t *x, int32_t start) {
  if (form == NF4_BYTES) {
    __m256i sum = _mm256_zextsi128_si256(_mm_cvtsi32_si128(start));
    sum = _mm256_dpbusd_avx_epi32(sum, w.v[0], load_256(x));
    return _mm256_dpbusd_avx_epi32(sum, w.v[1], load_256(x + 32));
  }
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) sum = _mm256_dpwssd_avx_epi32(sum, w.v[i], load_256(x + 32 * i));
  return sum;
}

DEFINE_INTEGER(bytes_nf4, NF4_BYTES)

static bool has_avx_vnni(void) {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
}

static bool ready(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (!has_avx_vnni()) return false;
  pthread_once(&once, fill_tables);
  return true;
}

const kernels cpu_kernels_avx_vnni = {
    .name = "avx_vnni",
    .isa = ADRT_ISA_AVX_VNNI,
    .ready = ready,
    WORDS_KERNELS,
    .bytes = {[ADRT_NF4] = bytes_nf4},
    COMMON_KERNELS,
};
#else
#include "kernels.h"

static bool ready(void) { return false; }

const kernels cpu_kernels_avx_vnni = {.name = "avx_vnni", .isa = ADRT_ISA_AVX_VNNI, .ready = ready};
#endif
