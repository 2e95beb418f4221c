/* Every number of a program is checked here, before anything is allocated or read. */
#include <stdlib.h>

#include "common.h"

enum { MAX_THREADS = 1024, MAX_PAGE_TOKENS = 1 << 16 };

typedef struct {
  const adrt_program *program;
  const adrt_op *op;
  int32_t index;
  bool *written; /* [n_registers]: some earlier operation wrote it */
  adrt_error *error;
} check;

static const char *kind_name(int32_t kind) {
  static const char *const names[] = {"?",         "EMBED", "NORM", "LINEAR", "ROPE",
                                      "ATTENTION", "GATED", "ADD",  "SCALE",  "LOGITS"};
  return kind >= ADRT_EMBED && kind <= ADRT_LOGITS ? names[kind] : names[0];
}

static int reg_ok(const check *c, const char *role, int32_t reg, int64_t width) {
  if (reg < 0 || reg >= c->program->n_registers)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (%s): %s is register %d of %d", c->index,
                    kind_name(c->op->kind), role, reg, c->program->n_registers);
  int64_t found = c->program->register_widths[reg];
  if (found != width)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (%s): %s, register %d, is %lld wide, expected %lld",
                    c->index, kind_name(c->op->kind), role, reg, (long long)found, (long long)width);
  return ADRT_OK;
}

static int source_ok(const check *c, const char *role, int32_t reg, int64_t width) {
  int code = reg_ok(c, role, reg, width);
  if (code == ADRT_OK && !c->written[reg])
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (%s): %s, register %d, is read before it is written",
                    c->index, kind_name(c->op->kind), role, reg);
  return code;
}

static int destination_ok(const check *c, int64_t width) {
  int code = reg_ok(c, "out", c->op->out, width);
  if (code == ADRT_OK) c->written[c->op->out] = true;
  return code;
}

static int64_t width_of(const check *c, int32_t reg) {
  return reg >= 0 && reg < c->program->n_registers ? c->program->register_widths[reg] : -1;
}

static int tensor_ok(const check *c, const char *role, int32_t tensor, int64_t rows, int64_t cols) {
  if (tensor < 0 || tensor >= c->program->n_tensors)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (%s): %s is tensor %d of %d", c->index,
                    kind_name(c->op->kind), role, tensor, c->program->n_tensors);
  const adrt_tensor *t = &c->program->tensors[tensor];
  if ((rows >= 0 && t->rows != rows) || (cols >= 0 && t->cols != cols))
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT,
                    "op %d (%s): %s, tensor %d, is [%lld, %lld], expected [%lld, %lld]", c->index,
                    kind_name(c->op->kind), role, tensor, (long long)t->rows, (long long)t->cols,
                    (long long)(rows >= 0 ? rows : t->rows), (long long)(cols >= 0 ? cols : t->cols));
  return ADRT_OK;
}

static int heads_ok(const check *c, int32_t kv_heads) {
  const adrt_op *op = c->op;
  if (op->heads < 1 || op->head_dim < 1 || kv_heads < 1 || op->heads % kv_heads)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (%s): impossible %d heads, %d KV heads of %d",
                    c->index, kind_name(op->kind), op->heads, kv_heads, op->head_dim);
  return ADRT_OK;
}

#define TRY(expression)                       \
  do {                                        \
    int try_code = (expression);              \
    if (try_code != ADRT_OK) return try_code; \
  } while (0)

static int embed_ok(const check *c) {
  TRY(tensor_ok(c, "weight", c->op->weight, -1, width_of(c, c->op->out)));
  return destination_ok(c, width_of(c, c->op->out));
}

static int norm_ok(const check *c) {
  int64_t width = width_of(c, c->op->out);
  TRY(tensor_ok(c, "weight", c->op->weight, 1, width));
  TRY(source_ok(c, "a", c->op->a, width));
  return destination_ok(c, width);
}

static int linear_ok(const check *c) {
  int64_t rows = c->op->kind == ADRT_LINEAR ? width_of(c, c->op->out) : -1;
  TRY(tensor_ok(c, "weight", c->op->weight, rows, width_of(c, c->op->a)));
  TRY(source_ok(c, "a", c->op->a, c->program->tensors[c->op->weight].cols));
  if (c->op->bias != -1) TRY(tensor_ok(c, "bias", c->op->bias, 1, c->program->tensors[c->op->weight].rows));
  return c->op->kind == ADRT_LINEAR ? destination_ok(c, rows) : ADRT_OK;
}

static int rope_ok(const check *c) {
  const adrt_op *op = c->op;
  TRY(heads_ok(c, 1));
  if (op->head_dim % 2)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (ROPE): head_dim %d is odd", c->index, op->head_dim);
  TRY(tensor_ok(c, "weight", op->weight, 1, op->head_dim / 2));
  if (c->program->tensors[op->weight].dtype != ADRT_F32)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (ROPE): inverse frequencies are %s, expected f32",
                    c->index, cpu_dtype_name(c->program->tensors[op->weight].dtype));
  TRY(source_ok(c, "a", op->a, (int64_t)op->heads * op->head_dim));
  return destination_ok(c, (int64_t)op->heads * op->head_dim);
}

