/* Kernels for AArch64 without the dot product, where 16-bit words are multiplied no faster than float32. */
#include "kernels_neon.h"

static bool ready(void) { return true; }

const kernels cpu_kernels_neon = {.name = "neon", .isa = ADRT_ISA_NEON, .ready = ready, COMMON_KERNELS};
