/* The adapters' share of a step as lists: the terms and gains that act on an operation (parts), the products of a V that
 * must be ready before (shrinks), and the rows of those that a thread does at once (jobs).
 *
 * Adapters may share a V or a U, as all of VeRA's do. So a shrink is one for all operations of a wave that read the same
 * input, and for tokens that follow each other, whatever their adapters; parts that read one U follow each other too. */
#include "executable.h"

/* The last shrink of this V in the wave whose first is `first`, or -1. What V knows of it may be of another step. */
static int64_t newest_shrink(const plan *p, int64_t first, const projection *v) {
  int64_t i = v->newest;
  return i >= first && i < p->n_shrinks && p->shrinks[i].what->projection == v ? i : -1;
}

/* The shrink of the wave that has the segment's tokens or may take them; NULL if none has. */
static shrink *find_shrink(const plan *p, int64_t first, const projection *v, int32_t input, const segment *where) {
  for (int64_t i = newest_shrink(p, first, v); i >= 0; i = p->shrinks[i].previous) {
    shrink *s = &p->shrinks[i];
    if (s->input != input || where->start < s->start || where->start > s->start + s->count) continue;
    if (where->start == s->start + s->count) s->count += where->count;
    return s;
  }
  return NULL;
}

static shrink *new_shrink(plan *p, instruction *in, int64_t first, const term *t, const segment *where) {
  if (!buffer_grow(&p->shrink_buffer, p->n_shrinks + 1, sizeof *p->shrinks)) return NULL;
  p->shrinks = p->shrink_buffer.data;
  shrink *s = &p->shrinks[p->n_shrinks];
  *s = (shrink){.what = t, .input = in->op.a, .start = where->start, .count = where->count, .first_part = -1};
  if (t->projection) {
    s->previous = newest_shrink(p, first, t->projection);
    t->projection->newest = p->n_shrinks;
  }
  p->n_shrinks++;
  in->n_shrinks++;
  return s;
}

static part *new_part(plan *p, instruction *in, const segment *where) {
  if (!buffer_grow(&p->part_buffer, p->n_parts + 1, sizeof *p->parts)) return NULL;
  p->parts = p->part_buffer.data;
  in->n_parts++;
  p->parts[p->n_parts] = (part){.start = where->start, .count = where->count, .next = -1, .together = 1};
  return &p->parts[p->n_parts++];
}

static bool plan_term(plan *p, instruction *in, int64_t first_shrink, const segment *where, const term *t) {
  part *mine = new_part(p, in, where);
  if (!mine) return false;
  mine->what = t;
  if (!t->hidden) return true;
  mine->hidden = p->n_hidden;
  shrink *s = t->projection ? find_shrink(p, first_shrink, t->projection, in->op.a, where) : NULL;
  if (!s && !(s = new_shrink(p, in, first_shrink, t, where))) return false;
  mine->next = s->first_part;
  s->first_part = mine - p->parts;
  return cpu_plan_hidden(p, where->count, t->hidden);
}

static bool plan_gain(plan *p, instruction *in, const segment *where, const float *gain) {
  part *mine = new_part(p, in, where);
  if (mine) mine->gain = gain;
  return mine;
}

/* Adapter number `level` of every stack; *any when there is one. */
static bool plan_level(plan *p, instruction *in, int64_t first_shrink, int64_t level, bool *any) {
  const application *a = p->applications + in->first_application, *end = a + in->n_applications;
  const segment *where = NULL;
  for (int64_t number = 0; a < end; where = a++->where) {
    number = a->where == where ? number + 1 : 0;
    if (number != level) continue;
    *any = true;
    for (int32_t k = 0; k < a->what->n_terms; k++)
      if (!plan_term(p, in, first_shrink, a->where, &a->what->terms[k])) return false;
    if (a->what->g_out && !plan_gain(p, in, a->where, a->what->g_out)) return false;
  }
  return true;
}

/* Where one pass over a U may do a part with the one before it. */
static bool joins(const part *before, const part *at) {
  const term *t = before->what, *u = at->what;
  return t && u && u->u && t->u == u->u && !t->e == !u->e && before->start + before->count == at->start;
}

static bool plan_instruction(plan *p, instruction *in, int64_t first_shrink) {
  in->first_part = p->n_parts;
  in->first_shrink = p->n_shrinks;
  in->n_parts = in->n_shrinks = 0;
  bool any = true;
  for (int64_t level = 0; any; level++) {
    any = false;
    if (!plan_level(p, in, first_shrink, level, &any)) return false;
  }
  for (int64_t i = in->n_parts - 1; i > 0; i--) {
    part *before = &p->parts[in->first_part + i - 1], *at = before + 1;
    if (joins(before, at)) before->together = at->together + 1;
  }
  return true;
}

static bool plan_jobs(adrt_executable *e, instruction *in) {
  plan *p = &e->plan;
  in->first_job = p->n_jobs;
  for (int64_t i = in->first_shrink; i < in->first_shrink + in->n_shrinks; i++) {
    shrink *s = &p->shrinks[i];
    int64_t rows = s->what->v.rows, at_once = cpu_rows_per_job(e, s->what);
    s->raw = p->n_hidden;
    if (s->what->projection && !cpu_plan_hidden(p, s->count, rows)) return false;
    if (!buffer_grow(&p->job_buffer, p->n_jobs + items_of(rows, at_once), sizeof *p->jobs)) return false;
    p->jobs = p->job_buffer.data;
    for (int64_t row = 0; row < rows; row += at_once)
      p->jobs[p->n_jobs++] = (shrink_job){i, row, rows - row < at_once ? rows - row : at_once};
  }
  in->n_jobs = p->n_jobs - in->first_job;
  return true;
}

bool cpu_plan_parts(adrt_executable *e, instruction *first, instruction *end) {
  plan *p = &e->plan;
  int64_t first_shrink = p->n_shrinks;
  for (instruction *in = first; in < end; in++)
    if (is_product(in->op.kind) && !plan_instruction(p, in, first_shrink)) return false;
  for (instruction *in = first; in < end; in++)
    if (is_product(in->op.kind) && !plan_jobs(e, in)) return false;
  return true;
}
