/* Kernels for AVX-512 with VNNI and VBMI: integer products for the `fast` precision.
 *
 * Activations and codes are split into a high and a low byte, x = scale (hi + lo/256) with one scale a
 * 64-block and nf4 = (hi + lo/256) / 127, and the products hi hi, hi lo and lo hi are summed exactly: the
 * error of a product is about 5e-5 where one byte each would leave 7e-3. int8 weights are a high byte alone.
 *
 * vpdpbusd multiplies unsigned by signed bytes. Weights are the unsigned side, offset by 128; what the offset
 * adds, 128 * sum(x), is known when the activations are quantized and subtracted a row at a time.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <pthread.h>

#include "kernels.h"

static void lookup_absmax_bytes(const uint8_t *q, int64_t n, float *out);
#define LOOKUP_ABSMAX lookup_absmax_bytes
#include "kernels_avx512.h"

enum { PAIR = 2 * BLOCK };

/* Byte b of DYNAMIC_MAP's values, and the codebook times 127 as high and low bytes offset by 128. The
 * codebook is repeated 4 times: vpermb reads 6 bits of an index, so the other nibble in bits 4 and 5 needs no
 * mask. */
static uint8_t map_bytes[4][256], codebook_hi[64], codebook_lo[64];

static void fill_tables(void) {
  for (int i = 0; i < 256; i++)
    for (int b = 0; b < 4; b++) map_bytes[b][i] = ((const uint8_t *)DYNAMIC_MAP)[4 * i + b];
  for (int i = 0; i < 64; i++) {
    float scaled = NF4_CODEBOOK[i % 16] * 127.0f, high = roundf(scaled),
          low = roundf((scaled - high) * 256.0f);
    codebook_hi[i] = (uint8_t)(128 + (int)high);
    codebook_lo[i] = (uint8_t)(128 + (int)(low > 127.0f ? 127.0f : low));
  }
}

/* 64 values' byte b: 256 entries are two tables of 128, picked by the index's top bit. */
INLINE __m512i map_byte(int b, __m512i q, __mmask64 top) {
  const uint8_t *t = map_bytes[b];
  __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), q, _mm512_loadu_si512(t + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), q, _mm512_loadu_si512(t + 192));
  return _mm512_mask_blend_epi8(top, low, high);
}

