/* Tensors: rows of numbers that flow over the tape, and trained parameters.
 *
 * Every tensor is a matrix [rows, cols], row-major (a vector has one row). Activations belong to the tape until the
 * reverse sweep has passed the op that made them; parameters belong to whoever made them. Frozen weights are no tensors
 * (backend/matrix.h), so packed bytes cannot reach an add. */
#ifndef TP_AUTOGRAD_TENSOR_H
#define TP_AUTOGRAD_TENSOR_H

#include "backend/backend.h"

typedef struct tp_storage tp_storage; /* a block of the step arena, counted by its users */

typedef struct tp_tensor {
    const char *name; /* parameters: PEFT's name; activations: NULL */
    tp_dtype dtype;   /* TP_F32, TP_BF16 or TP_F16; parameters are TP_F32 */
    int64_t rows, cols;
    int64_t ld; /* elements between rows; cols unless this is a view of columns */
    void *data; /* device memory */
    bool needs_grad;
    bool is_parameter;
    /* Gradient in dtype, with the same shape and ld. Parameters: given at creation and added to. Activations: allocated by
     * the first op that writes it during the reverse sweep. */
    void *grad;
    bool grad_written;
    tp_storage *storage, *grad_storage; /* NULL for parameters */
    struct tp_tensor *base;             /* a view of columns: gradients are written into the base's gradient, else NULL */
    struct tp_record *maker;            /* the op that made it, if it was recorded */
    bool forgotten;                     /* has no memory until the sweep makes it again (tp_tape_forget) */
} tp_tensor;

/* A parameter over memory of the caller; grad NULL: frozen. */
static inline tp_tensor tp_parameter(const char *name, int64_t rows, int64_t cols, float *data, float *grad)
{
    tp_tensor t = {.name = name,
                   .dtype = TP_F32,
                   .rows = rows,
                   .cols = cols,
                   .ld = cols,
                   .data = data,
                   .needs_grad = grad != NULL,
                   .is_parameter = true,
                   .grad = grad,
                   .grad_written = true};
    return t;
}

static inline tp_rows tp_tensor_rows(const tp_tensor *t)
{
    return (tp_rows){t->data, t->dtype, t->ld};
}
static inline tp_rows tp_tensor_grad_rows(const tp_tensor *t)
{
    return (tp_rows){t->grad, t->dtype, t->ld};
}

#endif
