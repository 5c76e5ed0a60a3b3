/* Growing buffers, UTF-8, nearest names, numbers, log lines. */
#include "tests/support.h"

#include <math.h>

#include "base/log.h"
#include "base/text.h"

static void buffers_grow_up_to_their_limit(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_buf buf;
    tp_buf_init(&buf, 10);
    assert_string_equal(tp_buf_cstr(&buf), "");
    tp_buf_text(&buf, "12345");
    tp_buf_printf(&buf, "%d", 6789);
    tp_buf_char(&buf, '0');
    assert_int_equal(buf.len, 10);
    assert_ok(&ctx, tp_buf_status(&ctx, &buf, "text"));
    tp_buf_char(&buf, 'x');
    assert_true(buf.failed);
    assert_string_equal(tp_buf_cstr(&buf), "1234567890");
    tp_buf_text(&buf, "");
    assert_int_equal(buf.len, 10);
    assert_status(&ctx, TP_NOMEM, tp_buf_status(&ctx, &buf, "text"));
    tp_buf_clear(&buf);
    tp_buf_append(&buf, "a\0b", 3);
    assert_int_equal(buf.len, 3);
    assert_memory_equal(buf.data, "a\0b", 4);
    tp_buf_free(&buf);
    tp_buf_init(&buf, 0);
    for (int i = 0; i < 100000; i++) tp_buf_printf(&buf, "%d,", i % 10);
    assert_int_equal(buf.len, 200000);
    assert_int_equal(strlen(buf.data), 200000);
    tp_buf_free(&buf);
}

static void utf8_goes_there_and_back(void **state)
{
    (void)state;
    for (uint32_t c = 0; c <= 0x10ffff; c++) {
        char bytes[4];
        uint32_t back = 0;
        bool surrogate = c >= 0xd800 && c < 0xe000;
        int n = tp_utf8_encode(c, bytes);
        assert_int_equal(n, c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4);
        assert_int_equal(tp_utf8_decode(bytes, (size_t)n, &back), surrogate ? 0 : n);
        if (!surrogate) assert_int_equal(back, c);
        for (int cut = 0; cut < n; cut++) assert_int_equal(tp_utf8_decode(bytes, (size_t)cut, &back), 0);
    }
}

/* RFC 3629: among the sequences of two bytes and of three exactly those are valid that the table of section 4 lists. */
static void utf8_refuses_what_the_rfc_forbids(void **state)
{
    (void)state;
    uint32_t codepoint;
    for (int a = 0; a < 256; a++) {
        for (int b = 0; b < 256; b++) {
            char two[2] = {(char)a, (char)b};
            bool tail = b >= 0x80 && b <= 0xbf;
            int expected = a < 0x80 ? 1 : a >= 0xc2 && a <= 0xdf && tail ? 2 : 0;
            assert_int_equal(tp_utf8_decode(two, 2, &codepoint), expected);
            char three[3] = {(char)a, (char)b, (char)0x80};
            bool valid = (a == 0xe0 && b >= 0xa0 && tail) || (a == 0xed && b >= 0x80 && b <= 0x9f) ||
                         (((a >= 0xe1 && a <= 0xec) || a == 0xee || a == 0xef) && tail);
            if (a >= 0xe0 && a <= 0xef) assert_int_equal(tp_utf8_decode(three, 3, &codepoint), valid ? 3 : 0);
            char four[4] = {(char)a, (char)b, (char)0xbf, (char)0x80};
            valid =
                (a == 0xf0 && b >= 0x90 && tail) || (a >= 0xf1 && a <= 0xf3 && tail) || (a == 0xf4 && b >= 0x80 && b <= 0x8f);
            if (a >= 0xf0) assert_int_equal(tp_utf8_decode(four, 4, &codepoint), valid ? 4 : 0);
        }
    }
    assert_int_equal(tp_utf8_valid_prefix("ab\xc3\xa4\xff", 5), 4);
    assert_int_equal(tp_utf8_valid_prefix("ab\xc3", 3), 2);
    assert_int_equal(tp_utf8_valid_prefix("", 0), 0);
}

