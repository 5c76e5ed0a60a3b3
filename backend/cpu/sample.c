/* The next token of each row, by sorting all candidates: what the filters mean, word for word. inference/sampler.c, which
 * decoding on the CPU uses, finds the same token faster. */
#include <math.h>
#include <stdlib.h>

#include "backend/cpu/cpu.h"

struct candidate {
    float logit;
    int32_t id;
};
_Static_assert(sizeof(struct candidate) == sizeof(uint64_t), "candidates lie in the scratch");

static int by_logit(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

static uint64_t weight_of(const struct candidate *c, float best)
{
    return (uint64_t)(exp((double)c->logit - best) * 0x1p32 + 0.5);
}

static uint64_t weigh(const struct candidate *c, int64_t n, float best)
{
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += weight_of(&c[i], best);
    return sum;
}

/* How many of the sorted candidates the filters leave. */
static int64_t keep(const tp_sample_args *a, const struct candidate *c, float best)
{
    int64_t n = a->vocab;
    if (a->top_k > 0 && a->top_k < n)
        for (n = a->top_k; n < a->vocab && c[n].logit == c[a->top_k - 1].logit;) n++;
    if (a->top_p < 1) {
        double enough = a->top_p * (double)weigh(c, n, best);
        uint64_t kept = 0;
        int64_t most = n;
        for (n = 0; n < most && (n == 0 || (double)kept < enough);) kept += weight_of(&c[n++], best);
    }
    if (a->min_p > 0)
        while (n > 1 && (double)weight_of(&c[n - 1], best) < a->min_p * 0x1p32) n--;
    return n;
}

static int32_t draw(const tp_sample_args *a, float *logits, struct candidate *c, float best, int32_t index)
{
    for (int64_t i = 0; i < a->vocab; i++) c[i] = (struct candidate){(float)(logits[i] / a->temperature), (int32_t)i};
    qsort(c, (size_t)a->vocab, sizeof *c, by_logit);
    int64_t n = keep(a, c, best), i = 0;
    tp_rng_key key = {a->seed, TP_STREAM_SAMPLE, 0};
    uint64_t at = (uint64_t)((double)tp_rng_uniform(key, (uint64_t)index) * (double)weigh(c, n, best));
    for (uint64_t w; at >= (w = weight_of(&c[i], best)); i++) at -= w;
    return c[i].id;
}

static int32_t next_token(const tp_sample_args *a, int64_t row)
{
    float *logits = a->logits + row * a->ld;
    int32_t best = 0;
    for (int64_t i = 0; i < a->vocab; i++) {
        if (a->seen != NULL && a->seen[row * a->vocab + i] != 0)
            logits[i] = (float)(logits[i] > 0 ? logits[i] / a->repetition_penalty : logits[i] * a->repetition_penalty);
        if (isnan(logits[i])) {
            if (a->bad[row] == 0) a->bad[row] = (int32_t)i + 1;
            return 0;
        }
        if (logits[i] > logits[best]) best = (int32_t)i;
    }
    if (!(a->temperature > 0)) return best;
    float most = (float)(logits[best] / a->temperature);
    if (!isfinite(most)) return best;
    return draw(a, logits, (struct candidate *)(a->scratch + row * a->vocab), most, a->counts[row]);
}

tp_status tp_cpu_sample(tp_ctx *ctx, const void *arguments)
{
    const tp_sample_args *a = arguments;
    (void)ctx;
    for (int64_t row = 0; row < a->n; row++) {
        int32_t token = next_token(a, row);
        if (a->seen != NULL) a->seen[row * a->vocab + token] = 1;
        a->ids[row] = token;
        a->history[a->counts[row] % a->history_length * a->n + row] = token;
        a->counts[row]++;
        if (a->positions[row] < a->position_limit) a->positions[row]++;
    }
    return TP_OK;
}
