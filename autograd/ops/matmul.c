/* y = alpha x w^T          dx = alpha dy w,  dw = alpha dy^T x
 * Both sides are tensors: trained dense layers and heads. Saves nothing but its inputs. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct matmul_record {
    tp_record record;
    tp_tensor *x, *w;
    float alpha;
};

static tp_status matmul_backward(tp_tape *tape, tp_record *base)
{
    struct matmul_record *r = (struct matmul_record *)base;
    tp_tensor *y = base->out[0];
    tp_rows dy = tp_tensor_grad_rows(y);
    tp_ctx *ctx = tp_tape_ctx(tape);
    if (tp_wants_grad(r->x)) {
        bool accumulate;
        tp_rows dx = tp_grad_for(tape, r->x, &accumulate);
        if (dx.data == NULL) return tp_tape_status(tape);
        tp_matmul_args args = {.n = y->rows,
                               .m = r->x->cols,
                               .k = y->cols,
                               .a = dy,
                               .b = tp_matrix_dense(r->w->dtype, r->w->data, r->w->rows, r->w->cols),
                               .c = dx,
                               .alpha = r->alpha,
                               .beta = accumulate ? 1 : 0,
                               .precision = tp_tape_precision(tape)};
        TP_TRY(tp_run_matmul(ctx, &args));
    }
    if (!tp_wants_grad(r->w)) return TP_OK;
    bool accumulate;
    tp_rows dw = tp_grad_for(tape, r->w, &accumulate);
    if (dw.data == NULL) return tp_tape_status(tape);
    tp_matmul_tn_args args = {.n = y->rows,
                              .m = r->w->rows,
                              .k = r->w->cols,
                              .a = dy,
                              .b = tp_tensor_rows(r->x),
                              .c = dw.data,
                              .alpha = r->alpha,
                              .beta = accumulate ? 1 : 0};
    return tp_run_matmul_tn(ctx, &args);
}

static const tp_op matmul_op = {.name = "matmul_nt", .backward = matmul_backward};

tp_tensor *tp_matmul_nt(tp_tape *tape, tp_tensor *x, tp_tensor *w, float alpha)
{
    const tp_tensor *inputs[] = {x, w};
    if (!tp_op_begin(tape, matmul_op.name, inputs, 2)) return NULL;
    if (x->cols != w->cols || w->dtype != TP_F32)
        return tp_op_fail(tape, matmul_op.name, TP_SHAPE, "x has %lld columns, w is [%lld, %lld] and must be f32",
                          (long long)x->cols, (long long)w->rows, (long long)w->cols);
    bool wants = tp_wants_grad(x) || tp_wants_grad(w);
    tp_tensor *y = tp_op_output(tape, matmul_op.name, tp_tape_precision(tape), x->rows, w->rows, wants);
    if (y == NULL) return NULL;
    tp_matmul_args args = {.n = x->rows,
                           .m = w->rows,
                           .k = x->cols,
                           .a = tp_tensor_rows(x),
                           .b = tp_matrix_dense(TP_F32, w->data, w->rows, w->cols),
                           .nt = true,
                           .c = tp_tensor_rows(y),
                           .alpha = alpha,
                           .precision = tp_tape_precision(tape)};
    if (!tp_op_ok(tape, matmul_op.name, tp_run_matmul(tp_tape_ctx(tape), &args))) return NULL;
    if (!wants || !tp_tape_recording(tape)) return y;
    struct matmul_record *r = tp_op_record(tape, &matmul_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->x = x;
    r->w = w;
    r->alpha = alpha;
    return y;
}
