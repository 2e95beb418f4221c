/* Matrix products with adapters in their normal form, and the embedding. */
#include <string.h>

#include "executable.h"

static const application *applications_of(const adrt_executable *e, const instruction *in) {
  return e->plan.applications + in->first_application;
}

static void multiply(float *x, const float *by, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] *= by[i];
}

static void add(float *x, const float *y, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

/* The activations of one token in the form that the product reads, multiplied by every g_in of its stack. */
static void prepare_token(const adrt_executable *e, const instruction *in, int64_t token, float *scratch) {
  const float *x = row_of(e, in->op.a, token);
  float *out = in->prepared + token * in->x_stride;
  int64_t cols = in->weight.cols, padded = cpu_align(cols, BLOCK);
  if (in->scaled_input) {
    memcpy(scratch, x, (size_t)padded * sizeof *x);
    for (int64_t i = 0; i < in->n_applications; i++) {
      const application *a = &applications_of(e, in)[i];
      bool acts = a->what->g_in && token >= a->where->start && token < a->where->start + a->where->count;
      if (acts) multiply(scratch, a->what->g_in, cols);
    }
    x = scratch;
  }
  switch (in->layout) {
    case X_PLAIN: memcpy(out, x, (size_t)padded * sizeof *x); break;
    case X_SPLIT: e->kernels->split(x, cols, out); break;
    default: e->kernels->quantize(x, cols, in->layout, out);
  }
}

/* Some rows of scale * d * (V x) for the tokens of a segment. */
static void shrink(const adrt_executable *e, const instruction *in, const shrink_job *job) {
  const term *t = job->what;
  int64_t rank = t->v.rows, count = job->where->count;
  float *hidden = e->plan.hidden + job->hidden + job->row0;
  e->kernels->exact[t->v.dtype](&t->v, job->row0, job->n_rows, row_of(e, in->op.a, job->where->start),
                                e->strides[in->op.a], count, hidden, rank);
  for (int64_t i = 0; i < count; i++)
    for (int64_t r = 0; r < job->n_rows; r++)
      hidden[i * rank + r] *= t->d ? t->scale * t->d[job->row0 + r] : t->scale;
}

static void product_decoded(const instruction *in, int64_t row0, int64_t n_rows, int64_t n, float *y,
                            int64_t stride, float *scratch) {
  int64_t padded = cpu_align(in->weight.cols, BLOCK);
  const matrix row = {.dtype = ADRT_F32, .rows = 1, .cols = padded, .data = (const uint8_t *)scratch};
  memset(scratch, 0, (size_t)padded * sizeof *scratch);
  for (int64_t r = 0; r < n_rows; r++) {
    cpu_decode_row(&in->weight, row0 + r, scratch);
    in->product(&row, 0, 1, in->x, in->x_stride, n, y + r, stride);
  }
}

static void expand_term(const kernels *k, const term *t, const float *hidden, int64_t count, int64_t row0,
                        int64_t n_rows, float *y, int64_t stride) {
  const u_panels *u = t->u;
  const uint8_t *panels = (const uint8_t *)u->panels + row0 * u->rank * (u->dtype == ADRT_F32 ? 4 : 2);
  k->expand[u->dtype](panels, u->rank * PANEL, u->rank, n_rows, hidden, u->rank, count, y, stride);
}

/* Rows [row0, row0 + n_rows) of one adapter onto the accumulated product of its segment. */
static void apply(const adrt_executable *e, const application *a, int64_t row0, int64_t n_rows, float *y,
                  int64_t stride) {
  const float *hidden = e->plan.hidden + a->hidden;
  float *mine = y + a->where->start * stride;
  for (int32_t k = 0; k < a->what->n_terms; k++) {
    const term *t = &a->what->terms[k];
    expand_term(e->kernels, t, hidden, a->where->count, row0, n_rows, mine, stride);
    hidden += a->where->count * t->v.rows;
  }
  if (!a->what->g_out) return;
  for (int64_t i = 0; i < a->where->count; i++) multiply(mine + i * stride, a->what->g_out + row0, n_rows);
}

static void compute_rows(const adrt_executable *e, const instruction *in, int64_t row0, float *scratch) {
  bool logits = in->op.kind == ADRT_LOGITS;
  int64_t left = in->width - row0, n_rows = left < in->rows_per_item ? left : in->rows_per_item;
  int64_t n = tokens_of(e, in), stride = logits ? in->width : e->strides[in->op.out];
  float *y = (logits ? e->plan.batch->logits : e->registers[in->op.out]) + row0;
  if (needs_decoding(&in->weight))
    product_decoded(in, row0, n_rows, n, y, stride, scratch);
  else
    in->product(&in->weight, row0, n_rows, in->x, in->x_stride, n, y, stride);
  const application *applications = applications_of(e, in);
  for (int64_t i = 0; i < in->n_applications; i++) apply(e, &applications[i], row0, n_rows, y, stride);
  for (int64_t i = 0; in->bias && i < n; i++) add(y + i * stride, in->bias + row0, n_rows);
  for (int64_t i = 0; i < in->n_applications; i++) {
    const segment *where = applications[i].where;
    const float *c = applications[i].what->c;
    for (int64_t t = where->start; c && t < where->start + where->count; t++)
      add(y + t * stride, c + row0, n_rows);
  }
}

static int64_t prepare_items(const adrt_executable *e, const instruction *in) {
  return in->prepared ? items_of(tokens_of(e, in), TOKENS_PER_ITEM) : 0;
}

int64_t cpu_linear_items(const adrt_executable *e, const instruction *in, enum phase phase) {
  if (!tokens_of(e, in)) return 0;
  return phase == PREPARE ? prepare_items(e, in) + in->n_shrinks : items_of(in->width, in->rows_per_item);
}

void cpu_linear(adrt_executable *e, const instruction *in, enum phase phase, int64_t item, float *scratch) {
  if (phase == COMPUTE) {
    compute_rows(e, in, item * in->rows_per_item, scratch);
    return;
  }
  int64_t prepares = prepare_items(e, in), first = item * TOKENS_PER_ITEM, n = tokens_of(e, in);
  if (item >= prepares) shrink(e, in, &e->plan.shrinks[in->first_shrink + item - prepares]);
  for (int64_t t = first; item < prepares && t < first + TOKENS_PER_ITEM && t < n; t++)
    prepare_token(e, in, t, scratch);
}

/* The embedding's normal form has a one-hot x, so g_in and V are read at one column. */
static void apply_embed(const adrt_executable *e, const attachment *a, int32_t token, int64_t width,
                        float *out, float *hidden) {
  for (int32_t k = 0; k < a->n_terms; k++) {
    const term *t = &a->terms[k];
    for (int64_t r = 0; r < t->v.rows; r++)
      hidden[r] = cpu_element(&t->v, r, token) * (t->d ? t->scale * t->d[r] : t->scale);
    expand_term(e->kernels, t, hidden, 1, 0, width, out, 0);
  }
  if (a->g_out) multiply(out, a->g_out, width);
}

void cpu_embed(adrt_executable *e, const instruction *in, int64_t index, float *scratch) {
  const adrt_batch *b = e->plan.batch;
  int32_t token = b->tokens[index], run = e->plan.run_of_token[index];
  int32_t first = b->stack_start[run], end = in->op.target >= 0 ? b->stack_start[run + 1] : first;
  float *out = row_of(e, in->op.out, index);
  cpu_decode_row(&in->weight, token, out);
  for (int32_t i = first; i < end; i++) {
    const attachment *a = e->adapters[b->stacks[i]]->by_target[in->op.target];
    for (int64_t j = 0; a && a->g_in && j < in->width; j++) out[j] *= a->g_in[token];
  }
  for (int32_t i = first; i < end; i++) {
    const attachment *a = e->adapters[b->stacks[i]]->by_target[in->op.target];
    if (a) apply_embed(e, a, token, in->width, out, scratch);
  }
  for (int32_t i = first; i < end; i++) {
    const attachment *a = e->adapters[b->stacks[i]]->by_target[in->op.target];
    if (a && a->c) add(out, a->c, in->width);
  }
}
