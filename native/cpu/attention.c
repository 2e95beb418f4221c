/* Rotary embedding, and attention over the paged KV cache.
 *
 * In a page, a layer's K is [kv_heads][ceil(page_tokens/16)][head_dim][16] and its V is
 * [kv_heads][ceil(head_dim/16)][page_tokens][16], so that q k^T and p v both add up along panels, 16 sums in a
 * vector. Queries of a run go through the pages together, and each meets them one after the other, whatever else
 * is in the batch.
 */
#include <math.h>
#include <string.h>

#include "executable.h"

void cpu_fill_rope_tables(adrt_executable *e) {
  const adrt_batch *b = e->plan.batch;
  for (int32_t i = 0; i < e->n_rope_tables; i++) {
    const rope_table *t = &e->rope_tables[i];
    for (int32_t token = 0; token < b->n_tokens; token++) {
      float *cosines = t->cos_sin + 2 * t->half * token, *sines = cosines + t->half;
      for (int64_t j = 0; j < t->half; j++) {
        float angle = (float)b->positions[token] * t->inverse[j];
        cosines[j] = (float)cos((double)angle) * t->factor;
        sines[j] = (float)sin((double)angle) * t->factor;
      }
    }
  }
}

void cpu_rope(adrt_executable *e, const instruction *in, int64_t token) {
  const rope_table *t = &e->rope_tables[in->rope_table];
  const float *cosines = t->cos_sin + 2 * t->half * token, *sines = cosines + t->half;
  const float *x = row_of(e, in->op.a, token);
  float *out = row_of(e, in->op.out, token);
  for (int32_t head = 0; head < in->op.heads; head++, x += 2 * t->half, out += 2 * t->half) {
    for (int64_t j = 0; j < t->half; j++) {
      float first = x[j], second = x[j + t->half];
      out[j] = first * cosines[j] - second * sines[j];
      out[j + t->half] = second * cosines[j] + first * sines[j];
    }
  }
}

static int64_t kv_item(const adrt_executable *e) { return e->options.kv_dtype == ADRT_F16 ? 2 : 4; }

static uint8_t *page_of(const adrt_executable *e, int64_t token, int64_t index) {
  const adrt_batch *b = e->plan.batch;
  return e->pages[b->pages[b->page_start[e->plan.run_of_token[token]] + index]];
}

static void store_item(const adrt_executable *e, float x, uint8_t *items, int64_t index) {
  if (e->options.kv_dtype == ADRT_F32)
    ((float *)(void *)items)[index] = x;
  else
    ((uint16_t *)(void *)items)[index] = cpu_f32_to_f16(x);
}

static void store(const adrt_executable *e, const instruction *in, int64_t token) {
  const kv_layer *kv = &e->kv_layers[in->op.layer];
  int64_t page_tokens = e->options.page_tokens, position = e->plan.batch->positions[token];
  int64_t slot = position % page_tokens, dim = kv->head_dim;
  int64_t k_panels = items_of(page_tokens, PANEL), v_panels = items_of(dim, PANEL);
  uint8_t *page = page_of(e, token, position / page_tokens);
  const float *k = row_of(e, in->op.b, token), *v = row_of(e, in->op.c, token);
  for (int64_t head = 0; head < kv->kv_heads; head++, k += dim, v += dim) {
    int64_t k_panel = head * k_panels + slot / PANEL;
    for (int64_t d = 0; d < dim; d++) {
      int64_t v_panel = head * v_panels + d / PANEL;
      store_item(e, k[d], page + kv->k_offset, (k_panel * dim + d) * PANEL + slot % PANEL);
      store_item(e, v[d], page + kv->v_offset, (v_panel * page_tokens + slot) * PANEL + d % PANEL);
    }
  }
}

/* The query heads of one KV head for consecutive tokens of a run, and room for their work: each is a row. */
typedef struct {
  const adrt_executable *e;
  const instruction *in;
  int64_t token, n_tokens, head, group, dim;
  int64_t score_stride;
  float *queries, *scores, *out; /* [n_tokens * group] of dim, score_stride, dim */
} query_block;

