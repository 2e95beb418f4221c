/* Which kernels this machine runs. */
#include "kernels.h"

static const kernels *const best_first[] = {
#if defined(__x86_64__)
    &cpu_kernels_vnni,
    &cpu_kernels_avx_vnni,
    &cpu_kernels_avx512,
    &cpu_kernels_avx2,
#elif defined(__aarch64__)
    &cpu_kernels_neon_dot,
    &cpu_kernels_neon,
#endif
    &cpu_kernels_portable,
};

const kernels *cpu_choose_kernels(int32_t isa) {
  for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++) {
    const kernels *k = best_first[i];
    if ((isa == ADRT_ISA_AUTO || isa == k->isa) && k->ready()) return k;
  }
  return NULL;
}
