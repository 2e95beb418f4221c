/* Attach and detach adapters lowered to the normal form. V and the vectors are read where they are; U is
 * copied into panels (executable.h), once for all adapters that share it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "executable.h"

static int64_t item_bytes(int32_t dtype) { return dtype == ADRT_F32 ? 4 : 2; }

static void *fill_panels(const matrix *u) {
  int64_t item = item_bytes(u->dtype), rank = u->cols;
  uint8_t *panels = cpu_calloc(cpu_product(cpu_align(u->rows, PANEL), rank, item), 1);
  if (!panels) return NULL;
  for (int64_t row = 0; row < u->rows; row++) {
    uint8_t *out = panels + (row / PANEL * rank * PANEL + row % PANEL) * item;
    const uint8_t *in = u->data + row * rank * item;
    for (int64_t k = 0; k < rank; k++) memcpy(out + k * PANEL * item, in + k * item, (size_t)item);
  }
  return panels;
}

static u_panels *share_panels(adrt_executable *e, const matrix *u) {
  for (u_panels *p = e->panels; p; p = p->next) {
    if (p->source == u->data && p->dtype == u->dtype && p->out == u->rows && p->rank == u->cols) {
      p->references++;
      return p;
    }
  }
  u_panels *p = cpu_calloc(1, sizeof *p);
  if (!p) return NULL;
  *p = (u_panels){e->panels, u->data, u->dtype, u->rows, u->cols, 1, fill_panels(u)};
  if (!p->panels) {
    cpu_free(p);
    return NULL;
  }
  return e->panels = p;
}

static void release_panels(adrt_executable *e, u_panels *panels) {
  if (!panels || --panels->references) return;
  u_panels **link = &e->panels;
  while (*link != panels) link = &(*link)->next;
  *link = panels->next;
  cpu_free(panels->panels);
  cpu_free(panels);
}

void cpu_free_adapter(adrt_executable *e, adapter *a) {
  if (!a) return;
  for (int32_t t = 0; a->by_target && t < e->n_targets; t++) {
    attachment *at = a->by_target[t];
    if (!at) continue;
    for (int32_t k = 0; at->terms && k < at->n_terms; k++) release_panels(e, at->terms[k].u);
    cpu_free(at->terms);
    cpu_free(at);
  }
  cpu_free(a->by_target);
  cpu_free(a);
}

static int attach_term(adrt_executable *e, const adrt_term *in, int32_t target, int32_t k, int64_t out,
                       int64_t inner, term *result, adrt_error *error) {
  matrix u, v;
  if (in->kind != ADRT_LOW_RANK || !in->u.data || in->e)
    return cpu_fail(error, ADRT_UNAVAILABLE, "target %d, term %d: kind %d is not built yet", target, k, in->kind);
  int code = cpu_matrix(&in->u, "adapter U of term", k, &u, error);
  if (code == ADRT_OK) code = cpu_matrix(&in->v, "adapter V of term", k, &v, error);
  if (code != ADRT_OK) return code;
  if (u.dtype > ADRT_BF16 || v.dtype > ADRT_BF16)
    return cpu_fail(error, ADRT_BAD_ARGUMENT,
                    "target %d, term %d: U is %s and V is %s, expected f32, f16 or bf16", target, k,
                    cpu_dtype_name(u.dtype), cpu_dtype_name(v.dtype));
  if (u.rows != out || v.cols != inner || u.cols != v.rows)
    return cpu_fail(
        error, ADRT_BAD_ARGUMENT,
        "target %d, term %d: U [%lld, %lld] and V [%lld, %lld] do not fit [%lld, rank] [rank, %lld]", target,
        k, (long long)u.rows, (long long)u.cols, (long long)v.rows, (long long)v.cols, (long long)out,
        (long long)inner);
  if (!isfinite(in->scale))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d, term %d: scale %g", target, k, (double)in->scale);
  *result = (term){.v = v, .d = in->d, .scale = in->scale};
  if (!(result->u = share_panels(e, &u)))
    return cpu_fail(error, ADRT_NO_MEMORY, "target %d, term %d: no memory for U [%lld, %lld]", target, k,
                    (long long)u.rows, (long long)u.cols);
  if (u.cols > e->max_rank) e->max_rank = u.cols;
  return ADRT_OK;
}

static int attach_target(adrt_executable *e, adapter *a, const adrt_attachment *in, adrt_error *error) {
  if (in->target < 0 || in->target >= e->n_targets || a->by_target[in->target])
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "attach: target %d of %d is %s", in->target, e->n_targets,
                    in->target >= 0 && in->target < e->n_targets ? "given twice" : "out of range");
  if (in->n_terms < 0 || (in->n_terms && !in->terms))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d: %d terms%s", in->target, in->n_terms,
                    in->n_terms < 0 ? "" : ", NULL");
  const instruction *at = &e->instructions[e->instruction_of_target[in->target]];
  bool embed = at->op.kind == ADRT_EMBED; /* the embedding's input is one-hot over its rows */
  attachment *result = a->by_target[in->target] = cpu_calloc(1, sizeof *result);
  if (!result || !(result->terms = cpu_calloc(in->n_terms, sizeof *result->terms)))
    return cpu_fail(error, ADRT_NO_MEMORY, "target %d: no memory for %d terms", in->target, in->n_terms);
  result->g_in = in->g_in;
  result->g_out = in->g_out;
  result->c = in->c;
  for (int32_t k = 0; k < in->n_terms; k++) {
    int code = attach_term(e, &in->terms[k], in->target, k, at->width,
                           embed ? at->weight.rows : at->weight.cols, &result->terms[k], error);
    if (code != ADRT_OK) return code;
    result->n_terms = k + 1;
  }
  return ADRT_OK;
}

int cpu_attach(adrt_executable *e, int32_t n, const adrt_attachment *attachments, int32_t *handle,
               adrt_error *error) {
  if (!e || n < 0 || (n && !attachments) || !handle)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "attach: %d attachments, or a NULL argument", n);
  adapter *a = cpu_calloc(1, sizeof *a);
  if (!a || !(a->by_target = cpu_calloc(e->n_targets, sizeof *a->by_target))) {
    cpu_free(a);
    return cpu_fail(error, ADRT_NO_MEMORY, "no memory for an adapter of %d targets", n);
  }
  int code = ADRT_OK;
  for (int32_t i = 0; code == ADRT_OK && i < n; i++) code = attach_target(e, a, &attachments[i], error);
  if (code == ADRT_OK && (e->n_adapters == INT32_MAX ||
                          !buffer_grow(&e->adapter_buffer, (int64_t)e->n_adapters + 1, sizeof *e->adapters)))
    code = cpu_fail(error, ADRT_NO_MEMORY, "no memory for adapter %d", e->n_adapters);
  if (code != ADRT_OK) {
    cpu_free_adapter(e, a);
    return code;
  }
  e->adapters = e->adapter_buffer.data;
  e->adapters[e->n_adapters] = a;
  *handle = e->n_adapters++;
  return ADRT_OK;
}

int cpu_detach(adrt_executable *e, int32_t handle, adrt_error *error) {
  if (!e || handle < 0 || handle >= e->n_adapters || !e->adapters[handle])
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "detach: no adapter with handle %d", handle);
  cpu_free_adapter(e, e->adapters[handle]);
  e->adapters[handle] = NULL;
  return ADRT_OK;
}
