#include "upload.cuh"

#include <string.h>

#include <algorithm>

namespace adaptrt {

landing::landing(size_t bytes, cudaStream_t packs)
    : packs_(packs), memory_((bytes + 511) / 512 * 512, "the largest tensor") {
  check(cudaStreamCreateWithFlags(&uploads_, cudaStreamNonBlocking), "making a stream");
  for (cudaEvent_t *event : {&arrived_, &packed_[0], &packed_[1]})
    check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "making an event");
  uploader_ = std::make_unique<uploader>(uploads_);
}

landing::~landing() {
  if (uploads_) cudaStreamSynchronize(uploads_);
  uploader_.reset();
  for (cudaEvent_t event : {arrived_, packed_[0], packed_[1]})
    if (event) cudaEventDestroy(event);
  if (uploads_) cudaStreamDestroy(uploads_);
}

const uint8_t *landing::arrive(const void *from, size_t bytes) {
  uint8_t *to = memory_.bytes() + (bytes > half() ? 0 : size_t(next_) * half());
  for (int i = 0; i < 2; i++)
    if (bytes > half() || i == next_) check(cudaStreamWaitEvent(uploads_, packed_[i], 0), "upload");
  uploader_->copy(to, from, bytes);
  check(cudaEventRecord(arrived_, uploads_), "upload");
  check(cudaStreamWaitEvent(packs_, arrived_, 0), "upload");
  return to;
}

void landing::leave(size_t bytes) {
  for (int i = 0; i < 2; i++)
    if (bytes > half() || i == next_) check(cudaEventRecord(packed_[i], packs_), "upload");
  next_ ^= 1;
}

crew::crew(size_t threads) {
  for (size_t i = 1; i < threads; i++) threads_.emplace_back([this] { wait_for_work(); });
}

crew::~crew() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    leaves_ = true;
  }
  begun_.notify_all();
  for (std::thread &thread : threads_) thread.join();
}

void crew::run(size_t n, const std::function<void(size_t)> &task) {
  std::unique_lock<std::mutex> lock(mutex_);
  task_ = &task;
  next_ = 0, end_ = n;
  if (n > 1) begun_.notify_all();
  work_off(lock);
  done_.wait(lock, [&] { return !under_way_; });
}

void crew::wait_for_work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    begun_.wait(lock, [&] { return leaves_ || next_ < end_; });
    if (leaves_) return;
    work_off(lock);
  }
}

void crew::work_off(std::unique_lock<std::mutex> &lock) {
  while (next_ < end_) {
    size_t mine = next_++;
    under_way_++;
    lock.unlock();
    (*task_)(mine);
    lock.lock();
    if (!--under_way_ && next_ == end_) done_.notify_all();
  }
}

uploader::uploader(cudaStream_t stream)
    : stream_(stream),
      memory_(n_buffers * chunk_bytes, "upload buffers"),
      crew_(std::min<size_t>(most_threads, std::max(1u, std::thread::hardware_concurrency()))) {
  for (cudaEvent_t &event : sent_) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "upload events");
}

uploader::~uploader() {
  for (cudaEvent_t event : sent_)
    if (event) cudaEventDestroy(event);
}

// What of the parts lies in [start, end) of the destination.
static void gather(uint8_t *to, const std::vector<uploader::part> &parts, size_t start, size_t end) {
  auto ends_before = [](const uploader::part &p, size_t at) { return p.at + p.bytes <= at; };
  for (auto p = std::lower_bound(parts.begin(), parts.end(), start, ends_before); p != parts.end() && p->at < end; ++p) {
    size_t first = std::max(start, p->at), last = std::min(end, p->at + p->bytes);
    memcpy(to + (first - start), static_cast<const uint8_t *>(p->from) + (first - p->at), last - first);
  }
}

void uploader::copy(void *to, const std::vector<part> &parts) {
  size_t end = parts.empty() ? 0 : parts.back().at + parts.back().bytes;
  for (size_t start = 0; start < end; start += chunk_bytes) {
    size_t n = std::min(chunk_bytes, end - start);
    check(cudaEventSynchronize(sent_[next_]), "upload");
    crew_.run((n + slice_bytes - 1) / slice_bytes, [&](size_t i) {
      size_t slice = i * slice_bytes;
      gather(buffer(next_) + slice, parts, start + slice, start + std::min(n, slice + slice_bytes));
    });
    check(cudaMemcpyAsync(static_cast<uint8_t *>(to) + start, buffer(next_), n, cudaMemcpyHostToDevice, stream_), "upload");
    check(cudaEventRecord(sent_[next_], stream_), "upload");
    next_ = (next_ + 1) % n_buffers;
  }
}

}  // namespace adaptrt
