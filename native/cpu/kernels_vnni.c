/* Kernels for AVX-512 with VNNI and VBMI: integer products for the `fast` precision.
 *
 * Activations and weights become integers small enough that a block of 64 products is summed exactly in 32 bits,
 * then scaled by the block's absmax. As 16-bit words their error is 1e-4 of a product; as bytes 6e-3, at twice the
 * speed, which is what the layers take that an error hurts least (choose_product in load.c, spec/performance.md).
 *
 * One algorithm for one token and for thousands, so that `fast` too gives the same bits for any batch. A panel is
 * 16 rows; some of its columns are unpacked, two columns of a row in each 32-bit lane, and multiplied with one
 * tile of tokens after the other from the L1 cache. Weights are fetched in the order of memory, by prefetches
 * one pair of panels ahead, so that DRAM sees one long stream although the rows of a panel are read together.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <pthread.h>

#include "kernels.h"

static void lookup_absmax_bytes(const uint8_t *q, int64_t n, float *out);
#define LOOKUP_ABSMAX lookup_absmax_bytes
#include "kernels_avx512.h"

enum {
  CHUNK = 128,      /* vectors of a panel unpacked together: 16 KiB for a pair of panels */
  TILE_TOKENS = 12, /* with 2 panels: 24 of 32 vector registers are sums */
  TOKENS_AT_ONCE = 128,
  DIRECT_TOKENS = 8, /* at most so many are multiplied from registers */
  NF4_RANGE = 8191, /* of a word of weight, with 64 * 8191 * 4095 < 2^31 */
  WORD_RANGE = 4095,
  BYTE_RANGE = 127 /* of an activation */
};

/* What weights are multiplied as. */
enum form { NF4_WORDS, NF4_BYTES, INT8_WORDS };

INLINE int dtype_of(int form) { return form == INT8_WORDS ? ADRT_INT8 : ADRT_NF4; }
INLINE int code_bytes(int form) { return form == NF4_BYTES ? 1 : 2; }
INLINE int block_vectors(int form) { return BLOCK * code_bytes(form) / 4; }
INLINE int chunk_blocks(int form) { return CHUNK / block_vectors(form); }

/* vpdpbusd takes weights without a sign. Of all byte codes (value + BYTE_ZERO / BYTE_SCALE) * BYTE_SCALE these two
 * put the codebook nearest to whole numbers: 3.3e-3 of error for normal weights instead of 5.9e-3 with 127. */
static const float BYTE_SCALE = 124.11f, BYTE_ZERO = 124.16f;

/* Byte b of DYNAMIC_MAP's values, and the codebook as words and as bytes, repeated: vpermw reads 5 bits of an
 * index and vpermb 6, so the next nibble's lowest bits need no mask. */
static uint8_t map_bytes[4][256];
static int16_t codebook_words[32];
static uint8_t codebook_bytes[64];

static void fill_tables(void) {
  for (int i = 0; i < 256; i++)
    for (int b = 0; b < 4; b++) map_bytes[b][i] = ((const uint8_t *)DYNAMIC_MAP)[4 * i + b];
  for (int i = 0; i < 32; i++) codebook_words[i] = (int16_t)roundf(NF4_CODEBOOK[i % 16] * (float)NF4_RANGE);
  for (int i = 0; i < 64; i++) codebook_bytes[i] = (uint8_t)roundf(NF4_CODEBOOK[i % 16] * BYTE_SCALE + BYTE_ZERO);
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

/* Quantized activations: of each token the codes, then a scale for each block, then, of bytes, what a block's sum
 * starts from: the share of the weights' BYTE_ZERO. */
typedef struct {
  const uint8_t *codes; /* [cols], in the order in which weights unpack */
  const float *scales;  /* [blocks], with the codebook's for nf4 */
  const int32_t *starts;
  int64_t stride; /* floats from token to token */
} quantized;

static inline quantized view(int form, const float *x, int64_t stride, int64_t cols) {
  const float *scales = x + cols * code_bytes(form) / 4;
  return (quantized){(const uint8_t *)x, scales, (const int32_t *)(const void *)(scales + cols / BLOCK), stride};
}

INLINE quantized move(int form, quantized x, int64_t tokens, int64_t blocks) {
  int64_t items = tokens * x.stride + blocks;
  return (quantized){x.codes + 4 * tokens * x.stride + blocks * BLOCK * code_bytes(form), x.scales + items,
                     x.starts + items, x.stride};
}

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

/* The order in which unpack_codes leaves words: nf4 (`split`) in eights, int8 in fours. */
static __m512i order_of_words(bool split) {
  static const int8_t order[2][8] = {{0, 2, 1, 3, 4, 6, 5, 7}, {1, 5, 0, 4, 3, 7, 2, 6}};
  int16_t index[32];
  for (int i = 0; i < 32; i++) index[i] = (int16_t)(i / 8 * 8 + order[split][i % 8]);
  return _mm512_loadu_si512(index);
}

static void quantize_words(const float *x, int64_t n, bool split, float *out) {
  int16_t *codes = (int16_t *)(void *)out;
  float *scales = out + n / 2;
  const __m512i order = order_of_words(split);
  for (int64_t b = 0; b < n / BLOCK; b++, codes += BLOCK) {
    __m512i code[4];
    float scale = quantize_block(x + b * BLOCK, WORD_RANGE, code);
    scales[b] = split ? scale / (float)NF4_RANGE : scale;
    for (int i = 0; i < 2; i++) {
      __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(code[2 * i]));
      __m512i words = _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(code[2 * i + 1]), 1);
      _mm512_storeu_si512(codes + 32 * i, _mm512_permutexvar_epi16(order, words));
    }
  }
}

