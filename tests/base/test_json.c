/* JSON: what is accepted and what is refused and where, values, lookups, typed access, output, memory that runs out. */
#include "tests/support.h"

#include <math.h>

#include "base/file.h"
#include "base/json.h"
#include "tests/failing_memory.h"

static tp_json_doc *parse(tp_ctx *ctx, const char *text)
{
    tp_json_doc *doc = NULL;
    assert_ok(ctx, tp_json_parse(ctx, text, strlen(text), NULL, &doc));
    return doc;
}

/* Verdicts of RFC 8259, each also given by Python's json module except where noted. */
static void grammar_is_that_of_the_rfc(void **state)
{
    (void)state;
    static const char *const good[] = {"null",
                                       " true ",
                                       "false",
                                       "0",
                                       "-0",
                                       "-1.5e+3",
                                       "1E2",
                                       "0.0",
                                       "1e-7",
                                       "\"\"",
                                       "[]",
                                       "{}",
                                       "[ ]",
                                       "{ }",
                                       "\t\r\n[1,2]\n",
                                       "[[],{}]",
                                       "{\"\":0}",
                                       "{\"a\":{\"a\":1}}",
                                       "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\"",
                                       "\"\\u0000\"",
                                       "\"\\ud83c\\udf89\"",
                                       "\"\\ud800\"",
                                       "\"\\udc00\\ud800\"",
                                       "\"\x7f\"",
                                       "\"\xf4\x8f\xbf\xbf\"",
                                       "123456789012345678901234567890",
                                       "[1e400]"};
    static const char *const bad[] = {"",
                                      " ",
                                      "nul",
                                      "nulL",
                                      "True",
                                      "01",
                                      "-",
                                      "-01",
                                      "+1",
                                      "1.",
                                      ".5",
                                      "1e",
                                      "1e+",
                                      "0x1",
                                      "1_0",
                                      "NaN",
                                      "Infinity",
                                      "-Infinity",
                                      "\"",
                                      "\"a",
                                      "\"\\x\"",
                                      "\"\\u12\"",
                                      "\"\\u12g4\"",
                                      "\"\\",
                                      "\"\n\"",
                                      "\"\t\"",
                                      "'a'",
                                      "[",
                                      "[1",
                                      "[1,",
                                      "[1,]",
                                      "[,1]",
                                      "[1 2]",
                                      "]",
                                      "{",
                                      "{\"a\"",
                                      "{\"a\":",
                                      "{\"a\":1",
                                      "{\"a\":1,",
                                      "{\"a\":1,}",
                                      "{a:1}",
                                      "{1:1}",
                                      "{\"a\" 1}",
                                      "{,}",
                                      "[}",
                                      "{]",
                                      "[1}",
                                      "1 2",
                                      "null,",
                                      "[]]",
                                      "// c\n1",
                                      "/* c */1",
                                      "\xef\xbb\xbf"
                                      "1",
                                      "\"\xff\"",
                                      "\"\xc0\xaf\"",
                                      "\"\xed\xa0\x80\"",
                                      "\"\xf5\x80\x80\x80\"",
                                      "\"\xe2\x82\"",
                                      "{\"a\":1,\"a\":2}",
                                      "{\"a\":1,\"\\u0061\":2}",
                                      "1\xc2\xa0",
                                      "\x0c"
                                      "1"};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        tp_json_doc *doc = NULL;
        if (tp_json_parse(&ctx, good[i], strlen(good[i]), NULL, &doc) != TP_OK) fail_msg("%s: %s", good[i], ctx.message);
        tp_json_free(doc);
        /* No prefix of an array, object or string is a document, and nothing behind the end is looked at. */
        size_t n = strlen(good[i]);
        char *copy = malloc(n);
        memcpy(copy, good[i], n);
        for (size_t cut = 0; cut < n; cut++) {
            tp_status status = tp_json_parse(&ctx, copy, cut, NULL, &doc);
            if (strchr("[{\"", good[i][0]) != NULL) assert_int_equal(status, TP_FORMAT);
            tp_json_free(doc);
            tp_ctx_clear(&ctx);
        }
        free(copy);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        tp_json_doc *doc = NULL;
        if (tp_json_parse(&ctx, bad[i], strlen(bad[i]), NULL, &doc) != TP_FORMAT) fail_msg("accepted: %s", bad[i]);
        assert_null(doc);
        assert_memory_equal(ctx.message, "json:", 5);
        tp_ctx_clear(&ctx);
    }
    tp_json_doc *doc = NULL;
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, "\"a\0b\"", 5, NULL, &doc));
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, "1\0", 2, NULL, &doc));
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, NULL, 0, NULL, &doc));
}

