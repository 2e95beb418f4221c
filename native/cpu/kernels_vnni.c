/* Kernels for AVX-512 with VNNI and VBMI. */
#if defined(__x86_64__)
#include "kernels_avx512.h"

static bool supported(void) {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

const kernels cpu_kernels_vnni = {
    .name = "avx512_vnni", .isa = ADRT_ISA_AVX512_VNNI, .supported = supported, COMMON_KERNELS};
#else
typedef int not_for_this_cpu;
#endif