/* 64 lookups at a time, byte by byte; the first permutation undoes what the unpacks do to the order. */
static void lookup_absmax_bytes(const uint8_t *q, int64_t n, float *out) {
  const __m512i transpose = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (int64_t i = 0; i < n; i += 64) {
    int64_t left = n - i < 64 ? n - i : 64;
    __mmask64 present = left == 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
    __m512i codes = _mm512_permutexvar_epi32(transpose, _mm512_maskz_loadu_epi8(present, q + i));
    __mmask64 top = _mm512_movepi8_mask(codes);
    __m512i b0 = map_byte(0, codes, top), b1 = map_byte(1, codes, top);
    __m512i b2 = map_byte(2, codes, top), b3 = map_byte(3, codes, top);
    __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    __m512i values[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                         _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    for (int j = 0; j < 4; j++)
      _mm512_mask_storeu_epi32(out + i + 16 * j, (__mmask16)(present >> 16 * j), values[j]);
  }
}

/* One token's quantized activations, in the order of the layout (X_INT8 or X_INT8_SPLIT). */
typedef struct {
  const int8_t *hi, *lo; /* [cols] */
  const float *scale;    /* [blocks]: of hi * 256 + lo, with the 1/127 of nf4 */
  const float *offset;   /* [blocks]: what the weights' +128 adds, negated */
} int8_x;

static inline int8_x int8_view(const float *x, int64_t cols) {
  const int8_t *bytes = (const int8_t *)(const void *)x;
  const float *scale = (const float *)(const void *)(bytes + 2 * cols);
  return (int8_x){bytes, bytes + cols, scale, scale + cols / BLOCK};
}

/* 64 values to bytes; returns the scale, NaN when a value is not finite, and the sums of both bytes. */
static float quantize_block(const float *x, int8_t *hi, int8_t *lo, int32_t *sum_hi, int32_t *sum_lo) {
  __m512 v[4], largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v[i]));
    poison = _mm512_fmadd_ps(v[i], _mm512_setzero_ps(), poison); /* infinity * 0 is NaN */
  }
  float range = _mm512_reduce_max_ps(largest), inverse = range > 1e-30f ? 127.0f / range : 0.0f;
  __m512i his = _mm512_setzero_si512(), los = _mm512_setzero_si512();
  for (int i = 0; i < 4; i++) {
    __m512 scaled = _mm512_mul_ps(v[i], _mm512_set1_ps(inverse));
    __m512i high = _mm512_cvtps_epi32(scaled);
    __m512 rest = _mm512_mul_ps(_mm512_sub_ps(scaled, _mm512_cvtepi32_ps(high)), _mm512_set1_ps(256.0f));
    __m512i low = _mm512_min_epi32(_mm512_cvtps_epi32(rest), _mm512_set1_epi32(127));
    _mm_storeu_si128((__m128i *)(void *)(hi + 16 * i), _mm512_cvtsepi32_epi8(high));
    _mm_storeu_si128((__m128i *)(void *)(lo + 16 * i), _mm512_cvtsepi32_epi8(low));
    his = _mm512_add_epi32(his, high);
    los = _mm512_add_epi32(los, low);
  }
  *sum_hi = _mm512_reduce_add_epi32(his);
  *sum_lo = _mm512_reduce_add_epi32(los);
  return range / 127.0f + _mm512_reduce_add_ps(poison);
}

/* Each 128 bytes to 64 even-numbered ones, then 64 odd-numbered ones. */
static void split_bytes(int8_t *bytes, int64_t n) {
  int8_t index[2][64];
  for (int i = 0; i < 64; i++) index[0][i] = (int8_t)(2 * i), index[1][i] = (int8_t)(2 * i + 1);
  __m512i even = _mm512_loadu_si512(index[0]), odd = _mm512_loadu_si512(index[1]);
  for (int64_t i = 0; i < n; i += PAIR) {
    __m512i a = _mm512_loadu_si512(bytes + i), b = _mm512_loadu_si512(bytes + i + BLOCK);
    _mm512_storeu_si512(bytes + i, _mm512_permutex2var_epi8(a, even, b));
    _mm512_storeu_si512(bytes + i + BLOCK, _mm512_permutex2var_epi8(a, odd, b));
  }
}

static void quantize(const float *x, int64_t n, bool split, float *out) {
  int8_t *hi = (int8_t *)(void *)out, *lo = hi + n;
  float *scales = (float *)(void *)(lo + n), *offsets = scales + n / BLOCK;
  for (int64_t b = 0; b < n / BLOCK; b++) {
    int32_t sum_hi, sum_lo;
    float unit = quantize_block(x + b * BLOCK, hi + b * BLOCK, lo + b * BLOCK, &sum_hi, &sum_lo) / 256.0f;
    scales[b] = split ? unit / 127.0f : unit;
    offsets[b] = scales[b] * -128.0f * (float)(256 * sum_hi + sum_lo + (split ? sum_hi : 0));
  }
  if (split) {
    split_bytes(hi, n);
    split_bytes(lo, n);
  }
}

/* scale[0] in the lanes of the first block of a pair, scale[1] in those of the second. */
INLINE __m512 pair_scale(const float *scale) {
  const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(lanes,
                               _mm512_castsi512_ps(_mm512_set1_epi64(*(const int64_t *)(const void *)scale)));
}

INLINE __m512 weighted(__m512i high, __m512i middle, __m512 scale, __m512 acc) {
  __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), middle);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

