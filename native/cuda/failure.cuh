// Errors inside the CUDA backend are exceptions; backend.cu turns them into codes at the ABI's boundary.
#ifndef ADAPTRT_CUDA_FAILURE_CUH
#define ADAPTRT_CUDA_FAILURE_CUH
#include <cuda_runtime.h>

#include "adaptrt.h"

namespace adaptrt {

struct failure {
  adrt_error error;
};

// Throws a failure with a one-line message.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
[[noreturn]] void fail(int code, const char *format, ...);

// Throws when a call of the CUDA runtime failed; `what` was being done.
void check(cudaError_t status, const char *what);

// Throws when a validation of native/common failed with its message in `error`.
inline void check(int code, const adrt_error &error) {
  if (code != ADRT_OK) throw failure{error};
}

}  // namespace adaptrt
#endif
