/* An adapter in the normal form: every size, index and number checked against its attach point, so that nothing later
 * reads beyond what it was given. */
#include <math.h>

#include "common.h"

/* Where a term is attached, for its checks and messages. */
typedef struct {
  int32_t target, k;
  bool embed;
  int64_t out, inner; /* an embedding's input is one-hot over its rows */
  adrt_error *error;
} place;

static int check_array(const place *at, const char *name, const void *array, bool needed) {
  if ((uintptr_t)array % 4 || (needed && !array))
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: %s is %s", at->target, at->k, name,
                    array ? "not aligned to its items" : "NULL");
  return ADRT_OK;
}

static int check_tensor(const place *at, const char *name, const adrt_tensor *tensor, int32_t last_dtype, matrix *out) {
  int code = cpu_matrix(tensor, name, at->k, out, at->error);
  if (code == ADRT_OK && out->dtype > last_dtype)
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d: %s %d is %s, expected f32, f16 or bf16", at->target, name,
                    at->k, cpu_dtype_name(out->dtype));
  return code;
}

/* A float V may be wider than the input, and a float U taller than the output; a quantized U lies transposed. */
static bool low_rank_fits(const place *at, const matrix *u, const matrix *v) {
  bool whole = cpu_is_quantized(v->dtype);
  if (whole ? v->cols != at->inner : v->cols < at->inner) return false;
  if (!u) return v->rows == at->out;
  if (cpu_is_quantized(u->dtype)) return u->rows == v->rows && u->cols == at->out;
  return u->cols == v->rows && u->rows >= at->out;
}

static int check_low_rank(const place *at, const adrt_term *in) {
  matrix u = {0}, v;
  bool dense = !in->u.data;
  int code = check_tensor(at, "adapter V of term", &in->v, ADRT_NF4, &v);
  if (code == ADRT_OK && !dense) code = check_tensor(at, "adapter U of term", &in->u, ADRT_NF4, &u);
  if (code == ADRT_OK) code = check_array(at, "d", in->d, false);
  if (code == ADRT_OK) code = check_array(at, "e", in->e, false);
  if (code != ADRT_OK || low_rank_fits(at, dense ? NULL : &u, &v)) return code;
  return cpu_fail(at->error, ADRT_BAD_ARGUMENT,
                  "target %d, term %d: %s U [%lld, %lld] and %s V [%lld, %lld] do not fit [%lld, rank] [rank, %lld]",
                  at->target, at->k, dense ? "no" : cpu_dtype_name(u.dtype), (long long)u.rows, (long long)u.cols,
                  cpu_dtype_name(v.dtype), (long long)v.rows, (long long)v.cols, (long long)at->out,
                  (long long)at->inner);
}

static int check_rows(const place *at, const adrt_term *in, int64_t rows, int64_t cols) {
  const int32_t *start = in->row_start;
  if (start[0] != 0)
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: row_start[0] is %d, expected 0", at->target,
                    at->k, start[0]);
  for (int64_t r = 0; r < rows; r++)
    if (start[r + 1] < start[r] || start[r + 1] > in->n_values)
      return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: row_start[%lld] is %d after %d, of %lld values",
                      at->target, at->k, (long long)r + 1, start[r + 1], start[r], (long long)in->n_values);
  if (start[rows] != in->n_values)
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: %lld rows end at value %d of %lld", at->target,
                    at->k, (long long)rows, start[rows], (long long)in->n_values);
  for (int64_t r = 0; r < rows; r++) {
    int64_t previous = -1;
    for (int64_t k = start[r]; k < start[r + 1]; previous = in->columns[k++])
      if (in->columns[k] <= previous || in->columns[k] >= cols)
        return cpu_fail(at->error, ADRT_BAD_ARGUMENT,
                        "target %d, term %d: row %lld has column %d after %lld, of %lld columns", at->target, at->k,
                        (long long)r, in->columns[k], (long long)previous, (long long)cols);
  }
  return ADRT_OK;
}

static int check_sparse(const place *at, const adrt_term *in) {
  int64_t rows = at->embed ? at->inner : at->out, cols = at->embed ? at->out : at->inner;
  if (in->n_values < 0 || in->n_values > INT32_MAX)
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: impossible %lld values", at->target, at->k,
                    (long long)in->n_values);
  int code = check_array(at, "row_start", in->row_start, true);
  if (code == ADRT_OK) code = check_array(at, "columns", in->columns, in->n_values > 0);
  if (code == ADRT_OK) code = check_array(at, "values", in->values, in->n_values > 0);
  return code == ADRT_OK ? check_rows(at, in, rows, cols) : code;
}

static int check_kronecker(const place *at, const adrt_term *in) {
  matrix w1, w2;
  int code = check_tensor(at, "adapter W1 of term", &in->u, ADRT_BF16, &w1);
  if (code == ADRT_OK) code = check_tensor(at, "adapter W2 of term", &in->v, ADRT_BF16, &w2);
  if (code != ADRT_OK) return code;
  if (at->embed || cpu_product(w1.rows, w2.rows, 1) != at->out || cpu_product(w1.cols, w2.cols, 1) != at->inner)
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT,
                    "target %d, term %d: W1 [%lld, %lld] and W2 [%lld, %lld] do not make a %s of [%lld, %lld]",
                    at->target, at->k, (long long)w1.rows, (long long)w1.cols, (long long)w2.rows, (long long)w2.cols,
                    at->embed ? "table, which takes no Kronecker product" : "product", (long long)at->out,
                    (long long)at->inner);
  return ADRT_OK;
}

static int check_term(const place *at, const adrt_term *in) {
  if (!isfinite(in->scale))
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: scale %g", at->target, at->k,
                    (double)in->scale);
  switch (in->kind) {
    case ADRT_LOW_RANK: return check_low_rank(at, in);
    case ADRT_SPARSE: return check_sparse(at, in);
    case ADRT_KRONECKER: return check_kronecker(at, in);
    default:
      return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: unknown kind %d", at->target, at->k, in->kind);
  }
}

/* What an attachment's vectors must be: of floats, which are never read beyond the sizes of the operation. */
static int check_vectors(const adrt_attachment *in, int32_t kind, int64_t inner, adrt_error *error) {
  const float *const vectors[] = {in->g_in, in->rotation, in->g_out, in->c};
  for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
    if ((uintptr_t)vectors[i] % sizeof(float))
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d: a vector is not aligned to its items", in->target);
  if (kind == ADRT_NORM && (in->n_terms || in->g_in || in->rotation || in->c))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d is a norm, which takes g_out and nothing else", in->target);
  if (in->rotation && (kind == ADRT_EMBED || in->rotation_block < 1 || inner % in->rotation_block))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d: a rotation in blocks of %lld does not fit %s of %lld inputs",
                    in->target, (long long)in->rotation_block, kind == ADRT_EMBED ? "an embedding" : "a product",
                    (long long)inner);
  return ADRT_OK;
}

int cpu_validate_attachment(const adrt_attachment *a, const attach_point *point, adrt_error *error) {
  if (a->n_terms < 0 || (a->n_terms && !a->terms))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d: %d terms%s", a->target, a->n_terms,
                    a->n_terms < 0 ? "" : ", NULL");
  int code = check_vectors(a, point->kind, point->inner, error);
  for (int32_t k = 0; code == ADRT_OK && k < a->n_terms; k++) {
    const place at = {a->target, k, point->kind == ADRT_EMBED, point->out, point->inner, error};
    code = check_term(&at, &a->terms[k]);
  }
  return code;
}
