/* What every file of the CPU backend shares: errors, checked sizes, aligned memory, matrices. */
#ifndef CPU_COMMON_H
#define CPU_COMMON_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adaptrt.h"

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
const char *cpu_dtype_name(int32_t dtype);

float cpu_f16_to_f32(uint16_t h);
uint16_t cpu_f32_to_f16(float f); /* ties to even */

#endif
