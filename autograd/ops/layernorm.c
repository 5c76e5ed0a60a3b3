/* y = w (x - mean) r + b,  r = 1 / sqrt(var(x) + eps)                  (Ba et al. 2016, arXiv:1607.06450)
 * Saves mean and r: two numbers per row. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct layernorm_record {
    tp_record record;
    tp_tensor *x, *weight, *bias;
};

static tp_status layernorm_backward(tp_tape *tape, tp_record *base)
{
    struct layernorm_record *r = (struct layernorm_record *)base;
    tp_tensor *y = base->out[0];
    bool accumulate = false;
    tp_rows dx = {0};
    tp_storage *unused = NULL;
    if (tp_wants_grad(r->x)) {
        dx = tp_grad_for(tape, r->x, &accumulate);
    } else { /* the kernel makes dx on the way to dw and db */
        unused = tp_op_alloc(tape, "layernorm", (size_t)(y->rows * y->cols) * tp_dtype_bytes(y->dtype));
        if (unused != NULL) dx = (tp_rows){tp_storage_data(unused), y->dtype, y->cols};
    }
    if (dx.data == NULL) return tp_tape_status(tape);
    tp_layernorm_backward_args args = {.n = y->rows,
                                       .dim = y->cols,
                                       .x = tp_tensor_rows(r->x),
                                       .dy = tp_tensor_grad_rows(y),
                                       .dx = dx,
                                       .weight = r->weight->data,
                                       .mean = tp_storage_data(base->saved[0]),
                                       .rstd = tp_storage_data(base->saved[1]),
                                       .dweight = tp_wants_grad(r->weight) ? r->weight->grad : NULL,
                                       .dbias = tp_wants_grad(r->bias) ? r->bias->grad : NULL,
                                       .accumulate = accumulate};
    TP_TRY(tp_run_layernorm_backward(tp_tape_ctx(tape), &args));
    tp_op_release(tape, unused);
    return TP_OK;
}

static const tp_op layernorm_op = {.name = "layernorm", .backward = layernorm_backward};

tp_tensor *tp_layernorm(tp_tape *tape, tp_tensor *x, tp_tensor *weight, tp_tensor *bias, float eps)
{
    const tp_tensor *inputs[] = {x, weight};
    if (!tp_op_begin(tape, layernorm_op.name, inputs, 2)) return NULL;
    if (x->cols != weight->cols || (bias != NULL && bias->cols != x->cols))
        return tp_op_fail(tape, layernorm_op.name, TP_SHAPE, "x has %lld columns, the weight %lld values", (long long)x->cols,
                          (long long)weight->cols);
    bool wants = tp_wants_grad(x) || tp_wants_grad(weight) || tp_wants_grad(bias);
    tp_tensor *y = tp_op_output(tape, layernorm_op.name, x->dtype, x->rows, x->cols, wants);
    tp_storage *mean = tp_op_alloc(tape, layernorm_op.name, (size_t)x->rows * sizeof(float));
    tp_storage *rstd = tp_op_alloc(tape, layernorm_op.name, (size_t)x->rows * sizeof(float));
    if (y == NULL || mean == NULL || rstd == NULL) return NULL;
    tp_layernorm_args args = {.n = x->rows,
                              .dim = x->cols,
                              .x = tp_tensor_rows(x),
                              .y = tp_tensor_rows(y),
                              .weight = weight->data,
                              .bias = bias != NULL ? bias->data : NULL,
                              .mean = tp_storage_data(mean),
                              .rstd = tp_storage_data(rstd),
                              .eps = eps};
    if (!tp_op_ok(tape, layernorm_op.name, tp_run_layernorm(tp_tape_ctx(tape), &args))) return NULL;
    if (!wants || !tp_tape_recording(tape)) {
        tp_op_release(tape, rstd);
        tp_op_release(tape, mean);
        return y;
    }
    struct layernorm_record *r = tp_op_record(tape, &layernorm_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->record.saved[0] = mean;
    r->record.saved[1] = rstd;
    r->x = x;
    r->weight = weight;
    r->bias = bias;
    return y;
}
