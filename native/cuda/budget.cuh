// How much of the device's memory an executable may have, and who gives way when more is wanted.
#ifndef ADAPTRT_CUDA_BUDGET_CUH
#define ADAPTRT_CUDA_BUDGET_CUH
#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace adaptrt {

// Something on the device that can move to the host when memory is wanted for something else.
class tenant {
 public:
  virtual ~tenant() = default;
  virtual size_t movable() const = 0;  // bytes that would become free
  virtual void give_way() = 0;         // moves a little of them
};

// The device memory that an executable may have. While a `scope` lives, all that the thread allocates counts.
class budget {
 public:
  explicit budget(size_t limit = SIZE_MAX) : limit_(limit) {}
  ~budget() { drop_kept(); }
  budget(const budget &) = delete;
  void admit(tenant *one) { tenants_.push_back(one); }  // the first is the first to give way
  // Memory of the device; tenants move until it fits. Throws ADRT_NO_MEMORY when it cannot.
  void *allocate(size_t bytes, const char *what);
  void free(void *data, size_t bytes);
  // While this lives, what is freed is kept for the next who wants as much: freeing waits for the device, which may have
  // a step under way.
  class keeping {
   public:
    explicit keeping(budget &b) : budget_(b) { b.keeps_ = true; }
    ~keeping() { budget_.keeps_ = false; }
    keeping(const keeping &) = delete;

   private:
    budget &budget_;
  };
  size_t room() const;  // until the limit, or until the device is full
  size_t limit() const { return limit_; }

  class scope {
   public:
    explicit scope(budget &b) : before_(current()) { current() = &b; }
    ~scope() { current() = before_; }
    scope(const scope &) = delete;

   private:
    budget *before_;
  };
  static budget *&current();  // of this thread; or none

 private:
  struct piece {
    void *data;
    size_t bytes;
  };
  bool fits(size_t bytes, size_t used) const { return bytes <= limit_ && used <= limit_ - bytes; }
  size_t movable() const;
  bool make_way();
  void drop_kept();
  void *take_kept(size_t bytes);

  size_t limit_, used_ = 0;
  std::vector<tenant *> tenants_;
  std::vector<piece> kept_;  // counted in used_
  bool keeps_ = false;
};

}  // namespace adaptrt
#endif
