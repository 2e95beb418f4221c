/* A step's batch: every number checked, then the plan of which adapter acts on which tokens of which
 * operation. */
#include <string.h>

#include "executable.h"

static int starts_ok(const char *name, const int32_t *start, int32_t n_runs, int32_t end, adrt_error *error) {
  if (start[0] != 0) return cpu_fail(error, ADRT_BAD_ARGUMENT, "%s[0] is %d, expected 0", name, start[0]);
  for (int32_t r = 0; r < n_runs; r++)
    if (start[r + 1] < start[r])
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "%s[%d] is %d, less than the %d before it", name, r + 1,
                      start[r + 1], start[r]);
  if (end >= 0 && start[n_runs] != end)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "%s ends at %d, expected %d", name, start[n_runs], end);
  return ADRT_OK;
}

static int tokens_ok(const adrt_executable *e, const adrt_batch *b, adrt_error *error) {
  for (int32_t i = 0; i < e->n_instructions; i++) {
    const instruction *in = &e->instructions[i];
    for (int32_t t = 0; in->op.kind == ADRT_EMBED && t < b->n_tokens; t++)
      if (b->tokens[t] < 0 || b->tokens[t] >= in->weight.rows)
        return cpu_fail(error, ADRT_BAD_ARGUMENT, "token %d is %d, the vocabulary has %lld", t, b->tokens[t],
                        (long long)in->weight.rows);
  }
  return ADRT_OK;
}

static int run_ok(const adrt_executable *e, const adrt_batch *b, int32_t r, adrt_error *error) {
  int32_t first = b->run_start[r], end = b->run_start[r + 1];
  for (int32_t t = first; t < end; t++) {
    int64_t expected = t == first ? b->positions[t] : (int64_t)b->positions[t - 1] + 1;
    if (b->positions[t] < 0 || b->positions[t] != expected)
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "run %d: token %d has position %d, expected %lld", r, t,
                      b->positions[t], (long long)(expected < 0 ? 0 : expected));
  }
  int32_t n_pages = b->page_start[r + 1] - b->page_start[r];
  int32_t needed = end > first ? b->positions[end - 1] / e->options.page_tokens + 1 : 0;
  if (n_pages < needed)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "run %d: position %d needs %d KV pages of %d tokens, it has %d",
                    r, b->positions[end - 1], needed, e->options.page_tokens, n_pages);
  for (int32_t i = b->page_start[r]; i < b->page_start[r + 1]; i++)
    if (b->pages[i] < 0 || b->pages[i] >= e->n_pages)
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "run %d: KV page %d is not reserved, %d pages are", r,
                      b->pages[i], e->n_pages);
  for (int32_t i = b->stack_start[r]; i < b->stack_start[r + 1]; i++)
    if (b->stacks[i] < 0 || b->stacks[i] >= e->n_adapters || !e->adapters[b->stacks[i]])
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "run %d: no adapter with handle %d", r, b->stacks[i]);
  return ADRT_OK;
}

static int pointers_ok(const adrt_batch *b, adrt_error *error) {
  if (b->n_tokens < 1 || b->n_runs < 1 || b->n_logits < 0)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "impossible batch: %d tokens, %d runs, %d logit rows",
                    b->n_tokens, b->n_runs, b->n_logits);
  if (!b->tokens || !b->positions || !b->run_start || !b->page_start || !b->stack_start ||
      (b->n_logits && (!b->logit_rows || !b->logits)))
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "an array of the batch is NULL");
  return ADRT_OK;
}

int cpu_validate_batch(const adrt_executable *e, const adrt_batch *b, adrt_error *error) {
  int code = pointers_ok(b, error);
  if (code == ADRT_OK) code = starts_ok("run_start", b->run_start, b->n_runs, b->n_tokens, error);
  if (code == ADRT_OK) code = starts_ok("page_start", b->page_start, b->n_runs, -1, error);
  if (code == ADRT_OK) code = starts_ok("stack_start", b->stack_start, b->n_runs, -1, error);
  if (code == ADRT_OK &&
      ((b->page_start[b->n_runs] && !b->pages) || (b->stack_start[b->n_runs] && !b->stacks)))
    code = cpu_fail(error, ADRT_BAD_ARGUMENT, "pages or stacks is NULL");
  if (code == ADRT_OK) code = tokens_ok(e, b, error);
  for (int32_t r = 0; code == ADRT_OK && r < b->n_runs; r++) code = run_ok(e, b, r, error);
  for (int32_t i = 0; code == ADRT_OK && i < b->n_logits; i++)
    if (b->logit_rows[i] < 0 || b->logit_rows[i] >= b->n_tokens)
      code = cpu_fail(error, ADRT_BAD_ARGUMENT, "logit row %d is token %d of %d", i, b->logit_rows[i],
                      b->n_tokens);
  return code;
}

