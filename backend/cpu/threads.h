/* A pool of threads for loops over independent items.
 *
 * The caller is thread 0 and works too. Idle threads spin for at most 50 microseconds and then sleep, so a run on a busy
 * machine loses no core to waiting, and steps of many short kernels do not pay a wake-up each. The caller takes items
 * itself until none is left: if the other cores are taken, it does all the work and waits for nobody. */
#ifndef TP_BACKEND_CPU_THREADS_H
#define TP_BACKEND_CPU_THREADS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_threads tp_threads;

/* Threads that this process may run at once: the size of its affinity mask, at least 1. */
int tp_threads_allowed(void);

/* A pool of `threads` threads including the caller; 0: tp_threads_allowed(). Threads that the system refuses are left
 * out. Each is bound to one CPU if the affinity mask holds as many CPUs as the pool has threads; the caller is not. NULL
 * with NOMEM recorded. */
tp_threads *tp_threads_new(tp_ctx *ctx, int threads) TP_MUST_CHECK;
void tp_threads_free(tp_threads *pool); /* accepts NULL */

/* How many threads there are, at least 1. */
int tp_threads_count(const tp_threads *pool);

/* Runs body(arg, i, thread) for i in 0..n-1 and returns when all are done; what bodies wrote is then visible. Not to be
 * called from a body, nor by two threads at once on one pool. */
void tp_threads_for(tp_threads *pool, int64_t n, void (*body)(void *arg, int64_t i, int thread), void *arg);

/* What threads do while they spin between jobs: body(arg, thread, step) for step = 0, 1, 2, ... until it returns false. A step
 * should take less than a microsecond. It may run until the pool is freed, also beside a later job and a later call of this
 * function, which begins with step 0 again. The caller of jobs does not take part. */
void tp_threads_while_idle(tp_threads *pool, bool (*body)(void *arg, int thread, int64_t step), void *arg);

/* A moment's rest inside a loop that waits for another thread. */
static inline void tp_threads_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#ifdef __cplusplus
}
#endif
#endif
