/* Int8 arithmetic of this machine: the floor under prefill speed, which `adaptrt bench` compares against. */
#include "peak.h"

#include <pthread.h>
#include <time.h>

enum { MAX_THREADS = PEAK_THREADS, REPEATS = 3 };
static const int64_t ROUNDS = 4000000; /* tens of milliseconds */

static void *work(void *sink) {
  *(volatile int32_t *)sink = peak_vnni(ROUNDS);
  return NULL;
}

double peak_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Operations a second of one try; 0 when a thread could not be started. */
static double once(int32_t threads) {
  pthread_t ids[MAX_THREADS];
  int32_t sinks[MAX_THREADS], started = 1;
  double start = peak_now();
  while (started < threads && !pthread_create(&ids[started], NULL, work, &sinks[started])) started++;
  work(&sinks[0]);
  for (int32_t i = 1; i < started; i++) pthread_join(ids[i], NULL);
  if (started < threads) return 0;
  return (double)ROUNDS * VNNI_OPERATIONS * threads / (peak_now() - start);
}

double cpu_int8_peak(int32_t threads) {
  if (threads < 1 || threads > MAX_THREADS || !peak_vnni_ready()) return 0;
  double best = 0;
  for (int i = 0; i < REPEATS; i++) {
    double rate = once(threads);
    if (rate > best) best = rate;
  }
  return best;
}
