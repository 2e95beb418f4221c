// The CUDA backend's table: the one symbol the outside sees, and the boundary where exceptions become codes.
#include <stdio.h>

#include <mutex>
#include <new>

#include "executable.cuh"

namespace {

using adaptrt::check;
using adaptrt::fail;

// A fault costs the process its context on the device; it comes back once nobody uses the old one.
struct {
  std::mutex mutex;
  int loaded = 0;
  bool faulted = false;
} state;

// Once nobody uses the device any more.
void recover() {
  std::lock_guard<std::mutex> lock(state.mutex);
  if (state.loaded || !state.faulted) return;
  cudaDeviceReset();
  cudaGetLastError();
  state.faulted = false;
}

void note_fault() {
  std::lock_guard<std::mutex> lock(state.mutex);
  state.faulted = true;
}

template <typename callable>
int guarded(adrt_error *error, const callable &call) {
  adrt_error caught = {ADRT_OK, ""};
  try {
    call();
    return ADRT_OK;
  } catch (const adaptrt::failure &f) {
    caught = f.error;
  } catch (const std::exception &other) {
    caught.code = ADRT_NO_MEMORY;
    snprintf(caught.message, sizeof caught.message, "no memory on the host (%s)", other.what());
  }
  if (error) *error = caught;
  return caught.code;
}

// Calls on an executable: on its device, refused after a fault.
template <typename callable>
int guarded_on(adrt_executable *e, adrt_error *error, const char *what, const callable &call) {
  return guarded(error, [&] {
    if (!e) fail(ADRT_BAD_ARGUMENT, "%s: a NULL argument", what);
    if (e->faulted) fail(ADRT_DEVICE_FAULT, "%s: the GPU failed in an earlier call; load the model again", what);
    adaptrt::device_scope scope(e->device);
    adaptrt::budget::scope memory(e->budget);
    try {
      call();
    } catch (...) {
      e->faulted = e->queues.wait() != cudaSuccess;  // what was queued reads memory that may go
      if (e->faulted) note_fault();
      throw;
    }
  });
}

int probe(adrt_error *error) {
  return guarded(error, [] {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice || (status == cudaSuccess && !count))
      fail(ADRT_UNAVAILABLE, "%s", status == cudaErrorInsufficientDriver ? "no NVIDIA driver, or one too old for CUDA 13"
                                                                         : "no NVIDIA GPU");
    check(status, "no GPU can be used");
    int best = 0;
    for (int i = 0; i < count; i++) {
      int major = 0;
      check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i), "reading the GPU's properties");
      best = major > best ? major : best;
    }
    if (best < 8) fail(ADRT_UNAVAILABLE, "the GPU has compute capability %d, this backend needs 8.0", best);
  });
}

int load(const adrt_program *program, const adrt_options *options, adrt_executable **out, adrt_error *error) {
  return guarded(error, [&] {
    if (!program || !options || !out) fail(ADRT_BAD_ARGUMENT, "load: a NULL argument");
    *out = nullptr;
    try {
      *out = adaptrt::load(*program, *options);
    } catch (...) {
      if (cudaStreamSynchronize(cudaStreamPerThread) != cudaSuccess) note_fault();
      recover();
      throw;
    }
    std::lock_guard<std::mutex> lock(state.mutex);
    state.loaded++;
  });
}

void unload(adrt_executable *e) {
  if (!e) return;
  int device = e->device;
  {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaStreamSynchronize(e->queues.main);
    delete e;
    cudaSetDevice(before);
  }
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    state.loaded--;
  }
  recover();
}

int reserve(adrt_executable *e, int32_t n_pages, adrt_error *error) {
  return guarded_on(e, error, "reserve", [&] {
    if (n_pages < 0) fail(ADRT_BAD_ARGUMENT, "reserve: %d pages", n_pages);
    adaptrt::reserve_pages(*e, n_pages);
  });
}

int attach(adrt_executable *e, int32_t n, const adrt_attachment *attachments, int32_t *handle, adrt_error *error) {
  return guarded_on(e, error, "attach", [&] {
    if (n < 0 || (n && !attachments) || !handle)
      fail(ADRT_BAD_ARGUMENT, "attach: %d attachments, or a NULL argument", n);
    *handle = e->shelf.attach(n, attachments);
  });
}

int detach(adrt_executable *e, int32_t handle, adrt_error *error) {
  return guarded_on(e, error, "detach", [&] { e->shelf.detach(handle); });
}

int prefetch(adrt_executable *e, int32_t n, const int32_t *handles, adrt_error *error) {
  return guarded_on(e, error, "prefetch", [&] {
    if (n < 0 || (n && !handles)) fail(ADRT_BAD_ARGUMENT, "prefetch: %d adapters, or a NULL argument", n);
    e->shelf.want(n, handles);
  });
}

int step(adrt_executable *e, const adrt_batch *batch, adrt_error *error) {
  return guarded_on(e, error, "step", [&] {
    if (!batch) fail(ADRT_BAD_ARGUMENT, "step: a NULL argument");
    adaptrt::step(*e, *batch);
  });
}

int peaks(adrt_executable *e, adrt_peaks *out, adrt_error *error) {
  return guarded_on(e, error, "peaks", [&] {
    if (!out) fail(ADRT_BAD_ARGUMENT, "peaks: a NULL argument");
    *out = adaptrt::measure_peaks(*e);
  });
}

const char *describe(const adrt_executable *e) { return e ? adaptrt::describe(*e) : "cuda: nothing loaded"; }

const adrt_backend backend = {ADRT_ABI_VERSION, sizeof(adrt_backend), "cuda", probe, load,     unload,
                              reserve,          attach,               detach, step,  describe, peaks,
                              prefetch};

}  // namespace

extern "C" __attribute__((visibility("default"))) const adrt_backend *adrt_cuda_backend(void) { return &backend; }
