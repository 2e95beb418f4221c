/* The vectors of NEON on AArch64, for the tables with and without its dot product. */
#ifndef CPU_KERNELS_NEON_H
#define CPU_KERNELS_NEON_H
#include <arm_neon.h>

#include "elementwise.h"
#include "quant_tables.h"

enum { LANES = 4, TILE_ROWS = 2 };
typedef float32x4_t vec;

static inline vec v_zero(void) { return vdupq_n_f32(0); }
static inline vec v_set1(float x) { return vdupq_n_f32(x); }
static inline vec v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, vec v) { vst1q_f32(p, v); }
static inline vec v_mul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec v_add(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline float v_sum(vec v) { return vaddvq_f32(v); }

static inline vec v_items(int dtype, const uint8_t *items) {
  if (dtype == ADRT_F32) return vld1q_f32((const float *)(const void *)items);
  uint16x4_t half = vld1_u16((const uint16_t *)(const void *)items);
  if (dtype == ADRT_F16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

/* Four of the values of 16 codes: each of a value's bytes is looked up for all 16. The calls for the other four differ
 * in the last step only, and the compiler shares the rest. */
static inline vec nf4_lookup(uint8x16_t codes, int four) {
  const uint8x16x4_t table = vld4q_u8((const uint8_t *)NF4_CODEBOOK); /* byte b of each value */
  uint8x16_t byte[4];
  for (int b = 0; b < 4; b++) byte[b] = vqtbl1q_u8(table.val[b], codes);
  uint8x16x2_t low = vzipq_u8(byte[0], byte[1]), high = vzipq_u8(byte[2], byte[3]);
  uint16x8x2_t values = vzipq_u16(vreinterpretq_u16_u8(low.val[four / 2]), vreinterpretq_u16_u8(high.val[four / 2]));
  return vreinterpretq_f32_u16(values.val[four % 2]);
}

static inline vec v_weights(int dtype, const uint8_t *block, int i) {
  if (dtype == ADRT_NF4) { /* of each 16 bytes: 16 high nibbles in four vecs, then 16 low ones */
    uint8x16_t bytes = vld1q_u8(block + i / 8 * 16);
    return nf4_lookup(i % 8 < 4 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)), i % 4);
  }
  if (dtype == ADRT_INT8) {
    int16x8_t eight = vmovl_s8(vld1_s8((const int8_t *)block + i / 2 * 8));
    return vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(eight) : vget_low_s16(eight)));
  }
  return v_items(dtype, block + i * LANES * (dtype == ADRT_F32 ? 4 : 2));
}

#include "product.h"

#endif
