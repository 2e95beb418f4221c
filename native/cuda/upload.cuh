// From the host's memory, usually a mapped file, to the device at the bus's speed.
#ifndef ADAPTRT_CUDA_UPLOAD_CUH
#define ADAPTRT_CUDA_UPLOAD_CUH
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "memory.cuh"

namespace adaptrt {

// Threads that wait for work.
class crew {
 public:
  explicit crew(size_t threads);
  ~crew();
  crew(const crew &) = delete;
  // Calls task(0) ... task(n - 1), here and in the threads.
  void run(size_t n, const std::function<void(size_t)> &task);

 private:
  void wait_for_work();
  void work_off(std::unique_lock<std::mutex> &lock);

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable begun_, done_;
  const std::function<void(size_t)> *task_ = nullptr;
  size_t next_ = 0, end_ = 0, under_way_ = 0;
  bool leaves_ = false;
};

// Copies host memory to the device at the bus's speed: while a chunk is on its way, threads fill the next pinned buffer.
// Chunks are large, since every call of the driver takes a lock.
class uploader {
 public:
  explicit uploader(cudaStream_t stream);
  ~uploader();
  uploader(const uploader &) = delete;
  struct part {
    size_t at;  // of the destination; parts rise and do not overlap
    const void *from;
    size_t bytes;
  };
  // Queues copies on the stream; all `from` has been read when this returns. What lies between parts is lost.
  void copy(void *to, const std::vector<part> &parts);
  void copy(void *to, const void *from, size_t bytes) { copy(to, {{0, from, bytes}}); }

 private:
  static constexpr size_t chunk_bytes = size_t(16) << 20, slice_bytes = size_t(512) << 10, n_buffers = 3;
  static constexpr size_t most_threads = 12;  // they copy faster than the bus
  uint8_t *buffer(size_t i) const { return memory_.bytes() + i * chunk_bytes; }

  cudaStream_t stream_;
  pinned_memory memory_;
  cudaEvent_t sent_[n_buffers] = {};
  size_t next_ = 0;
  crew crew_;
};

// Where tensors arrive before they are packed: two halves, one of which fills while the other is packed. A tensor that is
// larger than a half has both.
class landing {
 public:
  landing(size_t bytes, cudaStream_t packs);
  ~landing();
  landing(const landing &) = delete;
  // Queues the copy of a tensor and calls pack(where it is), which enqueues on the stream for packing.
  template <typename callable>
  void receive(const void *from, size_t bytes, const callable &pack) {
    pack(arrive(from, bytes));
    leave(bytes);
  }

 private:
  const uint8_t *arrive(const void *from, size_t bytes);
  void leave(size_t bytes);
  size_t half() const { return memory_.size() / 2; }

  cudaStream_t packs_, uploads_ = nullptr;
  cudaEvent_t arrived_ = nullptr, packed_[2] = {};
  device_memory memory_;
  std::unique_ptr<uploader> uploader_;
  int next_ = 0;
};

}  // namespace adaptrt
#endif
