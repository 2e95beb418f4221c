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

/* x' = R x, a block after the other. */
static void rotate(const adrt_executable *e, const attachment *a, const float *x, int64_t cols, int64_t n, float *out) {
  int64_t b = a->rotation_block, stride = e->slot_stride;
  const panels *r = a->rotation_panels;
  for (int64_t t = 0; t < n; t++) memset(out + t * stride, 0, (size_t)cols * sizeof *out);
  for (int64_t first = 0; first < cols; first += b) {
    const float *block = a->rotation + first * b;
    if (r)
      e->kernels->expand[ADRT_F32](cpu_panel(r, first), r->stride, b, b,
                                   x + first, stride, n, out + first, stride);
    for (int64_t t = 0; !r && t < n; t++)
      for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++) out[t * stride + first + i] += block[i * b + j] * x[t * stride + first + j];
  }
}

/* The inputs of a few tokens after every g_in and rotation of their stacks, in `mapped`, slot_stride apart. */
static void map_input(const adrt_executable *e, const instruction *in, int64_t first, int64_t n, float *mapped) {
  int64_t cols = in->weight.cols, stride = e->slot_stride;
  float *rotated = mapped + TOKENS_PER_ITEM * stride;
  for (int64_t t = 0; t < n; t++)
    memcpy(mapped + t * stride, row_of(e, in->op.a, first + t), (size_t)cpu_align(cols, BLOCK) * sizeof *mapped);
  for (int64_t i = 0; i < in->n_applications; i++) {
    const application *a = &applications_of(e, in)[i];
    int64_t from = a->where->start - first, end = from + a->where->count;
    if (from < 0) from = 0;
    if (end > n) end = n;
    for (int64_t t = from; a->what->g_in && t < end; t++) multiply(mapped + t * stride, a->what->g_in, cols);
    if (!a->what->rotation || from >= end) continue;
    rotate(e, a->what, mapped + from * stride, cols, end - from, rotated);
    for (int64_t t = from; t < end; t++)
      memcpy(mapped + t * stride, rotated + (t - from) * stride, (size_t)cols * sizeof *mapped);
  }
}

