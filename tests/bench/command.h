/* The `tapeft` command under measurement: models of the size of SmolLM2-135M to train on, a recipe, one run, what it wrote.
 *
 * $TAPEFT names the binary (build/tapeft if unset). Everything is made below build/bench once and kept: two folders with
 * random weights, for speed does not depend on values, and a file of ready tokens, every one of them labelled. */
#ifndef TP_TESTS_BENCH_COMMAND_H
#define TP_TESTS_BENCH_COMMAND_H

#include <stdbool.h>

#include "base/dtype.h"
#include "base/status.h"

#define BENCH_SEQUENCE 512
/* FLOPs of a token in training, LoRA of rank 16 on all linears, no recomputation: forward 269 M, gradient of activations
 * 269 M, causal attention 62 M, low-rank products 29 M. */
#define BENCH_TOKEN_FLOPS 629e6

/* What is trained. */
typedef struct bench_model {
    const char *label; /* of the line */
    char path[1024];
    tp_dtype precision; /* TP_F32 or TP_BF16 */
    bool there;
} bench_model;

/* "f32", "bf16": folders of random weights, written on first use. "gguf": the model of `make demo`, if it is in the cache. */
bench_model bench_model_of(tp_ctx *ctx, const char *name);

#define BENCH_STEPS_MAX 64

/* One run of `tapeft train`. */
typedef struct bench_run {
    double start_seconds; /* process start to the beginning of step 1 */
    int n_steps;
    double seconds[BENCH_STEPS_MAX], cpu_seconds[BENCH_STEPS_MAX];
    double peak_bytes, planned_bytes; /* resident at most, mapped file included; what plan.json said */
} bench_run;
void bench_train(tp_ctx *ctx, const bench_model *model, int steps, bench_run *run);

/* Seconds that `tapeft --version` takes: starting and ending a process, as included in no other figure. */
double bench_process_seconds(tp_ctx *ctx);

#endif