static void messages_name_the_place(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"{\n  \"a\": 1,\n  \"b\": tru\n}", "f.json:3:11: expected null, true or false, found '\n'"},
        {"[1,\n2,\n]", "f.json:3:1: expected a value, found ']'"},
        {"{\"\xc3\xa4\xc3\xb6\": x}", "f.json:1:8: expected a value, found 'x'"}, /* characters count, not bytes */
        {"{\"a\":1,\n \"a\":2}", "f.json:2:2: repeated key \"a\", first at 1:2"},
        {"[1", "f.json:1:3: expected ',' or ']', found the end of the text"},
        {"[\"\xff\"]", "f.json:1:3: expected valid UTF-8, found byte 0xff"},
        {"[1] x", "f.json:1:5: expected nothing after the value, found 'x'"},
        {"\n\n {\"k\" 1}", "f.json:3:7: expected ':', found '1'"},
    };
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tp_json_doc *doc;
        char expected[256];
        size_t n = 0;
        for (const char *p = cases[i].message; *p != '\0'; p++) /* the message is one line */
            n += (size_t)snprintf(expected + n, sizeof expected - n, *p == '\n' ? "\\n" : "%c", *p);
        assert_int_equal(tp_json_parse(&ctx, cases[i].text, strlen(cases[i].text), &(tp_json_options){.name = "f.json"}, &doc),
                         TP_FORMAT);
        assert_string_equal(ctx.message, expected);
        tp_ctx_clear(&ctx);
    }
    tp_json_doc *doc;
    assert_int_equal(tp_json_parse(&ctx, "\n?", 2, &(tp_json_options){.name = "rows.jsonl", .first_line = 40001}, &doc),
                     TP_FORMAT);
    assert_string_equal(ctx.message, "rows.jsonl:40002:1: expected a value, found '?'");
}

static void depth_and_size_have_limits(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    enum { N = 1000000 };
    char *text = malloc(2 * N);
    tp_json_doc *doc;
    for (int depth = 126; depth <= 130; depth++) {
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        tp_status status = tp_json_parse(&ctx, text, 2 * (size_t)depth, NULL, &doc);
        assert_int_equal(status, depth <= TP_JSON_DEPTH ? TP_OK : TP_FORMAT);
        tp_json_free(doc);
        tp_ctx_clear(&ctx);
    }
    memset(text, '[', N);
    memset(text + N, ']', N);
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, text, 2 * N, NULL, &doc));
    assert_ok(&ctx, tp_json_parse(&ctx, text, 2 * N, &(tp_json_options){.max_depth = N}, &doc)); /* no stack is used up */
    tp_buf out;
    tp_buf_init(&out, 0);
    tp_json_write(&out, tp_json_root(doc), -1);
    assert_int_equal(out.len, 2 * N);
    assert_memory_equal(out.data, text, 2 * N);
    tp_buf_free(&out);
    tp_json_free(doc);
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, "[[1]]", 5, &(tp_json_options){.max_depth = 1}, &doc));
    for (size_t limit = 5; limit <= 7; limit++) { /* object, key, array, 1, 2, 3 */
        tp_status status = tp_json_parse(&ctx, "{\"a\":[1,2,3]}", 13, &(tp_json_options){.max_nodes = limit}, &doc);
        assert_int_equal(status, limit >= 6 ? TP_OK : TP_FORMAT);
        tp_json_free(doc);
        tp_ctx_clear(&ctx);
    }
    free(text);
}

