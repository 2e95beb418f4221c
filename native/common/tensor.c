/* Tensors as matrices: their layout, checked, and their values, one row or element at a time. */
#include <string.h>

#include "common.h"
#include "quant_tables.h"

const char *cpu_dtype_name(int32_t dtype) {
  static const char *const names[N_DTYPES] = {"f32", "f16", "bf16", "int8", "nf4"};
  return dtype >= 0 && dtype < N_DTYPES ? names[dtype] : "unknown";
}

static const int32_t item_bytes[N_DTYPES] = {4, 2, 2, 1, 0};
static const int32_t item_alignment[N_DTYPES] = {4, 2, 2, 2,
                                                 4}; /* of the parts, which start at multiples of 64 */

/* Byte offsets of the parts and the whole size, or false when the count overflows. */
typedef struct {
  int64_t absmax, nested, scales, bytes;
} layout;

static bool lay_out(int32_t dtype, int64_t rows, int64_t cols, layout *out) {
  int64_t count = cpu_product(rows, cols, 8); /* the factor keeps every sum below from overflowing */
  if (count < 0) return false;
  count /= 8;
  int64_t blocks = (count + BLOCK - 1) / BLOCK, nested = (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK;
  *out = (layout){0};
  if (dtype == ADRT_NF4) {
    out->absmax = cpu_align((count + 1) / 2, 64);
    out->nested = cpu_align(out->absmax + blocks, 64);
    out->bytes = out->nested + 4 * nested + 4;
  } else if (dtype == ADRT_INT8) {
    out->scales = cpu_align(count, 64);
    out->bytes = out->scales + 2 * rows * ((cols + BLOCK - 1) / BLOCK);
  } else {
    out->bytes = count * item_bytes[dtype];
  }
  return true;
}

int cpu_matrix(const adrt_tensor *t, const char *what, int64_t index, matrix *out, adrt_error *error) {
  if (t->dtype < 0 || t->dtype >= N_DTYPES)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "%s %lld: unknown dtype %d", what, (long long)index, t->dtype);
  layout parts;
  if (t->rows < 1 || t->cols < 1 || !lay_out(t->dtype, t->rows, t->cols, &parts))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "%s %lld: impossible shape [%lld, %lld]", what,
                    (long long)index, (long long)t->rows, (long long)t->cols);
  if ((uint64_t)parts.bytes != t->bytes)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "%s %lld: %s [%lld, %lld] needs %lld bytes, got %llu", what,
                    (long long)index, cpu_dtype_name(t->dtype), (long long)t->rows, (long long)t->cols,
                    (long long)parts.bytes, (unsigned long long)t->bytes);
  if (!t->data || (uintptr_t)t->data % (uintptr_t)item_alignment[t->dtype])
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "%s %lld: data is %s", what, (long long)index,
                    t->data ? "not aligned to its items" : "NULL");
  const uint8_t *data = t->data;
  *out = (matrix){.dtype = t->dtype, .rows = t->rows, .cols = t->cols, .data = data};
  if (t->dtype == ADRT_NF4) {
    out->absmax = data + parts.absmax;
    out->nested = data + parts.nested;
    memcpy(&out->offset, data + parts.bytes - 4, 4);
  } else if (t->dtype == ADRT_INT8) {
    out->scales = (const uint16_t *)(const void *)(data + parts.scales);
  }
  return ADRT_OK;
}

float cpu_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7fff) << 13, bits;
  float value;
  if (magnitude >= 0x0f800000) { /* infinity or NaN */
    bits = magnitude + 0x70000000;
    memcpy(&value, &bits, 4);
  } else { /* scaling by 2^112 rebiases the exponent and normalizes subnormals, exactly */
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

uint16_t cpu_f32_to_f16(float f) {
  uint32_t bits, magnitude;
  memcpy(&bits, &f, 4);
  uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and up round to infinity */
  if (magnitude < 0x38800000) {                      /* below 2^-14: let float addition round at 2^-24 */
    float value;
    memcpy(&value, &magnitude, 4);
    value += 0.5f;
    memcpy(&magnitude, &value, 4);
    return (uint16_t)(sign | (magnitude - 0x3f000000));
  }
  magnitude += 0xfff + (magnitude >> 13 & 1); /* ties to even */
  return (uint16_t)(sign | ((magnitude - 0x38000000) >> 13));
}

static float bf16_to_f32(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* Separate roundings of product and sum, as the quantizer defines them. */
static float absmax_at(const matrix *m, int64_t block) {
  float nested;
  memcpy(&nested, m->nested + block / NESTED_BLOCK * 4, 4);
  float scaled = DYNAMIC_MAP[m->absmax[block]] * nested;
  return scaled + m->offset;
}

uint8_t cpu_code(const matrix *m, int64_t row, int64_t col) {
  int64_t i = row * m->cols + col;
  return m->dtype == ADRT_INT8 ? m->data[i] : m->data[i / 2] >> (i % 2 ? 0 : 4) & 15;
}

float cpu_scale(const matrix *m, int64_t row, int64_t col) {
  if (m->dtype == ADRT_NF4) return absmax_at(m, (row * m->cols + col) / BLOCK);
  return bf16_to_f32(m->scales[row * ((m->cols + BLOCK - 1) / BLOCK) + col / BLOCK]);
}

float cpu_element(const matrix *m, int64_t row, int64_t col) {
  int64_t i = row * (m->cols + m->skipped) + col;
  uint16_t half;
  float value;
  switch (m->dtype) {
    case ADRT_F32: memcpy(&value, m->data + 4 * i, 4); return value;
    case ADRT_F16: memcpy(&half, m->data + 2 * i, 2); return cpu_f16_to_f32(half);
    case ADRT_BF16: memcpy(&half, m->data + 2 * i, 2); return bf16_to_f32(half);
    case ADRT_INT8: return (float)(int8_t)cpu_code(m, row, col) * cpu_scale(m, row, col);
    default: return NF4_CODEBOOK[cpu_code(m, row, col)] * cpu_scale(m, row, col);
  }
}

static void decode_nf4_row(const matrix *m, int64_t row, float *out) {
  int64_t i = row * m->cols, end = i + m->cols;
  while (i < end) {
    int64_t stop = (i / BLOCK + 1) * BLOCK;
    if (stop > end) stop = end;
    float absmax = absmax_at(m, i / BLOCK);
    for (; i < stop; i++) *out++ = NF4_CODEBOOK[m->data[i / 2] >> (i % 2 ? 0 : 4) & 15] * absmax;
  }
}

void cpu_decode_row(const matrix *m, int64_t row, float *out) {
  if (m->dtype == ADRT_NF4) {
    decode_nf4_row(m, row, out);
  } else {
    for (int64_t col = 0; col < m->cols; col++) out[col] = cpu_element(m, row, col);
  }
}
