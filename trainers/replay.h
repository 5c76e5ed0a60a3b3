/* Micro-batches as recordings: where the device can record kernels, those of a micro-batch are recorded when its shape appears
 * for the second time and replayed whenever it appears again, so that the host neither walks the tape nor calls a thousand
 * kernels.
 *
 * A shape is all of a tp_batch but what its device arrays hold: counts, lengths, segments. What kernels do may depend on
 * nothing else that changes from one micro-batch to the next; numbers that do change lie in device memory (tp_step_state). The
 * first pass of a shape runs as it is: it loads kernels and chooses algorithms, and leaves the trace of its places in the
 * step arena, which the recorded one must repeat.
 *
 * Lengths that hardly ever repeat would never be replayed. So micro-batches of uneven lengths are filled up to one of few
 * numbers of rows and of labels, and a shape is these two numbers: a recording is told the segments each time (graph_segments
 * of tp_backend). What is filled in belongs to no segment and has neither token nor label: such rows are zeros from the
 * embedding on and get gradients of zeros. They are there with and without recordings, so both give the same bits. */
#ifndef TP_TRAINERS_REPLAY_H
#define TP_TRAINERS_REPLAY_H

#include "backend/backend.h"
#include "data/dataset.h"

#define TP_REPLAY_SHAPES 64 /* remembered at once */

/* ---- filling up ---- */

typedef struct tp_buckets {
    int64_t rows, labels;         /* of the largest micro-batch */
    int64_t row_step, label_step; /* row_step 0: micro-batches stay as they are */
} tp_buckets;

TP_API tp_buckets tp_buckets_for(int64_t rows, int64_t labels);
/* Fills up the batch, unless it has as many rows as the largest one and sequences of one length: such batches come again as
 * they are, and only their labels are filled up. */
TP_API tp_status tp_buckets_fill(tp_ctx *ctx, const tp_buckets *buckets, tp_host_batch *batch) TP_MUST_CHECK;

/* ---- recordings ---- */

typedef struct tp_replay tp_replay;

/* Calls the kernels of a micro-batch. *trace: equal in every pass of a shape, or it cannot be replayed. */
typedef tp_status (*tp_replay_pass)(void *state, const tp_batch *batch, uint64_t *trace);

/* How many recordings are kept at most; the least recently used one goes. 0: nothing is recorded. */
TP_API tp_status tp_replay_open(tp_ctx *ctx, int64_t most, tp_replay **replay) TP_MUST_CHECK;
TP_API void tp_replay_close(tp_replay *replay);
/* Runs the pass, or a recording of it. What cannot be recorded runs as it is, which is noted once. any_segments: those of the
 * batch are no part of its shape. */
TP_API tp_status tp_replay_run(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, bool any_segments, tp_replay_pass pass,
                               void *state) TP_MUST_CHECK;
/* Ahead of tp_replay_run, while the device is at work on others: has the recording of such a batch ready, if there is one. */
TP_API void tp_replay_prepare(tp_ctx *ctx, tp_replay *replay, const tp_batch *batch, bool any_segments);
/* How many micro-batches were recordings so far; -1: none can be. */
TP_API int64_t tp_replay_count(const tp_replay *replay);

#endif
