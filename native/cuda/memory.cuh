// Memory that frees itself.
#ifndef ADAPTRT_CUDA_MEMORY_CUH
#define ADAPTRT_CUDA_MEMORY_CUH
#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "budget.cuh"
#include "failure.cuh"

namespace adaptrt {

// Memory of the device, or pinned memory of the host.
template <bool pinned>
class memory {
 public:
  memory() = default;
  // Throws ADRT_NO_MEMORY, with the bytes wanted and free, when there is not enough; `what` is it for.
  memory(size_t bytes, const char *what);
  memory(memory &&other) noexcept { *this = std::move(other); }
  memory &operator=(memory &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(owner_, other.owner_);
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
  budget *owner_ = nullptr;
};
using device_memory = memory<false>;
using pinned_memory = memory<true>;

// memcpy by as many threads as memory keeps busy.
void copy_in_threads(uint8_t *to, const uint8_t *from, size_t bytes);

}  // namespace adaptrt
#endif
