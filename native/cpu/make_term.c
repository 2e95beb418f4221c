/* The terms of an adapter, checked so that nothing later reads beyond what it was given. */
#include <math.h>

#include "executable.h"

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

static int make_low_rank(adrt_executable *e, const place *at, const adrt_term *in, term *out) {
  matrix u = {0}, v;
  bool dense = !in->u.data;
  int code = check_tensor(at, "adapter V of term", &in->v, ADRT_NF4, &v);
  if (code == ADRT_OK && !dense) code = check_tensor(at, "adapter U of term", &in->u, ADRT_NF4, &u);
  if (code == ADRT_OK) code = check_array(at, "d", in->d, false);
  if (code == ADRT_OK) code = check_array(at, "e", in->e, false);
  if (code != ADRT_OK) return code;
  if (!low_rank_fits(at, dense ? NULL : &u, &v))
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT,
                    "target %d, term %d: %s U [%lld, %lld] and %s V [%lld, %lld] do not fit [%lld, rank] [rank, %lld]",
                    at->target, at->k, dense ? "no" : cpu_dtype_name(u.dtype), (long long)u.rows, (long long)u.cols,
                    cpu_dtype_name(v.dtype), (long long)v.rows, (long long)v.cols, (long long)at->out,
                    (long long)at->inner);
  v.skipped = v.cols - at->inner;
  v.cols = at->inner;
  out->v = v;
  out->d = in->d;
  out->e = in->e;
  if (dense) return ADRT_OK;
  if (!(out->u = cpu_share_panels(e, &u)))
    return cpu_fail(at->error, ADRT_NO_MEMORY, "target %d, term %d: no memory for U [%lld, %lld]", at->target, at->k,
                    (long long)u.rows, (long long)u.cols);
  out->hidden = v.rows;
  if (v.rows > e->max_rank) e->max_rank = v.rows;
  return ADRT_OK;
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

static int make_sparse(const place *at, const adrt_term *in, term *out) {
  int64_t rows = at->embed ? at->inner : at->out, cols = at->embed ? at->out : at->inner;
  if (in->n_values < 0 || in->n_values > INT32_MAX)
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT, "target %d, term %d: impossible %lld values", at->target, at->k,
                    (long long)in->n_values);
  int code = check_array(at, "row_start", in->row_start, true);
  if (code == ADRT_OK) code = check_array(at, "columns", in->columns, in->n_values > 0);
  if (code == ADRT_OK) code = check_array(at, "values", in->values, in->n_values > 0);
  if (code == ADRT_OK) code = check_rows(at, in, rows, cols);
  out->row_start = in->row_start;
  out->columns = in->columns;
  out->values = in->values;
  return code;
}

static int make_kronecker(const place *at, const adrt_term *in, term *out) {
  int code = check_tensor(at, "adapter W1 of term", &in->u, ADRT_BF16, &out->w1);
  if (code == ADRT_OK) code = check_tensor(at, "adapter W2 of term", &in->v, ADRT_BF16, &out->v);
  if (code != ADRT_OK) return code;
  const matrix *w1 = &out->w1, *w2 = &out->v;
  if (at->embed || cpu_product(w1->rows, w2->rows, 1) != at->out || cpu_product(w1->cols, w2->cols, 1) != at->inner)
    return cpu_fail(at->error, ADRT_BAD_ARGUMENT,
                    "target %d, term %d: W1 [%lld, %lld] and W2 [%lld, %lld] do not make a %s of [%lld, %lld]",
                    at->target, at->k, (long long)w1->rows, (long long)w1->cols, (long long)w2->rows,
                    (long long)w2->cols, at->embed ? "table, which takes no Kronecker product" : "product",
                    (long long)at->out, (long long)at->inner);
  out->hidden = cpu_align(w2->rows, PANEL) * w1->cols;
  return ADRT_OK;
}

int cpu_make_term(adrt_executable *e, const adrt_term *in, int32_t target, int32_t k, term *out, adrt_error *error) {
  const instruction *op = &e->instructions[e->instruction_of_target[target]];
  bool embed = op->op.kind == ADRT_EMBED;
  const place at = {target, k, embed, op->width, embed ? op->weight.rows : op->weight.cols, error};
  if (!isfinite(in->scale))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d, term %d: scale %g", target, k, (double)in->scale);
  *out = (term){.kind = in->kind, .scale = in->scale};
  switch (in->kind) {
    case ADRT_LOW_RANK: return make_low_rank(e, &at, in, out);
    case ADRT_SPARSE: return make_sparse(&at, in, out);
    case ADRT_KRONECKER: return make_kronecker(&at, in, out);
    default: return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d, term %d: unknown kind %d", target, k, in->kind);
  }
}
