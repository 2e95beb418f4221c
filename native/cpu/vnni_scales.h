/* Block scales: nf4's absmax and int8's bfloat16, expanded for 16 rows at a time (vnni.h). */
#ifndef CPU_VNNI_SCALES_H
#define CPU_VNNI_SCALES_H
#include "vnni.h"

static uint8_t map_bytes[4][256]; /* byte b of DYNAMIC_MAP's values */

static void fill_map(void) {
  for (int i = 0; i < 256; i++)
    for (int b = 0; b < 4; b++) map_bytes[b][i] = ((const uint8_t *)DYNAMIC_MAP)[4 * i + b];
}

/* 64 values' byte b: 256 entries are two tables of 128, picked by the index's top bit. */
INLINE __m512i map_byte(int b, __m512i q, __mmask64 top) {
  const uint8_t *t = map_bytes[b];
  __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), q, _mm512_loadu_si512(t + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), q, _mm512_loadu_si512(t + 192));
  return _mm512_mask_blend_epi8(top, low, high);
}

/* 64 lookups, byte by byte: values[i] is what the bytes 4 i .. 4 i + 3 of each 128 bits stand for. */
INLINE void lookup(__m512i codes, __m512 values[4]) {
  __mmask64 top = _mm512_movepi8_mask(codes);
  __m512i b0 = map_byte(0, codes, top), b1 = map_byte(1, codes, top);
  __m512i b2 = map_byte(2, codes, top), b3 = map_byte(3, codes, top);
  __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
  __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
  values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  values[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  values[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}

static void lookup_absmax_bytes(const uint8_t *q, int64_t n, float *out) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (int64_t i = 0; i < n; i += 64) {
    int64_t left = n - i < 64 ? n - i : 64;
    __mmask64 present = left == 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
    __m512 values[4];
    lookup(_mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(present, q + i)), values);
    for (int j = 0; j < 4; j++) _mm512_mask_storeu_ps(out + i + 16 * j, (__mmask16)(present >> 16 * j), values[j]);
  }
}

/* The nested scales of block b of a panel's rows, looked up when they differ from those of the block before. */
typedef struct {
  const uint8_t *nested; /* float32, at any address */
  __m512i start, index; /* of each row: its first block, counted from that of nested[0]; the last lookup */
  __m512 values;
} nested_scales;

static nested_scales nested_of(const matrix *m, int64_t row) {
  int64_t first = row * blocks_of(m);
  __m512i rows = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return (nested_scales){
      .nested = m->nested + first / NESTED_BLOCK * 4,
      .start = _mm512_add_epi32(_mm512_mullo_epi32(rows, _mm512_set1_epi32((int)blocks_of(m))),
                                _mm512_set1_epi32((int)(first % NESTED_BLOCK))),
      .index = _mm512_set1_epi32(-1),
  };
}

INLINE __m512 nested_at(nested_scales *n, int64_t block) {
  _Static_assert(NESTED_BLOCK == 1 << 8, "the shift below");
  __m512i index = _mm512_srli_epi32(_mm512_add_epi32(n->start, _mm512_set1_epi32((int)block)), 8);
  if (_mm512_cmpneq_epi32_mask(index, n->index)) {
    n->index = index;
    n->values = _mm512_i32gather_ps(index, n->nested, 4);
  }
  return n->values;
}

/* `column`: of 16 rows four blocks' absmax from `block` on. Product and sum are rounded apart, as the quantizer
 * defines them. */
INLINE void expand_nf4_column(__m512i column, int64_t block, int64_t blocks, nested_scales *nested, float offset,
                              __m512 *out) {
  const __m512i by_block = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  __m512 values[4];
  lookup(_mm512_shuffle_epi8(column, by_block), values);
  for (int i = 0; i < 4 && block + i < blocks; i++)
    out[block + i] = _mm512_add_ps(_mm512_mul_ps(values[i], nested_at(nested, block + i)), _mm512_set1_ps(offset));
}

/* The same of two blocks' bfloat16. */
INLINE void expand_int8_column(__m512i column, int64_t block, int64_t blocks, __m512 *out) {
  out[block] = _mm512_castsi512_ps(_mm512_slli_epi32(column, 16));
  if (block + 1 < blocks)
    out[block + 1] = _mm512_castsi512_ps(_mm512_and_si512(column, _mm512_set1_epi32((int)0xffff0000)));
}

/* out[block] = the scales of 16 rows from `row` on. 16 bytes of each row at a time, the last ones of a row again when
 * they are fewer. */
INLINE void expand_panel(const matrix *m, int dtype, int64_t row, __m512 *out) {
  const int size = dtype == ADRT_NF4 ? 1 : 2;
  int64_t blocks = blocks_of(m), bytes = blocks * size, stride = bytes;
  const uint8_t *codes = (dtype == ADRT_NF4 ? m->absmax : (const uint8_t *)m->scales) + row * bytes;
  for (int64_t i = 0; i < PANEL * bytes; i += 64) /* those of the panel after the next */
    _mm_prefetch((const char *)codes + 2 * PANEL * bytes + i, _MM_HINT_T1);
  uint8_t few[PANEL][16] = {{0}};
  if (bytes < 16) {
    for (int r = 0; r < PANEL; r++) memcpy(few[r], codes + r * bytes, (size_t)bytes);
    codes = few[0];
    stride = 16;
  }
  nested_scales nested;
  if (dtype == ADRT_NF4) nested = nested_of(m, row);
  for (int64_t i = 0; i < bytes; i += 16) {
    int64_t at = i + 16 < stride ? i : stride - 16;
    __m512i column[4];
    transpose(codes + at, stride, column);
    for (int c = 0; c < 4 && at + 4 * c < bytes; c++) {
      if (dtype == ADRT_NF4)
        expand_nf4_column(column[c], at + 4 * c, blocks, &nested, m->offset, out);
      else
        expand_int8_column(column[c], at / 2 + 2 * c, blocks, out);
    }
  }
}

#endif
