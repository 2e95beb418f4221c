/* How fast the memory is for a step at this moment, and how long it takes to read what targets of an adapter share, as
 * VeRA's projections are: every layer wants them again, after weights have passed through the caches, and how much of them
 * is still there no size tells. So a step's reads are done in their order, without its arithmetic, and timed. */
#include "executable.h"
#include "peak.h"

enum { LANES = 16, NO_INPUT = -1 };

typedef struct {
  const uint8_t *data;
  int64_t bytes;
  int32_t input; /* of a V: the register that it multiplies */
  bool shared;   /* else weights */
} piece;

typedef struct {
  _Alignas(64) double weights, shared; /* seconds */
  uint64_t sum;
} reader;

typedef struct {
  piece *pieces;
  int64_t n_pieces;
  int32_t threads;
  reader readers[PEAK_THREADS];
} reading;

static bool is_shared(const term *t) { return t->u && t->projection && t->u->references > 1; }

/* As many bytes of V as its leading columns are. */
static piece piece_of_v(const term *t, int32_t input) {
  const panels *wide = t->projection->wide;
  if (wide) return (piece){wide->items, t->v.rows / PANEL * (t->v.cols / BLOCK) * WIDE_BLOCK_BYTES, input, true};
  return (piece){t->v.data, cpu_bytes_of(t->v.dtype, t->v.rows * t->v.cols), input, true};
}

static piece piece_of_u(const term *t, int64_t rows) {
  return (piece){t->u->items, cpu_bytes_of(t->u->dtype, items_of(rows, PANEL) * t->u->stride), NO_INPUT, true};
}

/* Append a piece that was not read since `first` for the same product. Returns where the pieces end. */
static piece *put_once(const piece *first, piece *end, piece p) {
  for (const piece *before = first; before < end; before++)
    if (before->data == p.data && before->input == p.input) return end;
  *end = p;
  return end + 1;
}

/* What an operation reads: V once for all of its wave that multiply one input by it, U once, then weights. */
static piece *put_operation(const adrt_executable *e, const instruction *in, int32_t n, const int32_t *handles,
                            const piece *wave, piece *end) {
  const piece *operation = end;
  for (int32_t i = 0; i < n && in->op.target >= 0; i++) {
    const attachment *a = e->adapters[handles[i]]->by_target[in->op.target];
    for (int32_t k = 0; a && k < a->n_terms; k++) {
      if (!is_shared(&a->terms[k])) continue;
      end = put_once(wave, end, piece_of_v(&a->terms[k], in->op.a));
      end = put_once(operation, end, piece_of_u(&a->terms[k], in->width));
    }
  }
  *end = (piece){in->weight.data, cpu_bytes_of(in->weight.dtype, in->weight.rows * in->weight.cols), NO_INPUT, false};
  return end + 1;
}

static int64_t put_step(const adrt_executable *e, int32_t n, const int32_t *handles, piece *pieces) {
  piece *end = pieces;
  for (int32_t w = 0; w < e->n_waves; w++) {
    const piece *wave = end;
    for (int32_t i = e->wave_start[w]; i < e->wave_start[w + 1]; i++)
      if (is_product(e->instructions[i].op.kind))
        end = put_operation(e, &e->instructions[i], n, handles, wave, end);
  }
  return end - pieces;
}

/* At least as many as there can be. */
static int64_t most_pieces(const adrt_executable *e, int32_t n, const int32_t *handles) {
  int64_t most = e->n_instructions;
  for (int32_t i = 0; i < n; i++)
    for (int32_t t = 0; t < e->n_targets; t++) {
      const attachment *a = e->adapters[handles[i]]->by_target[t];
      most += a ? 2 * a->n_terms : 0;
    }
  return most;
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
static void read_pieces(void *argument, int32_t thread) {
  reading *all = argument;
  reader *r = &all->readers[thread];
  for (const piece *p = all->pieces; p < all->pieces + all->n_pieces; p++) {
    int64_t from = p->bytes * thread / all->threads / 64 * 64, to = p->bytes * (thread + 1) / all->threads;
    double start = peak_now();
    r->sum += (p->shared ? read_cached : peak_read)((const uint64_t *)(const void *)(p->data + from),
                                                    (size_t)(to - from) / sizeof(uint64_t));
    *(p->shared ? &r->shared : &r->weights) += peak_now() - start;
  }
}

/* Threads of a step help each other, so their time is the mean. */
static adrt_reads summary(const reading *all) {
  adrt_reads reads = {0};
  double bytes = 0, seconds = 0;
  volatile uint64_t sink = 0;
  for (int64_t i = 0; i < all->n_pieces; i++) bytes += all->pieces[i].shared ? 0 : (double)all->pieces[i].bytes;
  for (int32_t i = 0; i < all->threads; i++) {
    seconds += all->readers[i].weights / all->threads;
    reads.shared_seconds += all->readers[i].shared / all->threads;
    sink += all->readers[i].sum;
  }
  if (seconds > 0) reads.bytes_per_second = bytes / seconds;
  return reads;
}

int cpu_read_step(adrt_executable *e, int32_t n, const int32_t *handles, adrt_reads *out, adrt_error *error) {
  if (!e || n < 0 || (n && !handles) || !out) return cpu_fail(error, ADRT_BAD_ARGUMENT, "read_step: a NULL argument");
  for (int32_t i = 0; i < n; i++)
    if (handles[i] < 0 || handles[i] >= e->n_adapters || !e->adapters[handles[i]])
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "read_step: no adapter with handle %d", handles[i]);
  reading all = {.threads = e->options.threads};
  if (!pool_is_ours(e->pool))
    return cpu_fail(error, ADRT_UNAVAILABLE, "read_step: the threads are those of the process that this one was forked from");
  *out = (adrt_reads){0};
  if (all.threads > PEAK_THREADS) return ADRT_OK; /* not known, as other peaks are not */
  if (!(all.pieces = cpu_calloc(most_pieces(e, n, handles), sizeof *all.pieces)))
    return cpu_fail(error, ADRT_NO_MEMORY, "read_step: no memory");
  all.n_pieces = put_step(e, n, handles, all.pieces);
  pool_run(e->pool, read_pieces, &all);
  *out = summary(&all);
  cpu_free(all.pieces);
  return ADRT_OK;
}
