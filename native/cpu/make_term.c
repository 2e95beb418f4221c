/* The terms of an adapter as the kernels read them; cpu_validate_attachment has checked them. */
#include "executable.h"

static int make_low_rank(adrt_executable *e, const adrt_term *in, int64_t inner, term *out, adrt_error *error) {
  matrix u;
  int code = cpu_matrix(&in->v, "adapter V of term", 0, &out->v, error);
  if (code != ADRT_OK) return code;
  out->v.skipped = out->v.cols - inner;
  out->v.cols = inner;
  out->d = in->d;
  out->e = in->e;
  if (!in->u.data) return ADRT_OK;
  code = cpu_matrix(&in->u, "adapter U of term", 0, &u, error);
  if (code != ADRT_OK) return code;
  if (!(out->u = cpu_share_panels(e, &u)))
    return cpu_fail(error, ADRT_NO_MEMORY, "no memory for an adapter's U [%lld, %lld]", (long long)u.rows,
                    (long long)u.cols);
  out->hidden = out->v.rows;
  if (out->hidden > e->max_rank) e->max_rank = out->hidden;
  return ADRT_OK;
}

static int make_kronecker(const adrt_term *in, term *out, adrt_error *error) {
  int code = cpu_matrix(&in->u, "adapter W1 of term", 0, &out->w1, error);
  if (code == ADRT_OK) code = cpu_matrix(&in->v, "adapter W2 of term", 0, &out->v, error);
  if (code == ADRT_OK) out->hidden = cpu_align(out->v.rows, PANEL) * out->w1.cols;
  return code;
}

int cpu_make_term(adrt_executable *e, const adrt_term *in, int64_t inner, term *out, adrt_error *error) {
  *out = (term){.kind = in->kind, .scale = in->scale};
  if (in->kind == ADRT_LOW_RANK) return make_low_rank(e, in, inner, out, error);
  if (in->kind == ADRT_KRONECKER) return make_kronecker(in, out, error);
  out->row_start = in->row_start;
  out->columns = in->columns;
  out->values = in->values;
  return ADRT_OK;
}
