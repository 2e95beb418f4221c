/* The quantizers of adaptrt/quant/nf4.py and int8.py, equal bit for bit.
 *
 * Equality rests on float32 operations as written: no contraction, no fast-math, no flushing of denormals. The loops over
 * a block have a fixed length and no branches, so that compilers turn them into vector code.
 */
#include <stdint.h>
#include <string.h>

#include "adaptrt.h"
#include "quant_tables.h"

enum { BLOCK = 64, NESTED_BLOCK = 256 };

static const float SMALLEST_SCALE = 1e-38f; /* keeps the inverse finite */
static const uint32_t INFINITY_BITS = 0x7f800000;
static const float ROUND_TO_INTEGER = 0x1.8p23f; /* added to |v| < 2^22, leaves rint(v) in the low mantissa bits */

static uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The largest |x|, as its bits: they are ordered like the numbers, and INFINITY_BITS or more mean infinity or NaN. */
static uint32_t largest_magnitude(const float *x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t magnitude = (int32_t)(float_bits(x[i]) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return (uint32_t)largest;
}

static int64_t first_not_finite(const float *x) {
  int64_t i = 0;
  while ((float_bits(x[i]) & INFINITY_BITS) != INFINITY_BITS) i++;
  return i;
}

/* Boundaries lie halfway between codebook values, and a tie goes to the lower code. */
static void encode_nf4(const float scaled[BLOCK], uint8_t packed[BLOCK / 2]) {
  int32_t code[BLOCK] = {0};
  for (int b = 0; b < 15; b++) {
    const float boundary = (NF4_CODEBOOK[b] + NF4_CODEBOOK[b + 1]) / 2;
    for (int i = 0; i < BLOCK; i++) code[i] += scaled[i] > boundary;
  }
  for (int j = 0; j < BLOCK / 2; j++) packed[j] = (uint8_t)(code[2 * j] << 4 | code[2 * j + 1]);
}

static float inverse(float absmax) { return 1.0f / (absmax > SMALLEST_SCALE ? absmax : SMALLEST_SCALE); }

static float nf4_full_block(const float *x, float absmax, uint8_t *codes) {
  float scaled[BLOCK];
  const float factor = inverse(absmax);
  for (int i = 0; i < BLOCK; i++) scaled[i] = x[i] * factor;
  encode_nf4(scaled, codes);
  return absmax;
}

/* A trailing partial block divides by its absmax, which is at least 1e-38: bitsandbytes' rule. */
static float nf4_partial_block(const float *x, int64_t n, float absmax, uint8_t *codes) {
  float scaled[BLOCK] = {0};
  uint8_t packed[BLOCK / 2];
  absmax = absmax > SMALLEST_SCALE ? absmax : SMALLEST_SCALE;
  for (int64_t i = 0; i < n; i++) scaled[i] = x[i] / absmax;
  encode_nf4(scaled, packed);
  memcpy(codes, packed, (size_t)((n + 1) / 2));
  return absmax;
}

int adrt_quantize_nf4(const float *x, int64_t n, uint8_t *codes, float *absmax, int64_t *bad) {
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t length = min_i64(BLOCK, n - start);
    const uint32_t largest = largest_magnitude(x + start, length);
    if (largest >= INFINITY_BITS) {
      *bad = start + first_not_finite(x + start);
      return ADRT_BAD_ARGUMENT;
    }
    absmax[start / BLOCK] = length == BLOCK
                                ? nf4_full_block(x + start, bits_float(largest), codes + start / 2)
                                : nf4_partial_block(x + start, length, bits_float(largest), codes + start / 2);
  }
  return ADRT_OK;
}

/* How many of the 255 boundaries of the dynamic map lie below v. */
static uint8_t encode_dynamic(float v) {
  int code = 0;
  for (int step = 128; step; step /= 2) {
    const int lower = code + step - 1;
    if ((DYNAMIC_MAP[lower] + DYNAMIC_MAP[lower + 1]) / 2 < v) code += step;
  }
  return (uint8_t)code;
}

int adrt_quantize_absmax(const float *absmax, int64_t n_blocks, float offset, uint8_t *q, float *nested) {
  for (int64_t start = 0; start < n_blocks; start += NESTED_BLOCK) {
    const int64_t length = min_i64(NESTED_BLOCK, n_blocks - start);
    float difference[NESTED_BLOCK];
    for (int64_t i = 0; i < length; i++) difference[i] = absmax[start + i] - offset;
    const float largest = bits_float(largest_magnitude(difference, length));
    const float factor = inverse(largest);
    for (int64_t i = 0; i < length; i++) q[start + i] = encode_dynamic(difference[i] * factor);
    nested[start / NESTED_BLOCK] = largest;
  }
  return ADRT_OK;
}

/* absmax / 127 rounded up to bfloat16, so that no code leaves ±127. */
static uint16_t int8_scale(float absmax) { return (uint16_t)((float_bits(absmax / 127.0f) + 0xffff) >> 16); }

static void int8_codes(const float *x, int64_t n, float scale, int8_t *codes) {
  for (int64_t i = 0; i < n; i++) codes[i] = (int8_t)(uint8_t)float_bits(x[i] / scale + ROUND_TO_INTEGER);
}

static void int8_block(const float *x, int64_t n, float absmax, int8_t *codes, uint16_t *scale) {
  *scale = int8_scale(absmax);
  const float divisor = bits_float((uint32_t)*scale << 16);
  if (divisor == 0)
    memset(codes, 0, (size_t)n);
  else if (n == BLOCK)
    int8_codes(x, BLOCK, divisor, codes); /* a fixed length, for the vectorizer */
  else
    int8_codes(x, n, divisor, codes);
}

int adrt_quantize_int8(const float *x, int64_t rows, int64_t cols, int8_t *codes, uint16_t *scales, int64_t *bad) {
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t col = 0; col < cols; col += BLOCK) {
      const int64_t start = row * cols + col, length = min_i64(BLOCK, cols - col);
      const uint32_t largest = largest_magnitude(x + start, length);
      if (largest >= INFINITY_BITS) {
        *bad = start + first_not_finite(x + start);
        return ADRT_BAD_ARGUMENT;
      }
      int8_block(x + start, length, bits_float(largest), codes + start, scales++);
    }
  }
  return ADRT_OK;
}
