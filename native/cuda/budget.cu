#include "budget.cuh"

#include <algorithm>

#include "failure.cuh"

namespace adaptrt {

budget *&budget::current() {
  thread_local budget *now = nullptr;
  return now;
}

size_t budget::movable() const {
  size_t bytes = 0;
  for (const piece &p : kept_) bytes += p.bytes;
  for (const tenant *one : tenants_) bytes += one->movable();
  return bytes;
}

// Frees what is kept, or else moves a tenant a little; false when there is neither.
bool budget::make_way() {
  if (!kept_.empty()) {
    drop_kept();
    return true;
  }
  for (tenant *one : tenants_)
    if (one->movable()) {
      one->give_way();
      return true;
    }
  return false;
}

void budget::drop_kept() {
  for (const piece &p : kept_) {
    cudaFree(p.data);
    used_ -= p.bytes;
  }
  kept_.clear();
}

void *budget::take_kept(size_t bytes) {
  for (size_t i = 0; i < kept_.size(); i++) {
    if (kept_[i].bytes != bytes) continue;
    void *data = kept_[i].data;
    kept_.erase(kept_.begin() + ptrdiff_t(i));
    return data;
  }
  return nullptr;
}

size_t budget::room() const {
  size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "reading the GPU's memory");
  return std::min(available, limit_ - std::min(limit_, used_));
}

void *budget::allocate(size_t bytes, const char *what) {
  for (size_t least = used_ - std::min(used_, movable());;) {
    if (void *kept = take_kept(bytes)) return kept;
    if (!fits(bytes, used_)) {
      if (fits(bytes, least) && make_way()) continue;
      fail(ADRT_NO_MEMORY,
           "%s: %zu bytes do not fit into the GPU memory of %zu bytes that is allowed, of which %zu are taken", what, bytes,
           limit_, least);
    }
    void *data = nullptr;
    cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaSuccess) {
      used_ += bytes;
      return data;
    }
    if (status != cudaErrorMemoryAllocation) check(status, what);
    cudaGetLastError();
    if (bytes <= room() + movable() && make_way()) continue;
    size_t available = 0, total = 0;
    cudaMemGetInfo(&available, &total);
    fail(ADRT_NO_MEMORY, "%s: %zu bytes do not fit, %zu of the GPU's %zu are free", what, bytes, available, total);
  }
}

void budget::free(void *data, size_t bytes) {
  if (keeps_) {
    kept_.push_back({data, bytes});
    return;
  }
  cudaFree(data);
  used_ -= bytes;
}

}  // namespace adaptrt
