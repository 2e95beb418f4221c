// What the GPU does at best: the floors under a step, which `adaptrt bench` compares against.
#include <algorithm>
#include <vector>

#include "executable.cuh"
#include "launch.cuh"

namespace adaptrt {
namespace {

constexpr size_t copy_bytes = size_t(1) << 29;  // far more than any cache
constexpr int square = 8192, warm_ups = 2, repeats = 7;

// Operands like weights: every mantissa and sign, since zeros would need less power and so run faster.
__global__ void fill_random(uint16_t *values, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    values[i] = uint16_t((uint32_t(i) * 2654435761u >> 13 & 0x807f) | 0x3f80);
}

struct timer {
  cudaEvent_t start = nullptr, end = nullptr;
  timer() {
    check(cudaEventCreate(&start), "making an event");
    check(cudaEventCreate(&end), "making an event");
  }
  ~timer() {
    cudaEventDestroy(start);
    cudaEventDestroy(end);
  }
};

// Median seconds of `work`, which queues something on the stream.
template <typename callable>
double seconds_of(cudaStream_t stream, const callable &work) {
  timer t;
  std::vector<float> milliseconds(repeats);
  for (int i = -warm_ups; i < repeats; i++) {
    float &elapsed = milliseconds[size_t(std::max(i, 0))];
    check(cudaEventRecord(t.start, stream), "timing");
    work();
    check(cudaEventRecord(t.end, stream), "timing");
    check(cudaEventSynchronize(t.end), "timing");
    check(cudaEventElapsedTime(&elapsed, t.start, t.end), "timing");
  }
  std::nth_element(milliseconds.begin(), milliseconds.begin() + repeats / 2, milliseconds.end());
  return 1e-3 * milliseconds[repeats / 2];
}

double copied_bytes_per_second(cudaStream_t stream) {
  device_memory from(copy_bytes, "probing the bandwidth"), to(copy_bytes, "probing the bandwidth");
  check(cudaMemsetAsync(from.bytes(), 1, copy_bytes, stream), "filling memory");
  return 2.0 * copy_bytes / seconds_of(stream, [&] {
    check(cudaMemcpyAsync(to.bytes(), from.bytes(), copy_bytes, cudaMemcpyDeviceToDevice, stream), "a copy");
  });
}

double uploaded_bytes_per_second(cudaStream_t stream) {
  constexpr size_t bytes = size_t(64) << 20;
  device_memory to(bytes, "probing the bus");
  pinned_memory from(bytes, "probing the bus");
  return bytes / seconds_of(stream, [&] {
    check(cudaMemcpyAsync(to.bytes(), from.bytes(), bytes, cudaMemcpyHostToDevice, stream), "a copy");
  });
}

double operations_per_second(const product_context &context, cudaStream_t stream) {
  if (!context.cublas) return 0;
  const int64_t count = int64_t(square) * square;
  device_memory memory(3 * count * sizeof(__nv_bfloat16), "probing the arithmetic");
  __nv_bfloat16 *a = memory.as<__nv_bfloat16>();
  launch({stream, false}, fill_random, dim3(1024), 256, 0, memory.as<uint16_t>(), 2 * count);
  double seconds = seconds_of(stream, [&] {
    if (!launch_square(context, a, a + count, a + 2 * count, square, stream))
      fail(ADRT_DEVICE_FAULT, "probing the arithmetic: cuBLAS failed");
  });
  return 2.0 * square * double(count) / seconds;
}

}  // namespace

adrt_peaks measure_peaks(adrt_executable &e) {
  budget probes;  // what is probed with is no part of the model
  budget::scope memory(probes);
  size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "reading the memory's size");
  cudaStream_t stream = e.queues.main;
  return {copied_bytes_per_second(stream), operations_per_second(*e.products.context, stream),
          uint64_t(total_bytes - free_bytes), uploaded_bytes_per_second(stream), e.weights.streamed_bytes()};
}

}  // namespace adaptrt
