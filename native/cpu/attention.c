/* Rotary embedding, and attention over the paged KV cache.
 *
 * In a page, a layer's K is [kv_heads][page_tokens][head_dim], so that q k^T is a product with rows of K, and
 * its V is [kv_heads][ceil(head_dim/16)][page_tokens][16], so that adding up p v streams through panels. A
 * query meets the pages one after the other, whatever else is in the batch.
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

static void store_items(const adrt_executable *e, const float *x, int64_t n, uint8_t *out) {
  if (e->options.kv_dtype == ADRT_F32) {
    memcpy(out, x, (size_t)n * sizeof *x);
    return;
  }
  uint16_t *halves = (uint16_t *)(void *)out;
  for (int64_t i = 0; i < n; i++) halves[i] = cpu_f32_to_f16(x[i]);
}

static void store(const adrt_executable *e, const instruction *in, int64_t token) {
  const kv_layer *kv = &e->kv_layers[in->op.layer];
  int64_t page_tokens = e->options.page_tokens, position = e->plan.batch->positions[token], item = kv_item(e);
  int64_t slot = position % page_tokens, dim = kv->head_dim, panels = items_of(dim, PANEL);
  uint8_t *page = page_of(e, token, position / page_tokens);
  const float *k = row_of(e, in->op.b, token), *v = row_of(e, in->op.c, token);
  for (int64_t head = 0; head < kv->kv_heads; head++, k += dim, v += dim) {
    store_items(e, k, dim, page + kv->k_offset + (head * page_tokens + slot) * dim * item);
    for (int64_t p = 0; p < panels; p++) {
      int64_t left = dim - p * PANEL;
      store_items(e, v + p * PANEL, left < PANEL ? left : PANEL,
                  page + kv->v_offset + ((head * panels + p) * page_tokens + slot) * PANEL * item);
    }
  }
}

/* All query heads of one KV head for one token. */
static void attend(const adrt_executable *e, const instruction *in, int64_t token, int64_t head,
                   float *scratch) {
  const kv_layer *kv = &e->kv_layers[in->op.layer];
  const kernels *k = e->kernels;
  int64_t group = in->op.heads / kv->kv_heads, dim = kv->head_dim, stride = cpu_align(dim, BLOCK);
  int64_t page_tokens = e->options.page_tokens, context = (int64_t)e->plan.batch->positions[token] + 1;
  int64_t score_stride = cpu_align(context, PANEL), dtype = e->options.kv_dtype;
  int64_t k_head = head * page_tokens * dim * kv_item(e);
  int64_t v_head = head * items_of(dim, PANEL) * page_tokens * PANEL * kv_item(e);
  float *queries = scratch, *scores = scratch + group * stride;
  const float *q = row_of(e, in->op.a, token) + head * group * dim;
  memset(queries, 0, (size_t)(group * stride) * sizeof *queries);
  for (int64_t h = 0; h < group; h++) memcpy(queries + h * stride, q + h * dim, (size_t)dim * sizeof *q);
  for (int64_t base = 0; base < context; base += page_tokens) {
    int64_t count = context - base < page_tokens ? context - base : page_tokens;
    const uint8_t *page = page_of(e, token, base / page_tokens);
    const matrix keys = {
        .dtype = (int32_t)dtype, .rows = page_tokens, .cols = dim, .data = page + kv->k_offset + k_head};
    k->exact[dtype](&keys, 0, count, queries, stride, group, scores + base, score_stride);
  }
  for (int64_t h = 0; h < group; h++)
    k->softmax(scores + h * score_stride, context, in->op.value[0], in->op.value[1]);
  float *out = row_of(e, in->op.out, token) + head * group * dim;
  memset(out, 0, (size_t)(group * dim) * sizeof *out);
  for (int64_t base = 0; base < context; base += page_tokens) {
    int64_t count = context - base < page_tokens ? context - base : page_tokens;
    const uint8_t *values = page_of(e, token, base / page_tokens) + kv->v_offset + v_head;
    k->expand[dtype](values, page_tokens * PANEL, count, dim, scores + base, score_stride, group, out, dim);
  }
}

int64_t cpu_attention_items(const adrt_executable *e, const instruction *in, enum phase phase) {
  int64_t n = e->plan.batch->n_tokens;
  return phase == PREPARE ? items_of(n, TOKENS_PER_ITEM) : n * in->op.kv_heads;
}

void cpu_attention(adrt_executable *e, const instruction *in, enum phase phase, int64_t item,
                   float *scratch) {
  if (phase == COMPUTE) {
    attend(e, in, item / in->op.kv_heads, item % in->op.kv_heads, scratch);
    return;
  }
  int64_t first = item * TOKENS_PER_ITEM, n = e->plan.batch->n_tokens;
  for (int64_t t = first; t < first + TOKENS_PER_ITEM && t < n; t++) store(e, in, t);
}
