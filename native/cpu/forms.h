/* nf4 and int8 as integers on x86: 16-bit words, and bytes where there are dot products of them. Included after
 * integer.h; the including file defines column_of_nf4. The integers are those of kernels_vnni.c.
 */
#ifndef CPU_FORMS_H
#define CPU_FORMS_H

enum {
  NF4_RANGE = 8191, /* of a word of weight, with 64 * 8191 * 4095 < 2^31 */
  WORD_RANGE = 4095,
  BYTE_RANGE = 127 /* of an activation */
};
static const float BYTE_SCALE = 124.11f, BYTE_ZERO = 124.16f; /* of a weight, which has no sign */

INLINE int column_of_nf4(int form, int i); /* the column whose weight unpacks to item i of a block */

INLINE int64_t x_bytes(int form) { return form == NF4_BYTES ? BLOCK : 2 * BLOCK; }
INLINE float x_range(int form) { return form == NF4_BYTES ? BYTE_RANGE : WORD_RANGE; }
INLINE float value_of_one(int form) {
  return form == NF4_BYTES ? 1.0f / BYTE_SCALE : form == NF4_WORDS ? 1.0f / (float)NF4_RANGE : 1.0f;
}

static inline int16_t nf4_word(int code) { return (int16_t)roundf(NF4_CODEBOOK[code] * (float)NF4_RANGE); }
static inline uint8_t nf4_byte(int code) { return (uint8_t)roundf(NF4_CODEBOOK[code] * BYTE_SCALE + BYTE_ZERO); }

INLINE int32_t store_block(int form, const int32_t q[BLOCK], uint8_t *out) {
  int16_t words[BLOCK];
  int32_t sum = 0;
  for (int i = 0; i < BLOCK; i++) words[i] = (int16_t)q[form == INT8_WORDS ? i : column_of_nf4(form, i)];
  if (form != NF4_BYTES) {
    memcpy(out, words, sizeof words);
    return 0;
  }
  for (int i = 0; i < BLOCK; i++) {
    out[i] = (uint8_t)words[i];
    sum += words[i];
  }
  return (int32_t)roundf(-BYTE_ZERO * (float)sum);
}

DEFINE_INTEGER(words_int8, INT8_WORDS)
DEFINE_INTEGER(words_nf4, NF4_WORDS)

static void quantize(const float *x, int64_t n, enum layout_of_x layout, float *out) {
  switch (layout) {
    case X_BYTES_SPLIT: quantize_as(NF4_BYTES, x, n, out); break;
    case X_WORDS_SPLIT: quantize_as(NF4_WORDS, x, n, out); break;
    default: quantize_as(INT8_WORDS, x, n, out);
  }
}

/* The slots of a kernel table that this file fills. */
#define WORDS_KERNELS .fast = {[ADRT_INT8] = words_int8, [ADRT_NF4] = words_nf4}, .quantize = quantize

#endif
