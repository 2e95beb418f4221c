/* A loaded program and the state of its steps.
 *
 * The program is cut into waves: runs of operations none of which reads what another of the wave writes. All
 * threads walk the waves together; a wave has two phases of independent items that threads take from a shared
 * counter, and a barrier after each phase that has any:
 *
 *   phase      LINEAR, LOGITS                           ATTENTION           the others
 *   PREPARE    rearrange activations; adapters' V x     store k and v       -
 *   COMPUTE    rows of W x, plus adapters' terms        softmax(q k) v      everything
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
  TOKENS_AT_ONCE = 8, /* of a term's result before it is added */
  GATHER = ADRT_LOGITS + 1 /* internal: picks logit rows */
};

/* Memory for panels, given back when its last user is gone. */
typedef struct {
  uint8_t *memory;
  int64_t bytes, used, users;
} arena;

/* An adapter's U, or its rotation, as panels [ceil(out/16)][rank][16], so that adding U h streams; made once for all
 * adapters whose tensor has the same data pointer. Quantized panels hold codes (kernels.h). */
typedef struct panels {
  struct panels *next;
  matrix source;
  int64_t references;
  int32_t dtype; /* of the panels */
  int64_t rank, stride; /* items in a panel */
  uint8_t *items;
  arena *arena; /* where the items lie */
  float *scales; /* int8, nf4: [ceil(out/64)][rank] */
} panels;

typedef struct {
  int32_t kind; /* adrt_term_kind */
  float scale;
  matrix v;         /* LOW_RANK: [rank, in]; KRONECKER: W2 [c, d] */
  panels *u;        /* LOW_RANK: NULL is the identity */
  matrix w1;        /* KRONECKER: [a, b] */
  const float *d, *e; /* LOW_RANK: [rank], [out], or NULL */
  const int32_t *row_start, *columns; /* SPARSE */
  const float *values;
  int64_t hidden; /* floats a token that PREPARE leaves for COMPUTE; 0: nothing to prepare */
} term;

typedef struct {
  int32_t n_terms;
  term *terms;
  const float *g_in, *g_out, *c;
  const float *rotation;
  int64_t rotation_block;
  panels *rotation_panels; /* where blocks are whole panels */
  bool scales_bias;
} attachment;

typedef struct {
  attachment **by_target; /* [n_targets], NULL where the adapter does nothing */
} adapter;

/* Consecutive tokens (or logit rows) with one adapter stack, stacks[first .. first + n) of the batch. */
typedef struct {
  int64_t start, count;
  int32_t first, n;
} segment;

/* One adapter acting on one operation for one segment. */
typedef struct {
  const segment *where;
  const attachment *what;
  int64_t hidden; /* floats into plan.hidden, where its terms' [count, term.hidden] lie one after the other */
} application;

/* Some rows of a term's v for the tokens of a segment: V x, or W2's share of a Kronecker product. */
typedef struct {
  const segment *where;
  const term *what;
  int64_t hidden;
  int64_t row0, n_rows;
} shrink_job;

/* Rows of a term's v that the next products will read; contiguous ones count as one. */
typedef struct {
  const uint8_t *data;
  int64_t rows, row_bytes, row_stride;
  int64_t start; /* bytes before it in plan.fetches */
} fetch;

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
  int64_t first_fetch, fetch_start, fetch_end; /* its share of plan.fetches, in bytes */
  const float *x; /* activations that the product reads [n, x_stride] */
  int64_t x_stride;
  float *prepared;   /* where this operation itself writes x, or NULL */
  bool maps_input, adds_constant; /* some application has g_in or a rotation; c, or there is a bias */
  const float *plain; /* the input as it was before this operation, [n, plain_stride], for terms */
  int64_t plain_stride;
  float *kept; /* where it is copied to when the output replaces it, or NULL */
  int64_t kept_at; /* floats into plan.hidden; -1 = not copied */
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
  fetch *fetches;
  int64_t n_fetches, fetch_bytes;
  float *hidden;
  int64_t n_hidden;
  buffer run_buffer, token_segment_buffer, logit_segment_buffer, application_buffer, shrink_buffer,
      fetch_buffer, hidden_buffer;
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
  panels *panels;
  arena *arena; /* with room left, perhaps, or NULL */

  int64_t max_cols, max_group, max_head; /* widest product input; most query heads a KV head; largest head */
  int64_t scratch_floats;
  buffer *scratch; /* [threads] */
  plan plan;
};

