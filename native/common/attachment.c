/* An adapter in the normal form: every size, index and number checked against its attach point. */
#include <math.h>

#include "common.h"

/* Where in an attachment something is wrong. */
typedef struct {
  const adrt_attachment *attachment;
  const attach_point *point;
  int32_t index; /* of the term */
  adrt_error *error;
} place;

#define WRONG(p, format, ...)                                                                                 \
  cpu_fail((p)->error, ADRT_BAD_ARGUMENT, "target %d, term %d: " format, (p)->attachment->target, (p)->index, \
           __VA_ARGS__)

static bool quantized(int32_t dtype) { return dtype > ADRT_BF16; }

static int check_low_rank(const place *p, const adrt_term *t) {
  int64_t out = p->point->out, inner = p->point->inner;
  matrix u, v;
  int code = cpu_matrix(&t->v, "adapter V of term", p->index, &v, p->error);
  if (code != ADRT_OK) return code;
  if (v.cols < inner || (quantized(v.dtype) && v.cols != inner))
    return WRONG(p, "V [%lld, %lld] does not fit [rank, %lld]", (long long)v.rows, (long long)v.cols,
                 (long long)inner);
  if (!t->u.data) {
    if (v.rows != out)
      return WRONG(p, "V [%lld, %lld] without U does not fit [%lld, %lld]", (long long)v.rows,
                   (long long)v.cols, (long long)out, (long long)inner);
    return ADRT_OK;
  }
  code = cpu_matrix(&t->u, "adapter U of term", p->index, &u, p->error);
  if (code != ADRT_OK) return code;
  bool transposed = quantized(u.dtype);
  if (transposed ? u.rows != v.rows || u.cols != out : u.cols != v.rows || u.rows < out)
    return WRONG(p, "U [%lld, %lld] and V [%lld, %lld] do not fit [%lld, rank] [rank, %lld]",
                 (long long)(transposed ? u.cols : u.rows), (long long)(transposed ? u.rows : u.cols),
                 (long long)v.rows, (long long)v.cols, (long long)out, (long long)inner);
  return ADRT_OK;
}

static int check_sparse(const place *p, const adrt_term *t) {
  bool embed = p->point->kind == ADRT_EMBED;
  int64_t rows = embed ? p->point->inner : p->point->out, cols = embed ? p->point->out : p->point->inner;
  if (t->n_values < 0 || t->n_values > INT32_MAX || !t->row_start ||
      (t->n_values && (!t->columns || !t->values)))
    return WRONG(p, "%lld values, or a NULL array", (long long)t->n_values);
  if (t->row_start[0] || t->row_start[rows] != t->n_values)
    return WRONG(p, "row_start goes from %d to %d, expected 0 to %lld", t->row_start[0], t->row_start[rows],
                 (long long)t->n_values);
  for (int64_t r = 0; r < rows; r++)
    if (t->row_start[r + 1] < t->row_start[r])
      return WRONG(p, "row_start falls from %d to %d at row %lld", t->row_start[r], t->row_start[r + 1],
                   (long long)r);
  for (int64_t r = 0; r < rows; r++) {
    for (int32_t k = t->row_start[r]; k < t->row_start[r + 1]; k++) {
      int32_t before = k > t->row_start[r] ? t->columns[k - 1] : -1;
      if (t->columns[k] <= before || t->columns[k] >= cols)
        return WRONG(p, "row %lld has column %d after %d, expected rising ones below %lld", (long long)r,
                     t->columns[k], before, (long long)cols);
    }
  }
  return ADRT_OK;
}

static int check_kronecker(const place *p, const adrt_term *t) {
  matrix u, v;
  int code = cpu_matrix(&t->u, "adapter W1 of term", p->index, &u, p->error);
  if (code == ADRT_OK) code = cpu_matrix(&t->v, "adapter W2 of term", p->index, &v, p->error);
  if (code != ADRT_OK) return code;
  if (quantized(u.dtype) || quantized(v.dtype))
    return WRONG(p, "W1 is %s and W2 is %s, expected f32, f16 or bf16", cpu_dtype_name(u.dtype),
                 cpu_dtype_name(v.dtype));
  if (p->point->kind == ADRT_EMBED || cpu_product(u.rows, v.rows, 1) != p->point->out ||
      cpu_product(u.cols, v.cols, 1) != p->point->inner)
    return WRONG(p, "[%lld, %lld] kron [%lld, %lld] does not fit [%lld, %lld]", (long long)u.rows,
                 (long long)u.cols, (long long)v.rows, (long long)v.cols, (long long)p->point->out,
                 (long long)p->point->inner);
  return ADRT_OK;
}

static int check_term(const place *p, const adrt_term *t) {
  if (!isfinite(t->scale)) return WRONG(p, "scale %g", (double)t->scale);
  switch (t->kind) {
    case ADRT_LOW_RANK: return check_low_rank(p, t);
    case ADRT_SPARSE: return check_sparse(p, t);
    case ADRT_KRONECKER: return check_kronecker(p, t);
    default: return WRONG(p, "unknown kind %d", t->kind);
  }
}

int cpu_validate_attachment(const adrt_attachment *a, const attach_point *point, adrt_error *error) {
  if (a->n_terms < 0 || (a->n_terms && !a->terms))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d: %d terms%s", a->target, a->n_terms,
                    a->n_terms < 0 ? "" : ", NULL");
  if (point->kind == ADRT_NORM && (a->n_terms || a->g_in || a->rotation || a->c))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d: a norm takes g_out and nothing else", a->target);
  if (a->rotation && (point->kind == ADRT_EMBED || a->rotation_block < 1 || point->inner % a->rotation_block))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d: a rotation in blocks of %lld does not fit %lld inputs",
                    a->target, (long long)a->rotation_block, (long long)point->inner);
  for (int32_t k = 0; k < a->n_terms; k++) {
    const place p = {a, point, k, error};
    int code = check_term(&p, &a->terms[k]);
    if (code != ADRT_OK) return code;
  }
  return ADRT_OK;
}
