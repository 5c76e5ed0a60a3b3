/* Decoding where the logits never leave the device: one step gives every sequence its next token, and feeds it to the next
 * step.
 *
 * What changes from step to step, tokens, positions and the state of sampling, lies in device memory; so a step can be recorded
 * once and replayed (tp_backend.capture_begin), and the host looks at tokens some steps later. Sequences are rows of one pass:
 * each has a slot of the cache and does not see the others. */
#ifndef TP_INFERENCE_STEP_H
#define TP_INFERENCE_STEP_H

#include "inference/sampler.h"
#include "models/model.h"

#define TP_STEP_AHEAD 16 /* steps that may run before their tokens are read */
#define TP_STEP_SLOTS 8  /* sequences, at most */

typedef struct tp_step tp_step;

/* Whether a model decodes by steps on this device: of the Llama kind, heads of a size that the kernels take, frequencies that
 * do not depend on the length. Others decode pass by pass. */
bool tp_step_suits(const tp_device *device, const tp_model *model);

/* For `slots` sequences in a cache whose row i * capacity is the first of slot i. Model and cache are borrowed. */
tp_status tp_step_open(tp_ctx *ctx, tp_model *model, const tp_kv_cache *cache, int64_t slots, int64_t capacity,
                       tp_step **step) TP_MUST_CHECK;
void tp_step_close(tp_step *step); /* accepts NULL */
/* Bytes that an open one takes, without adapters. */
uint64_t tp_step_bytes(const tp_model *model, int64_t slots);

/* Before the first step, after a prefill: with what sits in the model's slots now, which must stay there, and this sampling.
 * *takes is false, and nothing has happened, if adapters are there that steps do not run (several on a linear, or on some
 * rows only). */
tp_status tp_step_begin(tp_ctx *ctx, tp_step *step, const tp_sampling *sampling, bool *takes) TP_MUST_CHECK;
/* Sequence in a slot: `used` tokens are in the cache, the next one is ids[n - 1]; `count` tokens have been sampled so far. ids
 * [n] is all that the repetition penalty counts. */
tp_status tp_step_set(tp_ctx *ctx, tp_step *step, int64_t slot, int64_t used, int64_t count, const int32_t *ids,
                      size_t n) TP_MUST_CHECK;
/* Starts n steps, 1 to TP_STEP_AHEAD. Slots that hold no sequence run along. */
tp_status tp_step_run(tp_ctx *ctx, tp_step *step, int n) TP_MUST_CHECK;
/* Waits for them. Afterwards tp_step_token gives the sampled tokens number count, count + 1, ... of a slot. */
tp_status tp_step_read(tp_ctx *ctx, tp_step *step) TP_MUST_CHECK;
/* NUMERIC if a logit was not a number. */
tp_status tp_step_token(tp_ctx *ctx, const tp_step *step, int64_t slot, int64_t number, int32_t *token) TP_MUST_CHECK;

/* Logits of the last step, device [slots, vocab]: as sampling left them, untouched if it is greedy without a penalty. */
const float *tp_step_logits(const tp_step *step);

#endif
