/* From logits to tokens: the sets and probabilities that transformers' processors leave, greedy ties, numbers that are none. */
#include "tests/support.h"

#include <math.h>

#include "base/rng.h"
#include "inference/sampler.h"
#include "tests/peers.h"

#define MOST_VOCAB 256
#define DRAWS      40000

struct table {
    tp_json_doc *doc;
    int64_t vocab;
    float logits[MOST_VOCAB];
    int32_t seen[32];
    size_t n_seen;
};

static void open_table(tp_ctx *ctx, struct table *t)
{
    t->doc = peer_table(ctx, "sampler");
    const tp_json *logits = tp_json_get(tp_json_root(t->doc), "logits"), *seen = tp_json_get(tp_json_root(t->doc), "seen");
    t->vocab = (int64_t)tp_json_count(logits);
    t->n_seen = tp_json_count(seen);
    assert_true(t->vocab > 0 && t->vocab <= MOST_VOCAB && t->n_seen <= 32);
    for (int64_t i = 0; i < t->vocab; i++) t->logits[i] = (float)peer_item(logits, (size_t)i);
    for (size_t i = 0; i < t->n_seen; i++) t->seen[i] = (int32_t)peer_item(seen, i);
}

static tp_sampling sampling_of(const tp_json *c)
{
    return (tp_sampling){.temperature = peer_number(c, "temperature"),
                         .top_k = (int64_t)peer_number(c, "top_k"),
                         .top_p = peer_number(c, "top_p"),
                         .min_p = peer_number(c, "min_p"),
                         .repetition_penalty = peer_number(c, "repetition_penalty"),
                         .seed = 42};
}

static int32_t draw(tp_ctx *ctx, tp_sampler *sampler, const struct table *t, const tp_sampling *how, uint64_t index)
{
    float logits[MOST_VOCAB];
    int32_t token;
    memcpy(logits, t->logits, sizeof logits);
    assert_ok(ctx, tp_sampler_next(ctx, sampler, how, logits, t->seen, t->n_seen, index, &token));
    assert_true(token >= 0 && token < t->vocab);
    return token;
}

/* Pearson's statistic over tokens expected at least ten times. Seeds are fixed, so the outcome is too; five standard deviations
 * above the mean would be one chance in a million for a right sampler, and a token more or less, or a wrong weight, is far off.
 */
static void check_distribution(size_t number, const tp_json *c, const int64_t *counts, int64_t vocab)
{
    const tp_json *ids = tp_json_get(c, "ids"), *probabilities = tp_json_get(c, "probabilities");
    double chi = 0, freedom = -1;
    int64_t inside = 0, all = 0;
    for (size_t i = 0; i < tp_json_count(ids); i++) {
        int64_t count = counts[(int64_t)peer_item(ids, i)];
        double expected = peer_item(probabilities, i) * DRAWS;
        inside += count;
        if (expected < 10) continue;
        chi += (count - expected) * (count - expected) / expected;
        freedom++;
    }
    for (int64_t v = 0; v < vocab; v++) all += counts[v];
    if (inside != all)
        fail_msg("case %zu: %lld of %d draws are tokens that transformers left out", number, (long long)(all - inside), DRAWS);
    if (!(chi <= freedom + 5 * sqrt(2 * freedom) + 1e-6))
        fail_msg("case %zu: chi-square %.1f with %.0f degrees of freedom", number, chi, freedom);
}

static void test_transformers(void **state)
{
    tp_ctx ctx;
    struct table t;
    tp_sampler *sampler;
    (void)state;
    tp_ctx_init(&ctx);
    open_table(&ctx, &t);
    assert_ok(&ctx, tp_sampler_new(&ctx, t.vocab, &sampler));
    const tp_json *cases = tp_json_get(tp_json_root(t.doc), "cases");
    assert_true(tp_json_count(cases) >= 15);
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        tp_sampling how = sampling_of(tp_json_at(cases, i));
        int64_t counts[MOST_VOCAB] = {0};
        for (uint64_t n = 0; n < DRAWS; n++) counts[draw(&ctx, sampler, &t, &how, n)]++;
        check_distribution(i, tp_json_at(cases, i), counts, t.vocab);
    }
    tp_sampler_free(sampler);
    tp_json_free(t.doc);
}

