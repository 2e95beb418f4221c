/* Integer products for `fast` as rows by tokens, written once over the vectors of an instruction set. Included after
 * product.h, whose vectors and scales it uses.
 *
 * Activations and weights become integers small enough that a block's products are summed exactly in 32 bits; the sums
 * become float32, times the scales of weights and activations, onto the row's accumulator, block after block. So a
 * result is the same to the last bit for any number of tokens. Blocks are unpacked into registers; rows are read from
 * end to end, as they lie in memory, when a token or two are all that they meet.
 *
 * The including file defines two types before it, `codes`, an unpacked block of one row, and `ints`, LANES sums of 32
 * bits; and after it the functions that are only declared here.
 */
#ifndef CPU_INTEGER_H
#define CPU_INTEGER_H

enum form { NF4_WORDS, INT8_WORDS, NF4_BYTES }; /* what weights are multiplied as */

INLINE int dtype_of(int form) { return form == INT8_WORDS ? ADRT_INT8 : ADRT_NF4; }

INLINE codes unpack(int form, const uint8_t *block);
/* The products of a block with 64 activations, shared among the lanes; with `start` in one of them. */
INLINE ints dot(int form, codes w, const uint8_t *x, int32_t start);
INLINE vec v_from_ints(ints v);
INLINE int64_t x_bytes(int form);    /* in which a block of activations is stored */
INLINE float x_range(int form);      /* the largest activation as an integer */
INLINE float value_of_one(int form); /* what a weight of 1 stands for */
/* 64 activations in the order in which weights unpack; returns what their sums start from. */
INLINE int32_t store_block(int form, const int32_t q[BLOCK], uint8_t *out);

enum {
  ROWS_TOGETHER = 32,
  TOKENS_TOGETHER = 8, /* that a block in registers meets */
  CHUNK_BLOCKS = 16,   /* of activations, which stay in the L1 cache while all rows meet them */
  BYTES_AHEAD = 8192,  /* from where weights are fetched into L2: into L1 gave three fifths of the speed for int8 */
  ROWS_AHEAD = 2       /* the same where columns are cut into chunks */
};

/* A token's quantized activations are, block after block, the codes and what follows them: one pointer walks it all. */
typedef struct {
  float scale;
  int32_t start;
  int32_t padding[6]; /* codes stay aligned */
} after_codes;

INLINE int64_t x_block_bytes(int form) { return x_bytes(form) + (int64_t)sizeof(after_codes); }

/* 64 values as integers; returns their scale, NaN when one is not finite. */
static inline float round_block(const float *x, float limit, int32_t q[BLOCK]) {
  const float round_to_int = 12582912.0f; /* as in exp_clamped */
  const int32_t infinity = 0x7f800000, bits_of_rounded = 0x4b400000;
  int32_t bits[BLOCK], largest_bits = 0; /* without their signs, floats are ordered as their bits are */
  float range;
  memcpy(bits, x, sizeof bits);
  for (int i = 0; i < BLOCK; i++) {
    int32_t size = bits[i] & 0x7fffffff;
    largest_bits = size > largest_bits ? size : largest_bits;
  }
  memcpy(&range, &largest_bits, sizeof range);
  const float inverse = range > 1e-30f ? limit / range : 0.0f;
  for (int i = 0; i < BLOCK; i++) {
    float shifted = x[i] * inverse + round_to_int;
    memcpy(q + i, &shifted, sizeof shifted);
    q[i] -= bits_of_rounded;
  }
  return largest_bits < infinity ? range / limit : NAN;
}

INLINE void quantize_as(int form, const float *x, int64_t n, float *out) {
  uint8_t *to = (uint8_t *)out;
  for (int64_t b = 0; b < n / BLOCK; b++, x += BLOCK, to += x_block_bytes(form)) {
    int32_t q[BLOCK];
    after_codes after = {.scale = round_block(x, x_range(form), q) * value_of_one(form)};
    after.start = store_block(form, q, to);
    memcpy(to + x_bytes(form), &after, sizeof after);
  }
}