/* Bytes in the order in which unpack_codes leaves them: of eight columns the even ones, then the odd ones. */
static void quantize_bytes(const float *x, int64_t n, float *out) {
  int8_t *codes = (int8_t *)(void *)out, index[BLOCK];
  float *scales = out + n / 4;
  int32_t *starts = (int32_t *)(void *)(scales + n / BLOCK);
  for (int i = 0; i < BLOCK; i++) index[i] = (int8_t)(i / 8 * 8 + i % 4 * 2 + i / 4 % 2);
  const __m512i order = _mm512_loadu_si512(index);
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

static void quantize_wide(const float *x, int64_t n, float *out);

static void quantize(const float *x, int64_t n, enum layout_of_x layout, float *out) {
  if (layout == X_BYTES_SPLIT)
    quantize_bytes(x, n, out);
  else if (layout == X_WIDE)
    quantize_wide(x, n, out);
  else
    quantize_words(x, n, layout == X_WORDS_SPLIT, out);
}

/* Some columns of up to two panels, ready to be multiplied: lane r holds two words or four bytes of row r. */
typedef struct {
  __m512i codes[CHUNK][2];
  __m512 scales[CHUNK][2]; /* as many as blocks */
} unpacked;

INLINE __m128i piece(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }

/* out[c] = the 32-bit item c of 16 rows, c < 4. */
INLINE void transpose(const uint8_t *rows, int64_t stride, __m512i out[4]) {
  __m512i v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) { /* lanes of 128 bits: rows i, i + 4, i + 8, i + 12 */
    const uint8_t *row = rows + i * stride;
    v[i] = _mm512_castsi128_si512(piece(row));
    v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x00f0, piece(row + 4 * stride));
    v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x0f00, piece(row + 8 * stride));
    v[i] = _mm512_mask_broadcast_i32x4(v[i], 0xf000, piece(row + 12 * stride));
  }
  __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
  __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  out[2] = _mm512_unpacklo_epi64(high01, high23);
  out[3] = _mm512_unpackhi_epi64(high01, high23);
}

/* Vectors that 16 bytes of each row unpack to. */
INLINE int piece_vectors(int form) { return form == NF4_WORDS ? 16 : 8; }

/* 16 bytes of each row of a panel; `ahead` is memory that will be wanted. */
INLINE void unpack_piece(int form, const uint8_t *rows, int64_t stride, const uint8_t *ahead, __m512i *out) {
  const __m512i words = _mm512_loadu_si512(codebook_words), bytes = _mm512_loadu_si512(codebook_bytes);
  __m512i column[4];
  transpose(rows, stride, column);
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    _mm_prefetch((const char *)ahead + 64 * c, _MM_HINT_T1);
    if (form == NF4_WORDS) {
#pragma GCC unroll 4
      for (int nibble = 0; nibble < 4; nibble++)
        out[4 * c + nibble] = _mm512_permutexvar_epi16(_mm512_srli_epi16(column[c], 4 * nibble), words);
    } else if (form == NF4_BYTES) {
      out[2 * c] = _mm512_permutexvar_epi8(_mm512_srli_epi16(column[c], 4), bytes);
      out[2 * c + 1] = _mm512_permutexvar_epi8(column[c], bytes);
    } else {
      out[2 * c] = _mm512_srai_epi16(_mm512_slli_epi16(column[c], 8), 8);
      out[2 * c + 1] = _mm512_srai_epi16(column[c], 8);
    }
  }
}