/* Rows of tokens [first, first + n) against positions [from, to): q k^T to scores, or p v onto out. */
static void meet_pages(const query_block *q, bool values, int64_t first, int64_t n, int64_t from, int64_t to) {
  const kv_layer *kv = &q->e->kv_layers[q->in->op.layer];
  int64_t page_tokens = q->e->options.page_tokens, dim = q->dim, row = first * q->group, rows = n * q->group;
  expand_kernel *expand = q->e->kernels->expand[q->e->options.kv_dtype];
  int64_t k_items = items_of(page_tokens, PANEL) * dim * PANEL, v_items = items_of(dim, PANEL) * page_tokens * PANEL;
  for (int64_t base = from; base < to; base += page_tokens) {
    int64_t count = to - base < page_tokens ? to - base : page_tokens;
    const uint8_t *page = page_of(q->e, q->token, base / page_tokens);
    float *scores = q->scores + row * q->score_stride + base;
    if (values)
      expand(page + kv->v_offset + q->head * v_items * kv_item(q->e), page_tokens * PANEL, count, dim, scores,
             q->score_stride, rows, q->out + row * dim, dim);
    else
      expand(page + kv->k_offset + q->head * k_items * kv_item(q->e), dim * PANEL, dim, count,
             q->queries + row * dim, dim, rows, scores, q->score_stride);
  }
}

/* All rows meet the pages that the first token sees whole; then each token the rest that it may see. */
static void meet_context(const query_block *q, bool values) {
  int64_t context = (int64_t)q->e->plan.batch->positions[q->token] + 1;
  int64_t shared = context / q->e->options.page_tokens * q->e->options.page_tokens;
  meet_pages(q, values, 0, q->n_tokens, 0, shared);
  for (int64_t t = 0; t < q->n_tokens; t++) meet_pages(q, values, t, 1, shared, context + t);
}

static void attend(const query_block *q) {
  const adrt_op *op = &q->in->op;
  int64_t context = (int64_t)q->e->plan.batch->positions[q->token] + 1, rows = q->n_tokens * q->group;
  size_t row_bytes = (size_t)q->dim * sizeof(float), group_bytes = (size_t)q->group * row_bytes;
  int64_t column = q->head * q->group * q->dim;
  memset(q->scores, 0, (size_t)(rows * q->score_stride) * sizeof(float));
  memset(q->out, 0, (size_t)rows * row_bytes);
  for (int64_t t = 0; t < q->n_tokens; t++)
    memcpy(q->queries + t * q->group * q->dim, row_of(q->e, op->a, q->token + t) + column, group_bytes);
  meet_context(q, false);
  for (int64_t r = 0; r < rows; r++)
    q->e->kernels->softmax(q->scores + r * q->score_stride, context + r / q->group, op->value[0], op->value[1]);
  meet_context(q, true);
  for (int64_t t = 0; t < q->n_tokens; t++)
    memcpy(row_of(q->e, op->out, q->token + t) + column, q->out + t * q->group * q->dim, group_bytes);
}

static int64_t score_stride(int64_t context) { return cpu_align(context, PANEL) + PANEL; }

int64_t cpu_attention_scratch(const adrt_executable *e, int64_t context) {
  return TOKENS_PER_ITEM * e->max_group * (2 * e->max_head + score_stride(context));
}

/* One KV head for the tokens [first, end), which may belong to several runs. */
static void attend_to_head(const adrt_executable *e, const instruction *in, int64_t first, int64_t end, int64_t head,
                           float *scratch) {
  const kv_layer *kv = &e->kv_layers[in->op.layer];
  const int32_t *run = e->plan.run_of_token, *positions = e->plan.batch->positions;
  for (int64_t t = first, next; t < end; t = next) {
    for (next = t + 1; next < end && run[next] == run[t];) next++;
    int64_t group = in->op.heads / kv->kv_heads, rows = (next - t) * group;
    float *out = scratch + rows * kv->head_dim;
    attend(&(query_block){e, in, t, next - t, head, group, kv->head_dim, score_stride(positions[next - 1] + 1),
                          scratch, out + rows * kv->head_dim, out});
  }
}

int64_t cpu_attention_items(const adrt_executable *e, const instruction *in, enum phase phase) {
  return items_of(e->plan.batch->n_tokens, TOKENS_PER_ITEM) * (phase == PREPARE ? 1 : in->op.kv_heads);
}

void cpu_attention(adrt_executable *e, const instruction *in, enum phase phase, int64_t item,
                   float *scratch) {
  int64_t heads = phase == COMPUTE ? in->op.kv_heads : 1, n = e->plan.batch->n_tokens;
  int64_t first = item / heads * TOKENS_PER_ITEM, end = first + TOKENS_PER_ITEM < n ? first + TOKENS_PER_ITEM : n;
  if (phase == COMPUTE) {
    attend_to_head(e, in, first, end, item % heads, scratch);
    return;
  }
  for (int64_t t = first; t < end; t++) store(e, in, t);
}
