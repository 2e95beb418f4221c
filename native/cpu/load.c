/* Load a program: copy its operations, resolve its tensors, cut it into waves; and give everything back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "executable.h"

enum { ITEM_BYTES = 64 * 1024 };

/* Floats: a tile of tokens reads the same columns of each, which must not meet in the same sets of the cache. */
enum { CACHE_WAY = 1024, STAGGER = 128 };

bool buffer_reserve(buffer *b, int64_t count, int64_t size) {
  if (count <= b->capacity) return true;
  void *data = cpu_calloc(count, size);
  if (!data) return false;
  cpu_free(b->data);
  *b = (buffer){data, count};
  return true;
}

bool buffer_grow(buffer *b, int64_t count, int64_t size) {
  if (count <= b->capacity) return true;
  buffer bigger = {0};
  if (!buffer_reserve(&bigger, count > 2 * b->capacity ? count : 2 * b->capacity, size)) return false;
  if (b->data) memcpy(bigger.data, b->data, (size_t)(b->capacity * size));
  cpu_free(b->data);
  *b = bigger;
  return true;
}

/* A one-row tensor as float32, NULL when memory is short. */
static float *load_vector(const adrt_tensor *tensor) {
  matrix m;
  float *out = cpu_calloc(cpu_align(tensor->cols, BLOCK), sizeof *out);
  if (out && cpu_matrix(tensor, "tensor", 0, &m, NULL) == ADRT_OK) cpu_decode_row(&m, 0, out);
  return out;
}

/* Registers that an operation reads, then the one it writes; -1 where there is none. */
static void registers_of(const adrt_op *op, int32_t read[3], int32_t *written) {
  bool two = op->kind == ADRT_GATED || op->kind == ADRT_ADD || op->kind == ADRT_ATTENTION;
  read[0] = op->kind == ADRT_EMBED ? -1 : op->a;
  read[1] = two ? op->b : -1;
  read[2] = op->kind == ADRT_ATTENTION ? op->c : -1;
  *written = op->kind == ADRT_LOGITS ? -1 : op->out;
}

/* Is a gated activation the first to read what `op` writes? */
static bool feeds_gate(const adrt_program *p, const adrt_op *op) {
  for (const adrt_op *later = op + 1; later < p->ops + p->n_ops; later++) {
    int32_t read[3], written;
    registers_of(later, read, &written);
    if (read[0] == op->out || read[1] == op->out || read[2] == op->out) return later->kind == ADRT_GATED;
  }
  return false;
}

/* The product kernel for a weight, and the form of activations that it reads. Bytes are for what a gated activation
 * reads: their error stays what it was there, where a softmax would amplify that of q and k, and residuals would
 * collect that of the other layers (spec/performance.md). */
static void choose_product(const adrt_executable *e, const adrt_program *p, const adrt_op *op,
                           instruction *in) {
  const matrix *m = &in->weight;
  const kernels *k = e->kernels;
  int32_t dtype = m->dtype;
  bool integer = e->options.precision == ADRT_FAST && m->rows >= PANEL && m->cols % BLOCK == 0;
  if (needs_decoding(m)) {
    in->product = k->exact[ADRT_F32];
    in->layout = X_PLAIN;
  } else if (integer && k->bytes[dtype] && feeds_gate(p, op)) {
    in->product = k->bytes[dtype];
    in->layout = X_BYTES_SPLIT;
  } else if (integer && k->fast[dtype]) {
    in->product = k->fast[dtype];
    in->layout = dtype == ADRT_NF4 ? X_WORDS_SPLIT : X_WORDS;
  } else {
    in->product = k->exact[dtype];
    in->layout = dtype == ADRT_NF4 ? X_SPLIT : X_PLAIN;
  }
}

/* Items of about ITEM_BYTES of weights, but enough of them to keep every thread busy; whole pairs of panels,
 * which the integer kernels multiply together. */