/* Room for `count` items of `size` bytes, zeroed when grown (nothing is kept); false when memory is short. */
bool buffer_reserve(buffer *b, int64_t count, int64_t size);
/* The same, keeping what is there. */
bool buffer_grow(buffer *b, int64_t count, int64_t size);

int cpu_plan(adrt_executable *e, const adrt_batch *batch, adrt_error *error);

int cpu_load(const adrt_program *program, const adrt_options *options, adrt_executable **out,
             adrt_error *error);
void cpu_unload(adrt_executable *e);
int cpu_reserve(adrt_executable *e, int32_t n_pages, adrt_error *error);
int cpu_attach(adrt_executable *e, int32_t n, const adrt_attachment *attachments, int32_t *handle,
               adrt_error *error);
int cpu_detach(adrt_executable *e, int32_t handle, adrt_error *error);
void cpu_free_adapter(adrt_executable *e, adapter *a);

/* Panels of a float matrix [out, rank] or of a quantized one [rank, out], shared by data pointer; NULL when memory is
 * short. */
panels *cpu_share_panels(adrt_executable *e, const matrix *source);
void cpu_release_panels(adrt_executable *e, panels *p);
/* The panel that holds a row. */
static inline const uint8_t *cpu_panel(const panels *p, int64_t row) {
  return p->items + cpu_bytes_of(p->dtype, row / PANEL * p->stride);
}

/* Make ready what a checked term of an operation with `inner` inputs needs; a failed one holds nothing. */
int cpu_make_term(adrt_executable *e, const adrt_term *in, int64_t inner, term *out, adrt_error *error);
/* Its two halves (terms.c). `y` starts at row0 and holds the rows of the operation's output for the segment's tokens. */
int64_t cpu_rows_per_job(const term *t);
int64_t cpu_rows_to_prepare(const term *t);
void cpu_prepare_term(const adrt_executable *e, const instruction *in, const shrink_job *job, float *scratch);
void cpu_add_term(const adrt_executable *e, const instruction *in, const term *t, const segment *where,
                  const float *hidden, int64_t row0, int64_t n_rows, float *y, int64_t y_stride, float *scratch);
/* The whole of a term for a one-hot input. */
void cpu_add_embedded(const adrt_executable *e, const term *t, int32_t token, int64_t width, float *out,
                      float *scratch);
int64_t cpu_term_scratch(const adrt_executable *e); /* floats */

bool cpu_plan_fetches(adrt_executable *e); /* false when memory is short */
/* What an item of a product fetches for itself and for the operations after it. */
void cpu_fetch_ahead(const adrt_executable *e, const instruction *in, int64_t row0, int64_t n_rows);
int cpu_step(adrt_executable *e, const adrt_batch *batch, adrt_error *error);

/* The items of an operation in a phase, and the work of one of them. */
int64_t cpu_linear_items(const adrt_executable *e, const instruction *in, enum phase phase);
void cpu_linear(adrt_executable *e, const instruction *in, enum phase phase, int64_t item, float *scratch);
int64_t cpu_attention_items(const adrt_executable *e, const instruction *in, enum phase phase);
void cpu_attention(adrt_executable *e, const instruction *in, enum phase phase, int64_t item, float *scratch);
int64_t cpu_linear_scratch(const adrt_executable *e); /* floats */
/* Floats of scratch that a thread needs for attention to so many positions. */
int64_t cpu_attention_scratch(const adrt_executable *e, int64_t context);
void cpu_embed(adrt_executable *e, const instruction *in, int64_t token, float *scratch);
void cpu_norm(adrt_executable *e, const instruction *in, int64_t token);
void cpu_rope(adrt_executable *e, const instruction *in, int64_t token);
void cpu_fill_rope_tables(adrt_executable *e);

static inline int64_t tokens_of(const adrt_executable *e, const instruction *in) {
  return in->op.kind == ADRT_LOGITS || in->op.kind == GATHER ? e->plan.batch->n_logits
                                                             : e->plan.batch->n_tokens;
}

static inline int64_t items_of(int64_t count, int64_t per_item) { return (count + per_item - 1) / per_item; }

static inline float *row_of(const adrt_executable *e, int32_t reg, int64_t token) {
  return e->registers[reg] + token * e->strides[reg];
}

#endif