INLINE void unpack_codes(int form, const uint8_t *rows, int64_t stride, int64_t bytes, const uint8_t *ahead,
                         __m512i (*out)[2]) {
  for (int64_t i = 0; i < bytes; i += 16, ahead += 16 * PANEL) {
    __m512i codes[16];
    unpack_piece(form, rows + i, stride, ahead, codes);
#pragma GCC unroll 16
    for (int j = 0; j < piece_vectors(form); j++) (*out++)[0] = codes[j];
  }
}

/* `scales` are the panel's, [16][row_blocks], from the first wanted block on, and may be read 3 beyond the last. */
INLINE void unpack_scales(const float *scales, int64_t row_blocks, int64_t blocks, __m512 (*out)[2]) {
  for (int64_t b = 0; b < blocks; b += 4) {
    __m512i column[4];
    transpose((const uint8_t *)(scales + b), row_blocks * 4, column);
    for (int c = 0; c < 4 && b + c < blocks; c++) out[b + c][0] = _mm512_castsi512_ps(column[c]);
  }
}

/* sum += products of a lane's words or bytes. GCC copies the sums of a loop over the intrinsic to and fro, which
 * halves its speed. */
INLINE void add_products(int form, __m512i *sum, __m512i weights, __m512i x) {
  if (form == NF4_BYTES)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(weights), "v"(x));
  else
    __asm__("vpdpwssd %2, %1, %0" : "+v"(*sum) : "v"(weights), "v"(x));
}

/* The same with one lane's activations, in memory, for all lanes. */
INLINE void add_products_of_one(int form, __m512i *sum, __m512i weights, const uint8_t *x) {
  const uint8_t(*one)[4] = (const uint8_t(*)[4])x;
  if (form == NF4_BYTES)
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(weights), "m"(*one));
  else
    __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(weights), "m"(*one));
}

INLINE __m512i start_of_sum(int form, quantized x, int t) {
  return form == NF4_BYTES ? _mm512_set1_epi32(x.starts[t * x.stride]) : _mm512_setzero_si512();
}

/* sums[t][panel] += the chunk's share of the products, a block at a time. */
INLINE void add_tile(int form, const unpacked *w, int panels, int tokens, int64_t blocks, quantized x,
                     __m512 (*sums)[2]) {
  for (int64_t b = 0; b < blocks; b++, x = move(form, x, 0, 1)) {
    __m512i sum[TILE_TOKENS][2];
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = start_of_sum(form, x, t);
#pragma GCC unroll 2
    for (int k = 0; k < block_vectors(form); k++) {
      const __m512i *codes = w->codes[b * block_vectors(form) + k];
#pragma GCC unroll 12
      for (int t = 0; t < tokens; t++) {
        int32_t one;
        memcpy(&one, x.codes + 4 * t * x.stride + 4 * k, 4);
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) add_products(form, &sum[t][p], codes[p], _mm512_set1_epi32(one));
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++) {
      __asm__("" ::: "memory"); /* or GCC loads all that is scaled at once and spills the sums */
      __m512 scale = _mm512_set1_ps(x.scales[t * x.stride]);
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++)
        sums[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][p]), _mm512_mul_ps(w->scales[b][p], scale),
                                     sums[t][p]);
    }
  }
}

/* A chunk for all tokens; x starts at it. */
INLINE void add_chunk(int form, const unpacked *w, int panels, int64_t blocks, quantized x, int64_t n_tokens,
                      __m512 (*sums)[2]) {
  for (int64_t n; n_tokens; n_tokens -= n, sums += n, x = move(form, x, n, 0)) {
    n = n_tokens >= 12 ? 12 : n_tokens >= 8 ? 8 : n_tokens >= 4 ? 4 : n_tokens >= 2 ? 2 : 1;
    switch (n) {
      case 12: add_tile(form, w, panels, 12, blocks, x, sums); break;
      case 8: add_tile(form, w, panels, 8, blocks, x, sums); break;
      case 4: add_tile(form, w, panels, 4, blocks, x, sums); break;
      case 2: add_tile(form, w, panels, 2, blocks, x, sums); break;
      default: add_tile(form, w, panels, 1, blocks, x, sums);
    }
  }
}

