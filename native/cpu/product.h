/* Products and expansions as tiles of rows by tokens, written once over the vectors of an instruction set.
 *
 * The including file defines: vec, LANES (floats in a vec), TILE_ROWS (rows decoded together for 4 tokens),
 * v_zero, v_set1, v_load, v_store, v_mul, v_add, v_fma (a * b + c), v_sum, and
 *   v_weights(dtype, block, i)   vec i of a 64-weight block: its values, or the unscaled codes of int8 and
 * nf4 v_items(dtype, items)        LANES values of f32, f16 or bf16 and may define LOOKUP_ABSMAX.
 *
 * The canonical order: in a block, lane by lane, vec 0 to the last; then, times the block's scale, onto the
 * row's accumulator; lanes are summed at the end.
 */
#ifndef CPU_PRODUCT_H
#define CPU_PRODUCT_H
#include <string.h>

#include "kernels.h"
#include "quant_tables.h"

#define INLINE static inline __attribute__((always_inline))

enum { BLOCK_VECS = BLOCK / LANES, PANEL_VECS = PANEL / LANES, PREFETCH_BYTES = 4096 };
enum { EXPAND_TOKENS = LANES == 16 ? 8 : 4, EXPAND_PANELS = 4 };

INLINE bool is_scaled(int dtype) { return dtype == ADRT_INT8 || dtype == ADRT_NF4; }

INLINE int64_t block_bytes(int dtype) {
  return dtype == ADRT_F32    ? 4 * BLOCK
         : dtype == ADRT_NF4  ? BLOCK / 2
         : dtype == ADRT_INT8 ? BLOCK
                              : 2 * BLOCK;
}

INLINE int64_t row_bytes(int dtype, int64_t cols) {
  return dtype == ADRT_F32 ? 4 * cols : dtype == ADRT_NF4 ? cols / 2 : dtype == ADRT_INT8 ? cols : 2 * cols;
}

static inline void expand_int8_scales(const uint16_t *scales, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)scales[i] << 16;
    memcpy(out + i, &bits, 4);
  }
}

#ifndef LOOKUP_ABSMAX
#define LOOKUP_ABSMAX lookup_absmax
/* out[i] = DYNAMIC_MAP[q[i]] */
static inline void lookup_absmax(const uint8_t *q, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t code = q[i];
    __asm__(
        ""
        : "+r"(code)); /* a lookup that the compiler vectorizes is several times slower than these loads */
    out[i] = DYNAMIC_MAP[code];
  }
}
#endif

static inline void expand_absmax(const matrix *m, int64_t block, int64_t n, float *out) {
  LOOKUP_ABSMAX(m->absmax + block, n, out);
  for (int64_t i = 0, stop; i < n;
       i = stop) { /* product and sum are rounded apart, as the quantizer defines them */
    float nested;
    memcpy(&nested, m->nested + (block + i) / NESTED_BLOCK * 4, 4);
    stop = ((block + i) / NESTED_BLOCK + 1) * NESTED_BLOCK - block;
    stop = stop < n ? stop : n;
    for (int64_t j = i; j < stop; j++) out[j] = out[j] * nested + m->offset;
  }
}

/* Scales [rows][blocks of a row] of consecutive rows, at most SCALES_AT_ONCE; one pass for many rows, since
 * each costs a stall between the stores of the lookup and the loads after it. */
static inline void expand_scales(const matrix *m, int dtype, int64_t row, int64_t rows, float *out) {
  int64_t blocks = blocks_of(m);
  if (dtype == ADRT_INT8) expand_int8_scales(m->scales + row * blocks, rows * blocks, out);
  if (dtype == ADRT_NF4) expand_absmax(m, row * blocks, rows * blocks, out);
}

/* How many of `n_rows` rows have their scales expanded together. */
static inline int64_t rows_at_once(const matrix *m, int dtype, int64_t n_rows) {
  int64_t rows = is_scaled(dtype) ? SCALES_AT_ONCE / blocks_of(m) : n_rows;
  return rows < n_rows ? rows : n_rows;
}

/* One 64-weight block of `rows` rows against `tokens` tokens. */
INLINE void add_block(int dtype, int rows, int tokens, const uint8_t *const *block, const float *scale,
                      const float *x, int64_t x_stride, vec acc[TILE_ROWS][4]) {
  vec sum[TILE_ROWS][4];
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK_VECS; i++) {
    vec w[TILE_ROWS];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) w[r] = v_weights(dtype, block[r], i);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
      vec a = v_load(x + t * x_stride + i * LANES);
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) sum[r][t] = i ? v_fma(w[r], a, sum[r][t]) : v_mul(w[r], a);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
      acc[r][t] =
          is_scaled(dtype) ? v_fma(v_set1(scale[r]), sum[r][t], acc[r][t]) : v_add(acc[r][t], sum[r][t]);
  }
}

