/* y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), or 0.5 x (1 + erf(x / sqrt 2)) if exact.
 * (Hendrycks & Gimpel 2016, arXiv:1606.08415.) Saves nothing but its input. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct gelu_record {
    tp_record record;
    tp_tensor *x;
    bool exact;
};

/* dy becomes dx in place and moves on. */
static tp_status gelu_backward(tp_tape *tape, tp_record *base)
{
    struct gelu_record *r = (struct gelu_record *)base;
    tp_tensor *y = base->out[0];
    tp_rows dy = tp_tensor_grad_rows(y);
    tp_gelu_backward_args args = {
        .n = y->rows, .dim = y->cols, .x = tp_tensor_rows(r->x), .dy = dy, .dx = dy, .exact = r->exact};
    TP_TRY(tp_run_gelu_backward(tp_tape_ctx(tape), &args));
    return tp_grad_move(tape, y, r->x);
}

static const tp_op gelu_op = {.name = "gelu", .backward = gelu_backward};

tp_tensor *tp_gelu(tp_tape *tape, tp_tensor *x, bool exact)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, gelu_op.name, inputs, 1)) return NULL;
    tp_tensor *y = tp_op_output(tape, gelu_op.name, x->dtype, x->rows, x->cols, tp_wants_grad(x));
    if (y == NULL) return NULL;
    tp_gelu_args args = {.n = x->rows, .dim = x->cols, .x = tp_tensor_rows(x), .y = tp_tensor_rows(y), .exact = exact};
    if (!tp_op_ok(tape, gelu_op.name, tp_run_gelu(tp_tape_ctx(tape), &args))) return NULL;
    if (!y->needs_grad || !tp_tape_recording(tape)) return y;
    struct gelu_record *r = tp_op_record(tape, &gelu_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->x = x;
    r->exact = exact;
    return y;
}
