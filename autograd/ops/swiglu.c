/* y = silu(g) u,  silu(g) = g s(g)                                     (Shazeer 2020, arXiv:2002.05202)
 * dg = dy u s(g) (1 + g (1 - s(g))),  du = dy silu(g).   Saves nothing but its inputs.
 * Between joint linears, backward may take over what their factors want from its arrays (factors.h). */
#include "autograd/op.h"
#include "autograd/ops.h"
#include "autograd/ops/factors.h"

struct swiglu_record {
    tp_record record;
    tp_tensor *gate, *up;
    bool makes_again;         /* the device does, in backward */
    tp_matmul_tn_args behind; /* the gradient of a factor that read y; c NULL: none */
};

static const char op_name[] = "swiglu";

/* Gradients go straight to their tensors; where somebody wrote before, or none is wanted, through scratch. */
static tp_status swiglu_backward(tp_tape *tape, tp_record *base)
{
    struct swiglu_record *r = (struct swiglu_record *)base;
    tp_tensor *y = base->out[0], *inputs[2] = {r->gate, r->up};
    tp_rows target[2];
    tp_storage *scratch[2] = {NULL, NULL};
    bool add[2] = {false, false};
    for (int i = 0; i < 2; i++) TP_TRY(tp_op_recall(tape, inputs[i]));
    for (int i = 0; i < 2; i++) {
        if (tp_wants_grad(inputs[i])) target[i] = tp_grad_for(tape, inputs[i], &add[i]);
        if (tp_wants_grad(inputs[i]) && !add[i]) continue;
        scratch[i] = tp_op_alloc(tape, op_name, (size_t)(y->rows * y->cols) * tp_dtype_bytes(y->dtype));
        if (scratch[i] == NULL) return tp_tape_status(tape);
        target[i] = (tp_rows){tp_storage_data(scratch[i]), y->dtype, y->cols};
    }
    if (target[0].data == NULL || target[1].data == NULL) return tp_tape_status(tape);
    tp_swiglu_backward_args args = {.n = y->rows,
                                    .dim = y->cols,
                                    .gate = tp_tensor_rows(r->gate),
                                    .up = tp_tensor_rows(r->up),
                                    .dy = tp_tensor_grad_rows(y),
                                    .dgate = target[0],
                                    .dup = target[1]};
    tp_swiglu_factors_args all = {.swiglu = args, .behind = r->behind};
    bool alone = !scratch[0] && !scratch[1], side_by_side = r->gate->base != NULL && r->gate->base == r->up->base;
    bool before = alone && r->makes_again && side_by_side && r->gate->data == r->gate->base->data &&
                  tp_joint_before(r->gate->base, y->cols, &all.before);
    if (before || r->behind.c != NULL)
        TP_TRY(tp_run_swiglu_factors(tp_tape_ctx(tape), &all));
    else
        TP_TRY(tp_run_swiglu_backward(tp_tape_ctx(tape), &args));
    for (int i = 0; i < 2; i++) {
        tp_rows grad = tp_tensor_grad_rows(inputs[i]);
        tp_add_args sum = {.n = y->rows, .dim = y->cols, .x = grad, .y = target[i], .z = grad};
        if (add[i]) TP_TRY(tp_run_add(tp_tape_ctx(tape), &sum));
        tp_op_release(tape, scratch[i]);
    }
    return TP_OK;
}

static tp_status run(tp_tape *tape, const tp_tensor *gate, const tp_tensor *up, const tp_tensor *y)
{
    tp_swiglu_args args = {
        .n = y->rows, .dim = y->cols, .gate = tp_tensor_rows(gate), .up = tp_tensor_rows(up), .y = tp_tensor_rows(y)};
    return tp_run_swiglu(tp_tape_ctx(tape), &args);
}

static tp_status swiglu_remake(tp_tape *tape, tp_record *base)
{
    struct swiglu_record *r = (struct swiglu_record *)base;
    TP_TRY(tp_op_recall(tape, r->gate));
    TP_TRY(tp_op_recall(tape, r->up));
    return run(tape, r->gate, r->up, base->out[0]);
}

static const tp_op swiglu_op = {.name = op_name, .backward = swiglu_backward, .remake = swiglu_remake};

bool tp_swiglu_behind(tp_tensor *y, const tp_matmul_tn_args *args)
{
    struct swiglu_record *r = (struct swiglu_record *)y->maker;
    if (r == NULL || r->record.op != &swiglu_op || !r->makes_again || r->behind.c != NULL) return false;
    r->behind = *args;
    return true;
}

tp_tensor *tp_swiglu(tp_tape *tape, tp_tensor *gate, tp_tensor *up)
{
    const tp_tensor *inputs[] = {gate, up};
    if (!tp_op_begin(tape, op_name, inputs, 2)) return NULL;
    if (gate->rows != up->rows || gate->cols != up->cols)
        return tp_op_fail(tape, op_name, TP_SHAPE, "gate is [%lld, %lld], up is [%lld, %lld]", (long long)gate->rows,
                          (long long)gate->cols, (long long)up->rows, (long long)up->cols);
    bool wants = tp_wants_grad(gate) || tp_wants_grad(up);
    tp_tensor *y = tp_op_output(tape, op_name, gate->dtype, gate->rows, gate->cols, wants);
    if (y == NULL) return NULL;
    if (!tp_op_ok(tape, op_name, run(tape, gate, up, y))) return NULL;
    if (!wants || !tp_tape_recording(tape)) return y;
    struct swiglu_record *r = tp_op_record(tape, &swiglu_op, sizeof *r, y, NULL, NULL);
    if (r == NULL) return NULL;
    r->gate = gate;
    r->up = up;
    r->makes_again = tp_tape_ctx(tape)->device->makes_swiglu_again;
    return y;
}
