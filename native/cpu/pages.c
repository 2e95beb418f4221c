/* The paged KV cache: a page holds every layer's keys and values of page_tokens tokens. */
#include <string.h>

#include "executable.h"

int cpu_reserve(adrt_executable *e, int32_t n_pages, adrt_error *error) {
  if (!e || n_pages < 0) return cpu_fail(error, ADRT_BAD_ARGUMENT, "reserve: %d pages", n_pages);
  if (n_pages > e->page_capacity) {
    uint8_t **pages = cpu_calloc(n_pages, sizeof *pages);
    if (!pages) return cpu_fail(error, ADRT_NO_MEMORY, "no memory for a table of %d KV pages", n_pages);
    if (e->n_pages) memcpy(pages, e->pages, (size_t)e->n_pages * sizeof *pages);
    cpu_free(e->pages);
    e->pages = pages;
    e->page_capacity = n_pages;
  }
  for (; e->n_pages < n_pages; e->n_pages++) {
    if (!(e->pages[e->n_pages] = cpu_calloc(e->page_bytes, 1)))
      return cpu_fail(error, ADRT_NO_MEMORY, "no memory for KV page %d of %d, %lld bytes each", e->n_pages,
                      n_pages, (long long)e->page_bytes);
  }
  return ADRT_OK;
}
