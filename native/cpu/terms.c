/* The terms of the adapter normal form (spec/adapters.md): what of each is prepared, and how the rest is added to rows
 * of a product. A term without a prepared part reads the operation's input itself. */
#include <string.h>

#include "executable.h"

enum { TOKENS_SPLIT = 4 };

/* Floats of n activations as X_WIDE. */
static int64_t wide_floats(int64_t n) { return n / 2 + 2 * (n / BLOCK); }

/* A term's result for a few tokens and rows, before e and before it is added. */
typedef float part_of_y[TOKENS_AT_ONCE][BLOCK];

/* Rows of m times x [n, x_stride], padded with zeros to 64, whatever the dtype. */
static void multiply(const adrt_executable *e, const matrix *m, int64_t row0, int64_t n_rows, const float *x,
                     int64_t x_stride, int64_t n, float *y, int64_t y_stride, float *scratch) {
  const kernels *k = e->kernels;
  int64_t padded = cpu_align(m->cols, BLOCK);
  if (needs_decoding(m)) {
    const matrix row = {.dtype = ADRT_F32, .rows = 1, .cols = padded, .data = (const uint8_t *)scratch};
    memset(scratch, 0, (size_t)padded * sizeof *scratch);
    for (int64_t r = 0; r < n_rows; r++) {
      cpu_decode_row(m, row0 + r, scratch);
      k->exact[ADRT_F32](&row, 0, 1, x, x_stride, n, y + r, y_stride);
    }
  } else if (m->dtype == ADRT_NF4) {
    for (int64_t t = 0, count; t < n; t += count) {
      count = n - t < TOKENS_SPLIT ? n - t : TOKENS_SPLIT;
      for (int64_t i = 0; i < count; i++) k->split(x + (t + i) * x_stride, padded, scratch + i * padded);
      k->exact[ADRT_NF4](m, row0, n_rows, scratch, padded, count, y + t * y_stride, y_stride);
    }
  } else if (n == 1 && m->dtype <= ADRT_BF16 && m->cols % BLOCK == 0) {
    k->shrink[m->dtype](m, row0, n_rows, x, x_stride, n, y, y_stride);
  } else {
    k->exact[m->dtype](m, row0, n_rows, x, x_stride, n, y, y_stride);
  }
}

/* The same for a wide V. */
static void multiply_wide(const adrt_executable *e, const term *t, int64_t row0, int64_t n_rows, const float *x,
                          int64_t x_stride, int64_t n, float *y, int64_t y_stride, float *scratch) {
  const panels *v = t->projection->wide;
  int64_t cols = t->v.cols, stride = wide_floats(cols);
  for (int64_t i = 0, count; i < n; i += count) {
    count = n - i < TOKENS_AT_ONCE ? n - i : TOKENS_AT_ONCE;
    for (int64_t j = 0; j < count; j++) {
      e->kernels->quantize(x + (i + j) * x_stride, cols, X_WIDE, scratch + j * stride);
      memset(y + (i + j) * y_stride, 0, (size_t)n_rows * sizeof *y);
    }
    e->kernels->add_wide(cpu_panel(v, row0), v->stride, cols, n_rows, scratch, stride, count, y + i * y_stride,
                         y_stride);
  }
}

/* Block `row` / 64 of a token's h [rank] for a wide U. */
static void store_wide(const adrt_executable *e, const float *block, int64_t row, int64_t rank, float *h) {
  float codes[BLOCK / 2 + 2];
  e->kernels->quantize(block, BLOCK, X_WIDE, codes);
  memcpy(h + row / 2, codes, BLOCK / 2 * sizeof *h);
  memcpy(h + (rank / 2 + row / BLOCK), codes + BLOCK / 2, sizeof *h);
  memcpy(h + (rank / 2 + rank / BLOCK + row / BLOCK), codes + BLOCK / 2 + 1, sizeof *h);
}

