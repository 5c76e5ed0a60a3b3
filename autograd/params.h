/* Trained parameters in flat buffers: values, gradients and, side by side, what the optimizer keeps.
 *
 * Every parameter has a range that begins at a multiple of 256 elements, so the norm, the all-reduce, 8-bit state blocks and
 * the update each run once over everything. Names are PEFT's file names. */
#ifndef TP_AUTOGRAD_PARAMS_H
#define TP_AUTOGRAD_PARAMS_H

#include "autograd/tensor.h"

#define TP_PARAM_ALIGN 256

typedef struct tp_param {
    char *name;     /* "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" */
    int64_t offset; /* in elements, a multiple of TP_PARAM_ALIGN */
    int64_t count;
    tp_tensor tensor; /* over the flat buffers; grad NULL until tp_params_train */
} tp_param;

typedef struct tp_params {
    tp_param *list;
    size_t n, capacity;
    int64_t elements;      /* length of each flat buffer */
    int64_t trained;       /* sum of counts */
    float *values, *grads; /* device; grads NULL unless training */
    tp_device *device;
} tp_params;

/* Declare all, then allocate once; tensors are valid from then on. */
TP_API tp_status tp_params_declare(tp_ctx *ctx, tp_params *params, const char *name, int64_t rows, int64_t cols,
                                   size_t *index) TP_MUST_CHECK;
TP_API tp_status tp_params_allocate(tp_ctx *ctx, tp_params *params) TP_MUST_CHECK;
/* Adds the gradient buffer and marks every parameter as trained. */
TP_API tp_status tp_params_train(tp_ctx *ctx, tp_params *params) TP_MUST_CHECK;
TP_API tp_status tp_params_zero_grads(tp_ctx *ctx, tp_params *params) TP_MUST_CHECK;
TP_API void tp_params_free(tp_params *params);
TP_API tp_param *tp_params_find(tp_params *params, const char *name);

#endif
