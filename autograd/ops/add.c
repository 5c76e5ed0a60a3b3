/* z = x + y          dx = dz, dy = dz.  One of them takes dz over, the other gets a copy. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct add_record {
    tp_record record;
    tp_tensor *x, *y;
};

static tp_status add_backward(tp_tape *tape, tp_record *base)
{
    struct add_record *r = (struct add_record *)base;
    tp_tensor *z = base->out[0];
    if (tp_wants_grad(r->y)) {
        bool accumulate;
        tp_rows dz = tp_tensor_grad_rows(z), dy = tp_grad_for(tape, r->y, &accumulate);
        if (dy.data == NULL) return tp_tape_status(tape);
        tp_add_args sum = {.n = z->rows, .dim = z->cols, .x = dy, .y = dz, .z = dy};
        tp_scale_args copy = {.n = z->rows, .dim = z->cols, .x = dz, .y = dy, .alpha = 1};
        TP_TRY(accumulate ? tp_run_add(tp_tape_ctx(tape), &sum) : tp_run_scale(tp_tape_ctx(tape), &copy));
    }
    return tp_wants_grad(r->x) ? tp_grad_move(tape, z, r->x) : TP_OK;
}

static const tp_op add_op = {.name = "add", .backward = add_backward};

tp_tensor *tp_add(tp_tape *tape, tp_tensor *x, tp_tensor *y)
{
    const tp_tensor *inputs[] = {x, y};
    if (!tp_op_begin(tape, add_op.name, inputs, 2)) return NULL;
    if (x->rows != y->rows || x->cols != y->cols || x->dtype != y->dtype)
        return tp_op_fail(tape, add_op.name, TP_SHAPE, "[%lld, %lld] %s and [%lld, %lld] %s do not add", (long long)x->rows,
                          (long long)x->cols, tp_dtype_name(x->dtype), (long long)y->rows, (long long)y->cols,
                          tp_dtype_name(y->dtype));
    tp_tensor *z = tp_op_output(tape, add_op.name, x->dtype, x->rows, x->cols, tp_wants_grad(x) || tp_wants_grad(y));
    if (z == NULL) return NULL;
    tp_add_args args = {.n = x->rows, .dim = x->cols, .x = tp_tensor_rows(x), .y = tp_tensor_rows(y), .z = tp_tensor_rows(z)};
    if (!tp_op_ok(tape, add_op.name, tp_run_add(tp_tape_ctx(tape), &args))) return NULL;
    if (!z->needs_grad || !tp_tape_recording(tape)) return z;
    struct add_record *r = tp_op_record(tape, &add_op, sizeof *r, z, NULL, NULL);
    if (r == NULL) return NULL;
    r->x = x;
    r->y = y;
    return z;
}
