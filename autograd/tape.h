/* The tape: the calls of one step in order, and the sweep back over them.
 *
 * Ops (autograd/ops.h) return a tensor, or NULL once the tape has failed, and accept NULL, so a forward pass reads like its
 * equations and is checked once at the end. The first error is kept with the scope and op it came from.
 *
 *     tp_tensor *h = tp_rmsnorm(tape, x, w, eps);
 *     tp_tensor *y = tp_linear(tape, h, &spec);        forward: values live in the step arena
 *     tp_tensor *l = tp_linear_cross_entropy(...);
 *     tp_tape_backward(tape, l);                       backward: gradients appear, dead values are given back
 *     tp_tape_reset(tape);                             everything of the step is gone
 */
#ifndef TP_AUTOGRAD_TAPE_H
#define TP_AUTOGRAD_TAPE_H

#include "autograd/tensor.h"
#include "backend/pool.h"
#include "base/arena.h"

typedef struct tp_tape tp_tape;

/* The step arena gets `capacity` bytes of ctx->device (dry: 0 for no limit). precision: TP_F32, TP_BF16 or TP_F16, the dtype of
 * activations and of the large products. ctx is borrowed and carries the errors. */
TP_API tp_status tp_tape_new(tp_ctx *ctx, size_t capacity, tp_dtype precision, tp_tape **tape) TP_MUST_CHECK;
TP_API void tp_tape_free(tp_tape *tape);
TP_API void tp_tape_reset(tp_tape *tape);
/* The places of the step arena that a pass took, and another pass of no more rows and labels that takes the same: noting begins
 * with an empty tape, following holds until the reset. `places` are the tape's own, or borrowed. */
TP_API void tp_tape_note_places(tp_tape *tape);
TP_API const tp_place *tp_tape_places(const tp_tape *tape, size_t *n);
TP_API void tp_tape_follow_places(tp_tape *tape, const tp_place *places, size_t n);
/* TP_OK or the first failure since the last reset. */
TP_API tp_status tp_tape_status(const tp_tape *tape);
TP_API tp_dtype tp_tape_precision(const tp_tape *tape);
TP_API tp_ctx *tp_tape_ctx(tp_tape *tape);
/* Free columns behind every row of the activations made from now on: `ld` is larger than `cols` by so many. Products of
 * several parts write there what belongs to the same sum (tp_joint_linear). 0 at first. */
TP_API void tp_tape_set_room(tp_tape *tape, int64_t columns);
/* Highest use of the step arena so far, in bytes. */
TP_API size_t tp_tape_peak(const tp_tape *tape);

/* Gradient of every tensor that leads to `loss` (a tensor an op of a loss returned, already weighted). Parameters' gradients
 * are added to. */
TP_API tp_status tp_tape_backward(tp_tape *tape, tp_tensor *loss) TP_MUST_CHECK;
/* The same from any tensor with a given gradient (same shape and dtype, copied): for tests and custom losses. */
TP_API tp_status tp_tape_backward_from(tp_tape *tape, tp_tensor *out, const void *grad) TP_MUST_CHECK;

/* Scope for messages: "layers.3.self_attn". Nested; begin copies the text. */
TP_API void tp_tape_scope_begin(tp_tape *tape, const char *format, ...) TP_PRINTF(2, 3);
TP_API void tp_tape_scope_end(tp_tape *tape);

/* Between begin and end nothing is recorded, and tp_tape_rewind may release values. Nests. */
TP_API void tp_tape_no_grad_begin(tp_tape *tape);
TP_API void tp_tape_no_grad_end(tp_tape *tape);
TP_API bool tp_tape_recording(const tp_tape *tape);

/* Releases everything made since the mark but `keep` (may be NULL). Only where nothing since the mark was recorded. */
TP_API size_t tp_tape_mark(const tp_tape *tape);
TP_API void tp_tape_rewind(tp_tape *tape, size_t mark, const tp_tensor *keep);

/* The forward pass has done with x, and linears or SwiGLU alone have read it: its memory may go. If its op saved what is
 * needed, the sweep makes it again for the first backward that reads it; otherwise nothing happens. A view (tp_split) goes with
 * the other views of the same tensor, which nobody may need either. */
TP_API void tp_tape_forget(tp_tape *tape, tp_tensor *x);

/* Where dropout reads its draw: device memory of the caller, who changes it between micro-batches only. NULL, at first: draw 0.
 */
TP_API void tp_tape_set_state(tp_tape *tape, const tp_step_state *state);
TP_API const tp_step_state *tp_tape_state(const tp_tape *tape);
/* Two passes that took other places or sizes from the arena since the reset differ in this number. */
TP_API uint64_t tp_tape_trace(const tp_tape *tape);

/* A piece of the network with one input and one output, run by `forward`.
 *   recording, keep        runs it as it is
 *   recording, recompute   keeps x and y alone; the reverse sweep runs it again (Chen et al. 2016, arXiv:1604.06174)
 *   not recording          runs it and releases all but y
 * The function must compute the same again: no counters, no clock, randomness through the tape's state and row only. */
typedef tp_tensor *(*tp_segment_fn)(tp_tape *tape, void *state, tp_tensor *x);
TP_API tp_tensor *tp_tape_segment(tp_tape *tape, tp_segment_fn forward, void *state, tp_tensor *x, bool recompute);
/* The same with recomputation, in slices: rows up to ends[0], then up to ends[1], ..., up to ends[n - 1] = rows of x run by
 * themselves, forward and in the sweep, so that values of one slice exist at a time. The function gets those rows as x,
 * tp_tape_row says which is the first, and its result has the shape of x. Rows of different slices may not depend on each
 * other. `ends` lives until tp_tape_reset. */
TP_API tp_tensor *tp_tape_sliced_segment(tp_tape *tape, tp_segment_fn forward, void *state, tp_tensor *x, const int64_t *ends,
                                         int64_t n);
/* Inputs of segments recorded from now on with recomputation wait for the sweep in host memory. They must not be read by anyone
 * else afterwards. */
TP_API void tp_tape_set_parking(tp_tape *tape, bool parking);
/* Whether a segment is run again for the sweep, which does not read its result. */
TP_API bool tp_tape_again(const tp_tape *tape);
/* Number, in the whole batch, of the first row of what is being computed. */
TP_API int64_t tp_tape_row(const tp_tape *tape);

/* A parameter or external value as the start of a tape: shares the data, owns nothing. */
TP_API tp_tensor *tp_tape_input(tp_tape *tape, tp_dtype dtype, int64_t rows, int64_t cols, void *data, bool needs_grad);
/* Zeroed host memory that lives until tp_tape_reset: state of segments. NULL on the tape's error. */
TP_API void *tp_tape_scratch(tp_tape *tape, size_t count, size_t size);

#endif
