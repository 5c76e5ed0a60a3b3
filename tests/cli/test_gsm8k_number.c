/* The number of a GSM8K answer: what counts as one, what is left out of it, and what is none. */
#include "tests/support.h"

#include <math.h>

#include "cli/gsm8k_number.h"

static void test_numbers(void **state)
{
    static const struct {
        const char *text;
        double value;
    } cases[] = {
        {"48/2 = 24, 48+24 = 72\n#### 72", 72},
        {"#### 1,234,567", 1234567},
        {"####$18", 18},
        {"####  $1,072.50.", 1072.5},
        {"#### 18.", 18},
        {"#### 5...", 5},
        {"#### -3", -3},
        {"#### +7", 7},
        {"#### 0.25 dollars", 0.25},
        {"#### 10\n#### 20", 10},
        {"#### 3% of it", 3},
        {"####\t42", 42},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double got = NAN;
        bool found = tp_gsm8k_number(cases[i].text, strlen(cases[i].text), &got);
        if (!found || got != cases[i].value) fail_msg("\"%s\": got %g, expected %g", cases[i].text, got, cases[i].value);
    }
}

static void test_no_numbers(void **state)
{
    static const char *const cases[] = {"",       "72",     "### 72",   "####",       "#### ",    "#### seventy",
                                        "#### .", "#### $", "#### 1-2", "#### 1.2.3", "####\n72", "##### 4"};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double got;
        if (tp_gsm8k_number(cases[i], strlen(cases[i]), &got)) fail_msg("\"%s\": got %g", cases[i], got);
    }
}

/* Text without a NUL behind it, cut anywhere, and digits without end. */
static void test_bounds(void **state)
{
    static const char text[] = "#### 1234567890";
    (void)state;
    for (size_t n = 0; n < sizeof text; n++) {
        double got;
        char *copy = malloc(n + 1); /* so that a sanitizer sees reads behind it */
        memcpy(copy, text, n);
        char *exact = realloc(copy, n > 0 ? n : 1);
        assert_non_null(exact);
        assert_int_equal(tp_gsm8k_number(exact, n, &got), n > 5);
        free(exact);
    }
    char long_number[200] = "#### ";
    memset(long_number + 5, '9', 190);
    double got;
    assert_false(tp_gsm8k_number(long_number, 195, &got));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_no_numbers),
        cmocka_unit_test(test_bounds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
