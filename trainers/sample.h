/* Samples: what the adapter makes of a few prompts while it is trained (sample_prompts, sample_steps).
 *
 * Each prompt is continued greedily by up to TP_SAMPLE_TOKENS tokens or until an end token; as one user turn through the
 * template that renders the rows of the data, or as it is where none does. Sampling looks at the model and changes nothing: a
 * run with samples trains the same bytes as one without. */
#ifndef TP_TRAINERS_SAMPLE_H
#define TP_TRAINERS_SAMPLE_H

#include <signal.h>

#include "data/dataset.h"
#include "models/model.h"
#include "trainers/metrics.h"

#define TP_SAMPLE_TOKENS 64

typedef struct tp_samples tp_samples;

typedef struct tp_samples_options {
    tp_strings prompts;            /* borrowed, as everything here */
    const tp_tokenizer *tokenizer; /* of the data; NULL: samples open their own from `tokenizer_path` */
    const char *tokenizer_path;    /* a tokenizer or a model */
    const tp_prompt *prompt;       /* tp_dataset_prompt; NULL: prompts are continued as they are */
    const tp_model *model;         /* shapes suffice */
} tp_samples_options;

/* The prompts as tokens: enough to know the context that is needed. FORMAT or SHAPE for a prompt that the model cannot take. */
TP_API tp_status tp_samples_open(tp_ctx *ctx, const tp_samples_options *options, tp_samples **samples) TP_MUST_CHECK;
TP_API void tp_samples_close(tp_samples *samples); /* accepts NULL; before the model */
/* Tokens that the KV cache holds: of the longest prompt and its continuation. */
TP_API int64_t tp_samples_context(const tp_samples *samples);
/* Takes the memory for decoding. The model is the one that is trained, its slots are filled. */
TP_API tp_status tp_samples_begin(tp_ctx *ctx, tp_samples *samples, tp_model *model) TP_MUST_CHECK;
/* Continues the prompts with the adapter as it is now, less those that samples.jsonl has for this step. Prompts that are left
 * when *stop is set (NULL: never) stay undone. A failure ends the samples of this step with a warning: they are no reason to
 * end a run. */
TP_API void tp_samples_make(tp_ctx *ctx, tp_samples *samples, tp_metrics *metrics, int64_t step,
                            const volatile sig_atomic_t *stop);

#endif