/* The activations of a few tokens in the form that the product reads. */
static void prepare_tokens(const adrt_executable *e, const instruction *in, int64_t first, int64_t n, float *scratch) {
  int64_t cols = in->weight.cols, padded = cpu_align(cols, BLOCK);
  if (in->maps_input) map_input(e, in, first, n, scratch);
  for (int64_t t = 0; t < n; t++) {
    const float *x = row_of(e, in->op.a, first + t);
    float *out = in->prepared + (first + t) * in->x_stride;
    if (in->kept) memcpy(in->kept + (first + t) * in->plain_stride, x, (size_t)padded * sizeof *x);
    if (in->maps_input) x = scratch + t * e->slot_stride;
    switch (in->layout) {
      case X_PLAIN: memcpy(out, x, (size_t)padded * sizeof *x); break;
      case X_SPLIT: e->kernels->split(x, cols, out); break;
      default: e->kernels->quantize(x, cols, in->layout, out);
    }
  }
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

/* One adapter's share of what a token gets added at the end. */
static void accumulate(const attachment *a, int64_t row0, int64_t n, float *constant) {
  if (a->g_out && a->scales_bias) multiply(constant, a->g_out + row0, n);
  if (a->c) add(constant, a->c + row0, n);
}

/* The bias and every c: of the applications one stack after the other, and of the tokens without any. */
static void add_constants(const adrt_executable *e, const instruction *in, int64_t row0, int64_t n_rows, float *y,
                          int64_t stride, float *constant) {
  const application *a = applications_of(e, in), *end = a + in->n_applications;
  for (int64_t t = 0, n = tokens_of(e, in), stop; t < n;) {
    const segment *where = a < end && a->where->start <= t ? a->where : NULL;
    memset(constant, 0, (size_t)n_rows * sizeof *constant);
    if (in->bias) memcpy(constant, in->bias + row0, (size_t)n_rows * sizeof *constant);
    for (; where && a < end && a->where == where; a++) accumulate(a->what, row0, n_rows, constant);
    for (stop = where ? t + where->count : a < end ? a->where->start : n; t < stop; t++)
      add(y + t * stride, constant, n_rows);
  }
}

static void compute_rows(const adrt_executable *e, const instruction *in, int64_t row0, float *scratch) {
  bool logits = in->op.kind == ADRT_LOGITS;
  int64_t left = in->width - row0, n_rows = left < in->rows_per_item ? left : in->rows_per_item;
  int64_t n = tokens_of(e, in), stride = logits ? in->width : e->strides[in->op.out];
  float *y = (logits ? e->plan.batch->logits : e->registers[in->op.out]) + row0;
  cpu_fetch_vectors(e, in, row0, n_rows);
  if (needs_decoding(&in->weight))
    product_decoded(in, row0, n_rows, n, y, stride, scratch);
  else
    in->product(&in->weight, row0, n_rows, in->x, in->x_stride, n, y, stride);
  cpu_add_parts(e, in, row0, n_rows, y, stride, scratch);
  if (in->adds_constant) add_constants(e, in, row0, n_rows, y, stride, scratch);
}

static int64_t prepare_items(const adrt_executable *e, const instruction *in) {
  return in->prepared ? items_of(tokens_of(e, in), TOKENS_PER_ITEM) : 0;
}

int64_t cpu_linear_items(const adrt_executable *e, const instruction *in, enum phase phase) {
  if (!tokens_of(e, in)) return 0;
  return phase == PREPARE ? prepare_items(e, in) + in->n_jobs : items_of(in->width, in->rows_per_item);
}

void cpu_linear(adrt_executable *e, const instruction *in, enum phase phase, int64_t item, float *scratch) {
  if (phase == COMPUTE) {
    compute_rows(e, in, item * in->rows_per_item, scratch);
    return;
  }
  int64_t prepares = prepare_items(e, in), first = item * TOKENS_PER_ITEM, left = tokens_of(e, in) - first;
  if (item >= prepares)
    cpu_shrink(e, &e->plan.jobs[in->first_job + item - prepares], scratch);
  else
    prepare_tokens(e, in, first, left < TOKENS_PER_ITEM ? left : TOKENS_PER_ITEM, scratch);
}

int64_t cpu_linear_scratch(const adrt_executable *e) {
  int64_t map = 2 * TOKENS_PER_ITEM * e->slot_stride, terms = cpu_term_scratch(e), most = map > terms ? map : terms;
  for (int32_t i = 0; i < e->n_instructions; i++)
    if (e->instructions[i].rows_per_item > most) most = e->instructions[i].rows_per_item;
  return most;
}

/* What adapter i of a token's stack does to an operation on single tokens, or NULL. */
static const attachment *acting(const adrt_executable *e, const instruction *in, int64_t token, int32_t i) {
  const adrt_batch *b = e->plan.batch;
  int32_t run = e->plan.run_of_token[token], first = b->stack_start[run];
  return e->adapters[b->stacks[first + i]]->by_target[in->op.target];
}

static int32_t stack_size(const adrt_executable *e, const instruction *in, int64_t token) {
  const int32_t *start = e->plan.batch->stack_start + e->plan.run_of_token[token];
  return in->op.target < 0 ? 0 : start[1] - start[0];
}

/* The embedding's normal form has a one-hot x, so g_in and V are read at one column. */
void cpu_embed(adrt_executable *e, const instruction *in, int64_t index, float *scratch) {
  int32_t token = e->plan.batch->tokens[index], n = stack_size(e, in, index);
  float *out = row_of(e, in->op.out, index);
  cpu_decode_row(&in->weight, token, out);
  for (int32_t i = 0; i < n; i++) {
    const attachment *a = acting(e, in, index, i);
    for (int64_t j = 0; a && a->g_in && j < in->width; j++) out[j] *= a->g_in[token];
  }
  float *constant = scratch;
  memset(constant, 0, (size_t)in->width * sizeof *constant);
  for (int32_t i = 0; i < n; i++) {
    const attachment *a = acting(e, in, index, i);
    for (int32_t k = 0; a && k < a->n_terms; k++)
      cpu_add_embedded(e, &a->terms[k], token, in->width, out, scratch + e->slot_stride);
    if (a && a->g_out) multiply(out, a->g_out, in->width);
    if (a) accumulate(a, 0, in->width, constant);
  }
  if (n) add(out, constant, in->width);
}

void cpu_norm(adrt_executable *e, const instruction *in, int64_t token) {
  float *out = row_of(e, in->op.out, token);
  e->kernels->norm(row_of(e, in->op.a, token), in->vector, in->op.value[0], in->width, out);
  for (int32_t i = 0; i < stack_size(e, in, token); i++) {
    const attachment *a = acting(e, in, token, i);
    if (a && a->g_out) multiply(out, a->g_out, in->width);
  }
}
