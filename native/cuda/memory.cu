#include "memory.cuh"

#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace adaptrt {
namespace {

constexpr size_t bytes_a_thread = size_t(4) << 20, most_threads = 8;

// Calls work(start, end) for parts of so many bytes, by as many threads as memory keeps busy.
template <typename callable>
void in_threads(size_t bytes, const callable &work) {
  size_t n = std::min(most_threads, bytes / bytes_a_thread + 1), share = bytes / n;
  std::vector<std::thread> threads;
  for (size_t i = 1; i < n; i++) {
    size_t start = i * share, end = i + 1 == n ? bytes : start + share;
    threads.emplace_back([=, &work] { work(start, end); });
  }
  work(0, n == 1 ? bytes : share);
  for (std::thread &thread : threads) thread.join();
}

}  // namespace

void copy_in_threads(uint8_t *to, const uint8_t *from, size_t bytes) {
  in_threads(bytes, [&](size_t start, size_t end) { memcpy(to + start, from + start, end - start); });
}

// Pinned memory in large pages, which threads fill with zeros: seven times faster than cudaMallocHost.
static cudaError_t allocate_pinned(void **data, size_t bytes) {
  void *made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return cudaErrorMemoryAllocation;
  madvise(made, bytes, MADV_HUGEPAGE);
  in_threads(bytes, [&](size_t start, size_t end) {
    for (size_t i = start; i < end; i += 4096) static_cast<volatile uint8_t *>(made)[i] = 0;
  });
  cudaError_t status = cudaHostRegister(made, bytes, cudaHostRegisterDefault);
  if (status == cudaSuccess)
    *data = made;
  else
    munmap(made, bytes);
  return status;
}

static void free_pinned(void *data, size_t bytes) {
  cudaHostUnregister(data);
  munmap(data, bytes);
}

template <>
device_memory::memory(size_t bytes, const char *what) : bytes_(bytes), owner_(budget::current()) {
  if (!bytes) return;
  if (!owner_) fail(ADRT_DEVICE_FAULT, "%s: no budget of memory", what);
  data_ = owner_->allocate(bytes, what);
}

template <>
pinned_memory::memory(size_t bytes, const char *what) : bytes_(bytes) {
  if (!bytes) return;
  cudaError_t status = allocate_pinned(&data_, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail(ADRT_NO_MEMORY, "%s: no %zu bytes of pinned memory", what, bytes);
  }
  check(status, what);
}

template <>
device_memory::~memory() {
  if (data_) owner_->free(data_, bytes_);
}

template <>
pinned_memory::~memory() {
  if (data_) free_pinned(data_, bytes_);
}

template class memory<false>;
template class memory<true>;

}  // namespace adaptrt