static void strings_are_decoded(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        const char *bytes;
        size_t n;
    } cases[] = {
        {"\"plain and longer than eight\"", "plain and longer than eight", 27},
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8},
        {"\"a\\u0000b\"", "a\0b", 3},
        {"\"\\u00e4\\u20AC\\ud83c\\udf89\"", "\xc3\xa4\xe2\x82\xac\xf0\x9f\x8e\x89", 9},
        {"\"\\ud800\"", "\xef\xbf\xbd", 3},
        {"\"\\ud800x\"", "\xef\xbf\xbdx", 4},
        {"\"\\udc00\\ud800\"", "\xef\xbf\xbd\xef\xbf\xbd", 6},
        {"\"\\ud800\\u0041\"",
         "\xef\xbf\xbd"
         "A",
         4},
        {"\"\\ud800\\ud83c\\udf89\"", "\xef\xbf\xbd\xf0\x9f\x8e\x89", 7},
        {"\"12345678\\\\\xc3\xa4\"", "12345678\\\xc3\xa4", 11},
    };
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tp_json_doc *doc = parse(&ctx, cases[i].text);
        tp_span text = tp_json_string(tp_json_root(doc));
        assert_int_equal(text.len, cases[i].n);
        assert_memory_equal(text.data, cases[i].bytes, cases[i].n);
        tp_json_free(doc);
    }
    /* Every place of a special byte in the eight that are looked at together. */
    for (size_t before = 0; before < 20; before++) {
        for (size_t after = 0; after < 20; after++) {
            char text[64];
            snprintf(text, sizeof text, "\"%.*s\\n%.*s\"", (int)before, "abcdefghijklmnopqrst", (int)after,
                     "ABCDEFGHIJKLMNOPQRST");
            tp_json_doc *doc = parse(&ctx, text);
            tp_span got = tp_json_string(tp_json_root(doc));
            assert_int_equal(got.len, before + 1 + after);
            assert_int_equal(got.data[before], '\n');
            tp_json_free(doc);
            snprintf(text, sizeof text, "\"%.*s\x01%.*s\"", (int)before, "abcdefghijklmnopqrst", (int)after,
                     "ABCDEFGHIJKLMNOPQRST");
            assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, text, strlen(text), NULL, &doc));
        }
    }
    const tp_json_options strict = {.strict_surrogates = true};
    tp_json_doc *doc;
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, "\"\\ud800\"", 8, &strict, &doc));
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, "\"\\udc00\"", 8, &strict, &doc));
    assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, "\"\\ud800\\u0041\"", 14, &strict, &doc));
    assert_ok(&ctx, tp_json_parse(&ctx, "\"\\ud83c\\udf89\"", 14, &strict, &doc));
    tp_json_free(doc);
}

static void numbers_are_exact(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        bool integer, real;
        int64_t i;
        double d;
    } cases[] = {
        {"0", true, true, 0, 0},
        {"-0", true, true, 0, 0},
        {"9223372036854775807", true, true, INT64_MAX, 9223372036854775807.0},
        {"-9223372036854775808", true, true, INT64_MIN, -9223372036854775808.0},
        {"9223372036854775808", false, true, 0, 9223372036854775808.0},
        {"-9223372036854775809", false, true, 0, -9223372036854775808.0},
        {"4096.0", false, true, 0, 4096},
        {"1e3", false, true, 0, 1000},
        {"0.1", false, true, 0, 0.1},
        {"5e-324", false, true, 0, 5e-324},
        {"1e-400", false, true, 0, 0},
        {"1.7976931348623157e308", false, true, 0, 1.7976931348623157e308},
        {"1e309", false, false, 0, 0},
        {"-1e999999999999", false, false, 0, 0},
    };
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        tp_json_doc *doc = parse(&ctx, cases[k].text);
        int64_t i = 123;
        double d = 123;
        assert_int_equal(tp_json_i64(tp_json_root(doc), &i), cases[k].integer);
        assert_int_equal(i, cases[k].integer ? cases[k].i : 123);
        assert_int_equal(tp_json_f64(tp_json_root(doc), &d), cases[k].real);
        assert_true(d == (cases[k].real ? cases[k].d : 123));
        assert_true(tp_span_is(tp_json_number_text(tp_json_root(doc)), cases[k].text));
        tp_json_free(doc);
    }
    char text[400] = "0."; /* longer than any buffer: 0.333... */
    memset(text + 2, '3', 390);
    tp_json_doc *doc = parse(&ctx, text);
    double d = 0;
    assert_true(tp_json_f64(tp_json_root(doc), &d) && d == 1.0 / 3);
    tp_json_free(doc);
    doc = parse(&ctx, "\"12\"");
    int64_t i;
    assert_false(tp_json_i64(tp_json_root(doc), &i));
    assert_false(tp_json_f64(tp_json_root(doc), &d));
    assert_false(tp_json_i64(NULL, &i));
    tp_json_free(doc);
}

