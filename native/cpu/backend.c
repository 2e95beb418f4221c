/* The CPU backend's table: the one symbol the outside sees. */
#include "executable.h"

static int probe(adrt_error *error) {
  (void)error;
  return ADRT_OK;
}

static const char *describe(const adrt_executable *e) { return e ? e->description : "cpu: nothing loaded"; }

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
};

const adrt_backend *adrt_cpu_backend(void) { return &backend; }
