/* The plan of a step: which adapter acts on which tokens of which operation. */
#include <string.h>

#include "executable.h"

/* Cut `count` rows, row i belonging to run run_of(i), where the adapter stack changes. */
static int64_t cut_segments(const adrt_batch *b, const int32_t *run_of_token, const int32_t *rows,
                            int64_t count, segment *out) {
  int64_t n = 0;
  int32_t previous = -1;
  for (int64_t i = 0; i < count; i++) {
    int32_t run = run_of_token[rows ? rows[i] : i];
    if (previous >= 0 && cpu_same_stack(b, run, previous)) {
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

static bool is_in_place(const instruction *in) { return in->op.kind == ADRT_LINEAR && in->op.out == in->op.a; }

bool cpu_plan_hidden(plan *p, int64_t count, int64_t each) {
  int64_t floats = cpu_product(count, each, 1);
  if (floats < 0 || p->n_hidden > ((int64_t)1 << 50) - floats) return false;
  p->n_hidden += floats;
  return true;
}

static bool plan_application(plan *p, instruction *in, const segment *where, const attachment *what) {
  if (!buffer_grow(&p->application_buffer, p->n_applications + 1, sizeof *p->applications)) return false;
  p->applications = p->application_buffer.data;
  p->applications[p->n_applications++] = (application){where, what};
  in->n_applications++;
  in->maps_input |= what->g_in || what->rotation;
  in->adds_constant |= what->c != NULL;
  return true;
}

static bool plan_instruction(adrt_executable *e, instruction *in) {
  plan *p = &e->plan;
  bool logits = in->op.kind == ADRT_LOGITS;
  const segment *segments = logits ? p->logit_segments : p->token_segments;
  int64_t n = logits ? p->n_logit_segments : p->n_token_segments;
  in->first_application = p->n_applications;
  in->n_applications = 0;
  in->maps_input = false;
  in->adds_constant = in->bias != NULL;
  for (int64_t s = 0; in->op.target >= 0 && s < n; s++) {
    for (int32_t i = 0; i < segments[s].n; i++) {
      const adapter *a = e->adapters[p->batch->stacks[segments[s].first + i]];
      const attachment *what = a->by_target[in->op.target];
      if (what && !plan_application(p, in, &segments[s], what)) return false;
    }
  }
  in->kept_at = in->n_applications && is_in_place(in) ? p->n_hidden : -1;
  return in->kept_at < 0 || cpu_plan_hidden(p, tokens_of(e, in), e->strides[in->op.a]);
}

static bool plan_wave(adrt_executable *e, int32_t first, int32_t end) {
  plan *p = &e->plan;
  p->n_hidden = 0;
  for (int32_t i = first; i < end; i++)
    if (is_product(e->instructions[i].op.kind) && !plan_instruction(e, &e->instructions[i])) return false;
  bool ok = cpu_plan_parts(e, e->instructions + first, e->instructions + end);
  if (p->n_hidden > p->most_hidden) p->most_hidden = p->n_hidden;
  return ok;
}

/* Where each product of a wave reads its activations: the register itself, a slot of its own, or one it
 * shares. Its adapters' terms read the register, or a copy where the output replaces it. */
static void plan_inputs(adrt_executable *e, int32_t first, int32_t end) {
  int32_t slot = 0;
  for (int32_t i = first; i < end; i++) {
    instruction *in = &e->instructions[i];
    if (!is_product(in->op.kind)) continue;
    in->prepared = NULL;
    in->x = e->registers[in->op.a];
    in->x_stride = in->plain_stride = e->strides[in->op.a];
    in->kept = in->kept_at < 0 ? NULL : e->plan.hidden + in->kept_at;
    in->plain = in->kept ? in->kept : in->x;
    if (in->layout == X_PLAIN && !in->maps_input && !is_in_place(in)) continue;
    in->x_stride = e->slot_stride;
    const instruction *same = NULL;
    for (int32_t j = first; j < i && !same && !in->maps_input; j++) {
      const instruction *other = &e->instructions[j];
      if (is_product(other->op.kind) && other->prepared && !other->maps_input && other->op.a == in->op.a &&
          other->layout == in->layout)
        same = other;
    }
    if (!same) in->prepared = e->slots[slot++].data;
    in->x = same ? same->prepared : in->prepared;
  }
}

static int64_t scratch_needed(const adrt_executable *e, const adrt_batch *b) {
  int64_t context = 0, floats = cpu_linear_scratch(e);
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
  p->n_applications = p->n_parts = p->n_shrinks = p->n_jobs = p->most_hidden = 0;
  bool ok = reserve_room(e, b) && plan_segments(p, b);
  for (int32_t w = 0; ok && w < e->n_waves; w++) ok = plan_wave(e, e->wave_start[w], e->wave_start[w + 1]);
  ok = ok && buffer_reserve(&p->hidden_buffer, p->most_hidden, sizeof *p->hidden);
  if (!ok)
    return cpu_fail(error, ADRT_NO_MEMORY, "no memory for a step of %d tokens and %d logit rows", b->n_tokens,
                    b->n_logits);
  p->hidden = p->hidden_buffer.data;
  for (int32_t w = 0; w < e->n_waves; w++) plan_inputs(e, e->wave_start[w], e->wave_start[w + 1]);
  return ADRT_OK;
}
