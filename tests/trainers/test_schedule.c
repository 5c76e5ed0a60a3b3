/* Learning rates: transformers' schedules step by step, and closed forms where it has no such schedule. */
#include "tests/support.h"

#include <math.h>

#include "tests/peers.h"
#include "trainers/schedule.h"

/* Both sides compute in f64 and differ in the order of a few operations. */
#define TOLERANCE 1e-15

static tp_schedule schedule_of(const tp_json *c)
{
    tp_schedule_kind kind = peer_is(c, "kind", "constant") ? TP_SCHEDULE_CONSTANT
                            : peer_is(c, "kind", "linear") ? TP_SCHEDULE_LINEAR
                                                           : TP_SCHEDULE_COSINE;
    return (tp_schedule){kind, peer_number(c, "learning_rate"), peer_number(c, "min_ratio"),
                         (int64_t)peer_number(c, "warmup_steps"), (int64_t)peer_number(c, "steps")};
}

static void test_transformers(void **state)
{
    tp_ctx ctx;
    size_t n = 0;
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "schedule");
    const tp_json *cases = tp_json_get(tp_json_root(doc), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        tp_schedule s = schedule_of(tp_json_at(cases, i));
        const tp_json *rates = tp_json_get(tp_json_at(cases, i), "rates");
        assert_int_equal(tp_json_count(rates), s.steps);
        for (int64_t t = 0; t < s.steps; t++, n++) {
            double got = tp_schedule_rate(&s, t), expected = peer_item(rates, (size_t)t);
            if (!(fabs(got - expected) <= TOLERANCE * s.learning_rate + 1e-18))
                fail_msg("case %zu, step %lld: %.17g, transformers has %.17g", i, (long long)t, got, expected);
        }
    }
    tp_json_free(doc);
    print_message("%zu rates\n", n);
    assert_true(n > 500);
}

static void test_closed_forms(void **state)
{
    const tp_schedule linear = {TP_SCHEDULE_LINEAR, 1e-3, 0.2, 4, 24}, cosine = {TP_SCHEDULE_COSINE, 1e-3, 0.2, 4, 24},
                      constant = {TP_SCHEDULE_CONSTANT, 1e-3, 0.2, 4, 24};
    (void)state;
    for (int t = 0; t < 4; t++) {
        assert_true(fabs(tp_schedule_rate(&linear, t) - 1e-3 * t / 4) < 1e-18);
        assert_true(fabs(tp_schedule_rate(&cosine, t) - 1e-3 * t / 4) < 1e-18);
        assert_true(fabs(tp_schedule_rate(&constant, t) - 1e-3 * t / 4) < 1e-18);
    }
    assert_true(tp_schedule_rate(&linear, 4) == 1e-3 && tp_schedule_rate(&cosine, 4) == 1e-3);
    assert_true(fabs(tp_schedule_rate(&linear, 14) - 0.6e-3) < 1e-18); /* half way between 1 and 0.2 */
    assert_true(fabs(tp_schedule_rate(&cosine, 14) - 0.6e-3) < 1e-18);
    assert_true(fabs(tp_schedule_rate(&cosine, 9) - 1e-3 * (0.2 + 0.8 * (2 + sqrt(2)) / 4)) < 1e-17); /* cos(pi / 4) */
    assert_true(tp_schedule_rate(&constant, 23) == 1e-3);
}

/* A run that goes on past its last step stays where the schedule ended. */
static void test_behind_the_end(void **state)
{
    const tp_schedule linear = {TP_SCHEDULE_LINEAR, 2, 0.25, 0, 10}, cosine = {TP_SCHEDULE_COSINE, 2, 0, 0, 10},
                      warm = {TP_SCHEDULE_COSINE, 2, 0.5, 10, 10};
    (void)state;
    for (int64_t t = 10; t < 40; t++) {
        assert_true(tp_schedule_rate(&linear, t) == 0.5);
        assert_true(fabs(tp_schedule_rate(&cosine, t)) < 1e-15);
        assert_true(tp_schedule_rate(&warm, t) == 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_transformers),
        cmocka_unit_test(test_closed_forms),
        cmocka_unit_test(test_behind_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
