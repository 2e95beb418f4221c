/* Read bandwidth of this machine: the floor under decode speed, which `adaptrt bench` compares against. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "peak.h"

enum { LANES = 16, MAX_THREADS = PEAK_THREADS };

typedef struct {
  const uint64_t *words;
  size_t count;
  uint64_t sum;
  double started, finished; /* seconds */
} slice;

uint64_t peak_read(const uint64_t *words, size_t count) {
  uint64_t lane[LANES] = {0}, sum = 0;
  for (size_t i = 0; i + LANES <= count; i += LANES) {
    __builtin_prefetch(words + i + 512);
    for (int j = 0; j < LANES; j++) lane[j] += words[i + j];
  }
  for (int j = 0; j < LANES; j++) sum += lane[j];
  return sum;
}

static void *read_slice(void *argument) {
  slice *s = argument;
  s->started = peak_now();
  s->sum = peak_read(s->words, s->count);
  s->finished = peak_now();
  return NULL;
}

/* Seconds from the first start to the last finish; 0 when a thread could not be started. */
static double read_once(slice *slices, int32_t threads) {
  pthread_t ids[MAX_THREADS];
  int32_t started = 1;
  while (started < threads && !pthread_create(&ids[started], NULL, read_slice, &slices[started])) started++;
  read_slice(&slices[0]);
  for (int32_t i = 1; i < started; i++) pthread_join(ids[i], NULL);
  if (started < threads) return 0;
  double first = slices[0].started, last = slices[0].finished;
  for (int32_t i = 1; i < threads; i++) {
    if (slices[i].started < first) first = slices[i].started;
    if (slices[i].finished > last) last = slices[i].finished;
  }
  return last - first;
}

double cpu_read_bandwidth(uint64_t bytes, int32_t threads) {
  if (threads < 1 || threads > MAX_THREADS || bytes > SIZE_MAX || bytes < (uint64_t)threads * 4096) return 0;
  uint64_t *words = malloc((size_t)bytes);
  if (!words) return 0;
  cpu_prefer_huge_pages(words, bytes); /* as the weights' file is mapped */
  memset(words, 1, (size_t)bytes); /* an untouched page would be read from the one shared zero page */
  size_t share = (size_t)bytes / sizeof *words / (size_t)threads;
  slice slices[MAX_THREADS] = {{0}};
  for (int32_t i = 0; i < threads; i++) slices[i] = (slice){.words = words + share * (size_t)i, .count = share};
  double seconds = read_once(slices, threads);
  volatile uint64_t sink = 0;
  for (int32_t i = 0; i < threads; i++) sink += slices[i].sum;
  free(words);
  return seconds > 0 ? (double)(share * sizeof *words * (size_t)threads) / seconds : 0;
}
