/* The CPU backend at the end of a pipe: runs in an emulator, driven by emulated.py.
 *
 * A request is its header, then blobs of memory, then pointers: where in the blobs an address of another blob belongs.
 * Blob 0 is the call's first argument, blob 1 its second. Memory is kept, as the ABI wants it, until the process ends.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adaptrt.h"

enum function { LOAD, RESERVE, ATTACH, DETACH, STEP, DESCRIBE, UNLOAD };
enum { MAX_EXECUTABLES = 1 << 16 };

typedef struct {
  int64_t function, executable, argument, n_blobs, n_pointers;
} request;

typedef struct {
  int64_t blob, offset, target;
} pointer;

typedef struct {
  int64_t code, value, bytes; /* of the payload that follows */
  char message[ADRT_MESSAGE_BYTES];
} reply;

static adrt_executable *executables[MAX_EXECUTABLES];
static int64_t n_executables;

static void receive(void *memory, size_t bytes) {
  if (bytes && fread(memory, bytes, 1, stdin) != 1) exit(0);
}

static void **receive_blobs(const request *r) {
  void **blobs = calloc((size_t)r->n_blobs + 2, sizeof *blobs);
  for (int64_t i = 0; i < r->n_blobs; i++) {
    int64_t bytes;
    receive(&bytes, sizeof bytes);
    blobs[i] = aligned_alloc(64, ((size_t)bytes + 64) / 64 * 64);
    receive(blobs[i], (size_t)bytes);
  }
  for (int64_t i = 0; i < r->n_pointers; i++) {
    pointer p;
    receive(&p, sizeof p);
    memcpy((char *)blobs[p.blob] + p.offset, &blobs[p.target], sizeof(void *));
  }
  return blobs;
}

static void answer(const reply *r, const void *payload) {
  fwrite(r, sizeof *r, 1, stdout);
  if (r->bytes) fwrite(payload, (size_t)r->bytes, 1, stdout);
  fflush(stdout);
}

static void serve(const adrt_backend *backend, const request *r, void **blobs) {
  adrt_executable **e = &executables[r->executable];
  adrt_error error = {0};
  int32_t handle = 0;
  reply out = {0};
  const void *payload = NULL;
  switch (r->function) {
    case LOAD:
      e = &executables[out.value = n_executables++];
      out.code = backend->load(blobs[0], blobs[1], e, &error);
      break;
    case RESERVE: out.code = backend->reserve(*e, (int32_t)r->argument, &error); break;
    case ATTACH:
      out.code = backend->attach(*e, (int32_t)r->argument, blobs[0], &handle, &error);
      out.value = handle;
      break;
    case DETACH: out.code = backend->detach(*e, (int32_t)r->argument, &error); break;
    case STEP:
      out.code = backend->step(*e, blobs[0], &error);
      payload = ((const adrt_batch *)blobs[0])->logits;
      out.bytes = r->argument;
      break;
    case DESCRIBE:
      payload = backend->describe(*e);
      out.bytes = (int64_t)strlen(payload) + 1;
      break;
    default: backend->unload(*e);
  }
  memcpy(out.message, error.message, sizeof out.message);
  answer(&out, payload);
}

int main(void) {
  for (request r;;) {
    receive(&r, sizeof r);
    void **blobs = receive_blobs(&r);
    serve(adrt_cpu_backend(), &r, blobs);
    free(blobs);
  }
}
