/* y = alpha x          dx = alpha dy, in place. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct scale_record {
    tp_record record;
    tp_tensor *x;
    float alpha;
};

static tp_status scale_backward(tp_tape *tape, tp_record *base)
{
    struct scale_record *r = (struct scale_record *)base;
    tp_tensor *y = base->out[0];
    tp_rows dy = tp_tensor_grad_rows(y);
    tp_scale_args args = {.n = y->rows, .dim = y->cols, .x = dy, .y = dy, .alpha = r->alpha};
    TP_TRY(tp_run_scale(tp_tape_ctx(tape), &args));
    return tp_grad_move(tape, y, r->x);
}

static const tp_op scale_op = {.name = "scale", .backward = scale_backward};

tp_tensor *tp_scale(tp_tape *tape, tp_tensor *x, float alpha)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, scale_op.name, inputs, 1)) return NULL;
    tp_tensor *y = tp_op_output(tape, scale_op.name, x->dtype, x->rows, x->cols, tp_wants_grad(x));
    if (y == NULL) return NULL;
    tp_scale_args args = {.n = x->rows, .dim = x->cols, .x = tp_tensor_rows(x), .y = tp_tensor_rows(y), .alpha = alpha};
    if (!tp_op_ok(tape, scale_op.name, tp_run_scale(tp_tape_ctx(tape), &args))) return NULL;
    if (!y->needs_grad || !tp_tape_recording(tape)) return y;
    struct scale_record *r = tp_op_record(tape, &scale_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->x = x;
    r->alpha = alpha;
    return y;
}
