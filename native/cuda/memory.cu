#include "memory.cuh"

#include <string.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace adaptrt {
namespace {

constexpr size_t largest_chunk = size_t(32) << 20, bytes_a_thread = size_t(4) << 20, most_threads = 8;

}  // namespace

void copy_in_threads(uint8_t *to, const uint8_t *from, size_t bytes) {
  size_t n = std::min(most_threads, bytes / bytes_a_thread + 1), share = bytes / n;
  std::vector<std::thread> threads;
  for (size_t i = 1; i < n; i++) {
    size_t start = i * share, end = i + 1 == n ? bytes : start + share;
    threads.emplace_back([=] { memcpy(to + start, from + start, end - start); });
  }
  memcpy(to, from, n == 1 ? bytes : share);
  for (std::thread &thread : threads) thread.join();
}

template <bool pinned>
memory<pinned>::memory(size_t bytes, const char *what) : bytes_(bytes) {
  if (!bytes) return;
  cudaError_t status = pinned ? cudaMallocHost(&data_, bytes) : cudaMalloc(&data_, bytes);
  if (status == cudaErrorMemoryAllocation) {
    size_t available = 0, total = 0;
    cudaGetLastError();
    if (pinned) fail(ADRT_NO_MEMORY, "%s: no %zu bytes of pinned memory", what, bytes);
    cudaMemGetInfo(&available, &total);
    fail(ADRT_NO_MEMORY, "%s: %zu bytes do not fit, %zu of the GPU's %zu are free", what, bytes, available, total);
  }
  check(status, what);
}

template <bool pinned>
memory<pinned>::~memory() {
  if (data_) pinned ? cudaFreeHost(data_) : cudaFree(data_);
}

template class memory<false>;
template class memory<true>;

uploader::uploader(size_t largest, cudaStream_t stream) : stream_(stream), chunk_(std::min(largest, largest_chunk)) {
  for (int i = 0; i < 2; i++) buffers_[i] = pinned_memory(chunk_, "upload buffers");
  for (int i = 0; i < 2; i++) check(cudaEventCreateWithFlags(&sent_[i], cudaEventDisableTiming), "upload events");
}

uploader::~uploader() {
  for (cudaEvent_t event : sent_)
    if (event) cudaEventDestroy(event);
}

void uploader::copy(void *to, const void *from, size_t bytes) {
  for (size_t done = 0; done < bytes; done += chunk_) {
    size_t n = std::min(chunk_, bytes - done);
    check(cudaEventSynchronize(sent_[next_]), "upload");
    copy_in_threads(buffers_[next_].bytes(), static_cast<const uint8_t *>(from) + done, n);
    check(cudaMemcpyAsync(static_cast<uint8_t *>(to) + done, buffers_[next_].bytes(), n, cudaMemcpyHostToDevice, stream_),
          "upload");
    check(cudaEventRecord(sent_[next_], stream_), "upload");
    next_ ^= 1;
  }
}

}  // namespace adaptrt