static bool same_stack(const adrt_batch *b, int32_t run, int32_t other) {
  int32_t n = b->stack_start[run + 1] - b->stack_start[run];
  if (n != b->stack_start[other + 1] - b->stack_start[other]) return false;
  return !n || !memcmp(b->stacks + b->stack_start[run], b->stacks + b->stack_start[other],
                       (size_t)n * sizeof *b->stacks);
}

/* Cut `count` rows, row i belonging to run run_of(i), where the adapter stack changes. */
static int64_t cut_segments(const adrt_batch *b, const int32_t *run_of_token, const int32_t *rows,
                            int64_t count, segment *out) {
  int64_t n = 0;
  int32_t previous = -1;
  for (int64_t i = 0; i < count; i++) {
    int32_t run = run_of_token[rows ? rows[i] : i];
    if (previous >= 0 && same_stack(b, run, previous)) {
      out[n - 1].count++;
    } else {
      int32_t first = b->stack_start[run];
      out[n++] = (segment){i, 1, first, b->stack_start[run + 1] - first};
    }
    previous = run;
  }
  return n;
}

static bool plan_segments(plan *p, const adrt_batch *b) {
  if (!buffer_reserve(&p->run_buffer, b->n_tokens, sizeof *p->run_of_token) ||
      !buffer_reserve(&p->token_segment_buffer, b->n_tokens, sizeof *p->token_segments) ||
      !buffer_reserve(&p->logit_segment_buffer, b->n_logits, sizeof *p->logit_segments))
    return false;
  p->run_of_token = p->run_buffer.data;
  p->token_segments = p->token_segment_buffer.data;
  p->logit_segments = p->logit_segment_buffer.data;
  for (int32_t r = 0; r < b->n_runs; r++)
    for (int32_t t = b->run_start[r]; t < b->run_start[r + 1]; t++) p->run_of_token[t] = r;
  p->n_token_segments = cut_segments(b, p->run_of_token, NULL, b->n_tokens, p->token_segments);
  p->n_logit_segments = cut_segments(b, p->run_of_token, b->logit_rows, b->n_logits, p->logit_segments);
  return true;
}

static bool plan_application(plan *p, instruction *in, const segment *where, const attachment *what) {
  if (!buffer_grow(&p->application_buffer, p->n_applications + 1, sizeof *p->applications)) return false;
  p->applications = p->application_buffer.data;
  p->applications[p->n_applications++] = (application){where, what, p->n_hidden};
  in->n_applications++;
  if (what->g_in) in->scaled_input = true;
  for (int32_t k = 0; k < what->n_terms; k++) {
    const term *t = &what->terms[k];
    int64_t jobs = items_of(t->v.rows, SHRINK_ROWS_PER_ITEM);
    if (!buffer_grow(&p->shrink_buffer, p->n_shrinks + jobs, sizeof *p->shrinks)) return false;
    p->shrinks = p->shrink_buffer.data;
    for (int64_t row = 0; row < t->v.rows; row += SHRINK_ROWS_PER_ITEM) {
      int64_t left = t->v.rows - row;
      p->shrinks[p->n_shrinks++] =
          (shrink_job){where, t, p->n_hidden, row, left < SHRINK_ROWS_PER_ITEM ? left : SHRINK_ROWS_PER_ITEM};
    }
    in->n_shrinks += jobs;
    int64_t hidden = cpu_product(where->count, t->v.rows, 1);
    if (hidden < 0 || p->n_hidden > ((int64_t)1 << 50) - hidden) return false;
    p->n_hidden += hidden;
  }
  return true;
}