/* V x for the shrink's tokens, then scale * d * (V x) for the tokens of each part. */
static void shrink_rows(const adrt_executable *e, const shrink *s, const shrink_job *job, float *scratch) {
  const matrix *v = &s->what->v;
  float *raw = e->plan.hidden + s->raw + job->row0;
  bool wide = s->what->projection->wide;
  const float *x = row_of(e, s->input, s->start);
  int64_t x_stride = e->strides[s->input];
  if (wide)
    multiply_wide(e, s->what, job->row0, job->n_rows, x, x_stride, s->count, raw, v->rows, scratch);
  else
    multiply(e, v, job->row0, job->n_rows, x, x_stride, s->count, raw, v->rows, scratch);
  for (int64_t i = s->first_part; i >= 0; i = e->plan.parts[i].next) {
    const part *p = &e->plan.parts[i];
    const float *mine = raw + (p->start - s->start) * v->rows, *d = p->what->d ? p->what->d + job->row0 : NULL;
    float *hidden = e->plan.hidden + p->hidden;
    for (int64_t t = 0; t < p->count; t++) {
      float *out = wide ? scratch : hidden + t * v->rows + job->row0;
      for (int64_t r = 0; r < job->n_rows; r++)
        out[r] = mine[t * v->rows + r] * (d ? p->what->scale * d[r] : p->what->scale);
      for (int64_t r = 0; wide && r < job->n_rows; r += BLOCK)
        store_wide(e, scratch + r, job->row0 + r, v->rows, hidden + t * v->rows);
    }
  }
}

/* W2 times each of the b segments of x, of one token, for one panel of W2's rows: [b][16]. */
static void multiply_segments(const adrt_executable *e, const term *t, const shrink_job *job, const float *x,
                              float *out, float *scratch) {
  int64_t b = t->w1.cols, d = t->v.cols, padded = cpu_align(d, BLOCK);
  product_kernel *product = e->kernels->exact[t->v.dtype];
  if (d == padded) {
    product(&t->v, job->row0, job->n_rows, x, d, b, out, PANEL);
    return;
  }
  memset(scratch, 0, (size_t)(TOKENS_SPLIT * padded) * sizeof *scratch);
  for (int64_t j = 0, n; j < b; j += n) {
    n = b - j < TOKENS_SPLIT ? b - j : TOKENS_SPLIT;
    for (int64_t i = 0; i < n; i++) memcpy(scratch + i * padded, x + (j + i) * d, (size_t)d * sizeof *x);
    product(&t->v, job->row0, job->n_rows, scratch, padded, n, out + j * PANEL, PANEL);
  }
}

/* A panel for W2, whose result is one; blocks of a wide V, one job for each thread, as each makes integers of all of x;
 * a few rows of another V, twice as many of nf4, for which x is reordered. */
int64_t cpu_rows_per_job(const adrt_executable *e, const term *t) {
  if (t->projection && t->projection->wide) return cpu_align(items_of(t->v.rows, e->options.threads), BLOCK);
  return t->kind == ADRT_KRONECKER ? PANEL : t->v.dtype == ADRT_NF4 ? 8 : 4;
}

void cpu_shrink(const adrt_executable *e, const shrink_job *job, float *scratch) {
  const shrink *s = &e->plan.shrinks[job->shrink];
  const term *t = s->what;
  if (t->kind == ADRT_LOW_RANK) {
    shrink_rows(e, s, job, scratch);
    return;
  }
  const part *p = &e->plan.parts[s->first_part];
  for (int64_t i = 0; i < s->count; i++) {
    float *out = e->plan.hidden + p->hidden + i * t->hidden + job->row0 * t->w1.cols;
    multiply_segments(e, t, job, row_of(e, s->input, s->start + i), out, scratch);
  }
}

static void add_part(part_of_y p, const float *factor, float scale, int64_t count, int64_t n_rows, float *y,
                     int64_t y_stride) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t r = 0; r < n_rows; r++) y[t * y_stride + r] += (factor ? scale * factor[r] : scale) * p[t][r];
}

/* Rows inside one block of 64 for few tokens onto y; the scales of U's block go onto h. */
static void expand(const adrt_executable *e, const panels *u, const float *hidden, int64_t count, int64_t row0,
                   int64_t n_rows, float *y, int64_t y_stride, float *scratch) {
  if (u->wide) {
    e->kernels->add_wide(cpu_panel(u, row0), u->stride, u->rank, n_rows, hidden, u->rank, count, y, y_stride);
    return;
  }
  const float *scales = u->scales ? u->scales + row0 / BLOCK * u->rank : NULL;
  for (int64_t t = 0; scales && t < count; t++)
    for (int64_t k = 0; k < u->rank; k++) scratch[t * u->rank + k] = hidden[t * u->rank + k] * scales[k];
  e->kernels->add_low_rank[u->dtype](cpu_panel(u, row0), u->stride, u->rank, n_rows, scales ? scratch : hidden,
                                     u->rank, count, y, y_stride);
}

