/* A loaded program and the state of its steps.
 *
 * The program is cut into waves: runs of operations none of which reads what another of the wave writes. All
 * threads walk the waves together; a wave has two phases of independent items that threads take from a shared
 * counter, and a barrier after each phase that has any:
 *
 *   phase      LINEAR, LOGITS                           ATTENTION           the others
 *   PREPARE    rearrange activations; adapters' V x     store k and v       -
 *   COMPUTE    rows of W x, plus adapters' U (V x)      softmax(q k) v      everything
 */
#ifndef CPU_EXECUTABLE_H
#define CPU_EXECUTABLE_H
#include <stdatomic.h>

#include "common.h"
#include "kernels.h"
#include "pool.h"

enum phase { PREPARE, COMPUTE, N_PHASES };
enum {
  TOKENS_PER_ITEM = 4,
  SHRINK_ROWS_PER_ITEM = 4,
  GATHER = ADRT_LOGITS + 1 /* internal: picks logit rows */
};

/* U of an adapter term as panels [ceil(out/16)][rank][16], so that adding U h streams; shared between
 * adapters whose U has the same data pointer. */
typedef struct u_panels {
  struct u_panels *next;
  const void *source;
  int32_t dtype;
  int64_t out, rank;
  int64_t references;
  void *panels;
} u_panels;

typedef struct {
  matrix v;       /* [rank, in] */
  u_panels *u;    /* [out, rank] */
  const float *d; /* [rank] or NULL */
  float scale;
} term;

typedef struct {
  int32_t n_terms;
  term *terms;
  const float *g_in, *g_out, *c;
} attachment;

typedef struct {
  attachment **by_target; /* [n_targets], NULL where the adapter does nothing */
} adapter;

/* Consecutive tokens (or logit rows) with one adapter stack, stacks[first .. first + n) of the batch. */
typedef struct {
  int64_t start, count;
  int32_t first, n;
} segment;

/* One adapter acting on one operation for one segment; its terms' V x lie one after the other at `hidden`. */
typedef struct {
  const segment *where;
  const attachment *what;
  int64_t hidden; /* floats into plan.hidden; term k is [count, rank_k] */
} application;

typedef struct {
  const segment *where;
  const term *what;
  int64_t hidden;
  int64_t row0, n_rows; /* of V */
} shrink_job;

typedef struct {
  adrt_op op;
  int64_t width;      /* of out, or rows of LOGITS */
  matrix weight;      /* EMBED, LINEAR, LOGITS */
  float *vector;      /* NORM's weight, ROPE's inverse frequencies */
  float *bias;        /* float32 or NULL */
  int32_t rope_table; /* ROPE: index of its cos and sin */
  product_kernel *product;
  enum layout_of_x layout;
  int64_t rows_per_item;

  /* of the current step */
  int64_t first_application, n_applications;
  int64_t first_shrink, n_shrinks;
  const float *x; /* activations that the product reads [n, x_stride] */
  int64_t x_stride;
  float *prepared;   /* where this operation itself writes x, or NULL */
  bool scaled_input; /* some application has g_in */
} instruction;

typedef struct {
  int32_t kv_heads, head_dim;
  int64_t k_offset, v_offset; /* bytes into a page: attention.c */
} kv_layer;

typedef struct {
  const float *inverse; /* [half] */
  int64_t half;
  float factor;
  float *cos_sin; /* [n_tokens][2][half], of the current step */
} rope_table;

typedef struct {
  void *data;
  int64_t capacity; /* items */
} buffer;

/* What one step needs beside the registers; grown when a step needs more. */
typedef struct {
  const adrt_batch *batch;
  int32_t *run_of_token;
  segment *token_segments, *logit_segments;
  int64_t n_token_segments, n_logit_segments;
  application *applications;
  int64_t n_applications;
  shrink_job *shrinks;
  int64_t n_shrinks;
  float *hidden;
  int64_t n_hidden;
  buffer run_buffer, token_segment_buffer, logit_segment_buffer, application_buffer, shrink_buffer,
      hidden_buffer;
} plan;

struct adrt_executable {
  adrt_options options;
  const kernels *kernels;
  pool *pool;
  char description[96];