static int64_t choose_rows_per_item(const adrt_executable *e, const adrt_tensor *weight) {
  int64_t row_bytes = (int64_t)(weight->bytes / (uint64_t)weight->rows) + 1;
  int64_t rows = ITEM_BYTES / row_bytes, share = weight->rows / (4 * (int64_t)e->options.threads);
  if (rows > share) rows = share;
  return rows < 2 * PANEL ? 2 * PANEL : rows / (2 * PANEL) * (2 * PANEL);
}

static int find_rope_table(adrt_executable *e, instruction *in) {
  for (int32_t i = 0; i < e->n_rope_tables; i++) {
    const rope_table *t = &e->rope_tables[i];
    if (t->half == in->op.head_dim / 2 && t->factor == in->op.value[0] &&
        !memcmp(t->inverse, in->vector, (size_t)t->half * sizeof *t->inverse))
      return i;
  }
  e->rope_tables[e->n_rope_tables] =
      (rope_table){.inverse = in->vector, .half = in->op.head_dim / 2, .factor = in->op.value[0]};
  return e->n_rope_tables++;
}

static bool load_weights(adrt_executable *e, const adrt_program *p, const adrt_op *op, instruction *in) {
  const adrt_tensor *weight = &p->tensors[op->weight];
  if (op->kind == ADRT_NORM || op->kind == ADRT_ROPE) {
    if (!(in->vector = load_vector(weight))) return false;
    if (op->kind == ADRT_ROPE) in->rope_table = find_rope_table(e, in);
  } else if (is_product_or_embed(op->kind)) {
    cpu_matrix(weight, "tensor", op->weight, &in->weight, NULL);
    in->width = op->kind == ADRT_EMBED ? weight->cols : weight->rows;
    if (weight->cols > e->max_cols) e->max_cols = weight->cols;
    if (is_product(op->kind)) {
      if (op->bias != -1 && !(in->bias = load_vector(&p->tensors[op->bias]))) return false;
      choose_product(e, p, op, in);
      in->rows_per_item = choose_rows_per_item(e, weight);
    }
  }
  if (is_attach_point(op->kind) && op->target >= 0)
    e->instruction_of_target[op->target] = (int32_t)(in - e->instructions);
  return true;
}

static int place_kv(adrt_executable *e, const adrt_op *op, adrt_error *error) {
  int64_t item = e->options.kv_dtype == ADRT_F16 ? 2 : 4;
  int64_t heads = cpu_product(op->kv_heads, item, 1), tokens = e->options.page_tokens;
  int64_t k = cpu_product(heads, cpu_align(tokens, PANEL), op->head_dim);
  int64_t v = cpu_product(heads, tokens, cpu_align(op->head_dim, PANEL));
  const int64_t limit = (int64_t)1 << 46;
  if (k < 0 || v < 0 || k > limit || v > limit || e->page_bytes > limit)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "layer %d: a KV page of %d tokens, %d heads of %d is too large",
                    op->layer, e->options.page_tokens, op->kv_heads, op->head_dim);
  e->kv_layers[op->layer] =
      (kv_layer){op->kv_heads, op->head_dim, e->page_bytes, e->page_bytes + cpu_align(k, 64)};
  e->page_bytes += cpu_align(k, 64) + cpu_align(v, 64);
  if (op->heads / op->kv_heads > e->max_group) e->max_group = op->heads / op->kv_heads;
  if (op->head_dim > e->max_head) e->max_head = op->head_dim;
  return ADRT_OK;
}

