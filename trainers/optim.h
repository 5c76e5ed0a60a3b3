/* Optimizers over flat buffers: state laid out like the parameters, one kernel call per step. */
#ifndef TP_TRAINERS_OPTIM_H
#define TP_TRAINERS_OPTIM_H

#include "autograd/params.h"

#define TP_OPTIM_STATES 2

typedef struct tp_optim tp_optim;

typedef struct tp_optim_kind {
    const char *name;                    /* "adamw", as recipes spell it */
    const char *states[TP_OPTIM_STATES]; /* names in optimizer.safetensors: "exp_avg", "exp_avg_sq"; NULL: unused */
    tp_status (*update)(tp_ctx *ctx, tp_optim *optim);
} tp_optim_kind;

typedef struct tp_optim_options {
    double beta1, beta2, epsilon; /* adamw */
    double momentum;              /* sgd; 0: keeps no state */
    double weight_decay;
    double max_grad_norm; /* 0: no clipping */
} tp_optim_options;

struct tp_optim {
    const tp_optim_kind *kind;
    tp_optim_options options;
    tp_params *params;             /* borrowed */
    float *state[TP_OPTIM_STATES]; /* device, params->elements each; NULL: unused */
    tp_step_state *step_state;     /* device */
    int64_t steps;                 /* updates made: t of the bias corrections */
    float loss_scale;              /* what the gradients are too large by, a power of two; 1 unless the caller sets it */
};

/* What the last step did. */
typedef struct tp_optim_result {
    double grad_norm; /* of the true gradients, before clipping */
    double loss_sum;
    bool finite; /* false: nothing was changed */
} tp_optim_result;

/* INVALID naming the known ones if there is no such optimizer. */
TP_API tp_status tp_optim_open(tp_ctx *ctx, const char *name, const tp_optim_options *options, tp_params *params,
                               tp_optim **optim) TP_MUST_CHECK;
TP_API void tp_optim_close(tp_optim *optim);
/* A step is begin; for each micro-batch its numbers, then its gradients and its loss added to step_state->loss_sum; update;
 * end. Only end waits for the device.
 * begin: loss_sum is 0. A loss that is not finite, or more than `loss_spread` above `loss_mean` (INFINITY: any may be), changes
 * nothing, like a gradient that is not finite.
 * update: norm, clipping and update; the gradients are left as they are. */
TP_API tp_status tp_optim_begin(tp_ctx *ctx, tp_optim *optim, double learning_rate, double loss_mean,
                                double loss_spread) TP_MUST_CHECK;
TP_API tp_status tp_optim_micro_batch(tp_ctx *ctx, tp_optim *optim, uint64_t draw, float grad_scale) TP_MUST_CHECK;
TP_API tp_status tp_optim_update(tp_ctx *ctx, tp_optim *optim) TP_MUST_CHECK;
TP_API tp_status tp_optim_end(tp_ctx *ctx, tp_optim *optim, tp_optim_result *result) TP_MUST_CHECK;
/* optimizer.safetensors: one tensor per parameter and state, "<parameter>.<state>", matched by name and shape. */
TP_API tp_status tp_optim_save(tp_ctx *ctx, const tp_optim *optim, const char *path) TP_MUST_CHECK;
TP_API tp_status tp_optim_load(tp_ctx *ctx, tp_optim *optim, const char *path) TP_MUST_CHECK;

#endif
