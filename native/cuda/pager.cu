#include "pager.cuh"

#include <math.h>

#include <algorithm>

#include "common.h"

namespace adaptrt {
namespace {

packed_matrix shifted(packed_matrix w, ptrdiff_t bytes) {
  auto shift = [&](auto *&pointer) {
    using item = std::remove_reference_t<decltype(*pointer)>;
    if (pointer) pointer = reinterpret_cast<item *>(reinterpret_cast<uint8_t *>(pointer) + bytes);
  };
  shift(w.codes);
  shift(w.scales);
  shift(w.unit);
  return w;
}

}  // namespace

pager::~pager() {
  if (copies_) cudaStreamSynchronize(copies_);
  for (cudaEvent_t event : arrived_)
    if (event) cudaEventDestroy(event);
  for (cudaEvent_t event : released_)
    if (event) cudaEventDestroy(event);
  if (copies_) cudaStreamDestroy(copies_);
}

void pager::open(cudaStream_t main, size_t slot_bytes) {
  main_ = main;
  slot_bytes_ = slot_bytes;
  check(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking), "making a stream");
  for (int i = 0; i < n_slots; i++)
    for (cudaEvent_t *event : {&arrived_[i], &released_[i]})
      check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "making an event");
}

int pager::add(size_t bytes) {
  block made;
  made.bytes = bytes;
  if (!counts_only()) made.device = device_memory(bytes, "weights");
  made.made_at = made.device.bytes();
  blocks_.push_back(std::move(made));
  return int(blocks_.size()) - 1;
}

uint8_t *pager::address(int block) const { return blocks_[size_t(block)].device.bytes(); }

void pager::note_use(int i, block_use use) {
  block &b = blocks_[size_t(i)];
  b.tabled = b.tabled || use == block_use::table;
  b.fixed = b.fixed || use == block_use::head;
  b.multiplied = b.multiplied || use == block_use::product;
  if (use == block_use::product) uses_.push_back(i);
}

void pager::settle(size_t spare) {
  for (block &b : blocks_)
    if (b.fixed && b.away()) bring_back(b);
  if (host_bytes() + spare <= device_room() + slots_.size()) slots_ = device_memory();
  for (;;) {
    int best = -1;
    for (size_t i = 0; i < blocks_.size(); i++)
      if (blocks_[i].away() && blocks_[i].bytes + spare <= device_room() &&
          (best < 0 || rank_of(i) > rank_of(size_t(best))))
        best = int(i);
    if (best < 0) return;
    bring_back(blocks_[size_t(best)]);
  }
}

// Multiples of the golden ratio modulo 1: the blocks below any threshold are spread evenly. Tables go first: a token reads
// one row.
double pager::rank_of(size_t i) const {
  constexpr double golden = 0.6180339887498949;
  double whole;
  return blocks_[i].multiplied ? modf(double(i) * golden, &whole) : -1;
}

int pager::next_to_go() const {
  int first = -1;
  for (size_t i = 0; i < blocks_.size(); i++)
    if (blocks_[i].can_go() && (first < 0 || rank_of(i) < rank_of(size_t(first)))) first = int(i);
  return first;
}

size_t pager::movable() const {
  if (in_step_) return 0;
  size_t bytes = 0, slots = slots_.size() || making_slots_ ? 0 : n_slots * slot_bytes_;
  for (const block &b : blocks_) bytes += b.can_go() ? b.bytes : 0;
  return bytes > slots ? bytes - slots : 0;
}

void pager::give_way() {
  int going = next_to_go();
  if (going >= 0 && blocks_[size_t(going)].multiplied && !slots_.size() && !making_slots_) {
    make_slots();
    going = next_to_go();
  }
  if (going >= 0) move_to_host(blocks_[size_t(going)]);
}

// May itself ask blocks to go.
void pager::make_slots() {
  making_slots_ = true;
  try {
    slots_ = device_memory(n_slots * slot_bytes_, "weights on their way from the host");
  } catch (...) {
    making_slots_ = false;
    throw;
  }
  making_slots_ = false;
}

