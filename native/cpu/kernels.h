/* The table of inner loops that each instruction set fills in; everything above it is independent of the CPU.
 *
 * A result for one (row, token) is the same to the last bit however rows and tokens are grouped into calls:
 * every kernel of a table adds up a row's 64-weight blocks in the same order for one token as for many.
 */
#ifndef CPU_KERNELS_H
#define CPU_KERNELS_H
#include "common.h"

/* How a product wants its activations; the buffer is one float32 per column, padded to 64, for every form. */
enum layout_of_x {
  X_PLAIN,      /* as they are */
  X_SPLIT,      /* each 32 reordered into 16 even, 16 odd: the order in which nf4 nibbles unpack */
  /* Integers and scales, in whatever order the table's own `quantize` and products agree on (vnni.h, `quantized`). */
  X_WORDS,       /* 16-bit integers for int8 */
  X_WORDS_SPLIT, /* the same for nf4 */
  X_BYTES_SPLIT, /* 8-bit integers for nf4 */
  X_WIDE,        /* for wide terms: half as long, then two numbers for each 64 */
};

/* y[t * y_stride + r] = sum over columns of weight[row0 + r] * x[t * x_stride], r < n_rows, t < n_tokens.
 * X_PLAIN and X_SPLIT activations are zero from column `cols` up to the next multiple of 64. */
typedef void product_kernel(const matrix *m, int64_t row0, int64_t n_rows, const float *x, int64_t x_stride,
                            int64_t n_tokens, float *y, int64_t y_stride);

/* y[t * y_stride + r] += sum over k < rank of u[r / 16][k][r % 16] * h[t * h_stride + k], r < n_rows; the
 * panels of 16 rows are `panel_stride` items apart and complete. */
typedef void expand_kernel(const void *panels, int64_t panel_stride, int64_t rank, int64_t n_rows,
                           const float *h, int64_t h_stride, int64_t n_tokens, float *y, int64_t y_stride);

typedef struct {
  const char *name;
  int isa;
  bool (*ready)(void);             /* can this CPU run them? Also fills the tables that they use */
  product_kernel *exact[N_DTYPES]; /* nf4: cols a multiple of 64, X_SPLIT; the others X_PLAIN */
  /* Integer products, NULL where there is none: rows >= 16, cols a multiple of 64. */
  product_kernel *fast[N_DTYPES];  /* error 1e-4; X_WORDS, nf4: X_WORDS_SPLIT */
  product_kernel *bytes[N_DTYPES]; /* error 6e-3; X_BYTES_SPLIT */
  expand_kernel *expand[3]; /* f32, f16, bf16 */
  /* For adapters: the same for few rows at a time, of any dtype. Codes of int8 and nf4 are not scaled; 16 bytes of
   * nf4 are step k in the high nibbles and k + 1 in the low ones. */
  expand_kernel *add_low_rank[N_DTYPES];
  /* The same results as exact's, for one token; f32, f16, bf16, cols a multiple of 64. */
  product_kernel *shrink[3];
  /* For wide terms, NULL where there is none: the same for panels of [rank/64] blocks, a block [16][16][4] int8 codes +
   * WIDE_ZERO and [16] float32 scales, panel_stride bytes apart, and h as X_WIDE. */
  expand_kernel *add_wide;
  void (*quantize)(const float *x, int64_t n, enum layout_of_x layout, float *out); /* n a multiple of 64 */
  void (*split)(const float *x, int64_t n, float *out);                /* X_SPLIT; n a multiple of 32 */
  void (*norm)(const float *x, const float *weight, float eps, int64_t n, float *out);
  void (*gated)(int mode, const float *gate, const float *up, int64_t n, float *out);
  void (*scale)(const float *x, float factor, float cap, int64_t n, float *out);
  void (*softmax)(float *scores, int64_t n, float scale, float cap); /* in place */
} kernels;

enum { WIDE_BLOCK_BYTES = BLOCK * PANEL + 4 * PANEL, WIDE_ZERO = 128 };
enum { SCALES_AT_ONCE = 1024 }; /* block scales that a product expands together, at least one row's */

static inline int64_t blocks_of(const matrix *m) { return (m->cols + BLOCK - 1) / BLOCK; }

/* Rows that no product kernel of their dtype reads: nf4 that starts inside a block, or more scales than fit.
 * They are decoded to float32 one by one. */
static inline bool needs_decoding(const matrix *m) {
  bool scaled = m->dtype == ADRT_NF4 || m->dtype == ADRT_INT8;
  return (m->dtype == ADRT_NF4 && m->cols % BLOCK) || (scaled && blocks_of(m) > SCALES_AT_ONCE);
}

extern const kernels cpu_kernels_portable;
#if defined(__x86_64__)
extern const kernels cpu_kernels_avx2, cpu_kernels_avx_vnni, cpu_kernels_avx512, cpu_kernels_vnni;
#elif defined(__aarch64__)
extern const kernels cpu_kernels_neon, cpu_kernels_neon_dot;
#endif

/* The best table for this machine, or the one `isa` forces; NULL when the CPU lacks it. */
const kernels *cpu_choose_kernels(int32_t isa);

#endif
