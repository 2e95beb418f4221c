// Hopper's own instructions: copies that complete on a barrier, and products of a warpgroup (128 threads) whose
// first operand is in registers and whose second is in shared memory. For sm_90a.
#ifndef ADAPTRT_CUDA_HOPPER_CUH
#define ADAPTRT_CUDA_HOPPER_CUH
#include <cuda.h>

#include "decode.cuh"

namespace adaptrt {

// ---- barriers in shared memory: they count arrivals, and bytes, in phases; a waiter names the parity of its phase ----

__device__ inline void init_barrier(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline bool barrier_passed(uint64_t *barrier, int parity) {
  uint32_t passed;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(passed)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return passed;
}

__device__ inline void wait_barrier(uint64_t *barrier, int parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

__device__ inline void arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival, and so many bytes to come.
__device__ inline void expect_bytes(uint64_t *barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// ---- copies ----

// A box of a two-dimensional array, from (column, row) on; what lies outside of the array arrives as zeros.
__device__ inline void copy_box(void *to, const CUtensorMap &map, int column, int row, uint64_t *barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// A map on its way to where copies look it up.
__device__ inline void prefetch_map(const CUtensorMap &map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- clusters ----

// Such a box to the same place in every block of the cluster that `blocks` has a bit for, and counted by the barrier
// there.
__device__ inline void copy_box_to_cluster(void *to, const CUtensorMap &map, int column, int row, uint64_t *barrier,
                                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

__device__ inline uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// For barriers, published before, and for the blocks' lives; it orders no other memory.
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait;" ::: "memory");
}

// The same in two steps, of all threads.
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void wait_at_cluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// To the same place of another block of the cluster, or of this one, counted by the barrier there.
__device__ inline void send_to_cluster(float *to, float v, uint64_t *barrier, int rank) {
  asm volatile(
      "{.reg .b32 there, counter; mapa.shared::cluster.u32 there, %0, %3; mapa.shared::cluster.u32 counter, %2, %3; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [counter];}" ::"r"(shared_address(to)),
      "r"(__float_as_uint(v)), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

__device__ inline void send_four_to_cluster(float *to, const float (&v)[4], uint64_t *barrier, int rank) {
  asm volatile(
      "{.reg .b32 there, counter; mapa.shared::cluster.u32 there, %0, %6; mapa.shared::cluster.u32 counter, %5, %6; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%1, %2, %3, %4}, [counter];}" ::"r"(
          shared_address(to)),
      "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])), "r"(__float_as_uint(v[3])),
      "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

// At the same barrier of another block of the cluster, or of this one.
__device__ inline void arrive_in_cluster(uint64_t *barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// ---- barriers of warps: 0 is __syncthreads ----

template <int threads>
__device__ inline void wait_with(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
}
template <int threads>
__device__ inline void arrive_at(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
}

// ---- flags in global memory ----

// What was written before announce is seen by who has awaited it.
__device__ inline void announce(uint32_t *flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ inline void await(uint32_t *flag) {
  uint32_t there = 0;
  while (!there) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
  *flag = 0;
}

// ---- warpgroups ----

// Registers move between warpgroups: one that needs few gives up some, one that multiplies takes them.
template <int n>
__device__ inline void limit_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

// The operand in shared memory: rows of 64 bf16 (128 bytes), swizzled as the copies of a tensor map with
// CU_TENSOR_MAP_SWIZZLE_128B leave them; groups of 8 rows are 1024 bytes apart.
__device__ inline uint64_t describe_operand(const void *rows) {
  return uint64_t((shared_address(rows) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
constexpr uint64_t operand_step = 32 >> 4;           // 16 columns further

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int in_flight>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(in_flight) : "memory");
}

// d[64 rows, n] += a[64 rows, 16] b[n, 16]^T: n / 2 registers of sums.
#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(d, i) SUMS_4(d, i), SUMS_4(d, i + 4)
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 32)
#define OPERANDS(a, b) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)

template <int n>
__device__ void warpgroup_product(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b);

template <>
__device__ inline void warpgroup_product<16>(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, "
      "1, 1, 1, 0;"
      : SUMS_8(d, 0)
      : OPERANDS(a, b));
}

template <>
__device__ inline void warpgroup_product<32>(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
      "%14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : SUMS_16(d, 0)
      : OPERANDS(a, b));
}

template <>
__device__ inline void warpgroup_product<64>(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
      "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, "
      "%36, 1, 1, 1, 0;"
      : SUMS_32(d, 0)
      : OPERANDS(a, b));
}

template <>
__device__ inline void warpgroup_product<112>(float (&d)[56], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, "
      "%33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "
      "%54, %55}, {%56, %57, %58, %59}, %60, 1, 1, 1, 0;"
      : SUMS_32(d, 0), SUMS_16(d, 32), SUMS_8(d, 48)
      : OPERANDS(a, b));
}

template <>
__device__ inline void warpgroup_product<128>(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
      "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "
      "%58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
      : SUMS_64(d, 0)
      : OPERANDS(a, b));
}

template <>
__device__ inline void warpgroup_product<256>(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
      "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, "
      "%71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "
      "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "
      "%126, %127}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
      : SUMS_64(d, 0), SUMS_64(d, 64)
      : OPERANDS(a, b));
}

#undef SUMS_4
#undef SUMS_8
#undef SUMS_16
#undef SUMS_32
#undef SUMS_64
#undef OPERANDS

}  // namespace adaptrt
#endif
