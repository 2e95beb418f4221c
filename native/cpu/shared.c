/* The time to read what targets of an adapter share, as VeRA's projections are: every layer wants them again, after
 * weights have passed through the caches. How much of them is still there no size tells, so a step's reads are done in
 * their order, without its arithmetic, and those of shared factors are timed. */
#include <pthread.h>

#include "executable.h"
#include "peak.h"

enum { LANES = 16 }; /* sums that do not wait for each other */

typedef struct {
  const uint8_t *data;
  int64_t bytes;
  bool shared;
} piece;

typedef struct {
  const piece *pieces;
  int64_t n_pieces;
  int32_t thread, threads;
  double seconds;
  uint64_t sum;
} reader;

static const attachment *attachment_of(const adapter *a, const instruction *in) {
  return is_product(in->op.kind) && in->op.target >= 0 ? a->by_target[in->op.target] : NULL;
}

static bool is_shared(const term *t) { return t->u && t->projection && t->u->references > 1; }

/* The first adapter with such a term, or NULL. */
static const adapter *find_adapter(const adrt_executable *e) {
  for (int32_t h = 0; h < e->n_adapters; h++)
    for (int32_t t = 0; e->adapters[h] && t < e->n_targets; t++) {
      const attachment *at = e->adapters[h]->by_target[t];
      for (int32_t k = 0; at && k < at->n_terms; k++)
        if (is_shared(&at->terms[k])) return e->adapters[h];
    }
  return NULL;
}

/* As many bytes of V as its leading columns are. */
static piece piece_of_v(const term *t) {
  const panels *wide = t->projection->wide;
  int64_t items = t->v.rows * t->v.cols;
  if (wide) return (piece){wide->items, t->v.rows / PANEL * (t->v.cols / BLOCK) * WIDE_BLOCK_BYTES, true};
  return (piece){t->v.data, cpu_bytes_of(t->v.dtype, items), true};
}

static piece piece_of_u(const term *t, int64_t rows) {
  return (piece){t->u->items, cpu_bytes_of(t->u->dtype, items_of(rows, PANEL) * t->u->stride), true};
}

/* Does an operation of the wave before this one multiply its input by the same V? */
static bool has_product(const instruction *first, const instruction *in, const adapter *a, const projection *v) {
  for (const instruction *before = first; before < in; before++) {
    const attachment *at = attachment_of(a, before);
    for (int32_t k = 0; at && k < at->n_terms; k++)
      if (before->op.a == in->op.a && at->terms[k].projection == v) return true;
  }
  return false;
}

/* What an operation reads of an adapter: at most two pieces a term. Returns how many. */
static int64_t pieces_of_terms(const instruction *first, const instruction *in, const adapter *a, piece *out) {
  const attachment *at = attachment_of(a, in);
  int64_t n = 0;
  for (int32_t k = 0; at && k < at->n_terms; k++) {
    const term *t = &at->terms[k];
    if (!is_shared(t)) continue;
    if (!has_product(first, in, a, t->projection)) out[n++] = piece_of_v(t);
    out[n++] = piece_of_u(t, in->width);
  }
  return n;
}

/* A step's pieces, into `out` unless it is NULL: how many. */
static int64_t pieces_of_step(const adrt_executable *e, const adapter *a, piece *out) {
  int64_t n = 0;
  for (int32_t wave = 0; wave < e->n_waves; wave++) {
    const instruction *first = e->instructions + e->wave_start[wave], *end = e->instructions + e->wave_start[wave + 1];
    for (const instruction *in = first; in < end; in++) {
      const attachment *at = attachment_of(a, in);
      if (!out) n += 1 + (at ? 2 * at->n_terms : 0);
      if (!out || !is_product(in->op.kind)) continue;
      n += pieces_of_terms(first, in, a, out + n);
      out[n++] = (piece){in->weight.data, cpu_bytes_of(in->weight.dtype, in->weight.rows * in->weight.cols), false};
    }
  }
  return n;
}

/* Without the prefetches that memory wants (bandwidth.c): some of it is in the caches, where they cost time. */
static uint64_t read_cached(const uint64_t *words, size_t count) {
  uint64_t lane[LANES] = {0}, sum = 0;
  for (size_t i = 0; i + LANES <= count; i += LANES)
    for (int j = 0; j < LANES; j++) lane[j] += words[i + j];
  for (int j = 0; j < LANES; j++) sum += lane[j];
  return sum;
}

/* A thread's part of every piece, from a whole line on. */
static void *read_pieces(void *argument) {
  reader *r = argument;
  for (int64_t i = 0; i < r->n_pieces; i++) {
    const piece *p = &r->pieces[i];
    int64_t from = p->bytes * r->thread / r->threads / 64 * 64, to = p->bytes * (r->thread + 1) / r->threads;
    const uint64_t *words = (const uint64_t *)(const void *)(p->data + from);
    size_t count = (size_t)(to - from) / sizeof *words;
    double start = p->shared ? peak_now() : 0;
    r->sum += (p->shared ? read_cached : peak_read)(words, count);
    if (p->shared) r->seconds += peak_now() - start;
  }
  return NULL;
}

/* The slowest thread's seconds; 0 when a thread could not be started. */
static double read_step(const piece *pieces, int64_t n_pieces, int32_t threads) {
  pthread_t ids[PEAK_THREADS];
  reader readers[PEAK_THREADS];
  int32_t started = 1;
  double slowest = 0;
  for (int32_t i = 0; i < threads; i++) readers[i] = (reader){pieces, n_pieces, i, threads, 0, 0};
  while (started < threads && !pthread_create(&ids[started], NULL, read_pieces, &readers[started])) started++;
  read_pieces(&readers[0]);
  for (int32_t i = 1; i < started; i++) pthread_join(ids[i], NULL);
  volatile uint64_t sink = 0;
  for (int32_t i = 0; i < started; i++) {
    sink += readers[i].sum;
    if (readers[i].seconds > slowest) slowest = readers[i].seconds;
  }
  return started < threads ? 0 : slowest;
}

double cpu_shared_seconds(const adrt_executable *e) {
  const adapter *a = find_adapter(e);
  if (!a || e->options.threads > PEAK_THREADS) return 0;
  piece *pieces = cpu_calloc(pieces_of_step(e, a, NULL), sizeof *pieces);
  if (!pieces) return 0;
  int64_t n = pieces_of_step(e, a, pieces);
  read_step(pieces, n, e->options.threads); /* the first reads what the caches do not hold yet */
  double seconds = read_step(pieces, n, e->options.threads);
  cpu_free(pieces);
  return seconds;
}
