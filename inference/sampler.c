/* Order of the filters: repetition penalty, temperature, top-k, top-p, min-p; then one draw from what is left.
 *
 * All of that speaks of candidates in order, the likeliest first, but a vocabulary is too long to sort for every token. So
 * candidates go into buckets by their distance from the best, and only those buckets are sorted inside which something is
 * decided: where a filter cuts, and where the draw falls. Weights are whole multiples of 2^-32 of the best one's: their sums
 * are exact in any order, so the result is the one that sorting all of them would give. */
#include "inference/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/rng.h"

/* Of a bucket: 1/32 nat. The last one takes all that is further away than 24 nats, whose weights round to 0. */
#define BUCKETS_PER_NAT 32
#define BUCKETS         (24 * BUCKETS_PER_NAT)
/* Of the best candidate. 2^20 such weights still are an exact double. */
#define WEIGHT_ONE 0x1p32

struct candidate {
    float logit;
    int32_t id;
};

struct bucket {
    int64_t first, end; /* candidates; `end` shrinks when top-k cuts */
    uint64_t weight;    /* of them together */
    bool sorted;
};

struct tp_sampler {
    int64_t vocab;
    struct candidate *candidates; /* [vocab], by bucket; within one in order of ids, or sorted */
    uint16_t *bucket_of;          /* [vocab] */
    unsigned char *seen;          /* [vocab] scratch, zero between calls */
    struct bucket buckets[BUCKETS];
};