/* Sum of a[i] * b[i], the offsets' share of a row. */
INLINE float dot_blocks(const float *a, const float *b, int64_t n) {
  __m512 acc = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 mask = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff;
    acc = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i), acc);
  }
  return _mm512_reduce_add_ps(acc);
}

typedef struct {
  __m512i hi, lo;
} tables;

INLINE void add_pair(const tables *book, int tokens, const uint8_t *codes, const float *absmax,
                     const int8_x *x, int64_t column, __m512 acc[4]) {
  __m512i odd = _mm512_loadu_si512(codes), even = _mm512_srli_epi16(odd, 4), zero = _mm512_setzero_si512();
  __m512i even_hi = _mm512_permutexvar_epi8(even, book->hi),
          even_lo = _mm512_permutexvar_epi8(even, book->lo);
  __m512i odd_hi = _mm512_permutexvar_epi8(odd, book->hi), odd_lo = _mm512_permutexvar_epi8(odd, book->lo);
  __m512 weight_scale = pair_scale(absmax);
#pragma GCC unroll 4
  for (int t = 0; t < tokens; t++) {
    __m512i x_even = _mm512_loadu_si512(x[t].hi + column),
            x_odd = _mm512_loadu_si512(x[t].hi + column + BLOCK);
    __m512i low_even = _mm512_loadu_si512(x[t].lo + column),
            low_odd = _mm512_loadu_si512(x[t].lo + column + BLOCK);
    __m512i high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even_hi, x_even), odd_hi, x_odd);
    __m512i middle = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even_hi, low_even), odd_hi, low_odd);
    __m512i other = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(middle, even_lo, x_even), odd_lo, x_odd);
    /* one token: its scales are in those of the weights already */
    __m512 scale =
        tokens == 1 ? weight_scale : _mm512_mul_ps(weight_scale, pair_scale(x[t].scale + column / BLOCK));
    acc[t] = weighted(high, other, scale, acc[t]);
  }
}

/* `scales` are the row's, [blocks]; with one token, times the token's. */
INLINE void nf4_tile(const matrix *m, const tables *book, int tokens, int64_t row, const float *scales,
                     const int8_x *x, float *y, int64_t y_stride) {
  int64_t blocks = blocks_of(m);
  const uint8_t *codes = m->data + row * m->cols / 2;
  __m512 acc[4];
  for (int t = 0; t < tokens; t++) acc[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b += 2, codes += BLOCK) {
    if (tokens == 1) _mm_prefetch((const char *)codes + PREFETCH_BYTES, _MM_HINT_T0);
    add_pair(book, tokens, codes, scales + b, x, b * BLOCK, acc);
  }
  for (int t = 0; t < tokens; t++) y[t * y_stride] += _mm512_reduce_add_ps(acc[t]);
}

INLINE void int8_tile(const matrix *m, int tokens, int64_t row, const float *scales, const int8_x *x,
                      float *y, int64_t y_stride) {
  int64_t blocks = blocks_of(m);
  const uint8_t *codes = m->data + row * m->cols;
  const __m512i zero = _mm512_setzero_si512(), flip = _mm512_set1_epi8((char)0x80);
  __m512 acc[4];
  for (int t = 0; t < tokens; t++) acc[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b++, codes += BLOCK) {
    if (tokens == 1) _mm_prefetch((const char *)codes + PREFETCH_BYTES, _MM_HINT_T0);
    __m512i w = _mm512_xor_si512(_mm512_loadu_si512(codes), flip);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
      __m512i high = _mm512_dpbusd_epi32(zero, w, _mm512_loadu_si512(x[t].hi + b * BLOCK));
      __m512i low = _mm512_dpbusd_epi32(zero, w, _mm512_loadu_si512(x[t].lo + b * BLOCK));
      float scale = tokens == 1 ? scales[b] : scales[b] * x[t].scale[b];
      acc[t] = weighted(high, low, _mm512_set1_ps(scale), acc[t]);
    }
  }
  for (int t = 0; t < tokens; t++) y[t * y_stride] += _mm512_reduce_add_ps(acc[t]);
}