/* A draw is a function of seed and index. */
static void test_repeats(void **state)
{
    tp_ctx ctx;
    struct table t;
    tp_sampler *a, *b;
    size_t differ = 0;
    (void)state;
    tp_ctx_init(&ctx);
    open_table(&ctx, &t);
    assert_ok(&ctx, tp_sampler_new(&ctx, t.vocab, &a));
    assert_ok(&ctx, tp_sampler_new(&ctx, t.vocab, &b));
    tp_sampling how = {.temperature = 1, .top_p = 1, .repetition_penalty = 1.1, .seed = 1}, other = how;
    other.seed = 2;
    for (uint64_t n = 0; n < 200; n++) {
        int32_t first = draw(&ctx, a, &t, &how, 199 - n);
        assert_int_equal(draw(&ctx, b, &t, &how, 199 - n), first);
        differ += draw(&ctx, b, &t, &other, 199 - n) != first;
    }
    assert_true(differ > 100);
    tp_sampler_free(a);
    tp_sampler_free(b);
    tp_json_free(t.doc);
}

static int32_t pick(tp_ctx *ctx, const tp_sampling *how, const float *logits, size_t n, const int32_t *seen, size_t n_seen)
{
    float copy[MOST_VOCAB];
    tp_sampler *sampler;
    int32_t token = -1;
    memcpy(copy, logits, n * sizeof *copy);
    assert_ok(ctx, tp_sampler_new(ctx, (int64_t)n, &sampler));
    assert_ok(ctx, tp_sampler_next(ctx, sampler, how, copy, seen, n_seen, 0, &token));
    tp_sampler_free(sampler);
    return token;
}

static void test_greedy(void **state)
{
    tp_ctx ctx;
    tp_sampling greedy = TP_SAMPLING_GREEDY, penalised = TP_SAMPLING_GREEDY;
    static const float ties[] = {1, 3, 2, 3, 3}, negative[] = {-INFINITY, -5, -INFINITY, -4}, scores[] = {2, 1.5f, -1, -1.2f},
                       one[] = {0};
    static const int32_t first[] = {0, 0, 0}, rest[] = {0, 1, 2, -1, 99}, out_of_range[] = {-7, 4, INT32_MAX, INT32_MIN};
    (void)state;
    tp_ctx_init(&ctx);
    penalised.repetition_penalty = 2;
    assert_int_equal(pick(&ctx, &greedy, ties, 5, NULL, 0), 1);
    assert_int_equal(pick(&ctx, &greedy, negative, 4, NULL, 0), 3);
    assert_int_equal(pick(&ctx, &greedy, one, 1, NULL, 0), 0);
    assert_int_equal(pick(&ctx, &greedy, scores, 4, first, 3), 0);    /* no penalty */
    assert_int_equal(pick(&ctx, &penalised, scores, 4, first, 3), 1); /* 2 / 2, once however often it was seen */
    assert_int_equal(pick(&ctx, &penalised, scores, 4, rest, 5), 0);  /* 1, 0.75, -2, -1.2 */
    assert_int_equal(pick(&ctx, &penalised, negative, 4, (const int32_t[]){3}, 1), 1); /* -4 becomes -8 */
    assert_int_equal(pick(&ctx, &penalised, scores, 4, out_of_range, 4), 0);
}

/* A temperature near 0 is greedy; one of infinite logits takes all. */
static void test_extremes(void **state)
{
    tp_ctx ctx;
    tp_sampling cold = {.temperature = 1e-3, .top_p = 1, .repetition_penalty = 1, .seed = 3},
                plain = {.temperature = 1, .top_p = 0.9, .min_p = 0.1, .repetition_penalty = 1, .seed = 3};
    static const float logits[] = {0, 5, 4.9f, -3}, masked[] = {-INFINITY, 1, -INFINITY, -INFINITY},
                       large[] = {3e38f, -3e38f, 0, 1};
    (void)state;
    tp_ctx_init(&ctx);
    assert_int_equal(pick(&ctx, &cold, logits, 4, NULL, 0), 1);
    assert_int_equal(pick(&ctx, &plain, masked, 4, NULL, 0), 1);
    assert_int_equal(pick(&ctx, &plain, large, 4, NULL, 0), 0);
    assert_int_equal(pick(&ctx, &cold, large, 4, NULL, 0), 0); /* 3e38 / 1e-3 overflows f32 */
}

