/* The two products of an adapter's low-rank term, for few rows and tokens at a time; included by product.h, whose
 * vectors and order of sums it uses. */
#ifndef CPU_LOW_RANK_H
#define CPU_LOW_RANK_H

enum { SHRINK_ROWS = 4, ADD_PANELS = 2, ADD_TOKENS = LANES == 16 ? 4 : 1 };

/* Threads walk both factors in the order of memory. So what multiplies some rows or panels also asks, piece by piece, for
 * those behind them: the memory drops requests that come in a burst. */
INLINE void fetch_next(const uint8_t *ahead, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
}

/* Some rows of V against one token: together, so that a sum need not wait for itself and x is loaded once. */
INLINE void shrink_tile(const matrix *m, int dtype, int rows, int64_t row, const float *x, float *y) {
  const int64_t stride = row_bytes(dtype, m->cols + m->skipped), bytes = block_bytes(dtype);
  const uint8_t *block = m->data + row * stride;
  vec acc[SHRINK_ROWS];
  for (int r = 0; r < rows; r++) acc[r] = v_zero();
  for (int64_t b = 0; b < m->cols / BLOCK; b++, block += bytes, x += BLOCK) {
    vec sum[SHRINK_ROWS];
    for (int r = 0; r < rows; r++) fetch_next(block + (rows + r) * stride, bytes);
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK_VECS; i++) {
      vec a = v_load(x + i * LANES);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        vec w = v_weights(dtype, block + r * stride, i);
        sum[r] = i ? v_fma(w, a, sum[r]) : v_mul(w, a);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) acc[r] = v_add(acc[r], sum[r]);
  }
  for (int r = 0; r < rows; r++) y[r] = v_sum(acc[r]);
}

INLINE void shrink(const matrix *m, int dtype, int64_t row0, int64_t n_rows, const float *x, float *y) {
  int64_t r = 0;
  for (; r + SHRINK_ROWS <= n_rows; r += SHRINK_ROWS) shrink_tile(m, dtype, SHRINK_ROWS, row0 + r, x, y + r);
  for (; r < n_rows; r++) shrink_tile(m, dtype, 1, row0 + r, x, y + r);
}

#define DEFINE_SHRINK(name, dtype)                                                                  \
  static void name(const matrix *m, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride, \
                   int64_t n_tokens, float *y, int64_t y_stride) {                                  \
    (void)x_stride, (void)n_tokens, (void)y_stride;                                                 \
    shrink(m, dtype, row0, n_rows, x, y);                                                           \
  }
DEFINE_SHRINK(shrink_f32, ADRT_F32)
DEFINE_SHRINK(shrink_f16, ADRT_F16)
DEFINE_SHRINK(shrink_bf16, ADRT_BF16)

/* Vec i of step k + `odd` of a panel, k even. */
INLINE vec panel_items(int dtype, const uint8_t *panel, int64_t k, int odd, int i) {
  if (dtype == ADRT_NF4) return v_weights(dtype, panel + k / 2 * PANEL, odd * PANEL_VECS + i);
  return v_weights(dtype, panel + row_bytes(dtype, (k + odd) * PANEL), i);
}

/* sum[odd] += step k + odd of some panels, `step` bytes apart, times h of some tokens. */
INLINE void add_step(int dtype, int panels, int tokens, int odd, const uint8_t *panel, int64_t step, int64_t k,
                     const float *h, int64_t h_stride, vec sum[2][ADD_TOKENS][ADD_PANELS * PANEL_VECS]) {
#pragma GCC unroll 16
  for (int i = 0; i < panels * PANEL_VECS; i++) {
    vec u = panel_items(dtype, panel + i / PANEL_VECS * step, k, odd, i % PANEL_VECS);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) sum[odd][t][i] = v_fma(u, v_set1(h[t * h_stride + k + odd]), sum[odd][t][i]);
  }
}

