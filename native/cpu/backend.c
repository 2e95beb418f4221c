/* The CPU backend's table: the one symbol the outside sees. */
#include "executable.h"
#include "peak.h"

static int probe(adrt_error *error) {
  (void)error;
  return ADRT_OK;
}

static const char *describe(const adrt_executable *e) { return e ? e->description : "cpu: nothing loaded"; }

enum { PROBE_BYTES = 1 << 29 }; /* far more than any cache */

static int peaks(adrt_executable *e, adrt_peaks *out, adrt_error *error) {
  (void)error;
  int32_t threads = e->options.threads;
  *out = (adrt_peaks){.bytes_per_second = cpu_read_bandwidth(PROBE_BYTES, threads),
                      .operations_per_second = cpu_int8_peak(threads)};
  return ADRT_OK;
}

static const adrt_backend backend = {
    .abi_version = ADRT_ABI_VERSION,
    .struct_bytes = sizeof(adrt_backend),
    .name = "cpu",
    .probe = probe,
    .load = cpu_load,
    .unload = cpu_unload,
    .reserve = cpu_reserve,
    .attach = cpu_attach,
    .detach = cpu_detach,
    .step = cpu_step,
    .describe = describe,
    .peaks = peaks,
    .read_step = cpu_read_step,
};

const adrt_backend *adrt_cpu_backend(void) { return &backend; }