static void containers_answer(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = parse(&ctx, "{\"a\":[10,[20,21],{\"b\":30}],\"\\u00e4\":true,\"n\":null,\"s\":\"x\"}");
    const tp_json *root = tp_json_root(doc), *a = tp_json_get(root, "a");
    int64_t i = 0;
    assert_int_equal(tp_json_type_of(root), TP_JSON_OBJECT);
    assert_int_equal(tp_json_count(root), 4);
    assert_true(tp_span_is(tp_json_key_at(root, 1), "\xc3\xa4"));
    assert_ptr_equal(tp_json_at(root, 0), a);
    assert_int_equal(tp_json_count(a), 3);
    assert_true(tp_json_i64(tp_json_at(tp_json_at(a, 1), 1), &i) && i == 21);
    assert_true(tp_json_i64(tp_json_get(tp_json_at(a, 2), "b"), &i) && i == 30);
    assert_true(tp_json_bool(tp_json_get(root, "\xc3\xa4"), false));
    assert_true(tp_json_bool(tp_json_get(root, "n"), true));
    assert_int_equal(tp_json_type_of(tp_json_get(root, "n")), TP_JSON_NULL);
    assert_null(tp_json_get(root, "b"));
    assert_null(tp_json_get(a, "a"));
    assert_null(tp_json_get(NULL, "a"));
    assert_null(tp_json_at(a, 3));
    assert_null(tp_json_at(NULL, 0));
    assert_int_equal(tp_json_count(tp_json_get(root, "s")), 0);
    assert_int_equal(tp_json_string(a).len, 0);
    assert_int_equal(tp_json_type_of(NULL), TP_JSON_NULL);
    char where[64];
    assert_string_equal(tp_json_where(doc, tp_json_get(tp_json_at(a, 2), "b"), where, sizeof where), "json:1:23");
    assert_string_equal(tp_json_type_name(TP_JSON_ARRAY), "an array");
    tp_json_free(doc);
    tp_json_free(NULL);
}

static void large_objects_are_indexed(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (int n = 1; n < 5000; n = n < 40 ? n + 1 : n * 2) {
        for (int twice = -1; twice < n; twice += n / 3 + 1) { /* a repeated key, or none */
            tp_buf text;
            tp_buf_init(&text, 0);
            tp_buf_char(&text, '{');
            for (int i = 0; i < n; i++) tp_buf_printf(&text, "%s\"k%d\":%d", i > 0 ? "," : "", i, i);
            if (twice >= 0) tp_buf_printf(&text, ",\"k%d\":%d", twice, n + 7);
            tp_buf_char(&text, '}');
            tp_json_doc *doc;
            if (twice >= 0) assert_status(&ctx, TP_FORMAT, tp_json_parse(&ctx, text.data, text.len, NULL, &doc));
            assert_ok(&ctx, tp_json_parse(&ctx, text.data, text.len, &(tp_json_options){.allow_duplicates = true}, &doc));
            assert_int_equal(tp_json_count(tp_json_root(doc)), n);
            for (int i = 0; i < n; i++) {
                char key[16];
                int64_t value = -1;
                snprintf(key, sizeof key, "k%d", i);
                assert_true(tp_span_is(tp_json_key_at(tp_json_root(doc), (size_t)i), key)); /* the first place */
                assert_true(tp_json_i64(tp_json_get(tp_json_root(doc), key), &value));
                assert_int_equal(value, i == twice ? n + 7 : i); /* the last value */
                assert_ptr_equal(tp_json_get(tp_json_root(doc), key), tp_json_at(tp_json_root(doc), (size_t)i));
            }
            assert_null(tp_json_get(tp_json_root(doc), "k"));
            tp_json_free(doc);
            tp_buf_free(&text);
        }
    }
}

