#include "peak.h"

#if defined(__x86_64__)
#include <immintrin.h>

bool peak_vnni_ready(void) { return __builtin_cpu_supports("avx512vnni"); }

/* Twelve independent chains hide the latency of vpdpbusd. */
int32_t peak_vnni(int64_t rounds) {
  __m512i sum[VNNI_CHAINS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
  for (int i = 0; i < VNNI_CHAINS; i++) sum[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < VNNI_CHAINS; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
    __asm__ volatile("" : "+x"(a), "+x"(b)); /* nothing may be moved out of the loop */
  }
  for (int i = 1; i < VNNI_CHAINS; i++) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
  return _mm512_reduce_add_epi32(sum[0]);
}
#else
bool peak_vnni_ready(void) { return false; }

int32_t peak_vnni(int64_t rounds) { return (int32_t)rounds; }
#endif
