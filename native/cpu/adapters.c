/* Attach and detach adapters lowered to the normal form. Everything is read where it is, except low-rank
 * terms' U and V and rotations, which are copied into huge pages (executable.h), once for all who share them. */
#include "executable.h"

void cpu_free_adapter(adrt_executable *e, adapter *a) {
  if (!a) return;
  for (int32_t t = 0; a->by_target && t < e->n_targets; t++) {
    attachment *at = a->by_target[t];
    if (!at) continue;
    for (int32_t k = 0; at->terms && k < at->n_terms; k++) cpu_release_term(e, &at->terms[k]);
    cpu_release_panels(e, at->rotation_panels);
    cpu_free(at->terms);
    cpu_free(at);
  }
  cpu_free(a->by_target);
  cpu_free(a);
}

static int attach_rotation(adrt_executable *e, const adrt_attachment *in, int64_t inner, attachment *result,
                           adrt_error *error) {
  if (!in->rotation) return ADRT_OK;
  result->rotation = in->rotation;
  result->rotation_block = in->rotation_block;
  if (in->rotation_block % PANEL) return ADRT_OK;
  const matrix blocks = {.dtype = ADRT_F32, .rows = inner, .cols = in->rotation_block,
                         .data = (const uint8_t *)in->rotation};
  if (!(result->rotation_panels = cpu_share_panels(e, &blocks, false)))
    return cpu_fail(error, ADRT_NO_MEMORY, "target %d: no memory for a rotation of %lld inputs", in->target,
                    (long long)inner);
  return ADRT_OK;
}

static int attach_terms(adrt_executable *e, const adrt_attachment *in, const attach_point *point, attachment *result,
                        adrt_error *error) {
  if (!(result->terms = cpu_calloc(in->n_terms, sizeof *result->terms)))
    return cpu_fail(error, ADRT_NO_MEMORY, "target %d: no memory for %d terms", in->target, in->n_terms);
  for (int32_t k = 0; k < in->n_terms; k++) {
    int code = cpu_make_term(e, &in->terms[k], point, &result->terms[k], error);
    if (code != ADRT_OK) return code;
    result->n_terms = k + 1;
  }
  return ADRT_OK;
}

static int attach_target(adrt_executable *e, adapter *a, const adrt_attachment *in, adrt_error *error) {
  if (in->target < 0 || in->target >= e->n_targets || a->by_target[in->target])
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "attach: target %d of %d is %s", in->target, e->n_targets,
                    in->target >= 0 && in->target < e->n_targets ? "given twice" : "out of range");
  const instruction *at = &e->instructions[e->instruction_of_target[in->target]];
  bool embed = at->op.kind == ADRT_EMBED;
  const attach_point point = {at->op.kind, at->width, embed ? at->weight.rows : at->weight.cols};
  int code = cpu_validate_attachment(in, &point, error);
  if (code != ADRT_OK) return code;
  attachment *result = a->by_target[in->target] = cpu_calloc(1, sizeof *result);
  if (!result) return cpu_fail(error, ADRT_NO_MEMORY, "no memory for target %d", in->target);
  result->g_in = in->g_in;
  result->g_out = in->g_out;
  result->c = in->c;
  result->scales_bias = in->scales_bias != 0;
  code = attach_rotation(e, in, point.inner, result, error);
  return code == ADRT_OK ? attach_terms(e, in, &point, result, error) : code;
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
