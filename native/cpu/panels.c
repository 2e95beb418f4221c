/* Adapters' U in the order in which it is added: panels (executable.h), made once for all who share the tensor. */
#include <stdlib.h>
#include <string.h>

#include "executable.h"

/* Panels lie together in huge pages: a step reads about a kilobyte of each here and there, which in ordinary pages
 * would cost a walk through the page tables every time. */
enum { ARENA_BYTES = 2 << 20 };

static arena *new_arena(int64_t bytes) {
  arena *a = cpu_calloc(1, sizeof *a);
  bytes = cpu_align(bytes, ARENA_BYTES);
  void *memory = NULL;
  if (!a || posix_memalign(&memory, ARENA_BYTES, (size_t)bytes)) {
    cpu_free(a);
    return NULL;
  }
  cpu_prefer_huge_pages(memory, (uint64_t)bytes);
  *a = (arena){memory, bytes, 0, 0};
  return a;
}

void cpu_release_memory(adrt_executable *e, arena *a) {
  if (!a || --a->users) return;
  if (e->arena == a) e->arena = NULL;
  free(a->memory);
  cpu_free(a);
}

/* From the newest arena, or from another one when it is full. */
uint8_t *cpu_take_memory(adrt_executable *e, int64_t bytes, arena **owner) {
  arena *a = e->arena;
  bytes = cpu_align(bytes, 64);
  if (!a || a->bytes - a->used < bytes) a = new_arena(bytes);
  if (!a) return NULL;
  e->arena = *owner = a;
  uint8_t *memory = a->memory + a->used;
  a->used += bytes;
  a->users++;
  memset(memory, 0, (size_t)bytes);
  return memory;
}

static void fill_floats(panels *p) {
  const matrix *m = &p->source;
  int64_t item = cpu_bytes_of(p->dtype, 1), row_bytes = m->cols * item;
  for (int64_t row = 0; row < m->rows; row++) {
    uint8_t *out = p->items + (row / PANEL * p->stride + row % PANEL) * item;
    for (int64_t k = 0; k < m->cols; k++)
      memcpy(out + k * PANEL * item, m->data + row * row_bytes + k * item, (size_t)item);
  }
}

/* One step k of a transposed quantized source, [rank, out]: its codes, and the scales of its blocks. */
static void fill_codes(panels *p, int64_t k) {
  const matrix *m = &p->source;
  for (int64_t i = 0; i < m->cols; i += BLOCK) p->scales[i / BLOCK * p->rank + k] = cpu_scale(m, k, i);
  for (int64_t row = 0; row < m->cols; row++) {
    uint8_t code = cpu_code(m, k, row), *panel = p->items + cpu_bytes_of(p->dtype, row / PANEL * p->stride);
    if (p->dtype == ADRT_INT8)
      panel[k * PANEL + row % PANEL] = code;
    else
      panel[k / 2 * PANEL + row % PANEL] |= (uint8_t)(k % 2 ? code : code << 4);
  }
}

/* The same for nf4 whose rows do not start with a block: as float32. */
static bool fill_decoded(panels *p) {
  int64_t out = p->source.cols;
  float *row = cpu_calloc(out, sizeof *row), *items = (float *)(void *)p->items;
  if (!row) return false;
  for (int64_t k = 0; k < p->rank; k++) {
    cpu_decode_row(&p->source, k, row);
    for (int64_t r = 0; r < out; r++) items[r / PANEL * p->stride + k * PANEL + r % PANEL] = row[r];
  }
  cpu_free(row);
  return true;
}

static bool fill(adrt_executable *e, panels *p) {
  const matrix *m = &p->source;
  bool quantized = cpu_is_quantized(m->dtype), decoded = m->dtype == ADRT_NF4 && m->cols % BLOCK;
  int64_t out = quantized ? m->cols : m->rows;
  p->rank = quantized ? m->rows : m->cols;
  p->dtype = p->wide ? ADRT_INT8 : decoded ? ADRT_F32 : m->dtype;
  p->stride = cpu_align(p->rank, p->dtype == ADRT_NF4 ? 2 : 1) * PANEL;
  if (p->wide) p->stride = p->rank / BLOCK * WIDE_BLOCK_BYTES;
  int64_t items = cpu_product(cpu_align(out, PANEL) / PANEL, p->stride, 4); /* the factor: no overflow in bytes */
  if (items < 0 || !(p->items = cpu_take_memory(e, cpu_bytes_of(p->dtype, items / 4), &p->arena))) return false;
  if (p->wide) return cpu_pack_wide_panels(m, p->items);
  if (decoded) return fill_decoded(p);
  if (!quantized) {
    fill_floats(p);
    return true;
  }
  if (!(p->scales = cpu_calloc(cpu_align(out, BLOCK) / BLOCK, p->rank * (int64_t)sizeof *p->scales))) return false;
  for (int64_t k = 0; k < p->rank; k++) fill_codes(p, k);
  return true;
}

static void free_panels(adrt_executable *e, panels *p) {
  cpu_release_memory(e, p->arena);
  cpu_free(p->scales);
  cpu_free(p);
}

panels *cpu_share_panels(adrt_executable *e, const matrix *source, bool wide) {
  for (panels *p = e->panels; p; p = p->next) {
    const matrix *m = &p->source;
    if (m->data == source->data && m->dtype == source->dtype && m->rows == source->rows &&
        m->cols == source->cols && p->wide == wide) {
      p->references++;
      return p;
    }
  }
  panels *p = cpu_calloc(1, sizeof *p);
  if (!p) return NULL;
  *p = (panels){.next = e->panels, .source = *source, .references = 1, .wide = wide};
  if (!fill(e, p)) {
    free_panels(e, p);
    return NULL;
  }
  return e->panels = p;
}

void cpu_release_panels(adrt_executable *e, panels *p) {
  if (!p || --p->references) return;
  panels **link = &e->panels;
  while (*link != p) link = &(*link)->next;
  *link = p->next;
  free_panels(e, p);
}
