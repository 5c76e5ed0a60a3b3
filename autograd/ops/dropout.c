/* y = x m / (1 - p), m ~ Bernoulli(1 - p) from the counter-based generator        (Srivastava et al. 2014)
 * dx = dy m / (1 - p): the same kernel on dy; the mask is made again, not saved. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct dropout_record {
    tp_record record;
    tp_tensor *x;
    float p;
    tp_rng_key key;
    int64_t row;
};

static tp_status run(tp_tape *tape, const tp_tensor *t, tp_rows from, tp_rows to, float p, tp_rng_key key, int64_t row)
{
    tp_dropout_args args = {.n = t->rows, .dim = t->cols, .x = from, .y = to, .p = p, .key = key, .first_row = row};
    args.state = tp_tape_state(tape);
    return tp_run_dropout(tp_tape_ctx(tape), &args);
}

static tp_status dropout_backward(tp_tape *tape, tp_record *base)
{
    struct dropout_record *r = (struct dropout_record *)base;
    tp_tensor *y = base->out[0];
    tp_rows dy = tp_tensor_grad_rows(y);
    TP_TRY(run(tape, y, dy, dy, r->p, r->key, r->row));
    return tp_grad_move(tape, y, r->x);
}

static const tp_op dropout_op = {.name = "dropout", .backward = dropout_backward};

tp_tensor *tp_dropout(tp_tape *tape, tp_tensor *x, float p, uint32_t site)
{
    const tp_tensor *inputs[] = {x};
    if (!tp_op_begin(tape, dropout_op.name, inputs, 1)) return NULL;
    if (!(p > 0)) return x;
    tp_tensor *y = tp_op_output(tape, dropout_op.name, x->dtype, x->rows, x->cols, tp_wants_grad(x));
    if (y == NULL) return NULL;
    tp_rng_key key = {tp_tape_ctx(tape)->seed, TP_STREAM_DROPOUT + site, 0};
    tp_status status = run(tape, y, tp_tensor_rows(x), tp_tensor_rows(y), p, key, tp_tape_row(tape));
    if (!tp_op_ok(tape, dropout_op.name, status)) return NULL;
    if (!y->needs_grad || !tp_tape_recording(tape)) return y;
    struct dropout_record *r = tp_op_record(tape, &dropout_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->x = x;
    r->p = p;
    r->key = key;
    r->row = tp_tape_row(tape);
    return y;
}
