/* A loaded program and the state of its steps.
 *
 * The program is cut into waves: runs of operations none of which reads what another of the wave writes. All
 * threads walk the waves together; a wave has two phases of independent items, of which each thread has a share of its
 * own and helps with the others', and a barrier after each phase that has any:
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

/* An adapter's U, its rotation, or a wide V, as panels [ceil(out/16)][rank][16], so that adding U h streams; made once
 * for all adapters whose tensor has the same data pointer. Quantized panels hold codes (kernels.h). */
typedef struct panels {
  struct panels *next;
  matrix source;
  int64_t references;
  int32_t dtype; /* of the panels */
  bool wide;     /* int8 as add_wide reads it; the stride is in bytes then */
  int64_t rank, stride; /* items in a panel */
  uint8_t *items;
  arena *arena; /* where the items lie */
  float *scales; /* int8, nf4: [ceil(out/64)][rank] */
} panels;

/* An adapter's V in huge pages; made once for all terms whose tensor has the same data pointer. A wide one is panels,
 * and its `v` only says how large it is. */
typedef struct projection {
  struct projection *next;
  const uint8_t *source;
  int32_t dtype; /* of the source */
  int64_t references;
  matrix v;
  panels *wide;
  arena *arena;
  int64_t newest; /* the last of plan.shrinks that reads it; may be of an earlier wave or step */
} projection;

typedef struct {
  int32_t kind; /* adrt_term_kind */
  float scale;
  matrix v;         /* LOW_RANK: [rank, in]; KRONECKER: W2 [c, d] */
  projection *projection; /* LOW_RANK with U: whose v it is */
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
} application;

/* A term, or a gain, of an application. Those of an operation act one after the other; where some read the same U for
 * tokens that follow each other, the first is done for all of them. */
typedef struct {
  const term *what;
  const float *gain;    /* where there is no term */
  int64_t start, count; /* tokens, or logit rows */
  int64_t hidden;       /* floats into plan.hidden: [count, what->hidden] */
  int64_t next;         /* of those that wait for the same shrink, or -1 */
  int64_t together;
} part;

/* The product of a V, or of a Kronecker term's W2, with the input of tokens: once for all parts that share it. */
typedef struct {
  const term *what;
  int32_t input; /* register */
  int64_t start, count;
  int64_t raw;        /* floats into plan.hidden: V x, [count, rank] */
  int64_t first_part; /* of those that wait for it */
  int64_t previous;   /* shrink of the same V in this wave, or -1 */
} shrink;

/* Some rows of it. */
typedef struct {
  int64_t shrink;
  int64_t row0, n_rows;
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
  int64_t first_part, n_parts;
  int64_t first_shrink, n_shrinks; /* those that no operation before it in the wave asked for */
  int64_t first_job, n_jobs;
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
  part *parts;
  int64_t n_parts;
  shrink *shrinks;
  int64_t n_shrinks;
  shrink_job *jobs;
  int64_t n_jobs;
  float *hidden; /* of the current wave */
  int64_t n_hidden, most_hidden;
  buffer run_buffer, token_segment_buffer, logit_segment_buffer, application_buffer, part_buffer, shrink_buffer,
      job_buffer, hidden_buffer;
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
  atomic_ullong *taken; /* [threads][n_waves][N_PHASES]: items taken of a thread's share, of its start and, << 32, its end */

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
  projection *projections;
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
 * short or, for wide ones, of which a float matrix is made, when a value is not finite. */
panels *cpu_share_panels(adrt_executable *e, const matrix *source, bool wide);
void cpu_release_panels(adrt_executable *e, panels *p);
/* The panel that holds a row. */
static inline const uint8_t *cpu_panel(const panels *p, int64_t row) {
  return p->items + cpu_bytes_of(p->dtype, row / PANEL * p->stride);
}

/* Zeroed memory in huge pages, shared with others who have the same owner; NULL when memory is short. */
uint8_t *cpu_take_memory(adrt_executable *e, int64_t bytes, arena **owner);
void cpu_release_memory(adrt_executable *e, arena *a);

/* Is a low-rank term with U one whose factors are to be wide (wide.c)? */
bool cpu_is_wide(const adrt_executable *e, const adrt_term *t, const attach_point *point);
/* A float factor as wide panels, zeroed before; false when a value is not finite or memory is short. */
bool cpu_pack_wide_panels(const matrix *m, uint8_t *out);

/* Make ready what a checked term needs; a failed one holds nothing. */
int cpu_make_term(adrt_executable *e, const adrt_term *in, const attach_point *point, term *out, adrt_error *error);
void cpu_release_term(adrt_executable *e, term *t);

/* What the terms of a wave do in this step, with one shrink for all that share it; false when memory is short. */
bool cpu_plan_parts(adrt_executable *e, instruction *first, instruction *end);
/* Take `count` times `each` floats of plan.hidden; false when there cannot be so many. */
bool cpu_plan_hidden(plan *p, int64_t count, int64_t each);

/* The two halves of terms (terms.c). `y` is row row0 of the operation's output for the first token. */
int64_t cpu_rows_per_job(const adrt_executable *e, const term *t);
void cpu_shrink(const adrt_executable *e, const shrink_job *job, float *scratch);
void cpu_add_parts(const adrt_executable *e, const instruction *in, int64_t row0, int64_t n_rows, float *y,
                   int64_t y_stride, float *scratch);
/* Have the caches fetch the vectors that cpu_add_parts will read. */
void cpu_fetch_vectors(const adrt_executable *e, const instruction *in, int64_t row0, int64_t n_rows);
/* The whole of a term for a one-hot input. */
void cpu_add_embedded(const adrt_executable *e, const term *t, int32_t token, int64_t width, float *out,
                      float *scratch);
int64_t cpu_term_scratch(const adrt_executable *e); /* floats */

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
