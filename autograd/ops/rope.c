/* Rotary position embedding, in place:  (a, b) -> (a cos - b sin, b cos + a sin) for channels i and i + half of each head.
 * A rotation's gradient is the inverse rotation, so nothing is saved.               (Su et al. 2021, arXiv:2104.09864) */
#include "autograd/op.h"
#include "autograd/ops.h"

struct rope_record {
    tp_record record;
    tp_tensor *x;
    tp_rope_angles angles;
    int64_t head_dim;
};

static tp_rope_args rope_args(const tp_tensor *x, tp_rows rows, const tp_rope_angles *angles, int64_t head_dim, bool inverse)
{
    return (tp_rope_args){.n = x->rows,
                          .heads = x->cols / head_dim,
                          .head_dim = head_dim,
                          .half = angles->half,
                          .x = rows,
                          .cos = angles->cos,
                          .sin = angles->sin,
                          .inverse = inverse};
}

static tp_status rope_backward(tp_tape *tape, tp_record *base)
{
    struct rope_record *r = (struct rope_record *)base;
    tp_tensor *y = base->out[0];
    tp_rope_args args = rope_args(y, tp_tensor_grad_rows(y), &r->angles, r->head_dim, true);
    TP_TRY(tp_run_rope(tp_tape_ctx(tape), &args));
    return tp_grad_move(tape, y, r->x);
}

static const tp_op rope_op = {.name = "rope", .backward = rope_backward};

tp_tensor *tp_rope(tp_tape *tape, tp_tensor *x, const tp_rope_angles *angles, int64_t head_dim)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, rope_op.name, inputs, 1)) return NULL;
    if (head_dim <= 0 || x->cols % head_dim != 0 || 2 * angles->half > head_dim)
        return tp_op_fail(tape, rope_op.name, TP_SHAPE, "x has %lld columns, heads of %lld, %lld rotated pairs",
                          (long long)x->cols, (long long)head_dim, (long long)angles->half);
    tp_tensor *y = tp_op_in_place(tape, rope_op.name, x, tp_wants_grad(x));
    if (y == NULL) return NULL;
    tp_rope_args args = rope_args(y, tp_tensor_rows(y), angles, head_dim, false);
    if (!tp_op_ok(tape, rope_op.name, tp_run_rope(tp_tape_ctx(tape), &args))) return NULL;
    if (!y->needs_grad || !tp_tape_recording(tape)) return y;
    struct rope_record *r = tp_op_record(tape, &rope_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->x = x;
    r->angles = *angles;
    r->head_dim = head_dim;
    return y;
}
