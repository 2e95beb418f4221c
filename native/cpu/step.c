/* One step: all threads walk the waves together (executable.h). */
#include <string.h>

#include "executable.h"

static int64_t items(const adrt_executable *e, const instruction *in, enum phase phase) {
  if (is_product(in->op.kind)) return cpu_linear_items(e, in, phase);
  if (in->op.kind == ADRT_ATTENTION) return cpu_attention_items(e, in, phase);
  return phase == COMPUTE ? items_of(tokens_of(e, in), TOKENS_PER_ITEM) : 0;
}

static void token_op(adrt_executable *e, const instruction *in, int64_t t, float *scratch) {
  const adrt_op *op = &in->op;
  const kernels *k = e->kernels;
  switch (op->kind) {
    case ADRT_EMBED: cpu_embed(e, in, t, scratch); break;
    case ADRT_ROPE: cpu_rope(e, in, t); break;
    case ADRT_NORM: cpu_norm(e, in, t); break;
    case ADRT_GATED:
      k->gated(op->mode, row_of(e, op->a, t), row_of(e, op->b, t), in->width, row_of(e, op->out, t));
      break;
    case ADRT_ADD: {
      const float *a = row_of(e, op->a, t), *b = row_of(e, op->b, t);
      float *out = row_of(e, op->out, t);
      for (int64_t i = 0; i < in->width; i++) out[i] = a[i] + b[i];
      break;
    }
    case ADRT_SCALE:
      k->scale(row_of(e, op->a, t), op->value[0], op->value[1], in->width, row_of(e, op->out, t));
      break;
    default: /* GATHER */
      memcpy(row_of(e, op->out, t), row_of(e, op->a, e->plan.batch->logit_rows[t]),
             (size_t)in->width * sizeof(float));
  }
}

static void run_item(adrt_executable *e, const instruction *in, enum phase phase, int64_t item,
                     float *scratch) {
  if (is_product(in->op.kind)) {
    cpu_linear(e, in, phase, item, scratch);
  } else if (in->op.kind == ADRT_ATTENTION) {
    cpu_attention(e, in, phase, item, scratch);
  } else {
    int64_t first = item * TOKENS_PER_ITEM, n = tokens_of(e, in);
    for (int64_t t = first; t < first + TOKENS_PER_ITEM && t < n; t++) token_op(e, in, t, scratch);
  }
}

/* Items of a thread's share, by how many it and others have taken of its two ends: its own next one, or for others a part
 * of what is left, long ones first, that they too walk in the order of memory. Returns how many, 0 when none is left. */
static int64_t take(atomic_ullong *taken, int64_t share, int32_t parts, int64_t *first) {
  unsigned long long old = atomic_load_explicit(taken, memory_order_relaxed), more;
  int64_t begun, ended, count;
  do {
    begun = (int64_t)(old & UINT32_MAX);
    ended = (int64_t)(old >> 32);
    if (begun + ended >= share) return 0;
    count = parts ? (share - begun - ended) / parts : 1;
    if (count < 1) count = 1;
    more = parts ? (unsigned long long)count << 32 : 1;
  } while (!atomic_compare_exchange_weak_explicit(taken, &old, old + more, memory_order_relaxed,
                                                  memory_order_relaxed));
  *first = parts ? share - ended - count : begun;
  return count;
}

/* The next items of a wave's phase for a thread. Each walks a share of its own, so that it streams through consecutive
 * weights and its prefetches are its own, and helps the others from the ends of theirs, so that all finish together. */
static int64_t next_items(adrt_executable *e, int32_t wave, enum phase phase, int32_t thread, int64_t total,
                          int64_t *first) {
  int32_t threads = e->options.threads;
  for (int32_t i = 0; i < threads; i++) {
    int32_t owner = (thread + i) % threads;
    int64_t start = total * owner / threads, share = total * (owner + 1) / threads - start;
    atomic_ullong *taken = &e->taken[(owner * e->n_waves + wave) * N_PHASES + phase];
    int64_t count = take(taken, share, i ? 2 * threads : 0, first);
    if (!count) continue;
    *first += start;
    return count;
  }
  return 0;
}

/* Take items of a wave's phase until none is left; true when there were any, for any thread. */
static bool run_phase(adrt_executable *e, int32_t wave, enum phase phase, int32_t thread) {
  int32_t first = e->wave_start[wave], end = e->wave_start[wave + 1];
  int64_t total = 0, begin, taken;
  for (int32_t i = first; i < end; i++) total += items(e, &e->instructions[i], phase);
  if (!total) return false;
  while ((taken = next_items(e, wave, phase, thread, total, &begin))) {
    for (int64_t i = begin; i < begin + taken; i++) {
      const instruction *in = &e->instructions[first];
      int64_t item = i;
      for (int64_t count; item >= (count = items(e, in, phase)); in++) item -= count;
      run_item(e, in, phase, item, e->scratch[thread].data);
    }
  }
  return true;
}

static void walk_waves(void *executable, int32_t thread) {
  adrt_executable *e = executable;
  for (int32_t wave = 0; wave < e->n_waves; wave++)
    for (enum phase phase = PREPARE; phase < N_PHASES; phase++)
      if (run_phase(e, wave, phase, thread)) pool_barrier(e->pool);
}

/* Rows of the smallest embedding. */
static int64_t vocabulary(const adrt_executable *e) {
  int64_t least = INT64_MAX;
  for (int32_t i = 0; i < e->n_instructions; i++) {
    const instruction *in = &e->instructions[i];
    if (in->op.kind == ADRT_EMBED && in->weight.rows < least) least = in->weight.rows;
  }
  return least;
}

static bool attached(const void *owner, int32_t handle) {
  const adrt_executable *e = owner;
  return handle >= 0 && handle < e->n_adapters && e->adapters[handle];
}

int cpu_step(adrt_executable *e, const adrt_batch *batch, adrt_error *error) {
  if (!e || !batch) return cpu_fail(error, ADRT_BAD_ARGUMENT, "step: a NULL argument");
  if (!pool_is_ours(e->pool))
    return cpu_fail(error, ADRT_UNAVAILABLE,
                    "step: the model was loaded by the parent of this forked process");
  const batch_limits limits = {vocabulary(e), e->options.page_tokens, e->n_pages, attached, e};
  int code = cpu_validate_batch(batch, &limits, error);
  if (code == ADRT_OK) code = cpu_plan(e, batch, error);
  if (code != ADRT_OK) return code;
  cpu_fill_rope_tables(e);
  for (int32_t i = 0; i < e->options.threads * e->n_waves * N_PHASES; i++)
    atomic_store_explicit(&e->taken[i], 0, memory_order_relaxed);
  pool_run(e->pool, walk_waves, e);
  e->plan.batch = NULL;
  return ADRT_OK;
}
