/* What an op is: for the files in autograd/ops/ only.
 *
 * An op's constructor checks shapes, allocates the result, runs a kernel and, if some input wants a gradient, appends a
 * record with what its backward needs. Backward asks which inputs want a gradient (frozen ones are the usual case here)
 * and whether it is the first to write or must add. Saved values are given back by the tape when backward has run. */
#ifndef TP_AUTOGRAD_OP_H
#define TP_AUTOGRAD_OP_H

#include "autograd/tape.h"

#define TP_RECORD_OUTPUTS 3
#define TP_RECORD_SAVED   4

typedef struct tp_record tp_record;

typedef struct tp_op {
    const char *name;
    tp_status (*backward)(tp_tape *tape, tp_record *record);
    /* Computes out[0] again, into its memory; NULL: the op cannot. */
    tp_status (*remake)(tp_tape *tape, tp_record *record);
    bool is_loss; /* the sweep may start here: backward reads no gradient of the output */
} tp_op;

/* First member of every op's own record. */
struct tp_record {
    const tp_op *op;
    const char *scope;
    tp_tensor *out[TP_RECORD_OUTPUTS]; /* unused: NULL */
    tp_storage *saved[TP_RECORD_SAVED];
};

/* True if the tape is fine and none of the inputs is NULL. Every constructor begins with it. */
bool tp_op_begin(tp_tape *tape, const char *op, const tp_tensor *const *inputs, int n);
/* Records a failure with scope and op in front; returns NULL so that constructors can return it. */
void *tp_op_fail(tp_tape *tape, const char *op, tp_status status, const char *format, ...) TP_PRINTF(4, 5);
/* Turns a kernel's status into a tape error ("scope: op: message"). */
bool tp_op_ok(tp_tape *tape, const char *op, tp_status status);

/* A fresh activation [rows, cols] of undefined content. */
tp_tensor *tp_op_output(tp_tape *tape, const char *op, tp_dtype dtype, int64_t rows, int64_t cols, bool needs_grad);
/* A tensor over the same memory, and in the sweep the same gradient memory: for ops that work in place. The input must not be
 * used again. */
tp_tensor *tp_op_in_place(tp_tape *tape, const char *op, tp_tensor *x, bool needs_grad);
/* A block of the step arena; NULL once the tape failed. Owned by the record it is saved in, or released by tp_op_release. */
tp_storage *tp_op_alloc(tp_tape *tape, const char *op, size_t bytes);
void *tp_storage_data(const tp_storage *storage);
void tp_op_release(tp_tape *tape, tp_storage *storage); /* accepts NULL */

/* Appends a record of `bytes` (a struct whose first member is tp_record), zeroed, with op, scope and outputs set. */
void *tp_op_record(tp_tape *tape, const tp_op *op, size_t bytes, tp_tensor *out0, tp_tensor *out1, tp_tensor *out2);

/* In backward, before a value of the forward pass is read: makes it again if it was forgotten. */
tp_status tp_op_recall(tp_tape *tape, tp_tensor *x);
/* In remake: a forgotten view of columns, from `column` on, of its base, which is there. */
void tp_op_view_again(tp_tensor *view, int64_t column);

/* In backward: the gradient of `t` as rows to write. *accumulate says whether to add (somebody wrote before). Call once per
 * write; NULL data on failure. Only for tensors with needs_grad. */
tp_rows tp_grad_for(tp_tape *tape, tp_tensor *t, bool *accumulate);
/* In backward: gives the finished gradient of `out` to `x`, without a copy if nothing is there yet, else added. Both have the
 * same shape. `out` keeps none. */
tp_status tp_grad_move(tp_tape *tape, tp_tensor *out, tp_tensor *x);

/* The same rows, from row and column number so and so on. */
static inline tp_rows tp_rows_from(tp_rows rows, int64_t row, int64_t column)
{
    rows.data = (char *)rows.data + (size_t)(row * rows.ld + column) * tp_dtype_bytes(rows.dtype);
    return rows;
}

/* A product in the tape's precision. */
static inline tp_status tp_op_product(tp_tape *tape, tp_matmul_args args)
{
    args.precision = tp_tape_precision(tape);
    return tp_run_matmul(tp_tape_ctx(tape), &args);
}

static inline bool tp_wants_grad(const tp_tensor *t)
{
    return t != NULL && t->needs_grad;
}

#endif
