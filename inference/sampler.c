/* Order of the filters: repetition penalty, temperature, top-k, top-p, min-p; then one draw from what is left. */
#include "inference/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"

struct candidate {
    float logit;
    int32_t id;
};

struct tp_sampler {
    int64_t vocab;
    struct candidate *candidates; /* [vocab] */
    double *weights;              /* [vocab] */
    unsigned char *seen;          /* [vocab] scratch, zero between calls */
};

tp_status tp_sampler_new(tp_ctx *ctx, int64_t vocab, tp_sampler **result)
{
    tp_sampler *s = tp_alloc(ctx, 1, sizeof *s);
    if (s == NULL) return TP_NOMEM;
    s->vocab = vocab;
    s->candidates = tp_alloc(ctx, (size_t)vocab, sizeof *s->candidates);
    s->weights = tp_alloc(ctx, (size_t)vocab, sizeof *s->weights);
    s->seen = tp_alloc(ctx, (size_t)vocab, 1);
    if (s->candidates == NULL || s->weights == NULL || s->seen == NULL) {
        tp_sampler_free(s);
        return TP_NOMEM;
    }
    *result = s;
    return TP_OK;
}

void tp_sampler_free(tp_sampler *s)
{
    if (s == NULL) return;
    tp_free(s->candidates);
    tp_free(s->weights);
    tp_free(s->seen);
    tp_free(s);
}

/* Every distinct seen token once, however often it occurred. */
static void penalise(tp_sampler *s, float *logits, const int32_t *seen, size_t n_seen, double penalty)
{
    for (size_t i = 0; i < n_seen; i++) {
        int32_t id = seen[i];
        if (id < 0 || id >= s->vocab || s->seen[id]) continue;
        s->seen[id] = 1;
        logits[id] = (float)(logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty);
    }
    for (size_t i = 0; i < n_seen; i++)
        if (seen[i] >= 0 && seen[i] < s->vocab) s->seen[seen[i]] = 0;
}

static tp_status argmax(tp_ctx *ctx, const float *logits, int64_t vocab, int32_t *best)
{
    int64_t at = 0;
    float most = logits[0];
    for (int64_t i = 0; i < vocab; i++) {
        float logit = logits[i];
        if (isnan(logit)) return tp_fail(ctx, TP_NUMERIC, "the logit of token %lld is not a number", (long long)i);
        if (logit > most) most = logit, at = i;
    }
    *best = (int32_t)at;
    return TP_OK;
}

static int by_logit(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* Sorted candidates, cut by top-k. */
static int64_t sort_candidates(tp_sampler *s, const tp_sampling *how, const float *logits)
{
    for (int64_t i = 0; i < s->vocab; i++)
        s->candidates[i] = (struct candidate){(float)(logits[i] / how->temperature), (int32_t)i};
    qsort(s->candidates, (size_t)s->vocab, sizeof *s->candidates, by_logit);
    if (how->top_k <= 0 || how->top_k >= s->vocab) return s->vocab;
    int64_t n = how->top_k;
    while (n < s->vocab && s->candidates[n].logit == s->candidates[how->top_k - 1].logit) n++; /* ties with the last one stay */
    return n;
}

tp_status tp_sampler_next(tp_ctx *ctx, tp_sampler *s, const tp_sampling *how, float *logits, const int32_t *seen, size_t n_seen,
                          uint64_t index, int32_t *token)
{
    if (how->repetition_penalty != 1) penalise(s, logits, seen, n_seen, how->repetition_penalty);
    TP_TRY(argmax(ctx, logits, s->vocab, token));
    if (!(how->temperature > 0)) return TP_OK;

    int64_t n = sort_candidates(s, how, logits);
    double best = s->candidates[0].logit, sum = 0, kept = 0;
    for (int64_t i = 0; i < n; i++) sum += s->weights[i] = exp(s->candidates[i].logit - best);
    int64_t left = 0;
    for (; left < n; left++) {
        if (how->top_p < 1 && left > 0 && kept >= how->top_p * sum) break;
        if (how->min_p > 0 && s->weights[left] < how->min_p) break; /* the best has weight 1 */
        kept += s->weights[left];
    }
    tp_rng_key key = {how->seed, TP_STREAM_SAMPLE, 0};
    double draw = (double)tp_rng_uniform(key, index) * kept;
    int64_t i = 0;
    while (i + 1 < left && draw >= s->weights[i]) draw -= s->weights[i++];
    *token = s->candidates[i].id;
    return TP_OK;
}
