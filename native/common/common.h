/* What the native backends share: errors, checked sizes, aligned memory, matrices, and the checks of every number
 * that comes through the ABI. */
#ifndef ADAPTRT_COMMON_H
#define ADAPTRT_COMMON_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adaptrt.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { BLOCK = 64, NESTED_BLOCK = 256, PANEL = 16, N_DTYPES = 5 };

/* Fill `error` (NULL is allowed) with a one-line message and return `code`. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int cpu_fail(adrt_error *error, int code, const char *format, ...);

int64_t cpu_align(int64_t value, int64_t alignment);
/* a * b * c, or -1 when it exceeds 2^62 or a factor is negative. */
int64_t cpu_product(int64_t a, int64_t b, int64_t c);

/* Zeroed memory on a 64-byte boundary, or NULL; large zeroed memory is only committed when written. */
void *cpu_calloc(int64_t count, int64_t size);
void cpu_free(void *memory);
/* Have the kernel back memory with pages of 2 MiB where it can: reading 4 KiB pages costs a fifth of the bandwidth. */
void cpu_prefer_huge_pages(void *memory, uint64_t bytes);

/* A tensor with the parts of its layout resolved (spec/format.md, "Data types"). */
typedef struct {
  int32_t dtype;
  int64_t rows, cols;
  int64_t skipped;        /* items between a row and the next: more than 0 for the leading columns of wider floats */
  const uint8_t *data;    /* values, or the codes of int8 and nf4 */
  const uint8_t *absmax;  /* nf4: [ceil(n/64)] */
  const uint8_t *nested;  /* nf4: float32 [ceil(blocks/256)] */
  float offset;           /* nf4 */
  const uint16_t *scales; /* int8: bfloat16 [rows * ceil(cols/64)] */
} matrix;

/* Check a tensor's dtype, shape, alignment and byte count; `what` and `index` name it in the message. */
int cpu_matrix(const adrt_tensor *tensor, const char *what, int64_t index, matrix *out, adrt_error *error);
/* Row `row` as float32 [cols]: the dequantized values, rounded as spec/format.md says. */
void cpu_decode_row(const matrix *m, int64_t row, float *out);
float cpu_element(const matrix *m, int64_t row, int64_t col);
/* Of int8 and nf4: the stored code of an element, and the scale of its block. */
uint8_t cpu_code(const matrix *m, int64_t row, int64_t col);
float cpu_scale(const matrix *m, int64_t row, int64_t col);
const char *cpu_dtype_name(int32_t dtype);

static inline bool cpu_is_quantized(int32_t dtype) { return dtype == ADRT_INT8 || dtype == ADRT_NF4; }

/* Bytes of `items` values or codes; an even number of nf4's. */
static inline int64_t cpu_bytes_of(int32_t dtype, int64_t items) {
  return dtype == ADRT_F32 ? 4 * items : dtype == ADRT_NF4 ? items / 2 : dtype == ADRT_INT8 ? items : 2 * items;
}

float cpu_f16_to_f32(uint16_t h);
uint16_t cpu_f32_to_f16(float f); /* ties to even */

static inline bool is_product(int32_t kind) { return kind == ADRT_LINEAR || kind == ADRT_LOGITS; }

static inline bool is_product_or_embed(int32_t kind) { return is_product(kind) || kind == ADRT_EMBED; }

static inline bool is_attach_point(int32_t kind) { return is_product_or_embed(kind) || kind == ADRT_NORM; }

int cpu_validate_options(const adrt_options *options, adrt_error *error);
int cpu_validate_program(const adrt_program *program, adrt_error *error);

/* Where an attachment acts: the kind of its operation, and its sizes as the normal form sees them (an embedding maps
 * its rows to its columns). */
typedef struct {
  int32_t kind;
  int64_t out, inner;
} attach_point;

/* Every size, index and number of an attachment, but the values of tensors and vectors. */
int cpu_validate_attachment(const adrt_attachment *a, const attach_point *point, adrt_error *error);

/* What a batch is checked against. */
typedef struct {
  int64_t vocabulary; /* token ids are below it */
  int32_t page_tokens, n_pages;
  bool (*attached)(const void *owner, int32_t handle);
  const void *owner;
} batch_limits;

int cpu_validate_batch(const adrt_batch *batch, const batch_limits *limits, adrt_error *error);

/* Whether two runs of a batch have the same adapter stack. */
bool cpu_same_stack(const adrt_batch *batch, int32_t run, int32_t other);

#ifdef __cplusplus
}
#endif

#endif
