/* The run context: first failure wins, messages are one safe line, every status has its exit class. */
#include "tests/support.h"

#include "base/text.h"

static void first_failure_wins(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    assert_int_equal(ctx.status, TP_OK);
    assert_string_equal(ctx.message, "");
    assert_int_equal(tp_fail(&ctx, TP_FORMAT, "first %d", 1), TP_FORMAT);
    assert_int_equal(tp_fail(&ctx, TP_NOMEM, "second"), TP_NOMEM); /* returned, not recorded */
    assert_int_equal(ctx.status, TP_FORMAT);
    assert_string_equal(ctx.message, "first 1");
    assert_int_equal(tp_fail_in(&ctx, "layer %d", 3), TP_FORMAT);
    assert_string_equal(ctx.message, "layer 3: first 1");
    tp_ctx_clear(&ctx);
    assert_int_equal(ctx.status, TP_OK);
    assert_int_equal(tp_fail(&ctx, TP_SHAPE, "again"), TP_SHAPE);
    assert_string_equal(ctx.message, "again");
    assert_int_equal(tp_fail(NULL, TP_NOMEM, "nobody listens"), TP_NOMEM);
}

static void messages_are_escaped(void **state)
{
    (void)state;
    static const struct {
        const char *in, *out;
    } cases[] = {
        {"plain", "plain"},
        {"two\nlines\ttab", "two\\nlines\\ttab"},
        {"\x1b[31mred\x07", "\\x1b[31mred\\x07"},
        {"\xff\xc3", "\\xff\\xc3"}, /* malformed UTF-8 */
        {"na\xc3\xafve \xf0\x9f\x8e\x89", "na\xc3\xafve \xf0\x9f\x8e\x89"},
        {"\xc2\x85\xe2\x80\xa8", "\\u0085\\u2028"}, /* line breaks outside ASCII */
        {"\xed\xa0\x80", "\\xed\\xa0\\x80"},        /* a surrogate in UTF-8 */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tp_ctx ctx;
        tp_ctx_init(&ctx);
        assert_int_equal(tp_fail(&ctx, TP_FORMAT, "%s", cases[i].in), TP_FORMAT);
        assert_string_equal(ctx.message, cases[i].out);
        tp_ctx_clear(&ctx);
        assert_int_equal(tp_fail(&ctx, TP_FORMAT, "x"), TP_FORMAT);
        assert_int_equal(tp_fail_in(&ctx, "%s", cases[i].in), TP_FORMAT);
        assert_memory_equal(ctx.message, cases[i].out, strlen(cases[i].out));
    }
}

static void long_messages_are_cut_at_a_character(void **state)
{
    (void)state;
    tp_ctx ctx;
    static char text[3 * TP_MESSAGE_BYTES];
    for (size_t i = 0; i + 3 < sizeof text; i += 3) memcpy(text + i, "\xe2\x82\xac", 3);
    for (int offset = 0; offset < 4; offset++) {
        tp_ctx_init(&ctx);
        (void)tp_fail(&ctx, TP_FORMAT, "%.*s%s", offset, "abcd", text);
        size_t n = strlen(ctx.message);
        assert_true(n < TP_MESSAGE_BYTES && n > TP_MESSAGE_BYTES - 16);
        for (int wraps = 0; wraps < 200; wraps++) (void)tp_fail_in(&ctx, "context number %d", wraps);
        assert_true(strlen(ctx.message) < TP_MESSAGE_BYTES);
        assert_memory_equal(ctx.message, "context number 199: context number 198: ", 40);
    }
}

static void statuses_have_names_and_classes(void **state)
{
    (void)state;
    static const struct {
        tp_status status;
        const char *name;
        int exit_code;
    } expected[] = {
        {TP_OK, "ok", 0},
        {TP_INVALID, "invalid", 2},
        {TP_FORMAT, "format", 3},
        {TP_SHAPE, "shape", 3},
        {TP_UNSUPPORTED, "unsupported", 3},
        {TP_IO_READ, "io_read", 3},
        {TP_IO_WRITE, "io_write", 4},
        {TP_NOMEM, "nomem", 4},
        {TP_DEVICE, "device", 4},
        {TP_NUMERIC, "numeric", 5},
        {TP_CHECKPOINT, "checkpoint", 6},
        {TP_INTERNAL, "internal", 70},
        {TP_PREEMPTED, "preempted", 75},
    };
    assert_int_equal(sizeof expected / sizeof expected[0], TP_STATUS_COUNT);
    for (size_t i = 0; i < TP_STATUS_COUNT; i++) {
        assert_int_equal(expected[i].status, i);
        assert_string_equal(tp_status_name(expected[i].status), expected[i].name);
        assert_int_equal(tp_status_exit_code(expected[i].status), expected[i].exit_code);
    }
    assert_int_equal(tp_status_exit_code((tp_status)999), 70);
    assert_string_equal(tp_status_name((tp_status)999), "unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(first_failure_wins),
        cmocka_unit_test(messages_are_escaped),
        cmocka_unit_test(long_messages_are_cut_at_a_character),
        cmocka_unit_test(statuses_have_names_and_classes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