/* The same, times e, which is another one for each part. */
static void expand_times(const adrt_executable *e, const part **at, int64_t *done, const float *hidden, int64_t count,
                         int64_t row0, int64_t n_rows, float *y, int64_t y_stride, float *scratch) {
  part_of_y p;
  for (int64_t t = 0; t < count; t++) memset(p[t], 0, (size_t)n_rows * sizeof *p[t]);
  expand(e, (*at)->what->u, hidden, count, row0, n_rows, p[0], BLOCK, scratch);
  for (int64_t t = 0; t < count; t++, ++*done) {
    if (*done == (*at)->count) {
      ++*at;
      *done = 0;
    }
    add_part(p + t, (*at)->what->e + row0, 1.0f, 1, n_rows, y + t * y_stride, y_stride);
  }
}

/* Parts [p, p + p->together). */
static void add_low_rank(const adrt_executable *e, const part *p, const float *hidden, int64_t row0, int64_t n_rows,
                         float *y, int64_t y_stride, float *scratch) {
  const panels *u = p->what->u;
  int64_t count = 0;
  for (int64_t i = 0; i < p->together; i++) count += p[i].count;
  if (!p->what->e && !u->scales) {
    expand(e, u, hidden, count, row0, n_rows, y, y_stride, NULL);
    return;
  }
  for (int64_t r = 0, rows; r < n_rows; r += rows) {
    const part *at = p;
    int64_t done = 0;
    rows = BLOCK - (row0 + r) % BLOCK;
    if (rows > n_rows - r) rows = n_rows - r;
    for (int64_t i = 0, n; i < count; i += n) {
      n = count - i < TOKENS_AT_ONCE ? count - i : TOKENS_AT_ONCE;
      if (p->what->e)
        expand_times(e, &at, &done, hidden + i * u->rank, n, row0 + r, rows, y + i * y_stride + r, y_stride, scratch);
      else
        expand(e, u, hidden + i * u->rank, n, row0 + r, rows, y + i * y_stride + r, y_stride, scratch);
    }
  }
}

/* U is the identity: V's rows are the output's. */
static void add_dense(const adrt_executable *e, const term *t, const float *x, int64_t x_stride, int64_t count,
                      int64_t row0, int64_t n_rows, float *y, int64_t y_stride, float *scratch) {
  part_of_y p;
  float factor[BLOCK];
  for (int64_t r = 0, rows; r < n_rows; r += rows) {
    rows = n_rows - r < BLOCK ? n_rows - r : BLOCK;
    for (int64_t j = 0; j < rows; j++)
      factor[j] = (t->d ? t->d[row0 + r + j] : 1.0f) * (t->e ? t->e[row0 + r + j] : 1.0f);
    for (int64_t i = 0, n; i < count; i += n) {
      n = count - i < TOKENS_AT_ONCE ? count - i : TOKENS_AT_ONCE;
      multiply(e, &t->v, row0 + r, rows, x + i * x_stride, x_stride, n, p[0], BLOCK, scratch);
      add_part(p, factor, t->scale, n, rows, y + i * y_stride + r, y_stride);
    }
  }
}

static void add_sparse(const term *t, const float *x, int64_t x_stride, int64_t count, int64_t row0, int64_t n_rows,
                       float *y, int64_t y_stride) {
  for (int64_t r = 0; r < n_rows; r++) {
    for (int64_t i = 0; i < count; i++) {
      const float *mine = x + i * x_stride;
      float sum = 0;
      for (int64_t k = t->row_start[row0 + r]; k < t->row_start[row0 + r + 1]; k++)
        sum += t->values[k] * mine[t->columns[k]];
      y[i * y_stride + r] += t->scale * sum;
    }
  }
}