  int32_t n_registers;       /* with the internal one that GATHER fills */
  int64_t *widths, *strides; /* floats per token; strides are padded to 64, and the padding stays zero */
  float **registers;         /* [n][stride] */
  buffer *register_buffers;

  int32_t n_instructions, n_waves, n_targets;
  instruction *instructions;
  int32_t *wave_start; /* [n_waves + 1] */
  int32_t *instruction_of_target;
  atomic_llong *next_item; /* [n_waves * N_PHASES] */

  int32_t n_slots; /* most products in a wave, each with its own prepared activations */
  int64_t slot_stride;
  buffer *slots;

  int32_t n_rope_tables;
  rope_table *rope_tables;
  buffer *rope_buffers;

  int32_t n_kv_layers;
  kv_layer *kv_layers; /* by layer number */
  int64_t page_bytes;
  int32_t n_pages, page_capacity;
  uint8_t **pages;

  int32_t n_adapters; /* handles given out so far; none is reused, so that a stale one is always noticed */
  adapter **adapters; /* by handle, NULL when detached */
  buffer adapter_buffer;
  int64_t max_rank; /* of any term attached so far */
  u_panels *panels;

  int64_t max_cols, max_group, max_head; /* widest product input; most query heads a KV head; largest head */
  int64_t scratch_floats;
  buffer *scratch; /* [threads] */
  plan plan;
};

/* Room for `count` items of `size` bytes, zeroed when grown (nothing is kept); false when memory is short. */
bool buffer_reserve(buffer *b, int64_t count, int64_t size);
/* The same, keeping what is there. */
bool buffer_grow(buffer *b, int64_t count, int64_t size);

int cpu_validate_program(const adrt_program *program, adrt_error *error);
int cpu_validate_batch(const adrt_executable *e, const adrt_batch *batch, adrt_error *error);
int cpu_plan(adrt_executable *e, const adrt_batch *batch, adrt_error *error);

int cpu_load(const adrt_program *program, const adrt_options *options, adrt_executable **out,
             adrt_error *error);
void cpu_unload(adrt_executable *e);
int cpu_reserve(adrt_executable *e, int32_t n_pages, adrt_error *error);
int cpu_attach(adrt_executable *e, int32_t n, const adrt_attachment *attachments, int32_t *handle,
               adrt_error *error);
int cpu_detach(adrt_executable *e, int32_t handle, adrt_error *error);
void cpu_free_adapter(adrt_executable *e, adapter *a);
int cpu_step(adrt_executable *e, const adrt_batch *batch, adrt_error *error);

/* The items of an operation in a phase, and the work of one of them. */
int64_t cpu_linear_items(const adrt_executable *e, const instruction *in, enum phase phase);
void cpu_linear(adrt_executable *e, const instruction *in, enum phase phase, int64_t item, float *scratch);
int64_t cpu_attention_items(const adrt_executable *e, const instruction *in, enum phase phase);
void cpu_attention(adrt_executable *e, const instruction *in, enum phase phase, int64_t item, float *scratch);
/* Floats of scratch that a thread needs for attention to so many positions. */
int64_t cpu_attention_scratch(const adrt_executable *e, int64_t context);
void cpu_embed(adrt_executable *e, const instruction *in, int64_t token, float *scratch);
void cpu_rope(adrt_executable *e, const instruction *in, int64_t token);
void cpu_fill_rope_tables(adrt_executable *e);

static inline bool is_product(int32_t kind) { return kind == ADRT_LINEAR || kind == ADRT_LOGITS; }

static inline bool is_product_or_embed(int32_t kind) { return is_product(kind) || kind == ADRT_EMBED; }

static inline int64_t tokens_of(const adrt_executable *e, const instruction *in) {
  return in->op.kind == ADRT_LOGITS || in->op.kind == GATHER ? e->plan.batch->n_logits
                                                             : e->plan.batch->n_tokens;
}

static inline int64_t items_of(int64_t count, int64_t per_item) { return (count + per_item - 1) / per_item; }

static inline float *row_of(const adrt_executable *e, int32_t reg, int64_t token) {
  return e->registers[reg] + token * e->strides[reg];
}

#endif
