/* Kernels for AVX-512 with VNNI and VBMI: integer products for the `fast` precision.
 *
 * Activations and weights become integers small enough that a block of 64 products is summed exactly in 32 bits,
 * then scaled by the block's absmax. As 16-bit words their error is 1e-4 of a product; as bytes 6e-3, at twice the
 * speed, which is what the layers take that an error hurts least (choose_product in load.c, spec/performance.md).
 *
 * Since the integers are exact, one token (vnni_one.h), few and many may each have their own way to them, and `fast`
 * too gives the same bits for any batch: blocks are scaled and added in order by all. For more than one token a panel
 * of 16 rows is transposed as it is unpacked, two or four columns of a row in each 32-bit lane; a few tokens are
 * multiplied from registers, many in tiles from the L1 cache. Weights are fetched in the order of memory, by
 * prefetches one panel or more ahead, so that DRAM sees one long stream although the rows of a panel are read
 * together.
 */
#if defined(__x86_64__)
#include <pthread.h>

#include "vnni_one.h"
#include "vnni_quantize.h"
#include "vnni_scales.h"

enum {
  CHUNK = 128,      /* vectors of a panel unpacked together: 16 KiB for a pair of panels */
  TILE_TOKENS = 12, /* with 2 panels: 24 of 32 vector registers are sums */
  TOKENS_AT_ONCE = 128,
  DIRECT_TOKENS = 8 /* at most so many are multiplied from registers */
};

INLINE int chunk_blocks(int form) { return CHUNK / block_vectors(form); }

/* Scales of up to two panels. */
typedef struct {
  int64_t first[2]; /* row of each panel; the last panel of a matrix may overlap the one before it */
  __m512 scales[2][SCALES_AT_ONCE]; /* [panel][block] */
} panel_pair;

/* Some columns of up to two panels, ready to be multiplied: lane r holds two words or four bytes of row r. */
typedef struct {
  __m512i codes[CHUNK][2];
  const __m512 *scales[2]; /* [panel], of its first block */
} unpacked;

/* 16 bytes of each row of a panel: out[n][c], c < 4. `ahead` is memory that will be wanted. */
INLINE void unpack_columns(int form, const uint8_t *rows, int64_t stride, const uint8_t *ahead, __m512i out[4][4]) {
  __m512i column[4];
  transpose(rows, stride, column);
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    _mm_prefetch((const char *)ahead + 64 * c, _MM_HINT_T1);
#pragma GCC unroll 4
    for (int n = 0; n < unpacked_items(form); n++) out[n][c] = unpack(form, column[c], n);
  }
}

INLINE void unpack_blocks(int form, const uint8_t *rows, int64_t stride, int64_t blocks, const uint8_t *ahead,
                          __m512i (*out)[2]) {
  for (; blocks; blocks--, out += block_vectors(form)) {
#pragma GCC unroll 4
    for (int i = 0; i < block_items(form); i += 4, rows += 16, ahead += 16 * PANEL) {
      __m512i codes[4][4];
      unpack_columns(form, rows, stride, ahead, codes);
#pragma GCC unroll 16
      for (int j = 0; j < 4 * unpacked_items(form); j++)
        out[j / 4 * block_items(form) + i + j % 4][0] = codes[j / 4][j % 4];
    }
  }
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
#pragma GCC unroll 2
      for (int p = 0; p < panels; p++)
        sums[t][p] = add_scaled(sum[t][p], w->scales[p][b], x.scales[t * x.stride], sums[t][p]);
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

/* A block of one panel against few tokens, from registers; several sums a token when one would wait for itself. */
INLINE void add_block_directly(int form, int tokens, const uint8_t *rows, int64_t stride, const uint8_t *ahead,
                               __m512 weight_scales, quantized x, __m512 *sums) {
  const int split = tokens == 2 ? 2 : 1, items = unpacked_items(form);
  __m512i sum[DIRECT_TOKENS][2];
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < split; i++) sum[t][i] = i ? _mm512_setzero_si512() : start_of_sum(form, x, t);
  for (int i = 0; i < block_items(form); i += 4, rows += 16, ahead += 16 * PANEL) {
    __m512i codes[4][4];
    unpack_columns(form, rows, stride, ahead, codes);
#pragma GCC unroll 16
    for (int k = 0; k < 4 * items; k++) {
      const uint8_t *one = x.codes + 4 * (k / 4 * block_items(form) + i + k % 4);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; t++)
        add_products_of_one(form, &sum[t][k % split], codes[k / 4][k % 4], one + 4 * t * x.stride);
    }
  }
  for (int t = 0; t < tokens; t++) {
    if (split == 2) sum[t][0] = _mm512_add_epi32(sum[t][0], sum[t][1]);
    sums[t] = add_scaled(sum[t][0], weight_scales, x.scales[t * x.stride], sums[t]);
  }
}

INLINE void multiply_directly(const matrix *m, int form, int64_t row, const __m512 *scales, int tokens, quantized x,
                              __m512 (*sums)[2]) {
  int64_t blocks = blocks_of(m), stride = row_bytes(m->dtype, m->cols), size = block_bytes(m->dtype);
  const uint8_t *rows = m->data + row * stride, *ahead = rows + PANEL * stride;
  __m512 sum[DIRECT_TOKENS];
  for (int t = 0; t < tokens; t++) sum[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b++, rows += size, ahead += size * PANEL, x = move(form, x, 0, 1))
    add_block_directly(form, tokens, rows, stride, ahead, scales[b], x, sum);
  for (int t = 0; t < tokens; t++) sums[t][0] = sum[t];
}

INLINE void multiply_few(const matrix *m, int form, const panel_pair *pair, int panels, quantized x, int64_t n,
                         __m512 (*sums)[2]) {
  for (int p = 0; p < panels; p++) {
    __m512(*out)[2] = (__m512(*)[2])&sums[0][p];
    switch (n) {
      case 1: out[0][0] = multiply_one(m, form, pair->first[p], pair->scales[p], x); break;
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
    int64_t from = b * block_bytes(dtype_of(form));
    for (int p = 0; p < panels; p++) {
      const uint8_t *rows = m->data + pair->first[p] * stride;
      unpack_blocks(form, rows + from, stride, n, rows + (2 * stride + from) * PANEL,
                    (__m512i(*)[2])&w.codes[0][p]);
      w.scales[p] = pair->scales[p] + b;
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
      expand_panel(m, dtype_of(form), pair.first[p], pair.scales[p]);
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

static void fill_tables(void) {
  fill_codebooks();
  fill_map();
}

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
    .add_wide = add_wide,
    .quantize = quantize,
    COMMON_KERNELS,
};
#else
typedef int not_for_this_cpu;
#endif
