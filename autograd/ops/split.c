/* Views of the columns of one tensor (fused q, k, v; gate and up). Gradients of the views are written straight into the columns
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

/* The views see x again. */
static tp_status split_remake(tp_tape *tape, tp_record *base)
{
    struct split_record *r = (struct split_record *)base;
    int64_t column = 0;
    TP_TRY(tp_op_recall(tape, r->x));
    for (int i = 0; i < TP_RECORD_OUTPUTS && base->out[i] != NULL; i++) {
        tp_op_view_again(base->out[i], column);
        column += base->out[i]->cols;
    }
    return TP_OK;
}

static const tp_op split_op = {.name = "split", .backward = split_backward, .remake = split_remake};

bool tp_split(tp_tape *tape, tp_tensor *x, const int64_t *sizes, int n, tp_tensor **out)
{
    const tp_tensor *inputs[] = {x};
    tp_tensor *views[TP_RECORD_OUTPUTS] = {NULL};
    int64_t column = 0, total = 0;
    for (int i = 0; i < n; i++) out[i] = NULL;
    for (int i = 0; i < n; i++) total += sizes[i];
    if (!tp_op_begin(tape, split_op.name, inputs, 1)) return false;
    if (n > TP_RECORD_OUTPUTS || total != x->cols)
        return tp_op_fail(tape, split_op.name, TP_SHAPE, "%lld columns cannot be split into %d parts of %lld together",
                          (long long)x->cols, n, (long long)total) != NULL;
    for (int i = 0; i < n; i++) {
        views[i] = tp_op_in_place(tape, split_op.name, x, tp_wants_grad(x));
        if (views[i] == NULL) return false;
        views[i]->cols = sizes[i];
        views[i]->data = (char *)x->data + (size_t)column * tp_dtype_bytes(x->dtype);
        views[i]->base = x;
        column += sizes[i];
    }
    for (int i = 0; i < n; i++) out[i] = views[i];
    if (!x->needs_grad || !tp_tape_recording(tape)) return true;
    struct split_record *r = tp_op_record(tape, &split_op, sizeof *r, views[0], views[1], views[2]);
    if (r == NULL) return false;
    r->x = x;
    return true;
}
