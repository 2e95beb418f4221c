// Barriers in shared memory that count arrivals in phases; a waiter names the parity (0, 1, 0, …) of the phase it awaits.
#ifndef ADAPTRT_CUDA_BARRIER_CUH
#define ADAPTRT_CUDA_BARRIER_CUH
#include <stdint.h>

#include "decode.cuh"

namespace adaptrt {

__device__ inline void init_barrier(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void arrive_barrier(uint64_t *barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline bool barrier_passed(uint64_t *barrier, int parity) {
  uint32_t passed;
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(passed) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(passed) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
  return passed;
}

__device__ inline void wait_barrier(uint64_t *barrier, int parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

}  // namespace adaptrt
#endif
