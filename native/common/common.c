/* Errors, checked sizes and aligned memory. */
#include "common.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

int cpu_fail(adrt_error *error, int code, const char *format, ...) {
  if (error) {
    error->code = code;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
  }
  return code;
}

int64_t cpu_align(int64_t value, int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

int64_t cpu_product(int64_t a, int64_t b, int64_t c) {
  const int64_t limit = (int64_t)1 << 62;
  if (a < 0 || b < 0 || c < 0) return -1;
  if (!a || !b || !c) return 0;
  if (a > limit / b || a * b > limit / c) return -1;
  return a * b * c;
}

void cpu_prefer_huge_pages(void *memory, uint64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t huge = (uintptr_t)1 << 21;
  uintptr_t start = ((uintptr_t)memory + huge - 1) & ~(huge - 1), end = ((uintptr_t)memory + bytes) & ~(huge - 1);
  if (start < end) (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

void *cpu_calloc(int64_t count, int64_t size) {
  int64_t bytes = cpu_product(count, size, 1);
  if (bytes < 0 || (uint64_t)bytes > SIZE_MAX - 64 - sizeof(void *)) return NULL;
  void *raw = calloc(1, (size_t)bytes + 64 + sizeof(void *));
  if (!raw) return NULL;
  cpu_prefer_huge_pages(raw, (uint64_t)bytes);
  uintptr_t start = ((uintptr_t)raw + sizeof(void *) + 63) & ~(uintptr_t)63;
  ((void **)start)[-1] = raw; /* what to give back to free() */
  return (void *)start;
}

void cpu_free(void *memory) {
  if (memory) free(((void **)memory)[-1]);
}
