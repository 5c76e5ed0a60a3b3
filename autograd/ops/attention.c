/* out = softmax(scale q k^T + mask) v per head, by tiles, without a score matrix.     (Dao 2023, arXiv:2307.08691)
 * Saves the log-sum-exp of every row and head and its own output, from which backward makes the probabilities again. */
#include "autograd/op.h"
#include "autograd/ops.h"

struct attention_record {
    tp_record record;
    tp_tensor *q, *k, *v;
    tp_attention_args args;
};

static const char op_name[] = "attention";

/* Where a gradient goes: straight to its tensor if nobody wrote there, else through scratch that is added afterwards. */
struct target {
    tp_tensor *tensor;
    tp_rows rows;
    tp_storage *scratch;
    bool add;
};

static bool open_target(tp_tape *tape, tp_tensor *t, struct target *target)
{
    *target = (struct target){.tensor = t};
    if (tp_wants_grad(t)) {
        target->rows = tp_grad_for(tape, t, &target->add);
        if (target->rows.data == NULL) return false;
        if (!target->add) return true;
    }
    target->scratch = tp_op_alloc(tape, op_name, (size_t)(t->rows * t->cols) * tp_dtype_bytes(t->dtype));
    if (target->scratch == NULL) return false;
    target->rows = (tp_rows){tp_storage_data(target->scratch), t->dtype, t->cols};
    return true;
}

static tp_status close_target(tp_tape *tape, struct target *target)
{
    tp_tensor *t = target->tensor;
    if (target->add) {
        tp_rows grad = tp_tensor_grad_rows(t);
        tp_add_args args = {.n = t->rows, .dim = t->cols, .x = grad, .y = target->rows, .z = grad};
        TP_TRY(tp_run_add(tp_tape_ctx(tape), &args));
    }
    tp_op_release(tape, target->scratch);
    return TP_OK;
}

static tp_status attention_backward(tp_tape *tape, tp_record *base)
{
    struct attention_record *r = (struct attention_record *)base;
    struct target dq, dk, dv;
    tp_storage *delta = tp_op_alloc(tape, op_name, (size_t)(r->args.n_q * r->args.heads) * sizeof(float));
    if (delta == NULL || !open_target(tape, r->q, &dq) || !open_target(tape, r->k, &dk) || !open_target(tape, r->v, &dv))
        return tp_tape_status(tape);
    tp_attention_backward_args args = {.forward = r->args,
                                       .n_k = r->k->rows,
                                       .dout = tp_tensor_grad_rows(base->out[0]),
                                       .dq = dq.rows,
                                       .dk = dk.rows,
                                       .dv = dv.rows,
                                       .delta = tp_storage_data(delta)};
    TP_TRY(tp_run_attention_backward(tp_tape_ctx(tape), &args));
    TP_TRY(close_target(tape, &dq));
    TP_TRY(close_target(tape, &dk));
    TP_TRY(close_target(tape, &dv));
    tp_op_release(tape, delta);
    return TP_OK;
}

static const tp_op attention_op = {.name = op_name, .backward = attention_backward};

tp_tensor *tp_attention(tp_tape *tape, tp_tensor *q, tp_tensor *k, tp_tensor *v, const tp_attention_spec *spec)
{
    const tp_tensor *inputs[] = {q, k, v};
    if (!tp_op_begin(tape, op_name, inputs, 3)) return NULL;
    if (q->cols != spec->heads * spec->head_dim || k->cols != spec->kv_heads * spec->head_dim || v->cols != k->cols ||
        v->rows != k->rows || spec->kv_heads <= 0 || spec->heads % spec->kv_heads != 0)
        return tp_op_fail(tape, op_name, TP_SHAPE, "q has %lld columns, k %lld, v %lld; %lld heads, %lld key heads of %lld",
                          (long long)q->cols, (long long)k->cols, (long long)v->cols, (long long)spec->heads,
                          (long long)spec->kv_heads, (long long)spec->head_dim);
    bool wants = tp_wants_grad(q) || tp_wants_grad(k) || tp_wants_grad(v), record = wants && tp_tape_recording(tape);
    tp_tensor *out = tp_op_output(tape, op_name, q->dtype, q->rows, q->cols, wants);
    tp_storage *lse = record ? tp_op_alloc(tape, op_name, (size_t)(q->rows * spec->heads) * sizeof(float)) : NULL;
    if (out == NULL || (record && lse == NULL)) return NULL;
    tp_attention_args args = {.n_q = q->rows,
                              .heads = spec->heads,
                              .kv_heads = spec->kv_heads,
                              .head_dim = spec->head_dim,
                              .q = tp_tensor_rows(q),
                              .k = tp_tensor_rows(k),
                              .v = tp_tensor_rows(v),
                              .out = tp_tensor_rows(out),
                              .lse = record ? tp_storage_data(lse) : NULL,
                              .segments = spec->segments,
                              .n_segments = spec->n_segments,
                              .causal = spec->causal,
                              .window = spec->window,
                              .scale = spec->scale};
    if (!tp_op_ok(tape, op_name, tp_run_attention(tp_tape_ctx(tape), &args))) return NULL;
    if (!record) return out;
    struct attention_record *r = tp_op_record(tape, &attention_op, sizeof *r, out, NULL, NULL);
    if (r == NULL) return NULL;
    r->record.saved[0] = lse;
    r->q = q;
    r->k = k;
    r->v = v;
    r->args = args;
    return out;
}
