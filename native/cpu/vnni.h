/* What the files of the integer kernels for AVX-512 with VNNI share: forms of weights and of activations. */
#ifndef CPU_VNNI_H
#define CPU_VNNI_H
#include <immintrin.h>

#include "kernels.h"

static void lookup_absmax_bytes(const uint8_t *q, int64_t n, float *out);
#define LOOKUP_ABSMAX lookup_absmax_bytes
#include "kernels_avx512.h"

enum {
  NF4_RANGE = 8191, /* of a word of weight, with 64 * 8191 * 4095 < 2^31 */
  WORD_RANGE = 4095,
  BYTE_RANGE = 127 /* of an activation */
};

/* What weights are multiplied as. */
enum form { NF4_WORDS, NF4_BYTES, INT8_WORDS };

INLINE int dtype_of(int form) { return form == INT8_WORDS ? ADRT_INT8 : ADRT_NF4; }
INLINE int code_bytes(int form) { return form == NF4_BYTES ? 1 : 2; }

/* A row's block is read as 32-bit items, and each of them unpacks to as many items of words or bytes as it takes. */
INLINE int block_items(int form) { return (int)block_bytes(dtype_of(form)) / 4; }
INLINE int unpacked_items(int form) { return form == NF4_WORDS ? 4 : 2; }
INLINE int block_vectors(int form) { return block_items(form) * unpacked_items(form); }

/* vpdpbusd takes weights without a sign. Of all byte codes (value + BYTE_ZERO / BYTE_SCALE) * BYTE_SCALE these two
 * put the codebook nearest to whole numbers: 3.3e-3 of error for normal weights instead of 5.9e-3 with 127. */
static const float BYTE_SCALE = 124.11f, BYTE_ZERO = 124.16f;

/* The codebook as words and as bytes, repeated: vpermw reads 5 bits of an index and vpermb 6, so the next nibble's
 * lowest bits need no mask. */
static int16_t codebook_words[32];
static uint8_t codebook_bytes[64];

static void fill_codebooks(void) {
  for (int i = 0; i < 32; i++) codebook_words[i] = (int16_t)roundf(NF4_CODEBOOK[i % 16] * (float)NF4_RANGE);
  for (int i = 0; i < 64; i++) codebook_bytes[i] = (uint8_t)roundf(NF4_CODEBOOK[i % 16] * BYTE_SCALE + BYTE_ZERO);
}

/* Item n of those that each 32-bit item unpacks to. Of its columns (8 of nf4, 4 of int8) it holds:
 * nf4 words n ^ 1 and (n ^ 1) + 4; nf4 bytes n, n + 2, n + 4, n + 6; int8 words n and n + 2. */
INLINE __m512i unpack(int form, __m512i items, int n) {
  if (form == NF4_WORDS)
    return _mm512_permutexvar_epi16(n ? _mm512_srli_epi16(items, 4 * n) : items, _mm512_loadu_si512(codebook_words));
  if (form == NF4_BYTES)
    return _mm512_permutexvar_epi8(n ? items : _mm512_srli_epi16(items, 4), _mm512_loadu_si512(codebook_bytes));
  return _mm512_srai_epi16(n ? items : _mm512_slli_epi16(items, 8), 8);
}

/* Quantized activations: of each token the codes, then a scale for each block, then, of bytes, what a block's sum
 * starts from: the share of the weights' BYTE_ZERO. The codes of a block are [n][item], as weights unpack, so that
 * one load serves a row's items and one broadcast a column of rows. */
typedef struct {
  const uint8_t *codes;
  const float *scales; /* [blocks], with the codebook's for nf4 */
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

/* What a block's exact sum adds for 16 rows, in the one order and rounding that there is for it. */
INLINE __m512 add_scaled(__m512i sum, __m512 weight_scales, float x_scale, __m512 to) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(weight_scales, _mm512_set1_ps(x_scale)), to);
}

#endif