/* Scales of up to two panels, [panel][16][blocks]. */
typedef struct {
  int64_t first[2]; /* row of each panel; the last panel of a matrix may overlap the one before it */
  float scales[2][PANEL * SCALES_AT_ONCE + 4];
} panel_pair;

/* A block of one panel against few tokens, from registers; several sums a token when one would wait for itself. */
INLINE void add_block_directly(int form, int tokens, const uint8_t *rows, int64_t stride, const uint8_t *ahead,
                               __m512 weight_scale, quantized x, __m512 *sums) {
  const int split = tokens == 1 ? 4 : tokens == 2 ? 2 : 1, vectors = piece_vectors(form);
  __m512i sum[DIRECT_TOKENS][4];
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < split; i++) sum[t][i] = i ? _mm512_setzero_si512() : start_of_sum(form, x, t);
  for (int64_t i = 0; i < block_bytes(dtype_of(form)); i += 16, ahead += 16 * PANEL, x.codes += 4 * vectors) {
    __m512i codes[16];
    unpack_piece(form, rows + i, stride, ahead, codes);
#pragma GCC unroll 16
    for (int k = 0; k < vectors; k++) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens; t++)
        add_products_of_one(form, &sum[t][k % split], codes[k], x.codes + 4 * t * x.stride + 4 * k);
    }
  }
  for (int t = 0; t < tokens; t++) {
    for (int i = 1; i < split; i++) sum[t][0] = _mm512_add_epi32(sum[t][0], sum[t][i]);
    __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(x.scales[t * x.stride]));
    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][0]), scale, sums[t]);
  }
}

INLINE void multiply_directly(const matrix *m, int form, int64_t row, const float *scales, int tokens, quantized x,
                              __m512 (*sums)[2]) {
  int64_t blocks = blocks_of(m), stride = row_bytes(m->dtype, m->cols), size = block_bytes(m->dtype);
  const uint8_t *rows = m->data + row * stride;
  __m512 sum[DIRECT_TOKENS];
  for (int t = 0; t < tokens; t++) sum[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b += 4) {
    __m512i scale[4];
    transpose((const uint8_t *)(scales + b), blocks * 4, scale);
    for (int i = 0; i < 4 && b + i < blocks; i++, rows += size, x = move(form, x, 0, 1))
      add_block_directly(form, tokens, rows, stride, rows + (b + i) * size * (PANEL - 1) + PANEL * stride,
                         _mm512_castsi512_ps(scale[i]), x, sum);
  }
  for (int t = 0; t < tokens; t++) sums[t][0] = sum[t];
}

INLINE void multiply_few(const matrix *m, int form, const panel_pair *pair, int panels, quantized x, int64_t n,
                         __m512 (*sums)[2]) {
  for (int p = 0; p < panels; p++) {
    __m512(*out)[2] = (__m512(*)[2])&sums[0][p];
    switch (n) {
      case 1: multiply_directly(m, form, pair->first[p], pair->scales[p], 1, x, out); break;
      case 2: multiply_directly(m, form, pair->first[p], pair->scales[p], 2, x, out); break;
      case 3: multiply_directly(m, form, pair->first[p], pair->scales[p], 3, x, out); break;
      case 4: multiply_directly(m, form, pair->first[p], pair->scales[p], 4, x, out); break;
      case 5: multiply_directly(m, form, pair->first[p], pair->scales[p], 5, x, out); break;
      case 6: multiply_directly(m, form, pair->first[p], pair->scales[p], 6, x, out); break;
      case 7: multiply_directly(m, form, pair->first[p], pair->scales[p], 7, x, out); break;
      default: multiply_directly(m, form, pair->first[p], pair->scales[p], 8, x, out);
    }
  }
}

