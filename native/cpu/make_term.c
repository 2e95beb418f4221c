/* The terms of an adapter as the kernels read them; cpu_validate_attachment has checked them. */
#include <string.h>

#include "executable.h"

/* V as panels when it is wide. Else as it is, in memory of its own: it is in no cache when its turn comes, and small pages
 * would cost reading it a tenth. */
static bool copy_v(adrt_executable *e, const adrt_tensor *in, bool wide, projection *p) {
  adrt_tensor copy = *in;
  if (cpu_matrix(in, "adapter V of term", 0, &p->v, NULL) != ADRT_OK) return false;
  if (wide) return (p->wide = cpu_share_panels(e, &p->v, true));
  uint8_t *memory = cpu_take_memory(e, (int64_t)copy.bytes, &p->arena);
  if (!memory) return false;
  copy.data = memcpy(memory, in->data, copy.bytes);
  return cpu_matrix(&copy, "adapter V of term", 0, &p->v, NULL) == ADRT_OK;
}

static void free_projection(adrt_executable *e, projection *p) {
  cpu_release_memory(e, p->arena);
  cpu_release_panels(e, p->wide);
  cpu_free(p);
}

static projection *share_projection(adrt_executable *e, const adrt_tensor *in, bool wide) {
  for (projection *p = e->projections; p; p = p->next) {
    if (p->source == in->data && p->dtype == in->dtype && p->v.rows == in->rows && p->v.cols == in->cols &&
        !p->wide == !wide) {
      p->references++;
      return p;
    }
  }
  projection *p = cpu_calloc(1, sizeof *p);
  if (!p) return NULL;
  *p = (projection){.next = e->projections, .source = in->data, .dtype = in->dtype, .references = 1};
  if (!copy_v(e, in, wide, p)) {
    free_projection(e, p);
    return NULL;
  }
  return e->projections = p;
}

static void release_projection(adrt_executable *e, projection *p) {
  if (!p || --p->references) return;
  projection **link = &e->projections;
  while (*link != p) link = &(*link)->next;
  *link = p->next;
  free_projection(e, p);
}

/* Share both factors of a low-rank term, or hold neither. */
static bool share_factors(adrt_executable *e, const adrt_term *in, const matrix *u, bool wide, term *out) {
  out->u = cpu_share_panels(e, u, wide);
  out->projection = share_projection(e, &in->v, wide);
  if (out->u && out->projection) return true;
  cpu_release_term(e, out);
  out->u = NULL;
  out->projection = NULL;
  return false;
}

static void use_leading(matrix *v, int64_t cols) {
  v->skipped = v->cols - cols;
  v->cols = cols;
}

/* Factors that cannot be wide, of which a value is not finite, stay as they are. */
static int make_factors(adrt_executable *e, const adrt_term *in, const attach_point *point, term *out,
                        adrt_error *error) {
  matrix u;
  int code = cpu_matrix(&in->u, "adapter U of term", 0, &u, error);
  if (code != ADRT_OK) return code;
  bool wide = cpu_is_wide(e, in, point) && share_factors(e, in, &u, true, out);
  if (!wide && !share_factors(e, in, &u, false, out))
    return cpu_fail(error, ADRT_NO_MEMORY, "no memory for an adapter's U [%lld, %lld] and V [%lld, %lld]",
                    (long long)u.rows, (long long)u.cols, (long long)in->v.rows, (long long)in->v.cols);
  out->v = out->projection->v;
  use_leading(&out->v, point->inner);
  out->hidden = out->v.rows;
  if (out->hidden > e->max_rank) e->max_rank = out->hidden;
  return ADRT_OK;
}

/* A dense change, without U, stays where it is. */
static int make_low_rank(adrt_executable *e, const adrt_term *in, const attach_point *point, term *out,
                         adrt_error *error) {
  out->d = in->d;
  out->e = in->e;
  if (in->u.data) return make_factors(e, in, point, out, error);
  int code = cpu_matrix(&in->v, "adapter V of term", 0, &out->v, error);
  if (code != ADRT_OK) return code;
  use_leading(&out->v, point->inner);
  return ADRT_OK;
}

static int make_kronecker(const adrt_term *in, term *out, adrt_error *error) {
  int code = cpu_matrix(&in->u, "adapter W1 of term", 0, &out->w1, error);
  if (code == ADRT_OK) code = cpu_matrix(&in->v, "adapter W2 of term", 0, &out->v, error);
  if (code == ADRT_OK) out->hidden = cpu_align(out->v.rows, PANEL) * out->w1.cols;
  return code;
}

int cpu_make_term(adrt_executable *e, const adrt_term *in, const attach_point *point, term *out, adrt_error *error) {
  *out = (term){.kind = in->kind, .scale = in->scale};
  if (in->kind == ADRT_LOW_RANK) return make_low_rank(e, in, point, out, error);
  if (in->kind == ADRT_KRONECKER) return make_kronecker(in, out, error);
  out->row_start = in->row_start;
  out->columns = in->columns;
  out->values = in->values;
  return ADRT_OK;
}

void cpu_release_term(adrt_executable *e, term *t) {
  cpu_release_panels(e, t->u);
  release_projection(e, t->projection);
}