static void typed_access_explains_itself(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    const char *text = "{\n \"n\": \"64\", \"big\": 99, \"real\": 4096.0, \"inf\": 1e999, \"none\": null,\n \"list\": [1], "
                       "\"ok\": 7, \"yes\": true}";
    tp_json_doc *doc;
    assert_ok(&ctx, tp_json_parse(&ctx, text, strlen(text), &(tp_json_options){.name = "config.json"}, &doc));
    const tp_json *root = tp_json_root(doc);
    int64_t i = 5;
    double d = 5;
    bool b = false;
    tp_span s;
    static const struct {
        const char *key, *message;
    } integers[] = {
        {"n", "config.json:2:7: n: expected an integer from 1 to 50, got \"64\""},
        {"big", "config.json:2:20: big: expected an integer from 1 to 50, got 99"},
        {"real", "config.json:2:32: real: expected an integer from 1 to 50, got 4096.0"},
        {"list", "config.json:3:10: list: expected an integer from 1 to 50, got an array"},
        {"yes", "config.json:3:31: yes: expected an integer from 1 to 50, got true"},
        {"none", "config.json:2:62: none: expected an integer from 1 to 50, got null"},
        {"absent", "config.json:1:1: absent: expected an integer from 1 to 50, got nothing"},
    };
    for (size_t k = 0; k < sizeof integers / sizeof integers[0]; k++) {
        assert_int_equal(tp_json_need_i64(&ctx, doc, root, integers[k].key, true, 1, 50, &i), TP_FORMAT);
        assert_string_equal(ctx.message, integers[k].message);
        tp_ctx_clear(&ctx);
    }
    assert_ok(&ctx, tp_json_need_i64(&ctx, doc, root, "absent", false, 1, 50, &i));
    assert_ok(&ctx, tp_json_need_i64(&ctx, doc, root, "none", false, 1, 50, &i));
    assert_ok(&ctx, tp_json_need_i64(&ctx, doc, NULL, "absent", false, 1, 50, &i));
    assert_int_equal(i, 5);
    assert_ok(&ctx, tp_json_need_i64(&ctx, doc, root, "ok", true, 7, 7, &i));
    assert_int_equal(i, 7);
    assert_status(&ctx, TP_FORMAT, tp_json_need_i64(&ctx, doc, tp_json_get(root, "list"), "x", false, 1, 50, &i));
    assert_status(&ctx, TP_FORMAT, tp_json_need_f64(&ctx, doc, root, "inf", true, 0, INFINITY, &d));
    assert_status(&ctx, TP_FORMAT, tp_json_need_f64(&ctx, doc, root, "real", true, 0, 1, &d));
    assert_ok(&ctx, tp_json_need_f64(&ctx, doc, root, "real", true, 0, 4096, &d));
    assert_true(d == 4096);
    assert_status(&ctx, TP_FORMAT, tp_json_need_bool(&ctx, doc, root, "ok", true, &b));
    assert_ok(&ctx, tp_json_need_bool(&ctx, doc, root, "yes", true, &b));
    assert_true(b);
    assert_status(&ctx, TP_FORMAT, tp_json_need_string(&ctx, doc, root, "ok", true, &s));
    assert_ok(&ctx, tp_json_need_string(&ctx, doc, root, "n", true, &s));
    assert_true(tp_span_is(s, "64"));
    tp_json_free(doc);
}

