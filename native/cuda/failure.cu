#include "failure.cuh"

#include <stdarg.h>
#include <stdio.h>

namespace adaptrt {

void fail(int code, const char *format, ...) {
  failure f;
  f.error.code = code;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(f.error.message, sizeof f.error.message, format, arguments);
  va_end(arguments);
  throw f;
}

static int code_of(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation: return ADRT_NO_MEMORY;
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorDevicesUnavailable:
    case cudaErrorSystemDriverMismatch: return ADRT_UNAVAILABLE;
    default: return ADRT_DEVICE_FAULT;
  }
}

void check(cudaError_t status, const char *what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky ends here
  fail(code_of(status), "%s: %s (%s)", what, cudaGetErrorString(status), cudaGetErrorName(status));
}

}  // namespace adaptrt
