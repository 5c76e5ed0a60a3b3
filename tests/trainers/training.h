/* A training run inside a test: recipe text in, what it leaves behind compared with the reference's. */
#ifndef TP_TESTS_TRAINERS_TRAINING_H
#define TP_TESTS_TRAINERS_TRAINING_H

#include "base/json.h"
#include "base/status.h"
#include "tests/scratch.h"
#include "trainers/train.h"

/* What a golden folder says about its run, and where the pieces are. */
typedef struct reference_run {
    char batches[1200], adapter[1200]; /* safetensors of token batches; folder that the adapter starts from */
    char base[1200];                   /* model folder or file */
    int64_t steps, accumulation, warmup_steps;
    double learning_rate, weight_decay, momentum, max_grad_norm;
    char optimizer[16], schedule[16];
    const char *precision; /* "fp32" or "bf16" */
} reference_run;

/* Recipe text for such a run: tokens in order, into `output`. */
void write_recipe(tp_buf *out, const reference_run *run, const char *output);

/* Reads the recipe (written to the scratch folder), opens the run, trains, closes. */
tp_status train_recipe(tp_ctx *ctx, scratch *s, const char *text, const tp_train_options *options);
/* The same, ending after the first `steps` steps; the schedule is that of the whole run. */
tp_status train_recipe_steps(tp_ctx *ctx, scratch *s, const char *text, const tp_train_options *options, int64_t steps);

/* The numbers under `key` in the rows of metrics.jsonl that have it, at most `most`; returns how many. */
size_t read_metrics(tp_ctx *ctx, const char *folder, const char *key, double *out, size_t most);

/* |got - reference| / |reference|, both taken as one vector over all tensors of the reference, in f64. Fails the test if a
 * tensor is missing or has another size. */
double relative_difference(tp_ctx *ctx, const char *got, const char *reference);

#endif
