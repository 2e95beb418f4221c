/* Kernels in C for any CPU; GCC and Clang lower the 4-lane vectors to whatever the target has. */
#include "elementwise.h"
#include "quant_tables.h"

enum { LANES = 4, TILE_ROWS = 1 };
typedef float vec __attribute__((vector_size(16)));

static inline vec v_zero(void) { return (vec){0}; }
static inline vec v_set1(float x) { return (vec){x, x, x, x}; }
static inline vec v_load(const float *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void v_store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec v_mul(vec a, vec b) { return a * b; }
static inline vec v_add(vec a, vec b) { return a + b; }
static inline vec v_fma(vec a, vec b, vec c) { return a * b + c; }
static inline float v_sum(vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

static inline vec v_items(int dtype, const uint8_t *items) {
  float lane[LANES];
  if (dtype == ADRT_F32) return v_load((const float *)(const void *)items);
  uint16_t half[LANES];
  memcpy(half, items, sizeof half);
  for (int i = 0; i < LANES; i++) {
    uint32_t bits = (uint32_t)half[i] << 16;
    if (dtype == ADRT_F16)
      lane[i] = cpu_f16_to_f32(half[i]);
    else
      memcpy(lane + i, &bits, 4);
  }
  return v_load(lane);
}

static inline vec v_weights(int dtype, const uint8_t *block, int i) {
  float lane[LANES];
  if (dtype == ADRT_NF4) { /* of each 16 bytes: 16 high nibbles in four vecs, then 16 low ones */
    const uint8_t *bytes = block + i / 8 * 16 + i % 4 * LANES;
    int shift = i % 8 < 4 ? 4 : 0;
    for (int j = 0; j < LANES; j++) lane[j] = NF4_CODEBOOK[bytes[j] >> shift & 15];
  } else if (dtype == ADRT_INT8) {
    for (int j = 0; j < LANES; j++) lane[j] = (float)(int8_t)block[i * LANES + j];
  } else {
    return v_items(dtype, block + i * LANES * (dtype == ADRT_F32 ? 4 : 2));
  }
  return v_load(lane);
}

#include "product.h"

static bool ready(void) { return true; }

const kernels cpu_kernels_portable = {
    .name = "portable", .isa = ADRT_ISA_PORTABLE, .ready = ready, COMMON_KERNELS};
