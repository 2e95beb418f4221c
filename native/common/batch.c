/* A step's batch: every number checked before anything is read by it. */
#include <string.h>

#include "common.h"

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

static int tokens_ok(const adrt_batch *b, const batch_limits *limits, adrt_error *error) {
  for (int32_t t = 0; t < b->n_tokens; t++)
    if (b->tokens[t] < 0 || b->tokens[t] >= limits->vocabulary)
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "token %d is %d, the vocabulary has %lld", t, b->tokens[t],
                      (long long)limits->vocabulary);
  return ADRT_OK;
}

static int run_ok(const adrt_batch *b, const batch_limits *limits, int32_t r, adrt_error *error) {
  int32_t first = b->run_start[r], end = b->run_start[r + 1];
  for (int32_t t = first; t < end; t++) {
    int64_t expected = t == first ? b->positions[t] : (int64_t)b->positions[t - 1] + 1;
    if (b->positions[t] < 0 || b->positions[t] != expected)
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "run %d: token %d has position %d, expected %lld", r, t,
                      b->positions[t], (long long)(expected < 0 ? 0 : expected));
  }
  int32_t n_pages = b->page_start[r + 1] - b->page_start[r];
  int32_t needed = end > first ? b->positions[end - 1] / limits->page_tokens + 1 : 0;
  if (n_pages < needed)
    return cpu_fail(error, ADRT_BAD_ARGUMENT, "run %d: position %d needs %d KV pages of %d tokens, it has %d",
                    r, b->positions[end - 1], needed, limits->page_tokens, n_pages);
  for (int32_t i = b->page_start[r]; i < b->page_start[r + 1]; i++)
    if (b->pages[i] < 0 || b->pages[i] >= limits->n_pages)
      return cpu_fail(error, ADRT_BAD_ARGUMENT, "run %d: KV page %d is not reserved, %d pages are", r,
                      b->pages[i], limits->n_pages);
  for (int32_t i = b->stack_start[r]; i < b->stack_start[r + 1]; i++)
    if (!limits->attached(limits->owner, b->stacks[i]))
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

int cpu_validate_batch(const adrt_batch *b, const batch_limits *limits, adrt_error *error) {
  int code = pointers_ok(b, error);
  if (code == ADRT_OK) code = starts_ok("run_start", b->run_start, b->n_runs, b->n_tokens, error);
  if (code == ADRT_OK) code = starts_ok("page_start", b->page_start, b->n_runs, -1, error);
  if (code == ADRT_OK) code = starts_ok("stack_start", b->stack_start, b->n_runs, -1, error);
  if (code == ADRT_OK &&
      ((b->page_start[b->n_runs] && !b->pages) || (b->stack_start[b->n_runs] && !b->stacks)))
    code = cpu_fail(error, ADRT_BAD_ARGUMENT, "pages or stacks is NULL");
  if (code == ADRT_OK) code = tokens_ok(b, limits, error);
  for (int32_t r = 0; code == ADRT_OK && r < b->n_runs; r++) code = run_ok(b, limits, r, error);
  for (int32_t i = 0; code == ADRT_OK && i < b->n_logits; i++)
    if (b->logit_rows[i] < 0 || b->logit_rows[i] >= b->n_tokens)
      code = cpu_fail(error, ADRT_BAD_ARGUMENT, "logit row %d is token %d of %d", i, b->logit_rows[i],
                      b->n_tokens);
  return code;
}

bool cpu_same_stack(const adrt_batch *b, int32_t run, int32_t other) {
  int32_t n = b->stack_start[run + 1] - b->stack_start[run];
  if (n != b->stack_start[other + 1] - b->stack_start[other]) return false;
  return !n || !memcmp(b->stacks + b->stack_start[run], b->stacks + b->stack_start[other],
                       (size_t)n * sizeof *b->stacks);
}
