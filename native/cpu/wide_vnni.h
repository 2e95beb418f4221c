/* The two products of a wide low-rank term (wide.c) for AVX-512 with VNNI; included by kernels_vnni.c. Integers are summed
 * exactly over blocks of 64, then scaled, block after block, for one token as for many. */
#ifndef CPU_WIDE_VNNI_H
#define CPU_WIDE_VNNI_H

enum { WIDE_TOKENS = 4, WIDE_RANGE = 32767 };

/* Words in order, then a scale for each block: X_WIDE. */
static void quantize_wide(const float *x, int64_t n, float *out) {
  int16_t *words = (int16_t *)(void *)out;
  for (int64_t b = 0; b < n / BLOCK; b++, words += BLOCK) {
    __m512i code[4];
    out[n / 2 + b] = quantize_block(x + b * BLOCK, WIDE_RANGE, code);
    for (int i = 0; i < 4; i++)
      _mm256_storeu_si256((__m256i *)(void *)(words + 16 * i), _mm512_cvtepi32_epi16(code[i]));
  }
}

INLINE __m512i widen(const uint8_t *codes) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)codes));
}

/* Two rows of V for some tokens. */
INLINE void shrink_wide_tile(const matrix *m, int64_t row, int tokens, const float *x, int64_t x_stride, float *y,
                             int64_t y_stride) {
  int64_t blocks = m->cols / BLOCK, stride = m->cols + m->skipped;
  float scale[2][WIDE_TOKENS][SCALES_AT_ONCE];
  __m512 acc[2][WIDE_TOKENS];
  for (int r = 0; r < 2; r++) {
    float weight[SCALES_AT_ONCE];
    expand_int8_scales(m->scales + (row + r) * (stride / BLOCK), blocks, weight);
    for (int t = 0; t < tokens; t++) {
      const float *mine = x + t * x_stride + m->cols / 2;
      for (int64_t b = 0; b < blocks; b++) scale[r][t][b] = weight[b] * mine[b];
      acc[r][t] = _mm512_setzero_ps();
    }
  }
  for (int64_t b = 0; b < blocks; b++) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++) {
      const uint8_t *codes = m->data + (row + r) * stride + b * BLOCK;
      __m512i low = widen(codes), high = widen(codes + BLOCK / 2);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
        const float *words = x + t * x_stride + b * BLOCK / 2;
        __m512i sum = _mm512_setzero_si512();
        add_products(NF4_WORDS, &sum, low, _mm512_loadu_si512(words));
        add_products(NF4_WORDS, &sum, high, _mm512_loadu_si512(words + BLOCK / 4));
        acc[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale[r][t][b]), acc[r][t]);
      }
    }
  }
  for (int r = 0; r < 2; r++)
    for (int t = 0; t < tokens; t++) y[t * y_stride + r] = _mm512_reduce_add_ps(acc[r][t]);
}

static void shrink_wide(const matrix *m, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride,
                        int64_t n_tokens, float *y, int64_t y_stride) {
  for (int64_t r = 0; r < n_rows; r += 2) {
    int64_t t = 0;
    for (; t + WIDE_TOKENS <= n_tokens; t += WIDE_TOKENS)
      shrink_wide_tile(m, row0 + r, WIDE_TOKENS, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
    for (; t < n_tokens; t++)
      shrink_wide_tile(m, row0 + r, 1, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
  }
}

/* Two panels, `step` bytes apart, for some tokens; of one token in several sums, so that none waits for itself. */
INLINE void add_wide_tile(int panels, int tokens, const uint8_t *panel, int64_t step, int64_t rank, const float *h,
                          int64_t h_stride, float *y, int64_t y_stride) {
  const int split = tokens == 1 ? 4 : 1;
  __m512 acc[WIDE_TOKENS][2];
#pragma GCC unroll 4
  for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
  for (int64_t b = 0; b < rank / BLOCK; b++, panel += WIDE_BLOCK_BYTES) {
    __m512i sum[WIDE_TOKENS][2][4];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
      for (int i = 0; i < split; i++) sum[t][0][i] = sum[t][1][i] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int k = 0; k < BLOCK / 2; k++) {
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++) {
        __m512i codes = widen(panel + p * step + k * 2 * PANEL);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
          add_products_of_one(NF4_WORDS, &sum[t][p][k % split], codes,
                              (const uint8_t *)(h + t * h_stride + b * BLOCK / 2 + k));
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++) {
      __m512 scales = _mm512_loadu_ps(panel + p * step + BLOCK * PANEL);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
        for (int i = 1; i < split; i++) sum[t][p][0] = _mm512_add_epi32(sum[t][p][0], sum[t][p][i]);
        __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(h[t * h_stride + rank / 2 + b]));
        acc[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][p][0]), scale, acc[t][p]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++) {
      float *out = y + t * y_stride + p * PANEL;
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), acc[t][p]));
    }
}

/* The last panel when only `n_rows` of its rows exist in y. */
INLINE void add_wide_partial(const uint8_t *panel, int64_t rank, int64_t n_rows, const float *h, float *y) {
  float whole[PANEL] = {0};
  memcpy(whole, y, (size_t)n_rows * sizeof *y);
  add_wide_tile(1, 1, panel, 0, rank, h, 0, whole, PANEL);
  memcpy(y, whole, (size_t)n_rows * sizeof *y);
}

static void add_wide(const void *panels, int64_t panel_stride, int64_t rank, int64_t n_rows, const float *h,
                     int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  const uint8_t *panel = panels;
  for (int together; n_rows >= PANEL; n_rows -= together * PANEL, y += together * PANEL) {
    int64_t t = 0;
    together = n_rows >= 2 * PANEL ? 2 : 1;
    for (; t + WIDE_TOKENS <= n_tokens && together == 2; t += WIDE_TOKENS)
      add_wide_tile(2, WIDE_TOKENS, panel, panel_stride, rank, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
    for (; t < n_tokens && together == 2; t++)
      add_wide_tile(2, 1, panel, panel_stride, rank, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
    for (; t < n_tokens; t++)
      add_wide_tile(1, 1, panel, panel_stride, rank, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
    panel += together * panel_stride;
  }
  for (int64_t t = 0; n_rows && t < n_tokens; t++)
    add_wide_partial(panel, rank, n_rows, h + t * h_stride, y + t * y_stride);
}

#endif
