// Load a program: the device, its streams, the weights, the stages.
#include <stdio.h>

#include <algorithm>

#include "executable.cuh"

namespace adaptrt {
namespace {

constexpr int oldest_major = 8;

void check_options(const adrt_options &o) {
  adrt_error error;
  check(cpu_validate_options(&o, &error), error);
  if (o.precision != ADRT_FAST)
    fail(ADRT_UNAVAILABLE, "precision exact is not offered here: products are bfloat16; use fast, or the cpu backend");
  if (o.kv_dtype != ADRT_F16) fail(ADRT_UNAVAILABLE, "KV in f32 is not offered here, expected f16");
  int count = 0;
  check(cudaGetDeviceCount(&count), "no GPU can be used");
  if (o.device < 0 || o.device >= count) fail(ADRT_BAD_ARGUMENT, "device %d, %d GPUs are there", o.device, count);
}

void open_device(adrt_executable &e) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, e.device), "reading the GPU's properties");
  if (properties.major < oldest_major)
    fail(ADRT_UNAVAILABLE, "%s has compute capability %d.%d, this backend needs %d.0", properties.name, properties.major,
         properties.minor, oldest_major);
  e.hopper = properties.major == 9;
  e.multiprocessors = properties.multiProcessorCount;
  snprintf(e.device_name, sizeof e.device_name, "%.60s, sm_%d%d", properties.name, properties.major, properties.minor);
  e.queues.create();
  check(product_create(e.device, &e.products.context), "making the products' context");
}

void make_points(adrt_executable &e, const adrt_program &p) {
  e.points.resize(size_t(p.n_targets));
  for (int32_t i = 0; i < p.n_ops; i++) {
    const adrt_op &op = p.ops[i];
    if (!is_attach_point(op.kind) || op.target < 0) continue;
    const adrt_tensor &w = p.tensors[op.weight];
    bool by_columns = op.kind == ADRT_EMBED || op.kind == ADRT_NORM;
    e.points[size_t(op.target)] = {op.kind, by_columns ? w.cols : w.rows, op.kind == ADRT_EMBED ? w.rows : w.cols};
  }
}

// Loads with a budget begin with a pass that only counts, so that one that is too small is refused at once, with the
// number that would do.
constexpr int32_t step_tokens = 512;

struct needs {
  size_t slot_bytes, step_bytes, least;
};

needs count_needs(const adrt_program &program, const adrt_executable &opened, size_t arriving) {
  adrt_executable e(opened.options);
  make_stages(e, program);
  needs n = {e.weights.needed_slot_bytes(), step_bytes(e, opened.products.context, step_tokens), 0};
  size_t loading = arriving + e.weights.largest_bytes();
  n.least = e.vector_bytes + e.weights.fixed_bytes() + 2 * n.slot_bytes + std::max(loading, n.step_bytes);
  return n;
}

void check_budget(const needs &n, size_t limit) {
  constexpr size_t mib = 1 << 20;
  if (limit < n.least)
    fail(ADRT_NO_MEMORY, "%.1f MiB of GPU memory are too few for this model, at least %zu MiB are needed",
         double(limit) / mib, (n.least + mib - 1) / mib);
}

size_t largest_tensor(const adrt_program &p) {
  uint64_t largest = 1 << 20;
  for (int32_t i = 0; i < p.n_tensors; i++) largest = std::max(largest, p.tensors[i].bytes);
  return size_t(largest);
}

}  // namespace

// All of one priority: blocks that wait for each other rely on that (spec/backend.md).
void device_queues::create() {
  for (cudaStream_t *stream : {&main, &adapters})
    check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "making a stream");
}

cudaError_t device_queues::wait() const {
  cudaError_t status = cudaStreamSynchronize(main), other = cudaStreamSynchronize(adapters);
  return status == cudaSuccess ? other : status;
}

device_queues::~device_queues() {
  for (cudaStream_t stream : {main, adapters})
    if (stream) cudaStreamDestroy(stream);
}

const char *describe(const adrt_executable &e) {
  int length = snprintf(e.description, sizeof e.description, "cuda: %s, fast", e.device_name);
  if (e.weights.streams())
    snprintf(e.description + length, sizeof e.description - size_t(length),
             ", %.3f GB of weights streamed from the host a step", double(e.weights.streamed_bytes()) / 1e9);
  return e.description;
}

adrt_executable *load(const adrt_program &program, const adrt_options &options) {
  adrt_error error;
  check_options(options);
  check(cpu_validate_program(&program, &error), error);
  device_scope scope(options.device);
  size_t largest = largest_tensor(program);
  auto e = std::make_unique<adrt_executable>(options);
  budget::scope memory(e->budget);
  open_device(*e);
  needs n = count_needs(program, *e, largest);
  check_budget(n, e->budget.limit());
  e->weights.open(e->queues.main, n.slot_bytes);
  make_points(*e, program);
  e->arrivals = std::make_unique<landing>(largest, e->queues.main);
  make_stages(*e, program);
  check(cudaStreamSynchronize(e->queues.main), "loading the weights");
  e->arrivals.reset();
  e->weights.settle(n.step_bytes);
  return e.release();
}

}  // namespace adaptrt

adaptrt::source adrt_executable::source_of(const adaptrt::view &v) const {
  if (v.buffer < 0) return {nullptr, 0};
  const adaptrt::activations &a = buffers[size_t(v.buffer)];
  return {a.wide + v.offset, a.width};
}

adaptrt::destination adrt_executable::destination_of(const adaptrt::view &v) const {
  if (v.buffer < 0) return {nullptr, 0, nullptr, 0};
  const adaptrt::activations &a = buffers[size_t(v.buffer)];
  return {a.wants_wide ? a.wide + v.offset : nullptr, a.width, a.wants_narrow ? a.narrow + v.offset : nullptr,
          a.narrow_stride()};
}
