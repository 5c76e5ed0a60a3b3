/* From logits to tokens: the sets and probabilities that transformers' processors leave, greedy ties, numbers that are none. */
#include "tests/support.h"

#include <math.h>

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_transformers), cmocka_unit_test(test_repeats),      cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_extremes),     cmocka_unit_test(test_not_a_number),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