void pager::move_to_host(block &b) {
  b.host = pinned_memory(b.bytes, "weights on the host");
  check(cudaMemcpyAsync(b.host.bytes(), b.device.bytes(), b.bytes, cudaMemcpyDeviceToHost, main_), "moving weights");
  check(cudaStreamSynchronize(main_), "moving weights");
  b.device = device_memory();
  moves_++;
  restart();
}

void pager::bring_back(block &b) {
  b.device = device_memory(b.bytes, "weights");
  check(cudaMemcpyAsync(b.device.bytes(), b.host.bytes(), b.bytes, cudaMemcpyHostToDevice, main_), "moving weights");
  check(cudaStreamSynchronize(main_), "moving weights");
  b.host = pinned_memory();
  moves_++;
  restart();
}

// Forgets the copies under way: what they are of has changed.
void pager::restart() {
  check(cudaStreamSynchronize(copies_), "moving weights");
  issued_ = used_ = 0;
  queue_.clear();
}

void pager::begin_step() {
  if (streams() && !slots_.size()) make_slots();
  if (streams() && (queue_.empty() || used_ % queue_.size())) {  // anew, or after a step that failed
    restart();
    for (int use : uses_)
      if (blocks_[size_t(use)].away()) queue_.push_back(use);
  }
  while (!queue_.empty() && issued_ < used_ + n_slots) issue();
  in_step_ = true;
}

void pager::issue() {
  const block &b = blocks_[size_t(queue_[issued_ % queue_.size()])];
  uint64_t i = issued_ % n_slots;
  check(cudaStreamWaitEvent(copies_, released_[i], 0), "streaming weights");
  check(cudaMemcpyAsync(slot(issued_), b.host.bytes(), b.bytes, cudaMemcpyHostToDevice, copies_), "streaming weights");
  check(cudaEventRecord(arrived_[i], copies_), "streaming weights");
  issued_++;
}

void pager::acquire(int i) {
  if (blocks_[size_t(i)].away()) check(cudaStreamWaitEvent(main_, arrived_[used_ % n_slots], 0), "streaming weights");
}

void pager::release(int i) {
  if (!blocks_[size_t(i)].away()) return;
  check(cudaEventRecord(released_[used_ % n_slots], main_), "streaming weights");
  used_++;
  issue();
}

packed_matrix pager::at(int i, packed_matrix w) const {
  const block &b = blocks_[size_t(i)];
  return shifted(w, (b.away() ? slot(used_) : b.device.bytes()) - b.made_at);
}

packed_matrix pager::table_at(int i, packed_matrix w) const {
  const block &b = blocks_[size_t(i)];
  return shifted(w, (b.away() ? b.host.bytes() : b.device.bytes()) - b.made_at);
}

size_t pager::streamed_bytes() const {
  size_t bytes = 0;
  for (int use : uses_) bytes += blocks_[size_t(use)].away() ? blocks_[size_t(use)].bytes : 0;
  return bytes;
}

size_t pager::host_bytes() const {
  size_t bytes = 0;
  for (const block &b : blocks_) bytes += b.away() ? b.bytes : 0;
  return bytes;
}

size_t pager::fixed_bytes() const {
  size_t bytes = 0;
  for (const block &b : blocks_) bytes += b.can_go() ? 0 : b.bytes;
  return bytes;
}

size_t pager::largest_bytes() const {
  size_t largest = 0;
  for (const block &b : blocks_) largest = std::max(largest, b.bytes);
  return largest;
}

size_t pager::needed_slot_bytes() const {
  size_t largest = 0;
  for (const block &b : blocks_)
    if (b.can_go() && b.multiplied) largest = std::max(largest, b.bytes);
  return size_t(cpu_align(int64_t(largest), 256));
}

}  // namespace adaptrt
