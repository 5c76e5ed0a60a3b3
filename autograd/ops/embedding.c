/* y_i = E[id_i] (+ add_i).       dE[id_i] += dy_i,  d add = dy
 * The table is frozen in whatever format it is stored; a trained f32 table may stand in for it. Nothing is saved. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct embedding_record {
    tp_record record;
    const int32_t *ids;
    tp_tensor *trained, *add;
};

static tp_status embedding_backward(tp_tape *tape, tp_record *base)
{
    struct embedding_record *r = (struct embedding_record *)base;
    tp_tensor *y = base->out[0];
    tp_ctx *ctx = tp_tape_ctx(tape);
    if (tp_wants_grad(r->trained)) {
        tp_embedding_backward_args args = {
            .n = y->rows, .dim = y->cols, .ids = r->ids, .dout = tp_tensor_grad_rows(y), .dtable = r->trained->grad};
        TP_TRY(tp_run_embedding_backward(ctx, &args));
    }
    return tp_wants_grad(r->add) ? tp_grad_move(tape, y, r->add) : TP_OK;
}

static const tp_op embedding_op = {.name = "embedding", .backward = embedding_backward};

tp_tensor *tp_embedding(tp_tape *tape, const tp_matrix *table, tp_tensor *trained, const int32_t *ids, int64_t n,
                        tp_tensor *add)
{
    if (!tp_op_begin(tape, embedding_op.name, NULL, 0)) return NULL;
    tp_matrix from = trained != NULL ? tp_matrix_dense(TP_F32, trained->data, trained->rows, trained->cols) : *table;
    if (add != NULL && (add->rows != n || add->cols != from.cols))
        return tp_op_fail(tape, embedding_op.name, TP_SHAPE, "rows to add are [%lld, %lld], the result is [%lld, %lld]",
                          (long long)add->rows, (long long)add->cols, (long long)n, (long long)from.cols);
    bool wants = tp_wants_grad(trained) || tp_wants_grad(add);
    tp_tensor *y = tp_op_output(tape, embedding_op.name, tp_tape_precision(tape), n, from.cols, wants);
    if (y == NULL) return NULL;
    tp_ctx *ctx = tp_tape_ctx(tape);
    if (add != NULL) {
        tp_scale_args copy = {.n = n, .dim = y->cols, .x = tp_tensor_rows(add), .y = tp_tensor_rows(y), .alpha = 1};
        if (!tp_op_ok(tape, embedding_op.name, tp_run_scale(ctx, &copy))) return NULL;
    }
    tp_embedding_args args = {.n = n, .ids = ids, .table = from, .out = tp_tensor_rows(y), .accumulate = add != NULL};
    if (!tp_op_ok(tape, embedding_op.name, tp_run_embedding(ctx, &args))) return NULL;
    if (!wants || !tp_tape_recording(tape)) return y;
    struct embedding_record *r = tp_op_record(tape, &embedding_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->ids = ids;
    r->trained = trained;
    r->add = add;
    return y;
}