/* The columns after the last whole block, padded with zeros; nf4 rows have none. */
INLINE void add_tail(const matrix *m, int dtype, int rows, int tokens, const uint8_t *const *tail,
                     const float *scale, const float *x, int64_t x_stride, vec acc[TILE_ROWS][4]) {
  uint8_t padded[TILE_ROWS][4 * BLOCK];
  const uint8_t *block[TILE_ROWS];
  for (int r = 0; r < rows; r++) {
    memset(padded[r], 0, sizeof padded[r]);
    memcpy(padded[r], tail[r], (size_t)row_bytes(dtype, m->cols % BLOCK));
    block[r] = padded[r];
  }
  add_block(dtype, rows, tokens, block, scale, x, x_stride, acc);
}

/* `scales` are those of `row` and the rows after it, [rows][blocks]. */
INLINE void product_tile(const matrix *m, int dtype, int rows, int tokens, int64_t row, const float *scales,
                         const float *x, int64_t x_stride, float *y, int64_t y_stride) {
  vec acc[TILE_ROWS][4];
  const uint8_t *block[TILE_ROWS];
  float scale[TILE_ROWS] = {0};
  int64_t whole = m->cols / BLOCK, blocks = blocks_of(m);
  for (int r = 0; r < rows; r++) {
    block[r] = m->data + (row + r) * row_bytes(dtype, m->cols + m->skipped);
    for (int t = 0; t < tokens; t++) acc[r][t] = v_zero();
  }
  for (int64_t b = 0; b < blocks; b++) {
    for (int r = 0; r < rows; r++) scale[r] = is_scaled(dtype) ? scales[r * blocks + b] : 0;
    if (tokens < 4) __builtin_prefetch(block[0] + PREFETCH_BYTES, 0, 2); /* into L2, which takes more at once */
    if (b < whole)
      add_block(dtype, rows, tokens, block, scale, x + b * BLOCK, x_stride, acc);
    else
      add_tail(m, dtype, rows, tokens, block, scale, x + b * BLOCK, x_stride, acc);
    for (int r = 0; r < rows; r++) block[r] += block_bytes(dtype);
  }
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) y[t * y_stride + r] = v_sum(acc[r][t]);
}

INLINE void product_rows(const matrix *m, int dtype, int tokens, int64_t row0, int64_t n_rows,
                         const float *scales, const float *x, int64_t x_stride, float *y, int64_t y_stride) {
  int64_t r = 0, blocks = is_scaled(dtype) ? blocks_of(m) : 0;
  for (; tokens == 4 && r + TILE_ROWS <= n_rows; r += TILE_ROWS)
    product_tile(m, dtype, TILE_ROWS, 4, row0 + r, scales + r * blocks, x, x_stride, y + r, y_stride);
  for (; r < n_rows; r++)
    product_tile(m, dtype, 1, tokens, row0 + r, scales + r * blocks, x, x_stride, y + r, y_stride);
}

INLINE void product(const matrix *m, int dtype, int64_t row0, int64_t n_rows, const float *x,
                    int64_t x_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  float scales[SCALES_AT_ONCE];
  int64_t at_once = rows_at_once(m, dtype, n_rows);
  for (int64_t r = 0; r < n_rows; r += at_once) {
    int64_t rows = n_rows - r < at_once ? n_rows - r : at_once, t = 0;
    expand_scales(m, dtype, row0 + r, rows, scales);
    for (; t + 4 <= n_tokens; t += 4)
      product_rows(m, dtype, 4, row0 + r, rows, scales, x + t * x_stride, x_stride, y + t * y_stride + r,
                   y_stride);
    for (; t + 2 <= n_tokens; t += 2)
      product_rows(m, dtype, 2, row0 + r, rows, scales, x + t * x_stride, x_stride, y + t * y_stride + r,
                   y_stride);
    if (t < n_tokens)
      product_rows(m, dtype, 1, row0 + r, rows, scales, x + t * x_stride, x_stride, y + t * y_stride + r,
                   y_stride);
  }
}

#define DEFINE_PRODUCT(name, dtype)                                                                 \
  static void name(const matrix *m, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride, \
                   int64_t n_tokens, float *y, int64_t y_stride) {                                  \
    product(m, dtype, row0, n_rows, x, x_stride, n_tokens, y, y_stride);                            \
  }
DEFINE_PRODUCT(product_f32, ADRT_F32)
DEFINE_PRODUCT(product_f16, ADRT_F16)
DEFINE_PRODUCT(product_bf16, ADRT_BF16)
DEFINE_PRODUCT(product_int8, ADRT_INT8)
DEFINE_PRODUCT(product_nf4, ADRT_NF4)

