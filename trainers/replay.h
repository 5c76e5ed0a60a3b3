/* Micro-batches as recordings: where the device can record kernels, those of a micro-batch are recorded when its shape appears
 * for the second time and replayed whenever it appears again, so that the host neither walks the tape nor calls a thousand
 * kernels.
 *
 * A shape is all of a tp_batch but what its device arrays hold: counts, lengths, segments. What kernels do may depend on
 * nothing else that changes from one micro-batch to the next; numbers that do change lie in device memory (tp_step_state). The
 * first pass of a shape runs as it is: it loads kernels and chooses algorithms, and leaves the trace of its places in the
 * step arena, which the recorded one must repeat. */
#ifndef TP_TRAINERS_REPLAY_H
#define TP_TRAINERS_REPLAY_H

#include "autograd/batch.h"
#include "backend/backend.h"

#define TP_REPLAY_SHAPES 32 /* remembered at once */
#define TP_REPLAY_GRAPHS 8  /* of them with a recording, at most; the least recently used one goes */

typedef struct tp_replay tp_replay;

/* Calls the kernels of a micro-batch. *trace: equal in every pass of a shape, or it cannot be replayed. */
typedef tp_status (*tp_replay_pass)(void *state, const tp_batch *batch, uint64_t *trace);

/* allowed false: nothing is recorded. */
TP_API tp_status tp_replay_open(tp_ctx *ctx, bool allowed, tp_replay **replay) TP_MUST_CHECK;
TP_API void tp_replay_close(tp_replay *replay);
/* Runs the pass, or a recording of it. What cannot be recorded runs as it is, which is noted once. */
TP_API tp_status tp_replay_run(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, tp_replay_pass pass,
                               void *state) TP_MUST_CHECK;

#endif