static bool plan_instruction(adrt_executable *e, instruction *in) {
  plan *p = &e->plan;
  bool logits = in->op.kind == ADRT_LOGITS;
  const segment *segments = logits ? p->logit_segments : p->token_segments;
  int64_t n = logits ? p->n_logit_segments : p->n_token_segments;
  in->first_application = p->n_applications;
  in->first_shrink = p->n_shrinks;
  in->n_applications = in->n_shrinks = 0;
  in->scaled_input = false;
  for (int64_t s = 0; in->op.target >= 0 && s < n; s++) {
    for (int32_t i = 0; i < segments[s].n; i++) {
      const adapter *a = e->adapters[p->batch->stacks[segments[s].first + i]];
      const attachment *what = a->by_target[in->op.target];
      if (what && !plan_application(p, in, &segments[s], what)) return false;
    }
  }
  return true;
}

/* Where each product of a wave reads its activations: the register itself, a slot of its own, or one it
 * shares. */
static void plan_inputs(adrt_executable *e, int32_t first, int32_t end) {
  int32_t slot = 0;
  for (int32_t i = first; i < end; i++) {
    instruction *in = &e->instructions[i];
    if (!is_product(in->op.kind)) continue;
    in->prepared = NULL;
    in->x = e->registers[in->op.a];
    in->x_stride = e->strides[in->op.a];
    bool in_place = in->op.kind == ADRT_LINEAR && in->op.out == in->op.a;
    if (in->layout == X_PLAIN && !in->scaled_input && !in_place) continue;
    in->x_stride = e->slot_stride;
    const instruction *same = NULL;
    for (int32_t j = first; j < i && !same && !in->scaled_input; j++) {
      const instruction *other = &e->instructions[j];
      if (is_product(other->op.kind) && other->prepared && !other->scaled_input && other->op.a == in->op.a &&
          other->layout == in->layout)
        same = other;
    }
    if (!same) in->prepared = e->slots[slot++].data;
    in->x = same ? same->prepared : in->prepared;
  }
}

static int64_t scratch_needed(const adrt_executable *e, const adrt_batch *b) {
  int64_t context = 0, floats = e->slot_stride > e->max_rank ? e->slot_stride : e->max_rank;
  for (int32_t t = 0; t < b->n_tokens; t++)
    if (b->positions[t] >= context) context = (int64_t)b->positions[t] + 1;
  int64_t attention = cpu_attention_scratch(e, context);
  return attention > floats ? attention : floats;
}

static bool reserve_room(adrt_executable *e, const adrt_batch *b) {
  int64_t n = b->n_tokens > b->n_logits ? b->n_tokens : b->n_logits;
  for (int32_t i = 0; i < e->n_registers; i++) {
    if (!buffer_reserve(&e->register_buffers[i], n, e->strides[i] * (int64_t)sizeof(float))) return false;
    e->registers[i] = e->register_buffers[i].data;
  }
  for (int32_t i = 0; i < e->n_slots; i++)
    if (!buffer_reserve(&e->slots[i], n, e->slot_stride * (int64_t)sizeof(float))) return false;
  for (int32_t i = 0; i < e->n_rope_tables; i++) {
    rope_table *t = &e->rope_tables[i];
    if (!buffer_reserve(&e->rope_buffers[i], n, 2 * t->half * (int64_t)sizeof(float))) return false;
    t->cos_sin = e->rope_buffers[i].data;
  }
  int64_t scratch = scratch_needed(e, b);
  for (int32_t i = 0; i < e->options.threads; i++)
    if (!buffer_reserve(&e->scratch[i], scratch, sizeof(float))) return false;
  return true;
}

int cpu_plan(adrt_executable *e, const adrt_batch *b, adrt_error *error) {
  plan *p = &e->plan;
  p->batch = b;
  p->n_applications = p->n_shrinks = p->n_hidden = 0;
  bool ok = reserve_room(e, b) && plan_segments(p, b);
  for (int32_t i = 0; ok && i < e->n_instructions; i++)
    if (is_product(e->instructions[i].op.kind)) ok = plan_instruction(e, &e->instructions[i]);
  ok = ok && buffer_reserve(&p->hidden_buffer, p->n_hidden, sizeof *p->hidden);
  if (!ok)
    return cpu_fail(error, ADRT_NO_MEMORY, "no memory for a step of %d tokens and %d logit rows", b->n_tokens,
                    b->n_logits);
  p->hidden = p->hidden_buffer.data;
  for (int32_t w = 0; w < e->n_waves; w++) plan_inputs(e, e->wave_start[w], e->wave_start[w + 1]);
  return ADRT_OK;
}
