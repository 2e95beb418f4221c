/* The product of one token: 64 bytes of a row at a time, for 16 rows (vnni.h).
 *
 * A vector of 32-bit items is a row's, so that nothing is transposed before the products; their sums are, and those
 * are few. They are the same integers that the tiles of many tokens have, added to the result in the same order. */
#ifndef CPU_VNNI_ONE_H
#define CPU_VNNI_ONE_H
#include "vnni.h"

enum {
  ROWS_TOGETHER = 2, /* so that their sums do not wait for each other */
  PANEL_AHEAD = 8192, /* bytes before the end of the next panel */
  ROW_AHEAD = 256,    /* bytes along a row */
};

/* Or GCC reads memory again for each use, and sorts loads by what they are for. */
INLINE void keep_in_register(__m512i *v) { __asm__("" : "+v"(*v)); }

/* The activations that the 32-bit items of 64 (or, at the end of a row, 32) bytes meet. */
INLINE void load_activations(int form, int bytes, const uint8_t *codes, __m512i x[4]) {
  for (int n = 0; n < unpacked_items(form); n++) {
    const uint8_t *p = codes + 4 * block_items(form) * n;
    x[n] = form == INT8_WORDS ? _mm512_loadu_si512(p) : _mm512_castsi256_si512(_mm256_loadu_si256((const void *)p));
    if (form != INT8_WORDS && bytes == 64)
      x[n] = _mm512_mask_broadcast_i64x4(x[n], 0xf0,
                                         _mm256_loadu_si256((const void *)(p + BLOCK * code_bytes(form))));
    keep_in_register(&x[n]);
  }
}

/* sums[r] = the products of a row's 32-bit items. */
INLINE void multiply_rows(int form, int bytes, const uint8_t *rows, int64_t stride, const __m512i x[4],
                          __m512i sums[ROWS_TOGETHER]) {
  __m512i items[ROWS_TOGETHER];
  for (int r = 0; r < ROWS_TOGETHER; r++) {
    items[r] = bytes == 64 ? _mm512_loadu_si512(rows + r * stride)
                           : _mm512_maskz_loadu_epi64(0x0f, rows + r * stride);
    keep_in_register(&items[r]);
    sums[r] = _mm512_setzero_si512();
  }
#pragma GCC unroll 4
  for (int n = 0; n < unpacked_items(form); n++) {
    for (int r = 0; r < ROWS_TOGETHER; r++) {
      __m512i weights = unpack(form, items[r], n);
      keep_in_register(&weights);
      add_products(form, &sums[r], weights, x[n]);
    }
  }
}

/* Each 128 bits: four rows' sums of the items there. */
INLINE __m512i sum_items(const __m512i v[4]) {
  __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* halves[h] = 16 rows' sums of the first or last 256 bits, from v[g] of rows 4 g to 4 g + 3. */
INLINE void sum_halves(const __m512i v[4], __m512i halves[2]) {
  __m512i a = _mm512_add_epi32(_mm512_shuffle_i64x2(v[0], v[1], 0x88), _mm512_shuffle_i64x2(v[0], v[1], 0xdd));
  __m512i b = _mm512_add_epi32(_mm512_shuffle_i64x2(v[2], v[3], 0x88), _mm512_shuffle_i64x2(v[2], v[3], 0xdd));
  halves[0] = _mm512_shuffle_i64x2(a, b, 0x88);
  halves[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
}

/* `ahead` is as far into the next panel as the row's piece is into this one. A prefetch that the memory cannot take
 * is dropped, and waiting for one line lets all others' requests run dry, so each is asked for three times. */
INLINE void fetch(const uint8_t *row, const uint8_t *ahead) {
  _mm_prefetch((const char *)ahead + PANEL_AHEAD, _MM_HINT_T1);
  _mm_prefetch((const char *)ahead, _MM_HINT_T1);
  _mm_prefetch((const char *)row + ROW_AHEAD, _MM_HINT_T1);
}

/* sum += what 64 or 32 bytes of 16 rows, one block of int8 or two or one of nf4, are with their scales. */
INLINE void add_pieces(int form, int bytes, const uint8_t *rows, int64_t stride, const uint8_t *ahead,
                       const __m512 *scales, quantized x, __m512 *sum) {
  __m512i activations[4], sums[PANEL], four[4], halves[2];
  load_activations(form, bytes, x.codes, activations);
#pragma GCC unroll 16
  for (int r = 0; r < PANEL; r += ROWS_TOGETHER) {
    for (int i = r; i < r + ROWS_TOGETHER; i++) fetch(rows + i * stride, ahead + bytes * i);
    multiply_rows(form, bytes, rows + r * stride, stride, activations, sums + r);
  }
  for (int g = 0; g < 4; g++) four[g] = sum_items(sums + 4 * g);
  sum_halves(four, halves);
  if (form == INT8_WORDS) halves[0] = _mm512_add_epi32(halves[0], halves[1]);
  for (int b = 0; b < bytes / (int)block_bytes(dtype_of(form)); b++) {
    if (form == NF4_BYTES) halves[b] = _mm512_add_epi32(halves[b], _mm512_set1_epi32(x.starts[b]));
    *sum = add_scaled(halves[b], scales[b], x.scales[b], *sum);
  }
}

/* Rows [row, row + 16) of the product. */
INLINE __m512 multiply_one(const matrix *m, int form, int64_t row, const __m512 *scales, quantized x) {
  const int64_t stride = row_bytes(dtype_of(form), m->cols), step = 64 / block_bytes(dtype_of(form));
  const uint8_t *rows = m->data + row * stride, *ahead = rows + PANEL * stride;
  __m512 sum = _mm512_setzero_ps();
  int64_t b = 0, blocks = blocks_of(m);
  for (; b + step <= blocks; b += step, rows += 64, ahead += 64 * PANEL, x = move(form, x, 0, step))
    add_pieces(form, 64, rows, stride, ahead, scales + b, x, &sum);
  if (b < blocks) add_pieces(form, 32, rows, stride, ahead, scales + b, x, &sum);
  return sum;
}

#endif