static void test_not_a_number(void **state)
{
    tp_ctx ctx;
    tp_sampler *sampler;
    int32_t token;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_sampler_new(&ctx, 4, &sampler));
    for (int place = 0; place < 4; place++)
        for (int greedy = 0; greedy < 2; greedy++) {
            tp_sampling how = {.temperature = greedy ? 0 : 1, .top_p = 1, .repetition_penalty = 1.5, .seed = 1};
            float logits[] = {1, 2, 3, 4};
            logits[place] = NAN;
            assert_status(&ctx, TP_NUMERIC, tp_sampler_next(&ctx, sampler, &how, logits, (const int32_t[]){2}, 1, 0, &token));
        }
    tp_sampler_free(sampler);
}

/* ---- the definition: all candidates sorted, filters from the front, one walk ---- */

#define LARGE_VOCAB 3000

struct ranked {
    float logit;
    int32_t id;
    uint64_t weight;
};

static int by_rank(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id - y->id;
}

static int32_t sorted_pick(const tp_sampling *how, const float *logits, int64_t n, uint64_t index)
{
    static struct ranked all[LARGE_VOCAB];
    uint64_t sum = 0, kept = 0;
    int64_t left = n, i = 0;
    for (int64_t j = 0; j < n; j++) all[j] = (struct ranked){(float)(logits[j] / how->temperature), (int32_t)j, 0};
    qsort(all, (size_t)n, sizeof *all, by_rank);
    if (how->top_k > 0 && how->top_k < n)
        for (left = how->top_k; left < n && all[left].logit == all[left - 1].logit;) left++;
    for (int64_t j = 0; j < left; j++) {
        all[j].weight = (uint64_t)(exp((double)all[j].logit - all[0].logit) * 0x1p32 + 0.5);
        sum += all[j].weight;
    }
    for (int64_t j = 0; j < left; j++) {
        bool enough = how->top_p < 1 && j > 0 && (double)kept >= how->top_p * (double)sum;
        if (enough || (how->min_p > 0 && (double)all[j].weight < how->min_p * 0x1p32)) left = j;
        if (j < left) kept += all[j].weight;
    }
    uint64_t at = (uint64_t)((double)tp_rng_uniform((tp_rng_key){how->seed, TP_STREAM_SAMPLE, 0}, index) * (double)kept);
    while (at >= all[i].weight) at -= all[i++].weight;
    return all[i].id;
}

/* Logits of several widths, with and without ties, against every mix of filters. */
static void test_sorted_definition(void **state)
{
    static const float widths[] = {0.001f, 1, 8, 60};
    static const int64_t ks[] = {0, 1, 2, 50, 1000, LARGE_VOCAB};
    static const double ps[] = {1, 0, 0.1, 0.5, 0.95, 0.99999}, mins[] = {0, 1e-12, 0.001, 0.3, 1},
                        temperatures[] = {0.2, 1, 3};
    static float logits[LARGE_VOCAB], copy[LARGE_VOCAB];
    tp_ctx ctx;
    tp_sampler *sampler;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_sampler_new(&ctx, LARGE_VOCAB, &sampler));
    for (uint64_t trial = 0; trial < 600; trial++) {
        float width = widths[trial % 4];
        tp_rng_fill_uniform((tp_rng_key){5, TP_STREAM_INIT, trial}, 0, LARGE_VOCAB, -width, width, logits);
        for (int i = 0; trial % 3 == 0 && i < LARGE_VOCAB; i++) logits[i] = floorf(logits[i] * 2) / 2;
        for (int i = 0; trial % 5 == 0 && i < LARGE_VOCAB; i += 2) logits[i] = -INFINITY;
        tp_sampling how = {.temperature = temperatures[trial % 3],
                           .top_k = ks[trial / 2 % 6],
                           .top_p = ps[trial / 7 % 6],
                           .min_p = mins[trial / 11 % 5],
                           .repetition_penalty = 1,
                           .seed = trial};
        for (uint64_t index = 0; index < 4; index++) {
            int32_t token;
            memcpy(copy, logits, sizeof copy);
            assert_ok(&ctx, tp_sampler_next(&ctx, sampler, &how, copy, NULL, 0, index, &token));
            assert_int_equal(token, sorted_pick(&how, logits, LARGE_VOCAB, index));
        }
    }
    tp_sampler_free(sampler);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_transformers), cmocka_unit_test(test_repeats),      cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_extremes),     cmocka_unit_test(test_not_a_number), cmocka_unit_test(test_sorted_definition),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
