/* Training: from a checked recipe to an adapter folder.
 *
 *     tp_run *run;
 *     st = tp_run_open(ctx, recipe, &config, &options, &run);   data, plan, model, slots filled, optimizer, resume point
 *     st = tp_run_train(run);                                   the loop: until done, told to stop, or an error
 *     st = tp_run_close(run, st);                               releases everything, keeps the first error
 *
 * Everything that influences the numbers is a function of the recipe, the files and the step, so a run that was killed and
 * resumed writes the same bytes as one that was not. */
#ifndef TP_TRAINERS_TRAIN_H
#define TP_TRAINERS_TRAIN_H

#include <signal.h>

#include "recipes/keys.h"
#include "trainers/plan.h"

typedef struct tp_run tp_run;

/* What resuming or repeating may differ in, by --accept. */
typedef enum tp_accept {
    TP_ACCEPT_RECIPE = 1,
    TP_ACCEPT_DATA = 2,
    TP_ACCEPT_BASE = 4,
    TP_ACCEPT_VERSION = 8,
    TP_ACCEPT_DEVICES = 16
} tp_accept;

typedef struct tp_train_options {
    const char *resume;         /* NULL: as the recipe says; "none", "auto" or a checkpoint's path */
    bool fresh_optimizer;       /* go on without the checkpoint's optimizer state */
    unsigned accept;            /* tp_accept bits */
    const char *like;           /* adapter folder whose run is repeated: base, data, version, device must be its; or NULL */
    bool force;                 /* adapter_path made for another base */
    bool dry_run;               /* stop after the plan: nothing is written */
    bool tune;                  /* for tp_run_tune: nothing is written, not even a folder */
    const char *dump_gradients; /* safetensors of step 1's gradients before clipping, or NULL */
    /* Set by signal handlers; NULL: never. stop: finish the step, save, PREEMPTED. save: save and go on. */
    const volatile sig_atomic_t *stop;
    volatile sig_atomic_t *save; /* set back to 0 when done */
    double loss_scale;           /* the first one, in any precision: for tests. 0: TP_LOSS_SCALE_FIRST under fp16, else none */
    bool join;                   /* stack weights and park activations as on a device with memory of its own: for tests */
    bool progress;               /* a progress line on stderr */
    double process_start;        /* CLOCK_MONOTONIC seconds at the start of the process, for "time to first step" */
} tp_train_options;

TP_API tp_status tp_run_open(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config, const tp_train_options *options,
                             tp_run **run) TP_MUST_CHECK;
TP_API tp_status tp_run_train(tp_run *run) TP_MUST_CHECK;
/* Instead of training: the products of a step and of an evaluation, by the device's fastest algorithms (tp_backend.tune_begin).
 * UNSUPPORTED where there is nothing to choose from. */
TP_API tp_status tp_run_tune(tp_run *run, tp_buf *report) TP_MUST_CHECK;
TP_API tp_status tp_run_close(tp_run *run, tp_status status) TP_MUST_CHECK;

TP_API const tp_plan *tp_run_plan(const tp_run *run);
/* Fills in the plan's seconds_per_step: measures the device for about a fifth of a second. */
TP_API tp_status tp_run_estimate(tp_run *run) TP_MUST_CHECK;
/* NOMEM unless the plan's peak is there: a dry run, which tp_run_open lets pass, can tell after it has shown the plan. */
TP_API tp_status tp_run_fits(const tp_run *run) TP_MUST_CHECK;
TP_API int64_t tp_run_step(const tp_run *run);
TP_API int64_t tp_run_steps(const tp_run *run);

#endif
