/* Threads that run one function together, with barriers inside it. */
#ifndef CPU_POOL_H
#define CPU_POOL_H
#include <stdbool.h>
#include <stdint.h>

typedef struct pool pool;
typedef void pool_job(void *argument, int32_t thread);

/* `threads` includes the caller's; NULL when threads or memory cannot be had. */
pool *pool_create(int32_t threads);
void pool_destroy(pool *p);
/* False in a forked child, which inherits the pool but not its threads. */
bool pool_is_ours(const pool *p);
/* Run job(argument, 0 .. threads-1), thread 0 being the caller; returns when all are done. */
void pool_run(pool *p, pool_job *job, void *argument);
/* Every thread of the running job waits here for all others. */
void pool_barrier(pool *p);

#endif