/* Expected texts are those of Python's json.dumps(..., ensure_ascii=False), and repr for numbers. */
static void output_is_that_of_python(void **state)
{
    (void)state;
    static const struct {
        double value;
        int digits;
        const char *text;
    } numbers[] = {
        {0, 17, "0"},
        {-0.0, 17, "-0"},
        {1, 17, "1"},
        {100000, 1, "100000"},
        {1e15, 17, "1e+15"},
        {123456789012345, 17, "123456789012345"},
        {0.1, 17, "0.1"},
        {0.1 + 0.2, 17, "0.30000000000000004"},
        {1.0 / 3, 17, "0.3333333333333333"},
        {1.0 / 3, 6, "0.333333"},
        {5e-324, 17, "5e-324"},
        {1.7976931348623157e308, 17, "1.7976931348623157e+308"},
        {2.5, 1, "2"},
        {1234567, 3, "1.23e+06"},
        {NAN, 17, "null"},
        {INFINITY, 17, "null"},
        {-INFINITY, 9, "null"},
        {1e22, 17, "1e+22"},
        {2.2250738585072014e-308, 17, "2.2250738585072014e-308"},
    };
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_buf out;
    tp_buf_init(&out, 0);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        tp_buf_clear(&out);
        tp_json_write_f64(&out, numbers[i].value, numbers[i].digits);
        assert_string_equal(tp_buf_cstr(&out), numbers[i].text);
    }
    uint64_t bits = 88172645463325252u; /* xorshift: any pattern has to come back from 17 digits or fewer */
    for (int i = 0; i < 100000; i++) {
        double value;
        bits ^= bits << 13, bits ^= bits >> 7, bits ^= bits << 17;
        memcpy(&value, &bits, 8);
        if (!isfinite(value)) continue;
        tp_buf_clear(&out);
        tp_json_write_f64(&out, value, 17);
        assert_true(strtod(tp_buf_cstr(&out), NULL) == value);
    }
    tp_buf_clear(&out);
    tp_json_write_string(&out,
                         "\"\\\b\f\n\r\t\x01\x7f\xc2\x9b\xc2\xa0/\xc3\xa4\xff"
                         "e",
                         18);
    assert_string_equal(tp_buf_cstr(&out), "\"\\\"\\\\\\b\\f\\n\\r\\t\\u0001\\u007f\\u009b\xc2\xa0/\xc3\xa4\xef\xbf\xbd"
                                           "e\"");
    tp_json_doc *doc = parse(
        &ctx,
        " { \"a\" : [ 1 , { } , [ ] , [ [ 2.50 ] ] ] , \"b\" : { \"c\" : \"\\u00e4\\n\" , \"d\" : null } , \"e\" : false } ");
    static const struct {
        int indent;
        const char *text;
    } layouts[] = {
        {-1, "{\"a\":[1,{},[],[[2.50]]],\"b\":{\"c\":\"\xc3\xa4\\n\",\"d\":null},\"e\":false}"},
        {0, "{\"a\": [1, {}, [], [[2.50]]], \"b\": {\"c\": \"\xc3\xa4\\n\", \"d\": null}, \"e\": false}"},
        {2, "{\n  \"a\": [\n    1,\n    {},\n    [],\n    [\n      [\n        2.50\n      ]\n    ]\n  ],\n"
            "  \"b\": {\n    \"c\": \"\xc3\xa4\\n\",\n    \"d\": null\n  },\n  \"e\": false\n}"},
    };
    for (size_t i = 0; i < sizeof layouts / sizeof layouts[0]; i++) {
        tp_buf_clear(&out);
        tp_json_write(&out, tp_json_root(doc), layouts[i].indent);
        assert_string_equal(tp_buf_cstr(&out), layouts[i].text);
    }
    tp_buf_clear(&out);
    tp_json_write(&out, NULL, -1);
    assert_string_equal(tp_buf_cstr(&out), "null");
    tp_buf_free(&out);
    tp_json_free(doc);
}

typedef struct seen {
    tp_buf keys;
    size_t stop_after;
} seen;

static tp_status see_member(void *user, tp_ctx *ctx, const tp_json_doc *doc, const tp_json *key, const tp_json *value)
{
    seen *s = user;
    (void)doc;
    tp_buf_append(&s->keys, tp_json_string(key).data, tp_json_string(key).len);
    tp_buf_char(&s->keys, '=');
    tp_json_write(&s->keys, value, -1);
    tp_buf_char(&s->keys, ';');
    return --s->stop_after == 0 ? tp_fail(ctx, TP_SHAPE, "enough") : TP_OK;
}

