// The attached adapters, on the device or not. The caller keeps an adapter's tensors until it is detached, usually in a
// mapped file; so an adapter that nothing names can leave the device when memory is wanted, the one longest unused first,
// and comes back from there. Whether those bytes are in memory or on disk is the operating system's business.
#ifndef ADAPTRT_CUDA_SHELF_CUH
#define ADAPTRT_CUDA_SHELF_CUH
#include <memory>
#include <vector>

#include "memory.cuh"

struct adrt_executable;

namespace adaptrt {

class shelf : public tenant {
 public:
  explicit shelf(adrt_executable &e) : e_(e) {}

  int32_t attach(int32_t n, const adrt_attachment *attachments);
  void detach(int32_t handle);
  bool has(int32_t handle) const { return handle >= 0 && size_t(handle) < entries_.size() && entries_[size_t(handle)]; }

  // A step: its adapters are on the device and stay while it lasts.
  void begin_step(const adrt_batch &batch);
  void end_step() { now_++; }
  // Adapters that will be named soon come while the next step computes.
  void want(int32_t n, const int32_t *handles);
  void bring_wanted();

  size_t movable() const override;
  void give_way() override;

 private:
  struct entry {
    std::vector<adrt_attachment> attachments;
    std::vector<std::vector<adrt_term>> terms;  // of each attachment
    uint64_t last_use = 0;
  };
  bool idle(size_t handle) const;
  void bring(int32_t handle);

  adrt_executable &e_;
  std::vector<std::unique_ptr<entry>> entries_;  // by handle, empty when detached
  std::vector<int32_t> wanted_;
  uint64_t now_ = 1;
};

}  // namespace adaptrt
#endif
