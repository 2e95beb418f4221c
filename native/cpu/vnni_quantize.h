/* Activations as integers with a scale for each block (vnni.h). */
#ifndef CPU_VNNI_QUANTIZE_H
#define CPU_VNNI_QUANTIZE_H
#include "vnni.h"

/* 64 values as integers in +- range; returns the scale, NaN when a value is not finite. */
static float quantize_block(const float *x, float limit, __m512i codes[4]) {
  __m512 v[4], largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v[i]));
    poison = _mm512_fmadd_ps(v[i], _mm512_setzero_ps(), poison); /* infinity * 0 is NaN */
  }
  float range = _mm512_reduce_max_ps(largest), inverse = range > 1e-30f ? limit / range : 0.0f;
  for (int i = 0; i < 4; i++) codes[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(inverse)));
  return range / limit + _mm512_reduce_add_ps(poison);
}

/* Columns of a block in the order of its codes, [n][item][code of the item]: what unpack says. */
INLINE int column_of(int form, int code) {
  int in_item = 4 / code_bytes(form), n = code / in_item / block_items(form);
  int item = code / in_item % block_items(form), i = code % in_item;
  return form == NF4_WORDS ? 8 * item + 4 * i + (n ^ 1) : BLOCK / block_items(form) * item + 2 * i + n;
}

INLINE void quantize_words(int form, const float *x, int64_t n, float *out) {
  int16_t *codes = (int16_t *)(void *)out, order[BLOCK];
  float *scales = out + n / 2;
  for (int i = 0; i < BLOCK; i++) order[i] = (int16_t)column_of(form, i);
  const __m512i first = _mm512_loadu_si512(order), second = _mm512_loadu_si512(order + 32);
  for (int64_t b = 0; b < n / BLOCK; b++, codes += BLOCK) {
    __m512i code[4], words[2];
    float scale = quantize_block(x + b * BLOCK, WORD_RANGE, code);
    scales[b] = form == NF4_WORDS ? scale / (float)NF4_RANGE : scale;
    for (int i = 0; i < 2; i++) {
      __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(code[2 * i]));
      words[i] = _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(code[2 * i + 1]), 1);
    }
    _mm512_storeu_si512(codes, _mm512_permutex2var_epi16(words[0], first, words[1]));
    _mm512_storeu_si512(codes + 32, _mm512_permutex2var_epi16(words[0], second, words[1]));
  }
}

static void quantize_bytes(const float *x, int64_t n, float *out) {
  int8_t *codes = (int8_t *)(void *)out, columns[BLOCK];
  float *scales = out + n / 4;
  int32_t *starts = (int32_t *)(void *)(scales + n / BLOCK);
  for (int i = 0; i < BLOCK; i++) columns[i] = (int8_t)column_of(NF4_BYTES, i);
  const __m512i order = _mm512_loadu_si512(columns);
  for (int64_t b = 0; b < n / BLOCK; b++, codes += BLOCK) {
    __m512i code[4], sum = _mm512_setzero_si512();
    scales[b] = quantize_block(x + b * BLOCK, BYTE_RANGE, code) / BYTE_SCALE;
    for (int i = 0; i < 4; i++) {
      sum = _mm512_add_epi32(sum, code[i]);
      _mm_storeu_si128((__m128i *)(void *)(codes + 16 * i), _mm512_cvtepi32_epi8(code[i]));
    }
    starts[b] = (int32_t)roundf(-BYTE_ZERO * (float)_mm512_reduce_add_epi32(sum));
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi8(order, _mm512_loadu_si512(codes)));
  }
}

static void quantize_wide(const float *x, int64_t n, float *out); /* wide_vnni.h */

static void quantize(const float *x, int64_t n, enum layout_of_x layout, float *out) {
  if (layout == X_BYTES_SPLIT)
    quantize_bytes(x, n, out);
  else if (layout == X_WORDS_SPLIT)
    quantize_words(NF4_WORDS, x, n, out);
  else if (layout == X_WIDE)
    quantize_wide(x, n, out);
  else
    quantize_words(INT8_WORDS, x, n, out);
}

#endif