/* Some blocks of a row onto the accumulators of a few tokens, whose activations are `x_stride` bytes apart. */
INLINE void add_row(int form, int tokens, const uint8_t *block, const float *scales, int64_t blocks, const uint8_t *x,
                    int64_t x_stride, int64_t ahead, vec *acc) {
  vec sum[TOKENS_TOGETHER];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; t++) sum[t] = acc[t];
  for (int64_t b = 0; b < blocks; b++, block += block_bytes(dtype_of(form)), x += x_block_bytes(form)) {
    const codes w = unpack(form, block);
    const vec scale = v_set1(scales[b]);
    __builtin_prefetch(block + ahead, 0, 2);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
      const after_codes *after = (const void *)(x + t * x_stride + x_bytes(form));
      vec products = v_from_ints(dot(form, w, x + t * x_stride, after->start));
      sum[t] = v_fma(v_mul(products, v_set1(after->scale)), scale, sum[t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; t++) acc[t] = sum[t];
}

/* Rows whose scales are expanded, for a few tokens, in chunks of columns. */
INLINE void multiply_rows(const matrix *m, int form, int tokens, int64_t chunk, int64_t row0, int64_t n_rows,
                          const float *scales, const uint8_t *x, int64_t x_stride, float *y, int64_t y_stride) {
  const int dtype = dtype_of(form);
  const int64_t blocks = blocks_of(m), stride = row_bytes(dtype, m->cols);
  const int64_t ahead = chunk < blocks ? ROWS_AHEAD * stride : BYTES_AHEAD;
  vec acc[ROWS_TOGETHER][TOKENS_TOGETHER];
  for (int64_t r = 0; r < n_rows; r++)
    for (int t = 0; t < tokens; t++) acc[r][t] = v_zero();
  for (int64_t b = 0; b < blocks; b += chunk) {
    const int64_t n = blocks - b < chunk ? blocks - b : chunk;
    for (int64_t r = 0; r < n_rows; r++)
      add_row(form, tokens, m->data + (row0 + r) * stride + b * block_bytes(dtype), scales + r * blocks + b, n,
              x + b * x_block_bytes(form), x_stride, ahead, acc[r]);
  }
  for (int64_t r = 0; r < n_rows; r++)
    for (int t = 0; t < tokens; t++) y[t * y_stride + r] = v_sum(acc[r][t]);
}

INLINE void multiply_tokens(const matrix *m, int form, int64_t row0, int64_t n_rows, const float *scales,
                            const uint8_t *x, int64_t x_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  const int64_t chunk = n_tokens < 4 ? blocks_of(m) : CHUNK_BLOCKS;
  for (int64_t n; n_tokens; n_tokens -= n, x += n * x_stride, y += n * y_stride) {
    n = n_tokens >= 8 ? 8 : n_tokens >= 4 ? 4 : n_tokens >= 2 ? 2 : 1;
    switch (n) {
      case 8: multiply_rows(m, form, 8, chunk, row0, n_rows, scales, x, x_stride, y, y_stride); break;
      case 4: multiply_rows(m, form, 4, chunk, row0, n_rows, scales, x, x_stride, y, y_stride); break;
      case 2: multiply_rows(m, form, 2, chunk, row0, n_rows, scales, x, x_stride, y, y_stride); break;
      default: multiply_rows(m, form, 1, chunk, row0, n_rows, scales, x, x_stride, y, y_stride);
    }
  }
}

INLINE void integer_product(const matrix *m, int form, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride,
                            int64_t n_tokens, float *y, int64_t y_stride) {
  float scales[SCALES_AT_ONCE];
  int64_t at_once = rows_at_once(m, dtype_of(form), n_rows);
  if (at_once > ROWS_TOGETHER) at_once = ROWS_TOGETHER;
  for (int64_t r = 0; r < n_rows; r += at_once) {
    int64_t rows = n_rows - r < at_once ? n_rows - r : at_once;
    expand_scales(m, dtype_of(form), row0 + r, rows, scales);
    multiply_tokens(m, form, row0 + r, rows, scales, (const uint8_t *)x, 4 * x_stride, n_tokens, y + r, y_stride);
  }
}

#define DEFINE_INTEGER(name, form)                                                                  \
  static void name(const matrix *m, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride, \
                   int64_t n_tokens, float *y, int64_t y_stride) {                                  \
    integer_product(m, form, row0, n_rows, x, x_stride, n_tokens, y, y_stride);                     \
  }

#endif