static void members_come_one_by_one(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t stop_after;
        tp_status status;
        const char *seen;
    } cases[] = {
        {" {} ", 99, TP_OK, ""},
        {"{\"a\":1,\"b\":[2,{\"c\":\"\\n\"}],\"a\":{\"x\":{}}}", 99, TP_OK, "a=1;b=[2,{\"c\":\"\\n\"}];a={\"x\":{}};"},
        {"{\"a\":1,\"b\":2}", 1, TP_SHAPE, "a=1;"},
        {"{\"a\":1,\"b\":}", 99, TP_FORMAT, "a=1;"},
        {"{\"a\":1} x", 99, TP_FORMAT, "a=1;"},
        {"{\"a\":[1,2,3,4,5,6]}", 99, TP_FORMAT, ""}, /* more than the 7 nodes allowed below */
        {"[1]", 99, TP_FORMAT, ""},
        {"", 99, TP_FORMAT, ""},
    };
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        seen s = {.stop_after = cases[i].stop_after};
        tp_status status =
            tp_json_each(&ctx, cases[i].text, strlen(cases[i].text), &(tp_json_options){.max_nodes = 7}, see_member, &s);
        assert_int_equal(status, cases[i].status);
        assert_string_equal(tp_buf_cstr(&s.keys), cases[i].seen);
        tp_buf_free(&s.keys);
        tp_ctx_clear(&ctx);
    }
}

/* Real files: each is parsed, written compactly, and parsed again to the same text. */
static void golden_files_survive_a_round_trip(void **state)
{
    (void)state;
    static const char *const files[] = {"index.json",
                                        "bad/index.json",
                                        "gguf/index.json",
                                        "gguf/metadata_expect.json",
                                        "tokenizers/llama3/tokenizer.json",
                                        "tokenizers/zoo/tokenizer.json"};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        char path[1024];
        tp_json_doc *doc = NULL, *again = NULL;
        tp_buf first, second;
        tp_buf_init(&first, 0);
        tp_buf_init(&second, 0);
        assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, files[i]), (size_t)64 << 20, &doc));
        tp_json_write(&first, tp_json_root(doc), -1);
        assert_ok(&ctx, tp_json_parse(&ctx, first.data, first.len, NULL, &again));
        tp_json_write(&second, tp_json_root(again), -1);
        assert_string_equal(tp_buf_cstr(&first), tp_buf_cstr(&second));
        assert_true(first.len > 100);
        tp_json_free(doc);
        tp_json_free(again);
        tp_buf_free(&first);
        tp_buf_free(&second);
    }
}

static tp_status parse_and_write(tp_ctx *ctx, const char *text)
{
    tp_json_doc *doc;
    TP_TRY(tp_json_parse(ctx, text, strlen(text), NULL, &doc));
    tp_buf out;
    tp_buf_init(&out, 0);
    tp_json_write(&out, tp_json_root(doc), 1);
    tp_status status = tp_buf_status(ctx, &out, "out");
    tp_buf_free(&out);
    tp_json_free(doc);
    return status;
}

static tp_status each_member(tp_ctx *ctx, const char *text)
{
    seen s = {.stop_after = SIZE_MAX};
    tp_status status = tp_json_each(ctx, text, strlen(text), NULL, see_member, &s);
    if (status == TP_OK) status = tp_buf_status(ctx, &s.keys, "keys");
    tp_buf_free(&s.keys);
    return status;
}

static void memory_may_run_out(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_text(&text, "{\"deep\":[[[[[[[[[[1]]]]]]]]]],\"escaped\":\"\\n\"");
    for (int i = 0; i < 300; i++) tp_buf_printf(&text, ",\"key\\t%d\":[%d]", i, i);
    tp_buf_char(&text, '}');
    assert_survives_failing_memory(&ctx, parse_and_write(&ctx, text.data));
    assert_survives_failing_memory(&ctx, each_member(&ctx, text.data));
    tp_buf_free(&text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(grammar_is_that_of_the_rfc),
        cmocka_unit_test(messages_name_the_place),
        cmocka_unit_test(depth_and_size_have_limits),
        cmocka_unit_test(strings_are_decoded),
        cmocka_unit_test(numbers_are_exact),
        cmocka_unit_test(containers_answer),
        cmocka_unit_test(large_objects_are_indexed),
        cmocka_unit_test(typed_access_explains_itself),
        cmocka_unit_test(output_is_that_of_python),
        cmocka_unit_test(members_come_one_by_one),
        cmocka_unit_test(golden_files_survive_a_round_trip),
        cmocka_unit_test(memory_may_run_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