static int load_instructions(adrt_executable *e, const adrt_program *p, adrt_error *error) {
  for (int32_t i = 0; i < p->n_ops; i++) {
    instruction *in = &e->instructions[e->n_instructions];
    if (p->ops[i].kind == ADRT_LOGITS) { /* LOGITS reads the rows that a GATHER before it picked */
      in->op = (adrt_op){.kind = GATHER, .a = p->ops[i].a, .b = -1, .c = -1, .out = e->n_registers - 1};
      in->width = e->widths[in->op.out] = e->widths[in->op.a];
      e->strides[in->op.out] = e->strides[in->op.a];
      in = &e->instructions[++e->n_instructions];
    }
    e->n_instructions++;
    in->op = p->ops[i];
    if (in->op.kind == ADRT_LOGITS)
      in->op.a = e->n_registers - 1;
    else
      in->width = e->widths[in->op.out];
    if (!load_weights(e, p, &p->ops[i], in))
      return cpu_fail(error, ADRT_NO_MEMORY, "no memory for the vectors of op %d", i);
    if (in->op.kind == ADRT_ATTENTION) {
      int code = place_kv(e, &in->op, error);
      if (code != ADRT_OK) return code;
    }
  }
  return ADRT_OK;
}

static bool depends_on(const adrt_op *later, const adrt_op *earlier) {
  int32_t read[3], earlier_read[3], written, earlier_written;
  registers_of(later, read, &written);
  registers_of(earlier, earlier_read, &earlier_written);
  if (written >= 0 && written == earlier_written) return true;
  for (int i = 0; i < 3; i++)
    if ((read[i] >= 0 && read[i] == earlier_written) || (written >= 0 && written == earlier_read[i]))
      return true;
  return false;
}

static void cut_waves(adrt_executable *e) {
  e->wave_start[0] = 0;
  e->n_waves = 0;
  for (int32_t i = 0; i < e->n_instructions; i++) {
    int32_t first = e->n_waves ? e->wave_start[e->n_waves - 1] : 0;
    bool cut = e->n_waves == 0;
    for (int32_t j = first; !cut && j < i; j++)
      cut = depends_on(&e->instructions[i].op, &e->instructions[j].op);
    if (cut) e->wave_start[e->n_waves++] = i;
    int32_t products = 0;
    for (int32_t j = e->wave_start[e->n_waves - 1]; j <= i; j++)
      products += is_product(e->instructions[j].op.kind);
    if (products > e->n_slots) e->n_slots = products;
  }
  e->wave_start[e->n_waves] = e->n_instructions;
}

static bool allocate_tables(adrt_executable *e, const adrt_program *p) {
  int64_t ops = (int64_t)p->n_ops + 1; /* with GATHER */
  e->n_registers = p->n_registers + 1;
  e->n_targets = p->n_targets;
  e->n_kv_layers = p->n_ops;
  return (e->widths = cpu_calloc(e->n_registers, sizeof *e->widths)) &&
         (e->strides = cpu_calloc(e->n_registers, sizeof *e->strides)) &&
         (e->registers = cpu_calloc(e->n_registers, sizeof *e->registers)) &&
         (e->register_buffers = cpu_calloc(e->n_registers, sizeof *e->register_buffers)) &&
         (e->instructions = cpu_calloc(ops, sizeof *e->instructions)) &&
         (e->wave_start = cpu_calloc(ops + 1, sizeof *e->wave_start)) &&
         (e->taken = cpu_calloc(ops * N_PHASES, e->options.threads * (int64_t)sizeof *e->taken)) &&
         (e->instruction_of_target =
              cpu_calloc((int64_t)p->n_targets + 1, sizeof *e->instruction_of_target)) &&
         (e->rope_tables = cpu_calloc(ops, sizeof *e->rope_tables)) &&
         (e->rope_buffers = cpu_calloc(ops, sizeof *e->rope_buffers)) &&
         (e->kv_layers = cpu_calloc(ops, sizeof *e->kv_layers)) &&
         (e->scratch = cpu_calloc(e->options.threads, sizeof *e->scratch));
}