tp_status tp_sampler_new(tp_ctx *ctx, int64_t vocab, tp_sampler **result)
{
    tp_sampler *s = tp_alloc(ctx, 1, sizeof *s);
    if (s == NULL) return TP_NOMEM;
    s->vocab = vocab;
    s->candidates = tp_alloc(ctx, (size_t)vocab, sizeof *s->candidates);
    s->bucket_of = tp_alloc(ctx, (size_t)vocab, sizeof *s->bucket_of);
    s->seen = tp_alloc(ctx, (size_t)vocab, 1);
    if (s->candidates == NULL || s->bucket_of == NULL || s->seen == NULL) {
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
    tp_free(s->bucket_of);
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

typedef float floats4 __attribute__((vector_size(16)));
typedef int32_t lanes4 __attribute__((vector_size(16)));

/* The first of the greatest, in two looks: what the greatest is, and where. */
static tp_status argmax(tp_ctx *ctx, const float *logits, int64_t vocab, int32_t *best)
{
    float most = -INFINITY;
    floats4 most4 = {most, most, most, most};
    lanes4 nan4 = {0};
    int64_t i = 0, at = 0;
    for (; i + 4 <= vocab; i += 4) {
        floats4 x;
        memcpy(&x, logits + i, sizeof x);
        lanes4 above = x > most4;
        most4 = (floats4)(((lanes4)x & above) | ((lanes4)most4 & ~above));
        nan4 |= x != x;
    }
    bool nan = (nan4[0] | nan4[1] | nan4[2] | nan4[3]) != 0;
    for (int lane = 0; lane < 4; lane++) most = most4[lane] > most ? most4[lane] : most;
    for (; i < vocab; i++) {
        nan = nan || isnan(logits[i]);
        most = logits[i] > most ? logits[i] : most;
    }
    while (nan ? !isnan(logits[at]) : logits[at] != most) at++;
    if (nan) return tp_fail(ctx, TP_NUMERIC, "the logit of token %lld is not a number", (long long)at);
    *best = (int32_t)at;
    return TP_OK;
}

/* ---- buckets ---- */

static int by_logit(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* A lower logit never has a lower bucket. */
static int bucket_for(float logit, float best)
{
    float distance = (best - logit) * BUCKETS_PER_NAT;
    return distance < BUCKETS - 1 ? (int)distance : BUCKETS - 1;
}

/* Divides the logits by the temperature on the way. */
static void fill_buckets(tp_sampler *s, float *logits, double temperature, float best)
{
    int64_t first = 0;
    for (int b = 0; b < BUCKETS; b++) s->buckets[b] = (struct bucket){0};
    for (int64_t i = 0; i < s->vocab; i++) {
        logits[i] = (float)(logits[i] / temperature);
        int b = bucket_for(logits[i], best);
        s->bucket_of[i] = (uint16_t)b;
        s->buckets[b].end++;
    }
    for (int b = 0; b < BUCKETS; b++) {
        int64_t n = s->buckets[b].end;
        s->buckets[b].first = s->buckets[b].end = first;
        first += n;
    }
    for (int64_t i = 0; i < s->vocab; i++) {
        struct bucket *b = &s->buckets[s->bucket_of[i]];
        s->candidates[b->end++] = (struct candidate){logits[i], (int32_t)i};
    }
}

static void sort_bucket(tp_sampler *s, struct bucket *b)
{
    if (!b->sorted) qsort(s->candidates + b->first, (size_t)(b->end - b->first), sizeof *s->candidates, by_logit);
    b->sorted = true;
}

static uint64_t weight_of(const struct candidate *c, float best)
{
    return (uint64_t)(exp((double)c->logit - best) * WEIGHT_ONE + 0.5);
}

/* Weighs the first buckets; returns the sum. */
static uint64_t weigh(tp_sampler *s, int buckets, float best)
{
    uint64_t sum = 0;
    for (int i = 0; i < buckets; i++) {
        struct bucket *b = &s->buckets[i];
        b->weight = 0;
        for (int64_t c = b->first; i < BUCKETS - 1 && c < b->end; c++) b->weight += weight_of(&s->candidates[c], best);
        sum += b->weight;
    }
    return sum;
}

/* ---- filters: each says how many buckets are left and cuts the last one ---- */

/* The first k, and those that tie with the last one. */
static int keep_top_k(tp_sampler *s, int64_t k)
{
    int last = 0;
    while (s->buckets[last].end < k) last++;
    struct bucket *b = &s->buckets[last];
    int64_t n = k;
    sort_bucket(s, b);
    while (n < b->end && s->candidates[n].logit == s->candidates[k - 1].logit) n++;
    b->end = n;
    return last + 1;
}

/* The first ones up to the one with which their weight reaches `share` of the sum. */
static int keep_top_p(tp_sampler *s, int buckets, double share, float best)
{
    uint64_t kept = 0;
    double enough = share * (double)weigh(s, buckets, best);
    int last = 0;
    while (last + 1 < buckets && (double)(kept + s->buckets[last].weight) < enough) kept += s->buckets[last++].weight;
    struct bucket *b = &s->buckets[last];
    sort_bucket(s, b);
    int64_t n = b->first;
    while (n < b->end && (n == 0 || (double)kept < enough)) kept += weight_of(&s->candidates[n++], best);
    b->end = n;
    return last + 1;
}

/* Those whose weight is at least `share` of the best one's. */
static int keep_min_p(tp_sampler *s, int buckets, double share, float best)
{
    double least = share * WEIGHT_ONE;
    double edge = -log(share) * BUCKETS_PER_NAT;
    int last = edge < BUCKETS ? (int)edge - 1 : BUCKETS - 1; /* all before it are on the right side of the edge */
    for (last = last > 0 ? last : 0; last < buckets; last++) {
        struct bucket *b = &s->buckets[last];
        int64_t n = b->first;
        sort_bucket(s, b);
        while (n < b->end && (n == 0 || (double)weight_of(&s->candidates[n], best) >= least)) n++;
        if (n == b->end) continue;
        b->end = n;
        return last + 1;
    }
    return buckets;
}

/* ---- the draw ---- */

static int32_t draw(tp_sampler *s, int buckets, float best, double uniform)
{
    uint64_t at = (uint64_t)(uniform * (double)weigh(s, buckets, best)); /* below the sum, for the best one alone is 2^32 */
    int i = 0;
    while (at >= s->buckets[i].weight) at -= s->buckets[i++].weight;
    struct bucket *b = &s->buckets[i];
    sort_bucket(s, b);
    int64_t n = b->first;
    for (uint64_t w; at >= (w = weight_of(&s->candidates[n], best)); n++) at -= w;
    return s->candidates[n].id;
}

tp_status tp_sampler_next(tp_ctx *ctx, tp_sampler *s, const tp_sampling *how, float *logits, const int32_t *seen, size_t n_seen,
                          uint64_t index, int32_t *token)
{
    if (how->repetition_penalty != 1) penalise(s, logits, seen, n_seen, how->repetition_penalty);
    TP_TRY(argmax(ctx, logits, s->vocab, token));
    if (!(how->temperature > 0)) return TP_OK;

    float best = (float)(logits[*token] / how->temperature);
    if (!isfinite(best)) return TP_OK; /* infinitely likelier than the rest, or all alike */
    int buckets = BUCKETS;
    fill_buckets(s, logits, how->temperature, best);
    if (how->top_k > 0 && how->top_k < s->vocab) buckets = keep_top_k(s, how->top_k);
    if (how->top_p < 1) buckets = keep_top_p(s, buckets, how->top_p, best);
    if (how->min_p > 0) buckets = keep_min_p(s, buckets, how->min_p, best);
    tp_rng_key key = {how->seed, TP_STREAM_SAMPLE, 0};
    *token = draw(s, buckets, best, (double)tp_rng_uniform(key, index));
    return TP_OK;
}
