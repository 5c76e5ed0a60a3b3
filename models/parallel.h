/* Inside models/: a loop over independent items on several threads, for loading and initialising. */
#ifndef TP_MODELS_PARALLEL_H
#define TP_MODELS_PARALLEL_H

#include <stdint.h>

#define TP_PARALLEL_MAX 16

/* Runs body(state, i, worker) for i in 0..n-1 and returns when all are done; worker is 0..threads-1 and tells concurrent
 * calls apart. The caller works too; threads that the system refuses are done without. */
void tp_parallel_for(int threads, int64_t n, void (*body)(void *state, int64_t i, int worker), void *state);

#endif