static int build(adrt_executable *e, const adrt_program *p, adrt_error *error) {
  if (!allocate_tables(e, p)) return cpu_fail(error, ADRT_NO_MEMORY, "no memory for %d operations", p->n_ops);
  for (int32_t i = 0; i < p->n_registers; i++) {
    e->widths[i] = p->register_widths[i];
    e->strides[i] = cpu_align(e->widths[i], BLOCK);
  }
  int code = load_instructions(e, p, error);
  if (code != ADRT_OK) return code;
  cut_waves(e);
  e->slot_stride = cpu_align(e->max_cols, CACHE_WAY) + STAGGER;
  if (!(e->slots = cpu_calloc((int64_t)e->n_slots, sizeof *e->slots)))
    return cpu_fail(error, ADRT_NO_MEMORY, "no memory for %d activations", e->n_slots);
  if (!(e->pool = pool_create(e->options.threads)))
    return cpu_fail(error, ADRT_NO_MEMORY, "cannot start %d threads", e->options.threads);
  snprintf(e->description, sizeof e->description, "cpu: %s %s, %d thread%s", e->kernels->name,
           e->options.precision == ADRT_FAST ? "fast" : "exact", e->options.threads,
           e->options.threads == 1 ? "" : "s");
  return ADRT_OK;
}

int cpu_load(const adrt_program *program, const adrt_options *options, adrt_executable **out,
             adrt_error *error) {
  if (!program || !options || !out) return cpu_fail(error, ADRT_BAD_ARGUMENT, "load: a NULL argument");
  *out = NULL;
  int code = cpu_validate_options(options, error);
  if (code == ADRT_OK) code = cpu_validate_program(program, error);
  if (code != ADRT_OK) return code;
  if (options->gpu_memory)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "%llu bytes of GPU memory are allowed, but the CPU has none",
                    (unsigned long long)options->gpu_memory);
  const kernels *k = cpu_choose_kernels(options->isa);
  if (!k) return cpu_fail(error, ADRT_UNAVAILABLE, "this CPU lacks instruction set %d", options->isa);
  adrt_executable *e = cpu_calloc(1, sizeof *e);
  if (!e) return cpu_fail(error, ADRT_NO_MEMORY, "no memory for an executable");
  e->options = *options;
  e->kernels = k;
  code = build(e, program, error);
  if (code == ADRT_OK)
    *out = e;
  else
    cpu_unload(e);
  return code;
}

static void free_buffers(buffer *buffers, int64_t n) {
  for (int64_t i = 0; buffers && i < n; i++) cpu_free(buffers[i].data);
  cpu_free(buffers);
}

static void free_plan(plan *p) {
  buffer *const buffers[] = {&p->run_buffer,         &p->token_segment_buffer, &p->logit_segment_buffer,
                             &p->application_buffer, &p->part_buffer,          &p->shrink_buffer,
                             &p->job_buffer,         &p->hidden_buffer};
  for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cpu_free(buffers[i]->data);
}

void cpu_unload(adrt_executable *e) {
  if (!e) return;
  pool_destroy(e->pool);
  for (int32_t i = 0; i < e->n_adapters; i++) cpu_free_adapter(e, e->adapters[i]);
  cpu_free(e->adapter_buffer.data);
  for (int32_t i = 0; i < e->n_pages; i++) cpu_free(e->pages[i]);
  cpu_free(e->pages);
  for (int32_t i = 0; e->instructions && i < e->n_instructions; i++) {
    cpu_free(e->instructions[i].vector);
    cpu_free(e->instructions[i].bias);
  }
  free_buffers(e->register_buffers, e->n_registers);
  free_buffers(e->rope_buffers, e->n_rope_tables);
  free_buffers(e->slots, e->n_slots);
  free_buffers(e->scratch, e->options.threads);
  free_plan(&e->plan);
  cpu_free(e->widths);
  cpu_free(e->strides);
  cpu_free(e->registers);
  cpu_free(e->instructions);
  cpu_free(e->wave_start);
  cpu_free(e->taken);
  cpu_free(e->instruction_of_target);
  cpu_free(e->rope_tables);
  cpu_free(e->kv_layers);
  cpu_free(e);
}