static void names_near_are_found(void **state)
{
    (void)state;
    static const char *const names[] = {"learning_rate", "lora_alpha", "rank", "num_epochs", NULL};
    assert_string_equal(tp_nearest_name("learning_rte", names), "learning_rate");
    assert_string_equal(tp_nearest_name("learning_raet", names), "learning_rate"); /* neighbours swapped */
    assert_string_equal(tp_nearest_name("num-epochs", names), "num_epochs");
    assert_string_equal(tp_nearest_name("rnak", names), "rank");
    assert_null(tp_nearest_name("batch_size", names));
    assert_null(tp_nearest_name("", names));
    char longer[200];
    memset(longer, 'a', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    assert_null(tp_nearest_name(longer, names));
}

static void numbers_are_exact(void **state)
{
    (void)state;
    int64_t i = 0;
    uint64_t u = 0;
    double d = 0;
    assert_true(tp_parse_i64("-9223372036854775808", &i) && i == INT64_MIN);
    assert_true(tp_parse_i64("9223372036854775807", &i) && i == INT64_MAX);
    static const char *const bad_integers[] = {"",    "-",    " 1", "1 ", "1.0", "1e3", "0x10", "9223372036854775808",
                                               "--1", "1_000"};
    for (size_t k = 0; k < sizeof bad_integers / sizeof bad_integers[0]; k++) assert_false(tp_parse_i64(bad_integers[k], &i));
    assert_true(tp_parse_u64("18446744073709551615", &u) && u == UINT64_MAX);
    assert_false(tp_parse_u64("18446744073709551616", &u));
    assert_false(tp_parse_u64("-1", &u));
    assert_true(tp_parse_f64("1e-4", &d) && d == 1e-4);
    assert_true(tp_parse_f64("5", &d) && d == 5);
    static const char *const bad_numbers[] = {"", "inf", "nan", "0x1p3", "1e309", " 1", "1,5", "e5", "1e"};
    for (size_t k = 0; k < sizeof bad_numbers / sizeof bad_numbers[0]; k++) assert_false(tp_parse_f64(bad_numbers[k], &d));
}

static void sizes_read_well(void **state)
{
    (void)state;
    char out[32];
    assert_string_equal(tp_format_bytes(0, out), "0 B");
    assert_string_equal(tp_format_bytes(1023, out), "1023 B");
    assert_string_equal(tp_format_bytes(1536, out), "1.50 KiB");
    assert_string_equal(tp_format_bytes((uint64_t)24 << 30, out), "24.0 GiB");
    assert_string_equal(tp_format_bytes(UINT64_MAX, out), "16.0 EiB");
    uint64_t n;
    assert_true(tp_parse_size("8GiB", &n) && n == (uint64_t)8 << 30);
    assert_true(tp_parse_size("1.5 GB", &n) && n == 1500000000);
    assert_true(tp_parse_size("512", &n) && n == 512);
    static const char *const bad_sizes[] = {"", "GiB", "0", "-1", "8gib", "8 GiB ", "9000000000GiB", "1e3", "1..5"};
    for (size_t k = 0; k < sizeof bad_sizes / sizeof bad_sizes[0]; k++) assert_false(tp_parse_size(bad_sizes[k], &n));
}

static void keep_line(tp_log_level level, const char *text, void *user)
{
    tp_buf_printf(user, "%s:%s|", tp_log_level_name(level), text);
}

static void log_lines_reach_the_sink(void **state)
{
    (void)state;
    tp_buf lines;
    tp_buf_init(&lines, 0);
    tp_log log = {.level = TP_LOG_INFO, .sink = keep_line, .user = &lines};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_note(&ctx, "nobody");
    tp_note(NULL, "nobody");
    ctx.log = &log;
    tp_note(&ctx, "loaded %d tensors", 3);
    tp_warn(&ctx, "odd name %s", "a\nb\x1b");
    tp_log_write(&log, TP_LOG_DEBUG, "below the level");
    tp_log_write(&log, TP_LOG_ERROR, "last");
    assert_string_equal(tp_buf_cstr(&lines), "info:loaded 3 tensors|warn:odd name a\\nb\\x1b|error:last|");
    assert_int_equal(ctx.status, TP_OK);
    tp_buf_free(&lines);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(buffers_grow_up_to_their_limit),
        cmocka_unit_test(utf8_goes_there_and_back),
        cmocka_unit_test(utf8_refuses_what_the_rfc_forbids),
        cmocka_unit_test(names_near_are_found),
        cmocka_unit_test(numbers_are_exact),
        cmocka_unit_test(sizes_read_well),
        cmocka_unit_test(log_lines_reach_the_sink),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
