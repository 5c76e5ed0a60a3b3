/* What a run reports: metrics.jsonl and samples.jsonl (repeat bit for bit), timing.jsonl (does not), the progress line. */
#ifndef TP_TRAINERS_METRICS_H
#define TP_TRAINERS_METRICS_H

#include <stdio.h>

#include "base/status.h"
#include "base/text.h"

typedef struct tp_metrics tp_metrics;

typedef struct tp_step_report {
    int64_t step, steps; /* from 1 */
    double loss, grad_norm, learning_rate;
    double loss_scale; /* 0: none */
    int64_t labels, tokens;
    double seconds;     /* of this step */
    double cpu_seconds; /* of all threads in this step: how busy they were, whatever else ran on the machine */
    double seconds_left;
    uint64_t resident_bytes; /* now */
    int64_t replayed;        /* micro-batches that were recordings (trainers/replay.h); < 0: none can be */
} tp_step_report;

/* Opens both files in `folder`, cut back to rows of steps <= `step` (0: emptied). Losing a log later never stops a run: it is
 * warned about once. progress: a line on stderr, redrawn on a terminal, one row every now and then elsewhere. */
TP_API tp_status tp_metrics_open(tp_ctx *ctx, const char *folder, int64_t step, bool progress,
                                 tp_metrics **metrics) TP_MUST_CHECK;
TP_API void tp_metrics_close(tp_metrics *metrics);
/* The first row of this process in timing.jsonl: `step` steps are done, `seconds` went by from its start to here. */
TP_API void tp_metrics_start(tp_ctx *ctx, tp_metrics *metrics, int64_t step, double seconds);
/* log: also write the rows (logging_steps). */
TP_API void tp_metrics_step(tp_ctx *ctx, tp_metrics *metrics, const tp_step_report *report, bool log);
TP_API void tp_metrics_eval(tp_ctx *ctx, tp_metrics *metrics, int64_t step, double eval_loss);
/* Opens samples.jsonl beside them, cut back in the same way. */
TP_API tp_status tp_metrics_open_samples(tp_ctx *ctx, tp_metrics *metrics, const char *folder, int64_t step) TP_MUST_CHECK;
/* Rows that samples.jsonl ends with and that are of this step: prompts that are done. */
TP_API size_t tp_metrics_sampled(const tp_metrics *metrics, int64_t step);
/* {"step", "prompt", "text"}: a row, and a line like those of tp_metrics_say. `text` has n bytes of UTF-8. */
TP_API void tp_metrics_sample(tp_ctx *ctx, tp_metrics *metrics, int64_t step, const char *prompt, const char *text, size_t n);
/* One line above the progress line. */
TP_API void tp_metrics_say(tp_metrics *metrics, const char *format, ...) TP_PRINTF(2, 3);

/* Resident set of this process now and at its peak, in bytes (0: unknown). */
TP_API uint64_t tp_resident_bytes(void);
TP_API uint64_t tp_peak_resident_bytes(void);
/* CLOCK_MONOTONIC in seconds, and the CPU time of all threads of this process. */
TP_API double tp_now(void);
TP_API double tp_cpu_seconds(void);

/* loss.svg from metrics.jsonl of `folder`: training loss, its running mean, held-out loss. */
TP_API tp_status tp_plot_loss(tp_ctx *ctx, const char *folder) TP_MUST_CHECK;

#endif