INLINE void multiply_many(const matrix *m, int form, const panel_pair *pair, int panels, quantized x,
                          int64_t n_tokens, __m512 (*sums)[2]) {
  unpacked w;
  int64_t blocks = blocks_of(m), stride = row_bytes(dtype_of(form), m->cols);
  memset(sums, 0, (size_t)n_tokens * sizeof *sums);
  for (int64_t b = 0; b < blocks; b += chunk_blocks(form)) {
    int64_t n = blocks - b < chunk_blocks(form) ? blocks - b : chunk_blocks(form);
    int64_t from = b * block_bytes(dtype_of(form)), bytes = n * block_bytes(dtype_of(form));
    for (int p = 0; p < panels; p++) {
      const uint8_t *rows = m->data + pair->first[p] * stride;
      unpack_codes(form, rows + from, stride, bytes, rows + (2 * stride + from) * PANEL,
                   (__m512i(*)[2])&w.codes[0][p]);
      unpack_scales(pair->scales[p] + b, blocks, n, (__m512(*)[2])&w.scales[0][p]);
    }
    if (panels == 2)
      add_chunk(form, &w, 2, n, move(form, x, 0, b), n_tokens, sums);
    else
      add_chunk(form, &w, 1, n, move(form, x, 0, b), n_tokens, sums);
  }
}

/* What a pair's sums say of rows [row, row + n_rows) of the matrix. */
static void store_sums(const panel_pair *pair, int panels, int64_t row, int64_t n_rows, int64_t tokens,
                       __m512 (*sums)[2], float *y, int64_t y_stride) {
  for (int p = 0; p < panels; p++, row += PANEL, n_rows -= PANEL, y += PANEL) {
    __mmask16 wanted = (__mmask16)(0xffff << (row - pair->first[p]));
    __mmask16 rows = n_rows < PANEL ? (__mmask16)((1 << n_rows) - 1) : (__mmask16)0xffff;
    for (int64_t t = 0; t < tokens; t++)
      _mm512_mask_storeu_ps(y + t * y_stride, rows, _mm512_maskz_compress_ps(wanted, sums[t][p]));
  }
}

INLINE void fast_product(const matrix *m, int form, int64_t row0, int64_t n_rows, const float *x,
                         int64_t x_stride, int64_t n_tokens, float *y, int64_t y_stride) {
  __m512 sums[TOKENS_AT_ONCE][2];
  panel_pair pair;
  const quantized quants = view(form, x, x_stride, m->cols);
  const int64_t at_once = n_tokens <= 2 * DIRECT_TOKENS ? DIRECT_TOKENS : TOKENS_AT_ONCE;
  for (int64_t r = 0; r < n_rows; r += 2 * PANEL) {
    int panels = n_rows - r > PANEL ? 2 : 1;
    for (int p = 0; p < panels; p++) {
      int64_t row = row0 + r + p * PANEL, last = m->rows - PANEL;
      pair.first[p] = row < last ? row : last;
      expand_scales(m, dtype_of(form), pair.first[p], PANEL, pair.scales[p]);
    }
    for (int64_t t = 0; t < n_tokens; t += at_once) {
      int64_t tokens = n_tokens - t < at_once ? n_tokens - t : at_once;
      if (tokens <= DIRECT_TOKENS)
        multiply_few(m, form, &pair, panels, move(form, quants, t, 0), tokens, sums);
      else
        multiply_many(m, form, &pair, panels, move(form, quants, t, 0), tokens, sums);
      store_sums(&pair, panels, row0 + r, n_rows - r, tokens, sums, y + t * y_stride + r, y_stride);
    }
  }
}

#define DEFINE_FAST(name, form)                                                                    \
  static void name(const matrix *m, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride, \
                   int64_t n_tokens, float *y, int64_t y_stride) {                                  \
    fast_product(m, form, row0, n_rows, x, x_stride, n_tokens, y, y_stride);                       \
  }
DEFINE_FAST(fast_int8, INT8_WORDS)
DEFINE_FAST(fast_nf4, NF4_WORDS)
DEFINE_FAST(bytes_nf4, NF4_BYTES)

#include "wide_vnni.h"

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
    .bytes = {[ADRT_NF4] = bytes_nf4},
    .shrink_wide = shrink_wide,
    .add_wide = add_wide,
    .quantize = quantize,
    COMMON_KERNELS,
};
#else
typedef int not_for_this_cpu;
#endif
