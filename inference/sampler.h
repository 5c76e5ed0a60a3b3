/* From logits to the next token: greedy, or sampling with the filters of transformers in its order. */
#ifndef TP_INFERENCE_SAMPLER_H
#define TP_INFERENCE_SAMPLER_H

#include "base/status.h"

typedef struct tp_sampling {
    double temperature;        /* 0: greedy */
    int64_t top_k;             /* 0: off */
    double top_p;              /* 1: off. Smallest set whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751) */
    double min_p;              /* 0: off. At least min_p times the best (Nguyen et al. 2024, arXiv:2407.01082) */
    double repetition_penalty; /* 1: off. Divides positive, multiplies negative logits of seen tokens (arXiv:1909.05858) */
    uint64_t seed;
} tp_sampling;

#define TP_SAMPLING_GREEDY ((tp_sampling){.temperature = 0, .top_p = 1, .repetition_penalty = 1, .seed = 42})

typedef struct tp_sampler tp_sampler;
TP_API tp_status tp_sampler_new(tp_ctx *ctx, int64_t vocab, tp_sampler **sampler) TP_MUST_CHECK;
TP_API void tp_sampler_free(tp_sampler *sampler);
/* Next token from logits [vocab] (changed by it). Candidates count in order of their logits, ties by id; their weights,
 * exp(logit - best), are rounded to multiples of 2^-32. seen: ids the penalty applies to. `index` counts the sampled tokens:
 * the same seed and index draw the same number. Ties go to the lower id. NUMERIC if the logits hold a NaN. */
TP_API tp_status tp_sampler_next(tp_ctx *ctx, tp_sampler *sampler, const tp_sampling *how, float *logits, const int32_t *seen,
                                 size_t n_seen, uint64_t index, int32_t *token) TP_MUST_CHECK;

#endif
