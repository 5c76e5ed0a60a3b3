/* y = w x r,  r = 1 / sqrt(mean(x^2) + eps)
 * dx = r (w dy - x r^2 mean(w dy x)),  dw += sum_rows dy x r         (Zhang & Sennrich 2019, arXiv:1910.07467)
 * Saves r: one number per group; x is kept by whoever made it. A weight narrower than x norms each head by itself. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct rmsnorm_record {
    tp_record record;
    tp_tensor *x, *weight;
    float eps;
};

static tp_status rmsnorm_backward(tp_tape *tape, tp_record *base)
{
    struct rmsnorm_record *r = (struct rmsnorm_record *)base;
    tp_tensor *y = base->out[0];
    int64_t dim = r->weight->cols;
    bool accumulate = false;
    tp_rows dx = {0};
    tp_storage *unused = NULL;
    TP_TRY(tp_op_recall(tape, r->x));
    if (tp_wants_grad(r->x)) {
        dx = tp_grad_for(tape, r->x, &accumulate);
    } else { /* the kernel makes dx on the way to dw */
        unused = tp_op_alloc(tape, "rmsnorm", (size_t)(y->rows * y->cols) * tp_dtype_bytes(y->dtype));
        if (unused != NULL) dx = (tp_rows){tp_storage_data(unused), y->dtype, y->cols};
    }
    if (dx.data == NULL) return tp_tape_status(tape);
    tp_rmsnorm_backward_args args = {.n = y->rows * (y->cols / dim),
                                     .dim = dim,
                                     .x = tp_tensor_rows(r->x),
                                     .dy = tp_tensor_grad_rows(y),
                                     .dx = dx,
                                     .weight = r->weight->data,
                                     .rstd = tp_storage_data(base->saved[0]),
                                     .dweight = tp_wants_grad(r->weight) ? r->weight->grad : NULL,
                                     .accumulate = accumulate,
                                     .heads = y->cols / dim};
    TP_TRY(tp_run_rmsnorm_backward(tp_tape_ctx(tape), &args));
    tp_op_release(tape, unused);
    return TP_OK;
}

/* y, and 1/rms if there is room for it. */
static tp_status run(tp_tape *tape, const tp_tensor *x, const tp_tensor *weight, float eps, const tp_tensor *y, float *rstd)
{
    int64_t dim = weight->cols;
    tp_rmsnorm_args args = {.n = x->rows * (x->cols / dim),
                            .dim = dim,
                            .x = tp_tensor_rows(x),
                            .y = tp_tensor_rows(y),
                            .weight = weight->data,
                            .rstd = rstd,
                            .eps = eps,
                            .heads = x->cols / dim};
    return tp_run_rmsnorm(tp_tape_ctx(tape), &args);
}

static tp_status rmsnorm_remake(tp_tape *tape, tp_record *base)
{
    struct rmsnorm_record *r = (struct rmsnorm_record *)base;
    TP_TRY(tp_op_recall(tape, r->x));
    return run(tape, r->x, r->weight, r->eps, base->out[0], tp_storage_data(base->saved[0]));
}

static const tp_op rmsnorm_op = {.name = "rmsnorm", .backward = rmsnorm_backward, .remake = rmsnorm_remake};

tp_tensor *tp_rmsnorm(tp_tape *tape, tp_tensor *x, tp_tensor *weight, float eps)
{
    const tp_tensor *inputs[] = {x, weight};
    if (!tp_op_begin(tape, rmsnorm_op.name, inputs, 2)) return NULL;
    int64_t dim = weight->cols;
    if (dim == 0 || x->cols % dim != 0)
        return tp_op_fail(tape, rmsnorm_op.name, TP_SHAPE, "x has %lld columns, the weight %lld values", (long long)x->cols,
                          (long long)dim);
    bool wants = tp_wants_grad(x) || tp_wants_grad(weight), record = wants && tp_tape_recording(tape);
    int64_t groups = x->rows * (x->cols / dim);
    tp_tensor *y = tp_op_output(tape, rmsnorm_op.name, x->dtype, x->rows, x->cols, wants);
    tp_storage *rstd = record ? tp_op_alloc(tape, rmsnorm_op.name, (size_t)groups * sizeof(float)) : NULL;
    if (y == NULL || (record && rstd == NULL)) return NULL;
    if (!tp_op_ok(tape, rmsnorm_op.name, run(tape, x, weight, eps, y, record ? tp_storage_data(rstd) : NULL))) return NULL;
    if (!record) return y;
    struct rmsnorm_record *r = tp_op_record(tape, &rmsnorm_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->record.saved[0] = rstd;
    r->x = x;
    r->weight = weight;
    r->eps = eps;
    return y;
}