/* y starts as the offsets' share; with one token, the weights' scales then take in the token's. */
INLINE void begin_rows(const matrix *m, int tokens, int64_t rows, float *scales, const int8_x *x, float *y,
                       int64_t y_stride) {
  int64_t blocks = blocks_of(m);
  for (int64_t r = 0; r < rows; r++) {
    float *of_row = scales + r * blocks;
    for (int t = 0; t < tokens; t++) y[t * y_stride + r] = dot_blocks(of_row, x[t].offset, blocks);
    for (int64_t b = 0; tokens == 1 && b < blocks; b++) of_row[b] *= x[0].scale[b];
  }
}

INLINE void int8_rows(const matrix *m, int dtype, const tables *book, int tokens, int64_t row0, int64_t rows,
                      float *scales, const float *x, int64_t x_stride, float *y, int64_t y_stride) {
  int8_x views[4];
  int64_t blocks = blocks_of(m);
  for (int t = 0; t < tokens; t++) views[t] = int8_view(x + t * x_stride, m->cols);
  begin_rows(m, tokens, rows, scales, views, y, y_stride);
  for (int64_t r = 0; r < rows; r++) {
    if (dtype == ADRT_NF4)
      nf4_tile(m, book, tokens, row0 + r, scales + r * blocks, views, y + r, y_stride);
    else
      int8_tile(m, tokens, row0 + r, scales + r * blocks, views, y + r, y_stride);
  }
}

INLINE void int8_product(const matrix *m, int dtype, int64_t row0, int64_t n_rows, const float *x,
                         int64_t x_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  float scales[SCALES_AT_ONCE];
  const tables book = {_mm512_loadu_si512(codebook_hi), _mm512_loadu_si512(codebook_lo)};
  int64_t at_once = rows_at_once(m, dtype, n_rows);
  for (int64_t r = 0; r < n_rows; r += at_once) {
    int64_t rows = n_rows - r < at_once ? n_rows - r : at_once, t = 0;
    expand_scales(m, dtype, row0 + r, rows, scales);
    for (; t + 4 <= n_tokens; t += 4)
      int8_rows(m, dtype, &book, 4, row0 + r, rows, scales, x + t * x_stride, x_stride, y + t * y_stride + r,
                y_stride);
    for (; t + 2 <= n_tokens; t += 2)
      int8_rows(m, dtype, &book, 2, row0 + r, rows, scales, x + t * x_stride, x_stride, y + t * y_stride + r,
                y_stride);
    if (t < n_tokens) /* the last: it overwrites the scales */
      int8_rows(m, dtype, &book, 1, row0 + r, rows, scales, x + t * x_stride, x_stride, y + t * y_stride + r,
                y_stride);
  }
}

#define DEFINE_FAST(name, dtype)                                                                    \
  static void name(const matrix *m, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride, \
                   int64_t n_tokens, float *y, int64_t y_stride) {                                  \
    int8_product(m, dtype, row0, n_rows, x, x_stride, n_tokens, y, y_stride);                       \
  }
DEFINE_FAST(fast_int8, ADRT_INT8)
DEFINE_FAST(fast_nf4, ADRT_NF4)

static bool ready(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (!has_avx512() || !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi"))
    return false;
  pthread_once(&once, fill_tables);
  return true;
}

const kernels cpu_kernels_vnni = {
    .name = "avx512_vnni",
    .isa = ADRT_ISA_AVX512_VNNI,
    .ready = ready,
    .fast = {[ADRT_INT8] = fast_int8, [ADRT_NF4] = fast_nf4},
    .quantize = quantize,
    COMMON_KERNELS,
};
#else
typedef int not_for_this_cpu;
#endif
