/* What adapters' terms will read is fetched into the caches by the products that run before: an operation's V while the
 * products of the wave before it compute, its U while the item that will add it computes. Reading them is then not a
 * wait, and the memory is busy where it would be idle, between two waves. */
#include "executable.h"

/* The rows of a term's v, once in a wave: [first, plan.n_fetches) are the wave's. */
static bool add_fetch(plan *p, int64_t first, const matrix *v) {
  for (int64_t i = first; i < p->n_fetches; i++)
    if (p->fetches[i].data == v->data && p->fetches[i].rows >= v->rows) return true;
  if (!buffer_grow(&p->fetch_buffer, p->n_fetches + 1, sizeof *p->fetches)) return false;
  p->fetches = p->fetch_buffer.data;
  int64_t row_bytes = cpu_bytes_of(v->dtype, v->cols), stride = cpu_bytes_of(v->dtype, v->cols + v->skipped);
  fetch f = {v->data, v->rows, row_bytes, stride, p->fetch_bytes};
  if (!v->skipped) f.row_bytes = f.row_stride = row_bytes * v->rows;
  p->fetches[p->n_fetches++] = f;
  p->fetch_bytes += row_bytes * v->rows;
  return true;
}

/* Share out what the wave `later` reads among the products of the wave `earlier`, by their rows. */
static bool plan_wave(adrt_executable *e, int32_t earlier, int32_t later) {
  plan *p = &e->plan;
  int64_t first = p->n_fetches, start = p->fetch_bytes, rows = 0, done = 0;
  for (int32_t i = e->wave_start[later]; i < e->wave_start[later + 1]; i++) {
    const instruction *in = &e->instructions[i];
    for (int64_t s = 0; is_product(in->op.kind) && s < in->n_shrinks; s++)
      if (!add_fetch(p, first, &p->shrinks[in->first_shrink + s].what->v)) return false;
  }
  instruction *from = &e->instructions[e->wave_start[earlier]], *end = &e->instructions[e->wave_start[earlier + 1]];
  for (const instruction *in = from; in < end; in++) rows += is_product(in->op.kind) ? in->width : 0;
  for (instruction *in = from; in < end; in++) {
    if (!is_product(in->op.kind)) continue;
    in->first_fetch = first;
    in->fetch_start = start + (p->fetch_bytes - start) * done / rows;
    done += in->width;
    in->fetch_end = start + (p->fetch_bytes - start) * done / rows;
  }
  return true;
}

static bool has_product(const adrt_executable *e, int32_t wave) {
  for (int32_t i = e->wave_start[wave]; i < e->wave_start[wave + 1]; i++)
    if (is_product(e->instructions[i].op.kind)) return true;
  return false;
}

bool cpu_plan_fetches(adrt_executable *e) {
  int32_t earlier = -1;
  e->plan.n_fetches = e->plan.fetch_bytes = 0;
  for (int32_t i = 0; i < e->n_instructions; i++) e->instructions[i].fetch_start = e->instructions[i].fetch_end = 0;
  for (int32_t wave = 0; wave < e->n_waves; wave++) {
    if (!has_product(e, wave)) continue;
    if (earlier >= 0 && !plan_wave(e, earlier, wave)) return false;
    earlier = wave;
  }
  return true;
}

static void prefetch(const uint8_t *data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
}

void cpu_fetch_ahead(const adrt_executable *e, const instruction *in, int64_t row0, int64_t n_rows) {
  const plan *p = &e->plan;
  int64_t bytes = in->fetch_end - in->fetch_start;
  int64_t at = in->fetch_start + bytes * row0 / in->width, end = in->fetch_start + bytes * (row0 + n_rows) / in->width;
  for (int64_t stop, i = in->first_fetch; at < end; at = stop) {
    while (i + 1 < p->n_fetches && p->fetches[i + 1].start <= at) i++;
    const fetch *f = &p->fetches[i];
    int64_t row = (at - f->start) / f->row_bytes, column = (at - f->start) % f->row_bytes;
    stop = at - column + f->row_bytes < end ? at - column + f->row_bytes : end;
    prefetch(f->data + row * f->row_stride + column, stop - at);
  }
  for (int64_t i = 0; i < in->n_applications; i++) {
    const attachment *a = p->applications[in->first_application + i].what;
    for (int32_t k = 0; k < a->n_terms; k++) {
      const panels *u = a->terms[k].u;
      if (u) prefetch(cpu_panel(u, row0), cpu_bytes_of(u->dtype, items_of(n_rows, PANEL) * u->stride));
    }
  }
}
