/* A training run from the inside: for the files of trainers/ only. */
#ifndef TP_TRAINERS_RUN_H
#define TP_TRAINERS_RUN_H

#include "autograd/upload.h"
#include "data/dataset.h"
#include "trainers/checkpoint.h"
#include "trainers/metrics.h"
#include "trainers/replay.h"
#include "trainers/sample.h"
#include "trainers/schedule.h"
#include "trainers/train.h"

struct tp_run {
    tp_ctx *ctx;
    const tp_recipe *recipe;
    const tp_config *config;
    tp_train_options options;
    bool owns_device;
    tp_dtype precision;

    /* the dry twin: shapes without weights, for the plan */
    tp_ctx dry;
    tp_model *shape_model;
    tp_plan plan;
    tp_place *places; /* of a micro-batch's allocations in the step arena; NULL: first fit */
    size_t n_places;

    tp_tokenizer *tokenizer;     /* NULL with ready tokens */
    tp_dataset *data, *held_out; /* held_out NULL: none */
    int64_t micro_batch_size, max_length;

    tp_model *model;
    tp_adapter_config start; /* of adapter_path; empty otherwise */
    tp_lora *lora;
    tp_pattern *patterns; /* rank and alpha patterns of the recipe */
    tp_tape *tape;
    tp_batch_buffers buffers;
    tp_buckets buckets;
    tp_replay *replay;
    tp_host_batch *group; /* [gradient_accumulation_steps]: the micro-batches of step group_step (from 0; -1: none) */
    int64_t group_step, group_n, group_labels, group_tokens;
    tp_host_batch eval_batch;
    float *losses; /* device [largest labels] */
    float *host_losses;
    tp_optim *optim;
    tp_schedule schedule;
    tp_metrics *metrics;
    tp_samples *samples; /* NULL: none are wanted */

    int lock; /* flock on the output folder; -1: none */
    tp_run_state state;
    int64_t micro_batches;          /* per epoch */
    int64_t steps_per_epoch, steps; /* of the whole run */
    bool finished;                  /* the run had finished before: nothing to do */
    double opened, last_save;       /* tp_now() */
    double seconds_in_steps;
    int64_t steps_here; /* since this process began */
};

/* trainers/setup.c */
tp_status tp_run_setup(tp_run *run) TP_MUST_CHECK;
/* trainers/lora_spec.c: with adapter_path, run->start has been read. */
tp_status tp_run_lora_spec(tp_run *run, const tp_model *model, tp_lora_spec *spec) TP_MUST_CHECK;
/* trainers/train.c: early_stopping_patience is used up, here or before the run was resumed. */
bool tp_run_stops_early(const tp_run *run);
/* trainers/evaluate.c: loss per label over held-out data, in order, without gradients or dropout. */
typedef struct tp_evaluation {
    double loss, perplexity;
    int64_t labels, rows;
} tp_evaluation;
typedef struct tp_eval_parts {
    tp_model *model;
    tp_tape *tape;
    tp_batch_buffers *buffers;
    tp_host_batch *batch;
    float *losses, *host_losses; /* device and host, as many as the largest batch has labels */
    const volatile sig_atomic_t *stop;
    bool adapters_off;
} tp_eval_parts;
TP_API tp_status tp_evaluate(tp_ctx *ctx, const tp_eval_parts *parts, const tp_dataset *data,
                             tp_evaluation *result) TP_MUST_CHECK;
/* trainers/resume.c */
tp_status tp_run_resume(tp_run *run) TP_MUST_CHECK;
tp_status tp_run_prepare_folder(tp_run *run) TP_MUST_CHECK;
tp_status tp_run_save(tp_run *run, const char *why);
tp_status tp_run_finish(tp_run *run) TP_MUST_CHECK;
/* The recipe with everything settled, the precision too: training from it gives the same bytes on the same device. */
void tp_run_write_recipe(const tp_run *run, tp_buf *out);
/* trainers/publish.c: <output_dir>/<name>/, with all that using the adapter takes. */
tp_status tp_run_publish_adapter(tp_run *run, const char *name) TP_MUST_CHECK;

#endif
