/* Workers sleep on a condition variable between jobs, so that an idle model costs nothing and the caller's
 * other threads get their cores, but first they spin for as long as a caller needs between two decode steps:
 * a wake-up costs more than that. Inside a job, barriers are microseconds apart, so they spin and soon yield,
 * for when others want the cores, the thread waited for may need this one. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SPINS_BEFORE_YIELD = 200, NANOSECONDS_BEFORE_SLEEP = 100000 };

struct pool {
  int32_t threads;
  int32_t started; /* workers, the caller not counted */
  pthread_t *ids;
  pid_t owner; /* a forked child has no workers */
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  _Atomic uint64_t generation; /* of jobs; changes under mutex */
  bool stopping;               /* under mutex */
  pool_job *job;
  void *argument;
  _Alignas(64) atomic_int arrived;
  _Alignas(64) atomic_uint phase;
};

typedef struct {
  pool *owner;
  int32_t thread;
} worker_start;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void pool_barrier(pool *p) {
  if (p->threads == 1) return;
  unsigned phase = atomic_load_explicit(&p->phase, memory_order_relaxed);
  if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == p->threads - 1) {
    atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&p->phase, phase + 1, memory_order_release);
    return;
  }
  for (int spins = 0; atomic_load_explicit(&p->phase, memory_order_acquire) == phase; spins++) {
    if (spins < SPINS_BEFORE_YIELD)
      relax();
    else
      sched_yield();
  }
}

static int64_t nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Until a job comes, for a while. */
static void spin(const pool *p, uint64_t seen) {
  int64_t end = nanoseconds() + NANOSECONDS_BEFORE_SLEEP;
  while (atomic_load_explicit(&p->generation, memory_order_relaxed) == seen && nanoseconds() < end)
    for (int i = 0; i < 8; i++) relax();
}

static void *work(void *argument) {
  worker_start start = *(worker_start *)argument;
  free(argument);
  pool *p = start.owner;
  for (uint64_t seen = 0;;) {
    spin(p, seen);
    pthread_mutex_lock(&p->mutex);
    while (p->generation == seen && !p->stopping) pthread_cond_wait(&p->wake, &p->mutex);
    seen = p->generation;
    bool stopping = p->stopping;
    pthread_mutex_unlock(&p->mutex);
    if (stopping) return NULL;
    p->job(p->argument, start.thread);
    pool_barrier(p);
  }
}

static bool start_worker(pool *p, int32_t thread) {
  worker_start *start = malloc(sizeof *start);
  if (!start) return false;
  *start = (worker_start){p, thread};
  if (pthread_create(&p->ids[thread - 1], NULL, work, start)) {
    free(start);
    return false;
  }
  p->started++;
  return true;
}

pool *pool_create(int32_t threads) {
  void *memory = NULL;
  if (posix_memalign(&memory, 64, sizeof(pool))) return NULL;
  pool *p = memory;
  *p = (pool){.threads = threads, .owner = getpid()};
  atomic_init(&p->arrived, 0);
  atomic_init(&p->phase, 0);
  atomic_init(&p->generation, 0);
  pthread_mutex_init(&p->mutex, NULL);
  pthread_cond_init(&p->wake, NULL);
  p->ids = calloc((size_t)threads, sizeof *p->ids);
  bool ok = p->ids != NULL;
  for (int32_t i = 1; ok && i < threads; i++) ok = start_worker(p, i);
  if (ok) return p;
  pool_destroy(p);
  return NULL;
}

bool pool_is_ours(const pool *p) { return p->owner == getpid(); }

void pool_destroy(pool *p) {
  if (!p) return;
  if (pool_is_ours(p)) {
    pthread_mutex_lock(&p->mutex);
    p->stopping = true;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
    for (int32_t i = 0; i < p->started; i++) pthread_join(p->ids[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->mutex);
  }
  free(p->ids);
  free(p);
}

void pool_run(pool *p, pool_job *job, void *argument) {
  if (p->threads > 1) {
    pthread_mutex_lock(&p->mutex);
    p->job = job;
    p->argument = argument;
    p->generation++;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
  }
  job(argument, 0);
  pool_barrier(p);
}
