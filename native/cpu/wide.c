/* Wide low-rank terms in `fast`: factors of a high rank between two trained vectors, as VeRA's random projections are.
 *
 * All modules and adapters share such factors, and the weights of a layer push them out of the caches before the next
 * layer wants them. So they are kept as int8 with a scale for 64 columns of a row: half the bytes of bf16, which go to
 * vpdpbusd as they are. Rounding uniform values so is an error of 5.5e-3 of the term. */
#include <string.h>

#include "executable.h"

enum { LOWEST_WIDE_RANK = 64 };

bool cpu_is_wide(const adrt_executable *e, const adrt_term *t, const attach_point *point) {
  int64_t rank = t->v.rows;
  return e->options.precision == ADRT_FAST && e->kernels->add_wide && is_product(point->kind) && t->d && t->e &&
         t->v.dtype <= ADRT_BF16 && t->u.dtype <= ADRT_BF16 && rank >= LOWEST_WIDE_RANK && rank % BLOCK == 0 &&
         t->v.cols % BLOCK == 0 && point->inner % BLOCK == 0;
}

/* One row of a panel: codes of four columns lie together, for the 16 rows; its scales follow the codes of a block. */
static void place_row(const int8_t *codes, const uint16_t *scales, int64_t cols, uint8_t *panel, int64_t r) {
  for (int64_t b = 0; b < cols / BLOCK; b++, panel += WIDE_BLOCK_BYTES) {
    for (int64_t k = 0; k < BLOCK; k++)
      panel[k / 4 * 4 * PANEL + 4 * r + k % 4] = (uint8_t)(codes[b * BLOCK + k] + WIDE_ZERO);
    uint32_t bits = (uint32_t)scales[b] << 16;
    memcpy(panel + BLOCK * PANEL + 4 * r, &bits, 4);
  }
}

bool cpu_pack_wide_panels(const matrix *m, uint8_t *out) {
  int64_t bytes = m->cols * 3, stride = m->cols / BLOCK * WIDE_BLOCK_BYTES;
  uint8_t *packed = cpu_calloc(bytes, 1);
  float *row = cpu_calloc(m->cols, sizeof *row);
  bool ok = packed && row;
  uint16_t *scales = (uint16_t *)(void *)(packed + m->cols);
  for (int64_t r = 0, bad; ok && r < m->rows; r++) {
    cpu_decode_row(m, r, row);
    ok = adrt_quantize_int8(row, 1, m->cols, (int8_t *)packed, scales, &bad) == ADRT_OK;
    if (ok) place_row((int8_t *)packed, scales, m->cols, out + r / PANEL * stride, r % PANEL);
  }
  cpu_free(packed);
  cpu_free(row);
  return ok;
}
