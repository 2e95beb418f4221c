/* nf4 and int8 multiplied as 16-bit words, for instruction sets without a dot product of bytes. Included after
 * integer.h; the including file defines column_of_nf4.
 *
 * vpmaddubsw multiplies bytes, but saturates at pairs of nf4's, and with signs moved from weights to activations so that
 * it does not, bytes take as many operations as words.
 */
#ifndef CPU_WORDS_H
#define CPU_WORDS_H

enum { NF4_RANGE = 8191, WORD_RANGE = 4095 }; /* 64 * 8191 * 4095 < 2^31 */

INLINE int column_of_nf4(int i); /* the column whose weight unpacks to word i of a block */

INLINE int64_t x_bytes(int form) { return (void)form, 2 * BLOCK; }
INLINE float x_range(int form) { return (void)form, WORD_RANGE; }
INLINE float value_of_one(int form) { return form == INT8_WORDS ? 1.0f : 1.0f / (float)NF4_RANGE; }

static inline int16_t nf4_word(int code) { return (int16_t)roundf(NF4_CODEBOOK[code] * (float)NF4_RANGE); }

INLINE int32_t store_block(int form, const int32_t q[BLOCK], uint8_t *out) {
  int16_t words[BLOCK];
  for (int i = 0; i < BLOCK; i++) words[i] = (int16_t)q[form == INT8_WORDS ? i : column_of_nf4(i)];
  memcpy(out, words, sizeof words);
  return 0;
}

DEFINE_INTEGER(words_int8, INT8_WORDS)
DEFINE_INTEGER(words_nf4, NF4_WORDS)

static void quantize_words(const float *x, int64_t n, enum layout_of_x layout, float *out) {
  if (layout == X_WORDS_SPLIT)
    quantize_as(NF4_WORDS, x, n, out);
  else
    quantize_as(INT8_WORDS, x, n, out);
}

/* The slots of a kernel table that this file fills. */
#define WORDS_KERNELS .fast = {[ADRT_INT8] = words_int8, [ADRT_NF4] = words_nf4}, .quantize = quantize_words

#endif
