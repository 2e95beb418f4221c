/* Kernels for AVX-512. */
#if defined(__x86_64__)
#include "kernels_avx512.h"

static bool ready(void) { return has_avx512(); }

const kernels cpu_kernels_avx512 = {.name = "avx512", .isa = ADRT_ISA_AVX512, .ready = ready, COMMON_KERNELS};
#else
typedef int not_for_this_cpu;
#endif
