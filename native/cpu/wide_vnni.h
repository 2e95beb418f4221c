/* The product of a wide low-rank term's factor (wide.c) for AVX-512 with VNNI; included by kernels_vnni.c.
 *
 * Activations are integers of 15 bits in two bytes, high and low, so that the codes need no widening: they are bytes
 * from memory to vpdpbusd. Integers are summed exactly over blocks of 64, then scaled, block after block, for one token
 * as for many. */
#ifndef CPU_WIDE_VNNI_H
#define CPU_WIDE_VNNI_H

enum { WIDE_TOKENS = 4, LOW_BITS = 7, WIDE_RANGE = (127 << LOW_BITS) + 63 };

/* X_WIDE: of each block the high bytes, then the low ones, both with a sign; a scale for each block; what a block's sum
 * starts from, since the codes have no sign. */
static void quantize_wide(const float *x, int64_t n, float *out) {
  int8_t *bytes = (int8_t *)(void *)out;
  float *scales = out + n / 2;
  int32_t *starts = (int32_t *)(void *)(scales + n / BLOCK);
  for (int64_t b = 0; b < n / BLOCK; b++, bytes += 2 * BLOCK) {
    __m512i code[4], sum = _mm512_setzero_si512();
    scales[b] = quantize_block(x + b * BLOCK, WIDE_RANGE, code);
    for (int i = 0; i < 4; i++) {
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code[i], _mm512_set1_epi32(1 << (LOW_BITS - 1))), LOW_BITS);
      __m512i low = _mm512_sub_epi32(code[i], _mm512_slli_epi32(high, LOW_BITS));
      _mm_storeu_si128((__m128i *)(void *)(bytes + 16 * i), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128((__m128i *)(void *)(bytes + BLOCK + 16 * i), _mm512_cvtepi32_epi8(low));
      sum = _mm512_add_epi32(sum, code[i]);
    }
    starts[b] = -WIDE_ZERO * _mm512_reduce_add_epi32(sum);
  }
}

INLINE __m512i four_bytes(const int8_t *x) {
  int32_t one;
  memcpy(&one, x, 4);
  __m512i all = _mm512_set1_epi32(one);
  keep_in_register(&all);
  return all;
}

/* Some panels, `step` bytes apart, for some tokens. */
INLINE void add_wide_tile(int panels, int tokens, const uint8_t *panel, int64_t step, int64_t cols, const float *x,
                          int64_t x_stride, float *y, int64_t y_stride) {
  __m512 acc[WIDE_TOKENS][2];
#pragma GCC unroll 4
  for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
  for (int64_t b = 0; b < cols / BLOCK; b++, panel += WIDE_BLOCK_BYTES) {
    const float *scales = x + cols / 2 + b;
    const int32_t *starts = (const int32_t *)(const void *)(scales + cols / BLOCK);
    __m512i high[WIDE_TOKENS][2], low[WIDE_TOKENS][2];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
      high[t][0] = high[t][1] = _mm512_setzero_si512();
      low[t][0] = low[t][1] = _mm512_set1_epi32(starts[t * x_stride]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < BLOCK / 4; k++) {
      __m512i codes[2];
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++) {
        codes[p] = _mm512_loadu_si512(panel + p * step + k * 4 * PANEL);
        keep_in_register(&codes[p]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
        const int8_t *bytes = (const int8_t *)(x + t * x_stride) + b * 2 * BLOCK + 4 * k;
        __m512i x_high = four_bytes(bytes), x_low = four_bytes(bytes + BLOCK);
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
          add_products(NF4_BYTES, &high[t][p], codes[p], x_high);
          add_products(NF4_BYTES, &low[t][p], codes[p], x_low);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++) {
      __m512 weight_scales = _mm512_loadu_ps(panel + p * step + BLOCK * PANEL);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
        __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[t][p], LOW_BITS), low[t][p]);
        acc[t][p] = add_scaled(sum, weight_scales, scales[t * x_stride], acc[t][p]);
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
INLINE void add_wide_partial(const uint8_t *panel, int64_t cols, int64_t n_rows, const float *x, float *y) {
  float whole[PANEL] = {0};
  memcpy(whole, y, (size_t)n_rows * sizeof *y);
  add_wide_tile(1, 1, panel, 0, cols, x, 0, whole, PANEL);
  memcpy(y, whole, (size_t)n_rows * sizeof *y);
}

static void add_wide(const void *panels, int64_t panel_stride, int64_t cols, int64_t n_rows, const float *x,
                     int64_t x_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  const uint8_t *panel = panels;
  for (int together; n_rows >= PANEL; n_rows -= together * PANEL, y += together * PANEL) {
    int64_t t = 0;
    together = n_rows >= 2 * PANEL ? 2 : 1;
    for (; t + WIDE_TOKENS <= n_tokens && together == 2; t += WIDE_TOKENS)
      add_wide_tile(2, WIDE_TOKENS, panel, panel_stride, cols, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
    for (; t < n_tokens && together == 2; t++)
      add_wide_tile(2, 1, panel, panel_stride, cols, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
    for (; t < n_tokens; t++)
      add_wide_tile(1, 1, panel, panel_stride, cols, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
    panel += together * panel_stride;
  }
  for (int64_t t = 0; n_rows && t < n_tokens; t++)
    add_wide_partial(panel, cols, n_rows, x + t * x_stride, y + t * y_stride);
}

#endif