/* `panels` panels of 16 rows, `step` bytes apart, for `tokens` tokens: y += panel^T h. */
INLINE void expand_tile(int dtype, int panels, int tokens, const uint8_t *panel, int64_t step, int64_t rank,
                        const float *h, int64_t h_stride, float *y, int64_t y_stride) {
  const int64_t item = dtype == ADRT_F32 ? 4 : 2;
  vec acc[EXPAND_TOKENS][EXPAND_PANELS * PANEL_VECS];
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < panels * PANEL_VECS; i++) acc[t][i] = v_zero();
  for (int64_t k = 0; k < rank; k++) {
#pragma GCC unroll 16
    for (int i = 0; i < panels * PANEL_VECS; i++) {
      vec u = v_items(dtype, panel + i / PANEL_VECS * step + (k * PANEL + i % PANEL_VECS * LANES) * item);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; t++) acc[t][i] = v_fma(u, v_set1(h[t * h_stride + k]), acc[t][i]);
    }
  }
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < panels * PANEL_VECS; i++) {
      float *out = y + t * y_stride + i * LANES;
      v_store(out, v_add(v_load(out), acc[t][i]));
    }
}

/* The last panel when only `n_rows` of its rows exist in y. */
INLINE void expand_partial(int dtype, const uint8_t *panel, int64_t rank, int64_t n_rows, const float *h,
                           int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  for (int64_t t = 0; t < n_tokens; t++) {
    float whole[PANEL] = {0};
    memcpy(whole, y + t * y_stride, (size_t)n_rows * sizeof *y);
    expand_tile(dtype, 1, 1, panel, 0, rank, h + t * h_stride, h_stride, whole, PANEL);
    memcpy(y + t * y_stride, whole, (size_t)n_rows * sizeof *y);
  }
}

/* Whole panels for a few tokens, `at_once` of them together so that no sum waits for itself. */
INLINE void expand_rows(int dtype, int at_once, int tokens, const uint8_t *panel, int64_t step, int64_t rank,
                        int64_t n_rows, const float *h, int64_t h_stride, float *y, int64_t y_stride) {
  for (; n_rows >= at_once * PANEL; n_rows -= at_once * PANEL, panel += at_once * step, y += at_once * PANEL)
    expand_tile(dtype, at_once, tokens, panel, step, rank, h, h_stride, y, y_stride);
  for (; n_rows >= PANEL; n_rows -= PANEL, panel += step, y += PANEL)
    expand_tile(dtype, 1, tokens, panel, step, rank, h, h_stride, y, y_stride);
}

INLINE void expand(int dtype, const uint8_t *panel, int64_t panel_stride, int64_t rank, int64_t n_rows,
                   const float *h, int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  const int64_t step = panel_stride * (dtype == ADRT_F32 ? 4 : 2), whole = n_rows / PANEL;
  int64_t t = 0;
  for (; t + EXPAND_TOKENS <= n_tokens; t += EXPAND_TOKENS)
    expand_rows(dtype, 1, EXPAND_TOKENS, panel, step, rank, n_rows, h + t * h_stride, h_stride, y + t * y_stride,
                y_stride);
  for (; t < n_tokens; t++)
    expand_rows(dtype, EXPAND_PANELS, 1, panel, step, rank, n_rows, h + t * h_stride, h_stride, y + t * y_stride,
                y_stride);
  if (n_rows % PANEL)
    expand_partial(dtype, panel + whole * step, rank, n_rows % PANEL, h, h_stride, n_tokens, y + whole * PANEL,
                   y_stride);
}

#define DEFINE_EXPAND(name, dtype)                                                                         \
  static void name(const void *panels, int64_t panel_stride, int64_t rank, int64_t n_rows, const float *h, \
                   int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride) {                       \
    expand(dtype, panels, panel_stride, rank, n_rows, h, h_stride, n_tokens, y, y_stride);                 \
  }
DEFINE_EXPAND(expand_f32, ADRT_F32)
DEFINE_EXPAND(expand_f16, ADRT_F16)
DEFINE_EXPAND(expand_bf16, ADRT_BF16)

#include "low_rank.h"

/* The slots of a kernel table that this file, elementwise.h and low_rank.h fill. */
#define COMMON_KERNELS                                                                           \
  .exact = {product_f32, product_f16, product_bf16, product_int8, product_nf4},                  \
  .expand = {expand_f32, expand_f16, expand_bf16}, .split = split, .norm = norm, .gated = gated, \
  .scale = scale, .softmax = softmax, LOW_RANK_KERNELS

#endif
