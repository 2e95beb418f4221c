/* Plain loops that each instruction set's file compiles for itself; the compiler vectorizes them. */
#ifndef CPU_ELEMENTWISE_H
#define CPU_ELEMENTWISE_H
#include <math.h>
#include <string.h>

#include "kernels.h"

enum { SUM_LANES = 16 };

/* e^x within 2 ulp for x in [-87, 88], clamped outside; branch-free so that loops over it vectorize. */
static inline float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float round_to_int = 12582912.0f; /* 1.5 * 2^23: adding it leaves the integer in the low bits */
  float shifted = x * 1.44269504f + round_to_int;
  float n = shifted - round_to_int;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
  float p = 1.9875691500e-4f;                          /* Cephes expf */
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

static inline float tanh_by_exp(float x) { return 1.0f - 2.0f / (exp_clamped(2.0f * x) + 1.0f); }

static inline float sum_lanes(const float lane[SUM_LANES]) {
  float half[SUM_LANES / 2];
  for (int i = 0; i < SUM_LANES / 2; i++) half[i] = lane[i] + lane[i + SUM_LANES / 2];
  return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

static void norm(const float *x, const float *weight, float eps, int64_t n, float *out) {
  float lane[SUM_LANES] = {0};
  int64_t i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) {
    for (int j = 0; j < SUM_LANES; j++) lane[j] += x[i + j] * x[i + j];
  }
  for (int j = 0; i < n; i++, j++) lane[j] += x[i] * x[i];
  float scale = 1.0f / sqrtf(sum_lanes(lane) / (float)n + eps);
  for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void gated(int mode, const float *gate, const float *up, int64_t n, float *out) {
  if (mode == ADRT_SILU) {
    for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exp_clamped(-gate[i])) * up[i];
  } else {
    for (int64_t i = 0; i < n; i++) {
      float x = gate[i], inner = 0.79788456f * (x + 0.044715f * x * x * x); /* sqrt(2 / pi) */
      out[i] = 0.5f * x * (1.0f + tanh_by_exp(inner)) * up[i];
    }
  }
}

static void scale(const float *x, float factor, float cap, int64_t n, float *out) {
  if (cap > 0) {
    for (int64_t i = 0; i < n; i++) out[i] = cap * tanh_by_exp(x[i] * factor / cap);
  } else {
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor;
  }
}

static inline float largest(const float *x, int64_t n) {
  float lane[SUM_LANES];
  for (int j = 0; j < SUM_LANES; j++) lane[j] = x[0];
  int64_t i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) {
    for (int j = 0; j < SUM_LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
  }
  for (; i < n; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
  for (int j = 1; j < SUM_LANES; j++) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
  return lane[0];
}

static void softmax(float *scores, int64_t n, float factor, float cap) {
  scale(scores, factor, cap, n, scores);
  float highest = largest(scores, n), lane[SUM_LANES] = {0};
  int64_t i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) {
    for (int j = 0; j < SUM_LANES; j++) lane[j] += scores[i + j] = exp_clamped(scores[i + j] - highest);
  }
  for (int j = 0; i < n; i++, j++) lane[j] += scores[i] = exp_clamped(scores[i] - highest);
  float inverse = 1.0f / sum_lanes(lane);
  for (i = 0; i < n; i++) scores[i] *= inverse;
}

static void split(const float *x, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += 32) {
    for (int j = 0; j < 16; j++) {
      out[i + j] = x[i + 2 * j];
      out[i + 16 + j] = x[i + 2 * j + 1];
    }
  }
}

#endif
