/* Kernels for AArch64 with the dot product of bytes (optional from Armv8.2, part of Armv8.4).
 *
 * A word w is the bytes 128 high + low, so a product of words is three of bytes, w x = 128 (128 wh xh + wh xl + wl xh),
 * without the least, wl xl. With both at 15 bits, a product is within 1e-4.
 */
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#include <pthread.h>

#include "kernels_neon.h"

typedef struct {
  int8x16_t high[4], low[4]; /* of bytes: only `high` */
} codes;
typedef int32x4_t ints;

#include "integer.h"

enum {
  WORD_RANGE = 127 * 128 + 63, /* whose high byte is at most 127 */
  BYTE_RANGE = 127
};

/* As in kernels_vnni.c, less 124, since here weights have a sign. */
static const float BYTE_SCALE = 124.11f, BYTE_ZERO = 0.16f;

static int8_t word_high[16], word_low[16], codebook_bytes[16];

static int8_t high_byte(int32_t word) { return (int8_t)((word + 64) >> 7); }
static int8_t low_byte(int32_t word) { return (int8_t)(word - 128 * high_byte(word)); }

static void fill_tables(void) {
  for (int i = 0; i < 16; i++) {
    int32_t word = (int32_t)roundf(NF4_CODEBOOK[i] * (float)WORD_RANGE);
    word_high[i] = high_byte(word);
    word_low[i] = low_byte(word);
    codebook_bytes[i] = (int8_t)roundf(NF4_CODEBOOK[i] * BYTE_SCALE + BYTE_ZERO);
  }
}

INLINE vec v_from_ints(ints v) { return vcvtq_f32_s32(v); }
INLINE int64_t x_bytes(int form) { return form == NF4_BYTES ? BLOCK : 2 * BLOCK; }
INLINE float x_range(int form) { return form == NF4_BYTES ? BYTE_RANGE : WORD_RANGE; }
INLINE float value_of_one(int form) {
  return form == NF4_BYTES ? 1.0f / BYTE_SCALE : form == NF4_WORDS ? 128.0f / (float)WORD_RANGE : 1.0f;
}

/* Of each 16 bytes the high nibbles, which come first, then the low ones. */
INLINE int column_of_nf4(int i) { return 2 * (i / 32 * 16 + i % 16) + i / 16 % 2; }

INLINE codes unpack(int form, const uint8_t *block) {
  codes c = {0};
  for (int i = 0; i < 4; i++) {
    if (form == INT8_WORDS) {
      c.high[i] = vld1q_s8((const int8_t *)block + 16 * i);
      continue;
    }
    uint8x16_t bytes = vld1q_u8(block + i / 2 * 16);
    uint8x16_t nibbles = i % 2 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
    c.high[i] = vqtbl1q_s8(vld1q_s8(form == NF4_BYTES ? codebook_bytes : word_high), nibbles);
    if (form == NF4_WORDS) c.low[i] = vqtbl1q_s8(vld1q_s8(word_low), nibbles);
  }
  return c;
}

INLINE ints dot(int form, codes w, const uint8_t *x, int32_t start) {
  int32x4_t sum = vsetq_lane_s32(start, vdupq_n_s32(0), 0), lower = vdupq_n_s32(0);
  for (int i = 0; i < 4; i++) {
    int8x16_t high = vld1q_s8((const int8_t *)x + 16 * i);
    sum = vdotq_s32(sum, w.high[i], high);
    if (form == NF4_BYTES) continue;
    lower = vdotq_s32(lower, w.high[i], vld1q_s8((const int8_t *)x + BLOCK + 16 * i));
    if (form == NF4_WORDS) lower = vdotq_s32(lower, w.low[i], high);
  }
  return form == NF4_BYTES ? sum : vaddq_s32(vshlq_n_s32(sum, 7), lower);
}

INLINE int32_t store_block(int form, const int32_t q[BLOCK], uint8_t *out) {
  int32_t sum = 0;
  for (int i = 0; i < BLOCK; i++) {
    int32_t x = q[form == INT8_WORDS ? i : column_of_nf4(i)];
    sum += (int8_t)x; /* of bytes, x; what is not finite may be anything */
    out[i] = (uint8_t)(form == NF4_BYTES ? x : high_byte(x));
    if (form != NF4_BYTES) out[BLOCK + i] = (uint8_t)low_byte(x);
  }
  return form == NF4_BYTES ? (int32_t)roundf(-BYTE_ZERO * (float)sum) : 0;
}

DEFINE_INTEGER(words_int8, INT8_WORDS)
DEFINE_INTEGER(words_nf4, NF4_WORDS)
DEFINE_INTEGER(bytes_nf4, NF4_BYTES)

static void quantize(const float *x, int64_t n, enum layout_of_x layout, float *out) {
  switch (layout) {
    case X_BYTES_SPLIT: quantize_as(NF4_BYTES, x, n, out); break;
    case X_WORDS_SPLIT: quantize_as(NF4_WORDS, x, n, out); break;
    default: quantize_as(INT8_WORDS, x, n, out);
  }
}

static bool has_dot_product(void) {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int32_t has = 0;
  size_t size = sizeof has;
  return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) && has;
#else
  return false;
#endif
}

static bool ready(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (!has_dot_product()) return false;
  pthread_once(&once, fill_tables);
  return true;
}

const kernels cpu_kernels_neon_dot = {
    .name = "neon_dot",
    .isa = ADRT_ISA_NEON_DOT,
    .ready = ready,
    .fast = {[ADRT_INT8] = words_int8, [ADRT_NF4] = words_nf4},
    .bytes = {[ADRT_NF4] = bytes_nf4},
    .quantize = quantize,
    COMMON_KERNELS,
};
