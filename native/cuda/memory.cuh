// Memory that frees itself, and uploads through pinned memory.
#ifndef ADAPTRT_CUDA_MEMORY_CUH
#define ADAPTRT_CUDA_MEMORY_CUH
#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "failure.cuh"

namespace adaptrt {

// Memory of the device, or pinned memory of the host.
template <bool pinned>
class memory {
 public:
  memory() = default;
  // Throws ADRT_NO_MEMORY, with the bytes wanted and free, when there is not enough; `what` is it for.
  memory(size_t bytes, const char *what);
  memory(memory &&other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  memory &operator=(memory &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~memory();

  uint8_t *bytes() const { return static_cast<uint8_t *>(data_); }
  template <typename item>
  item *as() const {
    return static_cast<item *>(data_);
  }
  size_t size() const { return bytes_; }

 private:
  void *data_ = nullptr;
  size_t bytes_ = 0;
};
using device_memory = memory<false>;
using pinned_memory = memory<true>;

// memcpy by as many threads as memory keeps busy.
void copy_in_threads(uint8_t *to, const uint8_t *from, size_t bytes);

// Copies host memory to the device at the bus's speed: threads fill one pinned buffer while the other is on its way.
class uploader {
 public:
  uploader(size_t largest, cudaStream_t stream);
  ~uploader();
  uploader(const uploader &) = delete;
  // Queues the copy; `from` has been read when this returns.
  void copy(void *to, const void *from, size_t bytes);

 private:
  cudaStream_t stream_;
  size_t chunk_;
  int next_ = 0;
  pinned_memory buffers_[2];
  cudaEvent_t sent_[2] = {};
};

}  // namespace adaptrt
#endif
