/* Rotary position embedding, in place:  (a, b) -> (a cos - b sin, b cos + a sin) for channels i and i + half of each head.
 * A rotation's gradient is the inverse rotation, so nothing is saved. Queries and keys that lie side by side are rotated as one
 * tensor with the heads of both.                                                   (Su et al. 2021, arXiv:2104.09864) */
#include "autograd/op.h"
#include "autograd/ops.h"

struct rope_record {
    tp_record record;
    tp_tensor *x[2]; /* the second may be NULL */
    tp_rope_angles angles;
    int64_t head_dim;
};

static const char op_name[] = "rope";

static tp_status rotate(tp_tape *tape, tp_rows rows, int64_t n, int64_t cols, const tp_rope_angles *angles, int64_t head_dim,
                        bool inverse)
{
    tp_rope_args args = {.n = n,
                         .heads = cols / head_dim,
                         .head_dim = head_dim,
                         .half = angles->half,
                         .x = rows,
                         .cos = angles->cos,
                         .sin = angles->sin,
                         .inverse = inverse};
    return tp_run_rope(tp_tape_ctx(tape), &args);
}

/* b's columns follow a's, and so do those of their gradients. */
static bool side_by_side(const tp_tensor *a, const tp_tensor *b)
{
    return b != NULL && a->base != NULL && a->base == b->base &&
           (char *)a->data + (size_t)a->cols * tp_dtype_bytes(a->dtype) == (char *)b->data;
}

/* The values, or the gradients, of both. */
static tp_status rotate_both(tp_tape *tape, tp_tensor *const x[2], const tp_rope_angles *angles, int64_t head_dim,
                             bool gradients)
{
    const bool one = side_by_side(x[0], x[1]);
    for (int i = 0; i < 2 && x[i] != NULL; i++) {
        int64_t cols = one ? x[0]->cols + x[1]->cols : x[i]->cols;
        tp_rows rows = gradients ? tp_tensor_grad_rows(x[i]) : tp_tensor_rows(x[i]);
        TP_TRY(rotate(tape, rows, x[i]->rows, cols, angles, head_dim, gradients));
        if (one) break;
    }
    return TP_OK;
}

static tp_status rope_backward(tp_tape *tape, tp_record *base)
{
    struct rope_record *r = (struct rope_record *)base;
    TP_TRY(rotate_both(tape, base->out, &r->angles, r->head_dim, true));
    TP_TRY(tp_grad_move(tape, base->out[0], r->x[0]));
    return r->x[1] != NULL ? tp_grad_move(tape, base->out[1], r->x[1]) : TP_OK;
}

static const tp_op rope_op = {.name = op_name, .backward = rope_backward};

static bool check(tp_tape *tape, const tp_tensor *x, const tp_rope_angles *angles, int64_t head_dim)
{
    if (head_dim > 0 && x->cols % head_dim == 0 && 2 * angles->half <= head_dim) return true;
    return tp_op_fail(tape, op_name, TP_SHAPE, "x has %lld columns, heads of %lld, %lld rotated pairs", (long long)x->cols,
                      (long long)head_dim, (long long)angles->half) != NULL;
}

/* y[i] = x[i] turned, for n of them. */
static bool turn(tp_tape *tape, tp_tensor *const x[2], int n, const tp_rope_angles *angles, int64_t head_dim, tp_tensor *y[2])
{
    tp_tensor *trained[2] = {NULL, NULL}, *from[2] = {NULL, NULL};
    int n_trained = 0;
    for (int i = 0; i < n; i++) {
        if (!check(tape, x[i], angles, head_dim)) return false;
        y[i] = tp_op_in_place(tape, op_name, x[i], tp_wants_grad(x[i]));
        if (y[i] == NULL) return false;
        if (y[i]->needs_grad) trained[n_trained] = y[i], from[n_trained++] = x[i];
    }
    if (!tp_op_ok(tape, op_name, rotate_both(tape, y, angles, head_dim, false))) return false;
    if (n_trained == 0 || !tp_tape_recording(tape)) return true;
    struct rope_record *r = tp_op_record(tape, &rope_op, sizeof *r, trained[0], trained[1], NULL);
    if (r == NULL) return false;
    r->x[0] = from[0];
    r->x[1] = from[1];
    r->angles = *angles;
    r->head_dim = head_dim;
    return true;
}

tp_tensor *tp_rope(tp_tape *tape, tp_tensor *x, const tp_rope_angles *angles, int64_t head_dim)
{
    tp_tensor *inputs[2] = {x, NULL}, *y[2] = {NULL, NULL};
    if (!tp_op_begin(tape, op_name, (const tp_tensor *const *)inputs, 1)) return NULL;
    return turn(tape, inputs, 1, angles, head_dim, y) ? y[0] : NULL;
}

bool tp_rope_both(tp_tape *tape, tp_tensor **q, tp_tensor **k, const tp_rope_angles *angles, int64_t head_dim)
{
    tp_tensor *inputs[2] = {*q, *k}, *y[2] = {NULL, NULL};
    *q = *k = NULL;
    if (!tp_op_begin(tape, op_name, (const tp_tensor *const *)inputs, 2) || !turn(tape, inputs, 2, angles, head_dim, y))
        return false;
    *q = y[0];
    *k = y[1];
    return true;
}
