// Weights that do not fit: they stay packed in pinned memory of the host and are copied to the device ahead of use.
//
// A block is what one product reads, or a table of embeddings. Blocks start on the device. When memory is wanted for
// something else they move to the host, one at a time, spread evenly over the program so that copies run while what
// stayed is multiplied. A step takes the blocks on the host in the order of their use through two slots of the device:
// while a product reads one, the next is on its way to the other. The copies go round: after the last product's release
// the first blocks of the next step are already under way. A table of embeddings is read where it is, over the bus.
#ifndef ADAPTRT_CUDA_PAGER_CUH
#define ADAPTRT_CUDA_PAGER_CUH
#include <vector>

#include "memory.cuh"
#include "product.cuh"

namespace adaptrt {

enum class block_use { table, product, head };  // the head stays: a slot for it would be as large

class pager : public tenant {
 public:
  pager() = default;
  pager(const pager &) = delete;
  ~pager() override;

  // While a program is loaded. A pager that is not opened only counts.
  void open(cudaStream_t main, size_t slot_bytes);  // as a pager that counted says
  bool counts_only() const { return !main_; }
  int add(size_t bytes);  // a new block, on the device
  uint8_t *address(int block) const;
  void note_use(int block, block_use use);
  void settle(size_t spare);  // brings back what fits after all, when so many bytes stay free

  // While a step is enqueued on the main stream; blocks stay where they are while this lives.
  class step {
   public:
    explicit step(pager &p) : pager_(p) { p.begin_step(); }
    ~step() { pager_.in_step_ = false; }
    step(const step &) = delete;

   private:
    pager &pager_;
  };
  void acquire(int block);         // what is enqueued from here on sees the block
  void release(int block);         // what is enqueued from here on does not
  packed_matrix at(int block, packed_matrix w) const;        // w where the block is now, between the two
  packed_matrix table_at(int block, packed_matrix w) const;

  size_t movable() const override;
  void give_way() override;

  bool streams() const { return streamed_bytes() > 0; }
  uint64_t moves() const { return moves_; }  // so far, of blocks from here to there
  size_t streamed_bytes() const;      // in a step
  size_t fixed_bytes() const;         // that never leave the device
  size_t largest_bytes() const;       // of a block
  size_t needed_slot_bytes() const;   // of a slot

 private:
  static constexpr int n_slots = 2;
  struct block {
    size_t bytes = 0;
    const uint8_t *made_at = nullptr;  // where its matrices were described
    bool tabled = false, multiplied = false, fixed = false;
    device_memory device;
    pinned_memory host;
    bool away() const { return host.size() > 0; }
    bool can_go() const { return !away() && !fixed && (tabled || multiplied); }
  };
  double rank_of(size_t i) const;
  int next_to_go() const;
  void move_to_host(block &b);
  void bring_back(block &b);
  void begin_step();
  void restart();
  void issue();
  void make_slots();
  size_t host_bytes() const;
  static size_t device_room() { return budget::current() ? budget::current()->room() : SIZE_MAX; }
  uint8_t *slot(uint64_t count) const { return slots_.bytes() + count % n_slots * slot_bytes_; }

  cudaStream_t main_ = nullptr, copies_ = nullptr;
  cudaEvent_t arrived_[n_slots] = {}, released_[n_slots] = {};
  std::vector<block> blocks_;
  std::vector<int> uses_;   // by products, in program order
  std::vector<int> queue_;  // those of them whose block is on the host
  uint64_t issued_ = 0, used_ = 0;  // copies so far; slots are taken in turn
  uint64_t moves_ = 0;
  size_t slot_bytes_ = 0;
  device_memory slots_;  // none before a product's block goes
  bool making_slots_ = false, in_step_ = false;
};

}  // namespace adaptrt
#endif
