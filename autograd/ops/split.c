/* Three views of the columns of one tensor (fused q, k, v). Gradients of the views are written straight into the columns
 * of the input's gradient, so backward has nothing to move. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct split_record {
    tp_record record;
    tp_tensor *x;
};

static tp_status split_backward(tp_tape *tape, tp_record *base)
{
    struct split_record *r = (struct split_record *)base;
    (void)tape;
    r->x->grad_written = true; /* every view is complete: the sweep fills those that nobody used */
    return TP_OK;
}

static const tp_op split_op = {"split", split_backward};

bool tp_split3(tp_tape *tape, tp_tensor *x, const int64_t sizes[3], tp_tensor *out[3])
{
    const tp_tensor *inputs[] = {x};
    out[0] = out[1] = out[2] = NULL;
    if (!tp_op_begin(tape, split_op.name, inputs, 1)) return false;
    if (sizes[0] + sizes[1] + sizes[2] != x->cols)
        return tp_op_fail(tape, split_op.name, TP_SHAPE, "%lld columns cannot be split into %lld, %lld and %lld",
                          (long long)x->cols, (long long)sizes[0], (long long)sizes[1], (long long)sizes[2]) != NULL;
    int64_t column = 0;
    for (int i = 0; i < 3; i++) {
        out[i] = tp_op_in_place(tape, split_op.name, x, tp_wants_grad(x));
        if (out[i] == NULL) return false;
        out[i]->cols = sizes[i];
        out[i]->data = (char *)x->data + (size_t)column * tp_dtype_bytes(x->dtype);
        out[i]->base = x;
        column += sizes[i];
    }
    if (!x->needs_grad || !tp_tape_recording(tape)) return true;
    struct split_record *r = tp_op_record(tape, &split_op, sizeof *r, out[0], out[1], out[2]);
    if (r == NULL) return false;
    r->x = x;
    return true;
}