static int attention_ok(const check *c) {
  const adrt_op *op = c->op;
  TRY(heads_ok(c, op->kv_heads));
  if (op->layer < 0 || op->layer >= c->program->n_ops)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (ATTENTION): layer %d of a program of %d operations",
                    c->index, op->layer, c->program->n_ops);
  for (int32_t i = 0; i < c->index; i++) {
    const adrt_op *other = &c->program->ops[i];
    if (other->kind == ADRT_ATTENTION && other->layer == op->layer)
      return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (ATTENTION): layer %d belongs to op %d", c->index,
                      op->layer, i);
  }
  TRY(source_ok(c, "a", op->a, (int64_t)op->heads * op->head_dim));
  TRY(source_ok(c, "b", op->b, (int64_t)op->kv_heads * op->head_dim));
  TRY(source_ok(c, "c", op->c, (int64_t)op->kv_heads * op->head_dim));
  return destination_ok(c, (int64_t)op->heads * op->head_dim);
}

static int elementwise_ok(const check *c) {
  const adrt_op *op = c->op;
  int64_t width = width_of(c, op->out);
  TRY(source_ok(c, "a", op->a, width));
  if (op->kind != ADRT_SCALE) TRY(source_ok(c, "b", op->b, width));
  if (op->kind == ADRT_GATED && op->mode != ADRT_SILU && op->mode != ADRT_GELU_TANH)
    return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d (GATED): unknown activation %d", c->index, op->mode);
  return destination_ok(c, width);
}

static int op_ok(const check *c) {
  switch (c->op->kind) {
    case ADRT_EMBED: return embed_ok(c);
    case ADRT_NORM: return norm_ok(c);
    case ADRT_LINEAR:
    case ADRT_LOGITS: return linear_ok(c);
    case ADRT_ROPE: return rope_ok(c);
    case ADRT_ATTENTION: return attention_ok(c);
    case ADRT_GATED:
    case ADRT_ADD:
    case ADRT_SCALE: return elementwise_ok(c);
    default: return cpu_fail(c->error, ADRT_BAD_ARGUMENT, "op %d: unknown kind %d", c->index, c->op->kind);
  }
}

static int ops_ok(const adrt_program *p, bool *written, int32_t *uses, adrt_error *error) {
  for (int32_t i = 0; i < p->n_ops; i++) {
    const adrt_op *op = &p->ops[i];
    check c = {p, op, i, written, error};
    TRY(op_ok(&c));
    if ((op->kind == ADRT_LOGITS) != (i == p->n_ops - 1))
      return cpu_fail(error, ADRT_BAD_ARGUMENT,
                      "op %d of %d (%s): LOGITS must be the last operation, and only that", i, p->n_ops,
                      kind_name(op->kind));
    if (!is_attach_point(op->kind) || op->target == -1) continue;
    if (op->target < 0 || op->target >= p->n_targets || uses[op->target]++)
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "op %d (%s): target %d is %s", i, kind_name(op->kind),
                      op->target,
                      op->target >= 0 && op->target < p->n_targets ? "named twice" : "out of range");
  }
  for (int32_t i = 0; i < p->n_targets; i++)
    if (!uses[i])
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "target %d of %d is named by no op", i, p->n_targets);
  return ADRT_OK;
}

static int counts_ok(const adrt_program *p, adrt_error *error) {
  if (p->n_registers < 1 || p->n_tensors < 1 || p->n_ops < 1 || p->n_targets < 0 || p->n_targets > p->n_ops ||
      p->n_registers > 1 << 16 || p->n_ops > 1 << 16)
    return cpu_fail(error, ADRT_BAD_ARGUMENT,
                    "impossible program: %d registers, %d tensors, %d ops, %d targets", p->n_registers,
                    p->n_tensors, p->n_ops, p->n_targets);
  if (!p->register_widths || !p->tensors || !p->ops)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "the program's registers, tensors or ops are NULL");
  for (int32_t i = 0; i < p->n_registers; i++)
    if (p->register_widths[i] < 1 || p->register_widths[i] > (int64_t)1 << 40)
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "register %d: impossible width %lld", i,
                      (long long)p->register_widths[i]);
  matrix ignored;
  for (int32_t i = 0; i < p->n_tensors; i++) TRY(cpu_matrix(&p->tensors[i], "tensor", i, &ignored, error));
  return ADRT_OK;
}

int cpu_validate_program(const adrt_program *p, adrt_error *error) {
  TRY(counts_ok(p, error));
  bool *written = calloc((size_t)p->n_registers, sizeof *written);
  int32_t *uses = calloc((size_t)p->n_targets + 1, sizeof *uses);
  int code = written && uses ? ops_ok(p, written, uses, error)
                             : cpu_fail(error, ADRT_NO_MEMORY, "no memory to check %d operations", p->n_ops);
  free(written);
  free(uses);
  return code;
}

int cpu_validate_options(const adrt_options *o, adrt_error *error) {
  if (o->threads < 1 || o->threads > MAX_THREADS)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "%d threads, expected 1 to %d", o->threads, MAX_THREADS);
  if (o->precision != ADRT_EXACT && o->precision != ADRT_FAST)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "unknown precision %d", o->precision);
  if (o->kv_dtype != ADRT_F16 && o->kv_dtype != ADRT_F32)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "KV dtype %d (%s), expected f16 or f32", o->kv_dtype,
                    cpu_dtype_name(o->kv_dtype));
  if (o->page_tokens < 1 || o->page_tokens > MAX_PAGE_TOKENS || (o->page_tokens & (o->page_tokens - 1)))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "pages of %d tokens, expected a power of two up to %d",
                    o->page_tokens, MAX_PAGE_TOKENS);
  if (o->isa < ADRT_ISA_AUTO || o->isa > ADRT_ISA_AVX_VNNI)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "unknown instruction set %d", o->isa);
  return ADRT_OK;
}