/* Row i c + j of (W1 kron W2) x is row i of W1 times what W2's row j made of the segments of x. */
static void add_kronecker(const adrt_executable *e, const term *t, const float *hidden, int64_t count, int64_t row0,
                          int64_t n_rows, float *y, int64_t y_stride, float *scratch) {
  int64_t c = t->v.rows, b = t->w1.cols;
  part_of_y p;
  for (int64_t r = 0, rows; r < n_rows; r += rows) {
    int64_t inner = (row0 + r) % c, before = inner % PANEL;
    rows = c - inner < BLOCK - before ? c - inner : BLOCK - before;
    if (rows > n_rows - r) rows = n_rows - r;
    cpu_decode_row(&t->w1, (row0 + r) / c, scratch);
    for (int64_t i = 0; i < count; i++) {
      memset(p[0], 0, sizeof p[0]);
      e->kernels->expand[ADRT_F32](hidden + i * t->hidden + inner / PANEL * b * PANEL, b * PANEL, b, before + rows,
                                   scratch, b, 1, p[0], BLOCK);
      for (int64_t j = 0; j < rows; j++) y[i * y_stride + r + j] += t->scale * p[0][before + j];
    }
  }
}

static void add_term(const adrt_executable *e, const instruction *in, const part *p, int64_t row0, int64_t n_rows,
                     float *y, int64_t y_stride, float *scratch) {
  const term *t = p->what;
  const float *x = in->plain + p->start * in->plain_stride, *hidden = e->plan.hidden + p->hidden;
  if (t->kind == ADRT_SPARSE)
    add_sparse(t, x, in->plain_stride, p->count, row0, n_rows, y, y_stride);
  else if (t->kind == ADRT_KRONECKER)
    add_kronecker(e, t, hidden, p->count, row0, n_rows, y, y_stride, scratch);
  else if (t->u)
    add_low_rank(e, p, hidden, row0, n_rows, y, y_stride, scratch);
  else
    add_dense(e, t, x, in->plain_stride, p->count, row0, n_rows, y, y_stride, scratch);
}

void cpu_add_parts(const adrt_executable *e, const instruction *in, int64_t row0, int64_t n_rows, float *y,
                   int64_t y_stride, float *scratch) {
  const part *p = e->plan.parts + in->first_part, *end = p + in->n_parts;
  for (; p < end; p += p->together) {
    float *mine = y + p->start * y_stride;
    if (p->what) add_term(e, in, p, row0, n_rows, mine, y_stride, scratch);
    for (int64_t t = 0; p->gain && t < p->count; t++)
      for (int64_t r = 0; r < n_rows; r++) mine[t * y_stride + r] *= p->gain[row0 + r];
  }
}

static void prefetch(const void *data, int64_t bytes) {
  const uint8_t *first = data, *last = first + bytes - 1; /* a vector need not start with a line */
  for (; first < last; first += 64) __builtin_prefetch(first, 0, 2);
  __builtin_prefetch(last, 0, 2);
}

void cpu_fetch_vectors(const adrt_executable *e, const instruction *in, int64_t row0, int64_t n_rows) {
  const part *p = e->plan.parts + in->first_part, *end = p + in->n_parts;
  for (; p < end; p++) {
    const float *vector = p->what ? p->what->e : p->gain;
    if (vector) prefetch(vector + row0, n_rows * (int64_t)sizeof *vector);
  }
}

void cpu_add_embedded(const adrt_executable *e, const term *t, int32_t token, int64_t width, float *out,
                      float *scratch) {
  if (t->kind == ADRT_SPARSE) {
    for (int64_t k = t->row_start[token]; k < t->row_start[token + 1]; k++)
      out[t->columns[k]] += t->scale * t->values[k];
    return;
  }
  for (int64_t r = 0; t->u && r < t->v.rows; r++)
    scratch[r] = cpu_element(&t->v, r, token) * (t->d ? t->scale * t->d[r] : t->scale);
  if (t->u) {
    const part whole = {.what = t, .count = 1, .together = 1};
    add_low_rank(e, &whole, scratch, 0, width, out, 0, scratch + t->v.rows);
    return;
  }
  for (int64_t r = 0; r < width; r++)
    out[r] += cpu_element(&t->v, r, token) * t->scale * (t->d ? t->d[r] : 1.0f) * (t->e ? t->e[r] : 1.0f);
}

int64_t cpu_term_scratch(const adrt_executable *e) {
  int64_t split = (TOKENS_SPLIT + 1) * e->slot_stride, scaled = (TOKENS_AT_ONCE + 1) * e->max_rank;
  return split > scaled ? split : scaled;
}