/* y += panels^T h, the even steps and the odd ones in sums of their own. */
INLINE void add_panels(int dtype, int panels, int tokens, const uint8_t *panel, int64_t step, int64_t rank,
                       const float *h, int64_t h_stride, float *y, int64_t y_stride) {
  vec sum[2][ADD_TOKENS][ADD_PANELS * PANEL_VECS];
#pragma GCC unroll 4
  for (int t = 0; t < tokens; t++)
#pragma GCC unroll 16
    for (int i = 0; i < panels * PANEL_VECS; i++) sum[0][t][i] = sum[1][t][i] = v_zero();
  const int64_t bytes = panels * row_bytes(dtype, 2 * PANEL); /* of two steps */
  const uint8_t *ahead = panel + panels * step;
  int64_t k = 0;
  for (; k + 2 <= rank; k += 2, ahead += bytes) {
    fetch_next(ahead, bytes);
    add_step(dtype, panels, tokens, 0, panel, step, k, h, h_stride, sum);
    add_step(dtype, panels, tokens, 1, panel, step, k, h, h_stride, sum);
  }
  if (k < rank) add_step(dtype, panels, tokens, 0, panel, step, k, h, h_stride, sum);
#pragma GCC unroll 4
  for (int t = 0; t < tokens; t++)
#pragma GCC unroll 16
    for (int i = 0; i < panels * PANEL_VECS; i++) {
      float *out = y + t * y_stride + i * LANES;
      v_store(out, v_add(v_load(out), v_add(sum[0][t][i], sum[1][t][i])));
    }
}

/* The last panel when only `n_rows` of its rows exist in y. */
INLINE void add_partial(int dtype, const uint8_t *panel, int64_t rank, int64_t n_rows, const float *h,
                        int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  for (int64_t t = 0; t < n_tokens; t++) {
    float whole[PANEL] = {0};
    memcpy(whole, y + t * y_stride, (size_t)n_rows * sizeof *y);
    add_panels(dtype, 1, 1, panel, 0, rank, h + t * h_stride, h_stride, whole, PANEL);
    memcpy(y + t * y_stride, whole, (size_t)n_rows * sizeof *y);
  }
}

INLINE void add_low_rank(int dtype, const uint8_t *panel, int64_t panel_stride, int64_t rank, int64_t n_rows,
                         const float *h, int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  const int64_t step = row_bytes(dtype, panel_stride);
  for (int panels; n_rows >= PANEL; n_rows -= panels * PANEL, panel += panels * step, y += panels * PANEL) {
    int64_t t = 0;
    panels = n_rows >= 2 * PANEL ? 2 : 1;
    for (; t + ADD_TOKENS <= n_tokens && panels == 2; t += ADD_TOKENS)
      add_panels(dtype, 2, ADD_TOKENS, panel, step, rank, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
    for (; t < n_tokens && panels == 2; t++)
      add_panels(dtype, 2, 1, panel, step, rank, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
    for (; t < n_tokens; t++)
      add_panels(dtype, 1, 1, panel, step, rank, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
  }
  if (n_rows) add_partial(dtype, panel, rank, n_rows, h, h_stride, n_tokens, y, y_stride);
}

#define DEFINE_ADD_LOW_RANK(name, dtype)                                                                   \
  static void name(const void *panels, int64_t panel_stride, int64_t rank, int64_t n_rows, const float *h, \
                   int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride) {                       \
    add_low_rank(dtype, panels, panel_stride, rank, n_rows, h, h_stride, n_tokens, y, y_stride);           \
  }
DEFINE_ADD_LOW_RANK(add_low_rank_f32, ADRT_F32)
DEFINE_ADD_LOW_RANK(add_low_rank_f16, ADRT_F16)
DEFINE_ADD_LOW_RANK(add_low_rank_bf16, ADRT_BF16)
DEFINE_ADD_LOW_RANK(add_low_rank_int8, ADRT_INT8)
DEFINE_ADD_LOW_RANK(add_low_rank_nf4, ADRT_NF4)

/* The slots of a kernel table that this file fills. */
#define LOW_RANK_KERNELS                                                                                             \
  .shrink = {shrink_f32, shrink_f16, shrink_bf16},                                                                   \
  .add_low_rank = {add_low_rank_f32, add_low_rank_f16, add_low_rank_bf16, add_low_rank_int8, add_low_rank_nf4}

#endif
