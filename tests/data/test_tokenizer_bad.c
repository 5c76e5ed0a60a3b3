/* tokenizer.json files from strangers: golden/bad/tokenizer with the verdicts of its index, hostile texts, and every
 * allocation made to fail in turn. */
#include "tests/support.h"

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "data/tokenizer.h"
#include "tests/failing_memory.h"

/* One line without control characters that a reader can act on. */
static void check_message(const tp_ctx *ctx, const char *path)
{
    assert_int_not_equal(ctx->message[0], '\0');
    for (const char *p = ctx->message; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f) fail_msg("%s: the message has control character %d", path, *p);
    assert_int_equal(tp_utf8_valid_prefix(ctx->message, strlen(ctx->message)), strlen(ctx->message));
}

static void check_bad_file(const char *path, tp_span verdict)
{
    tp_ctx ctx;
    tp_tokenizer *tokenizer;
    tp_ctx_init(&ctx);
    tp_status status = tp_tokenizer_open(&ctx, path, &tokenizer);
    if (status != TP_OK) {
        check_message(&ctx, path);
        assert_int_equal(tp_status_exit_code(status), 3);
        assert_null(tokenizer);
    }
    if (tp_span_is(verdict, "refuse") && status == TP_OK) fail_msg("%s: accepted, should be refused", path);
    if (tp_span_is(verdict, "accept") && status != TP_OK) fail_msg("%s: %s", path, ctx.message);
    if (status == TP_OK) { /* a text with and without tokens, and one that nested quantifiers choke on */
        tp_tokens tokens = {0};
        char slow[4096];
        memset(slow, 'a', sizeof slow);
        slow[sizeof slow - 1] = 'b';
        tp_status encoded =
            tp_tokenizer_encode(&ctx, tokenizer, tp_span_of("abcd ef <|end|> xyz"), TP_ENCODE_ADD_SPECIAL, &tokens);
        if (encoded != TP_OK) { /* only where an unknown character needs a token that is missing */
            check_message(&ctx, path);
            assert_int_equal(encoded, TP_FORMAT);
            assert_non_null(strstr(path, "unk_missing"));
            tp_ctx_clear(&ctx);
        }
        encoded = tp_tokenizer_encode(&ctx, tokenizer, (tp_span){slow, sizeof slow}, TP_ENCODE_PLAIN, &tokens);
        if (encoded != TP_OK) {
            check_message(&ctx, path);
            assert_int_equal(encoded, TP_UNSUPPORTED);
            assert_non_null(strstr(path, "regex_slow"));
        }
        tp_tokens_free(&tokens);
        tp_tokenizer_free(tokenizer);
    }
}

static void test_bad_files(void **state)
{
    (void)state;
    char root[512], path[1200];
    tp_ctx ctx;
    tp_json_doc *index;
    int n = 0;
    tp_ctx_init(&ctx);
    golden_path(root, sizeof root, "bad");
    snprintf(path, sizeof path, "%s/index.json", root);
    assert_ok(&ctx, tp_json_read(&ctx, path, 1 << 26, &index));
    const tp_json *cases = tp_json_get(tp_json_root(index), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        const tp_json *row = tp_json_at(cases, i);
        tp_span name = tp_json_string(tp_json_get(row, "path"));
        if (name.len < 10 || memcmp(name.data, "tokenizer/", 10) != 0) continue;
        snprintf(path, sizeof path, "%s/%.*s", root, (int)name.len, name.data);
        if (!tp_path_exists(path)) continue; /* the subset in the repository */
        check_bad_file(path, tp_json_string(tp_json_get(row, "verdict")));
        n++;
    }
    tp_json_free(index);
    print_message("%d files\n", n);
    assert_true(n > 0);
}

/* ---- small files of our own ---- */

#define HEAD    "{\"version\":\"1.0\","
#define LETTERS "\"a\":0,\"b\":1,\"\u0120\":2,\"ab\":3,\"\u0120a\":4,\"\u010a\":5,\"c\":6,\"aa\":7,\"aaaa\":8"
#define MERGES  "[[\"a\",\"b\"],[\"\u0120\",\"a\"],[\"a\",\"a\"],[\"aa\",\"aa\"]]"

static const char byte_level[] =
    HEAD "\"added_tokens\":[{\"id\":9,\"content\":\"<|x|>\",\"special\":true},{\"id\":10,\"content\":\"ca\",\"special\":false,"
         "\"lstrip\":true}],"
         "\"normalizer\":{\"type\":\"NFC\"},"
         "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"c+|x\"},"
         "\"behavior\":\"MergedWithNext\"},{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":true}]},"
         "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\",\"type_id\":0}},"
         "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[],\"special_tokens\":{\"x\":{\"id\":\"x\",\"ids\":[9],"
         "\"tokens\":[\"<|x|>\"]}}},"
         "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{" LETTERS "},\"merges\":" MERGES "}}";

static const char spm[] =
    HEAD "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\u2581\"},"
         "{\"type\":\"Replace\",\"pattern\":{\"String\":\" "
         "\"},\"content\":\"\u2581\"},{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"b{2,}\"},\"content\":\"b\"}]},"
         "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"\u2581\"},"
         "\"content\":\" \"},"
         "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]},"
         "\"model\":{\"type\":\"BPE\",\"unk_token\":\"<u>\",\"fuse_unk\":true,\"byte_fallback\":true,\"vocab\":{\"<u>\":0,"
         "\"\u2581\":1,\"a\":2,\"b\":3,"
         "\"\u2581a\":4,\"ab\":5,\"<0x0A>\":6,\"<0xC3>\":7,\"<0xA9>\":8},\"merges\":[\"\u2581 a\",\"a b\"]}}";

static tp_status whole_life(tp_ctx *ctx, const char *json)
{
    tp_tokenizer *t = NULL;
    tp_tokens tokens = {0};
    tp_buf out;
    int32_t ids[64];
    char text[200];
    tp_buf_init(&out, 0);
    memset(text, 'a', sizeof text);
    memcpy(text + 120, "bb e\xcc\x81 \n ca<|x|>\xc3\xa9", 18);
    tp_status status = tp_tokenizer_from_json(ctx, "t", json, strlen(json), &t);
    if (status == TP_OK) status = tp_tokenizer_encode(ctx, t, (tp_span){text, sizeof text}, TP_ENCODE_ADD_SPECIAL, &tokens);
    if (status == TP_OK)
        status = tp_tokenizer_encode_pair(ctx, t, tp_span_of("ab c"), tp_span_of("ba"), TP_ENCODE_APPEND, &tokens);
    size_t n = tokens.count < 64 ? tokens.count : 64;
    for (size_t i = 0; i < n; i++) ids[i] = tokens.items[i].id;
    if (status == TP_OK) status = tp_tokenizer_decode(ctx, t, ids, n, false, &out);
    tp_buf_free(&out);
    tp_tokens_free(&tokens);
    tp_tokenizer_free(t);
    return status;
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    assert_survives_failing_memory(&ctx, whole_life(&ctx, byte_level));
    assert_survives_failing_memory(&ctx, whole_life(&ctx, spm));
}

static size_t count_equal(tp_ctx *ctx, const tp_tokenizer *t, const char *unit, size_t times)
{
    tp_tokens tokens = {0};
    size_t n = strlen(unit);
    char *text = malloc(n * times);
    for (size_t i = 0; i < times; i++) memcpy(text + i * n, unit, n);
    assert_ok(ctx, tp_tokenizer_encode(ctx, t, (tp_span){text, n * times}, TP_ENCODE_PLAIN, &tokens));
    size_t count = tokens.count, at = 0;
    for (size_t i = 0; i < count; i++) { /* places follow each other without gap */
        assert_true(tokens.items[i].begin <= tokens.items[i].end && tokens.items[i].begin >= at);
        at = tokens.items[i].begin;
    }
    assert_true(count == 0 || tokens.items[count - 1].end == n * times);
    tp_tokens_free(&tokens);
    free(text);
    return count;
}

/* T6: long runs. A quadratic step would not end within the patience of whoever runs this. */
static void test_long_runs(void **state)
{
    (void)state;
    enum { MANY = 1 << 20 };
    tp_ctx ctx;
    tp_tokenizer *t;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_tokenizer_from_json(&ctx, "t", byte_level, strlen(byte_level), &t));
    assert_int_equal(count_equal(&ctx, t, "a", MANY),
                     MANY / 4 + 2); /* the prefix blank takes one a, three are left over: aa a */
    assert_int_equal(count_equal(&ctx, t, " ", MANY), MANY);
    assert_int_equal(count_equal(&ctx, t, "\n", MANY), MANY + 1);
    assert_int_equal(count_equal(&ctx, t, "b", MANY), MANY + 1);
    tp_tokenizer_free(t);
    assert_ok(&ctx, tp_tokenizer_from_json(&ctx, "t", spm, strlen(spm), &t));
    assert_int_equal(count_equal(&ctx, t, "a", MANY), MANY);
    assert_int_equal(count_equal(&ctx, t, "a ", MANY), MANY + 1);
    tp_tokenizer_free(t);
}

static void test_invalid_text_is_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {"\xff", "a\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "ok \x80"};
    tp_ctx ctx;
    tp_tokenizer *t;
    tp_tokens tokens = {0};
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_tokenizer_from_json(&ctx, "t", byte_level, strlen(byte_level), &t));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_status(&ctx, TP_INVALID, tp_tokenizer_encode(&ctx, t, tp_span_of(bad[i]), TP_ENCODE_PLAIN, &tokens));
    assert_ok(&ctx, tp_tokenizer_encode(&ctx, t, (tp_span){"a\0b", 3}, TP_ENCODE_PLAIN, &tokens)); /* NUL is text */
    tp_tokens_free(&tokens);
    tp_tokenizer_free(t);
}

/* ---- files that ask for more than their size ---- */

/* A tokenizer of the letter "a" and the blank, with some members in front of its model. */
static tp_status open_with(tp_ctx *ctx, const tp_buf *members, tp_tokenizer **t)
{
    tp_buf json;
    tp_buf_init(&json, 0);
    tp_buf_printf(&json, HEAD "%s\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\" \":1},\"merges\":[]}}",
                  tp_buf_cstr(members));
    assert_false(json.failed);
    tp_status status = tp_tokenizer_from_json(ctx, "t", json.data, json.len, t);
    tp_buf_free(&json);
    return status;
}

/* `"key":{"type":"Sequence","list":[part,part,...]},` */
static void write_sequence(tp_buf *out, const char *key, const char *list, const char *part, int times)
{
    tp_buf_printf(out, "\"%s\":{\"type\":\"Sequence\",\"%s\":[", key, list);
    for (int i = 0; i < times; i++) tp_buf_printf(out, "%s%s", i > 0 ? "," : "", part);
    tp_buf_text(out, "]},");
}

#define AAAA "{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"aaaaaaaa\"}"

/* 8^16 bytes from one. */
static void test_replacements_that_multiply(void **state)
{
    (void)state;
    const int32_t ids[] = {0, 0};
    tp_ctx ctx;
    tp_tokenizer *t;
    tp_tokens tokens = {0};
    tp_buf json, out;
    tp_ctx_init(&ctx);
    tp_buf_init(&json, 0);
    tp_buf_init(&out, 0);
    write_sequence(&json, "normalizer", "normalizers", AAAA, 16);
    assert_ok(&ctx, open_with(&ctx, &json, &t));
    assert_status(&ctx, TP_UNSUPPORTED, tp_tokenizer_encode(&ctx, t, tp_span_of("a"), TP_ENCODE_PLAIN, &tokens));
    assert_ok(&ctx, tp_tokenizer_encode(&ctx, t, tp_span_of(" "), TP_ENCODE_PLAIN, &tokens)); /* nothing to replace */
    assert_int_equal(tokens.count, 1);
    tp_tokenizer_free(t);

    tp_buf_clear(&json);
    write_sequence(&json, "decoder", "decoders", AAAA, 16);
    assert_ok(&ctx, open_with(&ctx, &json, &t));
    assert_status(&ctx, TP_UNSUPPORTED, tp_tokenizer_decode(&ctx, t, ids, 2, false, &out));
    tp_tokenizer_free(t);

    tp_buf_clear(&json); /* the limit is no matter of how many tokens there are */
    write_sequence(&json, "decoder", "decoders", AAAA, 1);
    assert_ok(&ctx, open_with(&ctx, &json, &t));
    for (int i = 0; i < 1000; i++) assert_ok(&ctx, tp_tokenizer_decode(&ctx, t, ids, 2, false, &out));
    assert_int_equal(out.len, 1000 * 2 * 8);
    tp_tokenizer_free(t);
    tp_tokens_free(&tokens);
    tp_buf_free(&json);
    tp_buf_free(&out);
}

/* Each part's place is looked for from the beginning of the file, and ids in a template count once for each mention. */
static void test_pipelines_have_limits(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_tokenizer *t;
    tp_buf json;
    tp_ctx_init(&ctx);
    tp_buf_init(&json, 0);
    write_sequence(&json, "post_processor", "processors", "{\"type\":\"ByteLevel\"}", 10000);
    assert_status(&ctx, TP_UNSUPPORTED, open_with(&ctx, &json, &t));
    tp_buf_clear(&json);
    write_sequence(&json, "normalizer", "normalizers", "{\"type\":\"Sequence\",\"normalizers\":[]}", 10000);
    assert_status(&ctx, TP_UNSUPPORTED, open_with(&ctx, &json, &t));

    char affix[300], model[500];
    memset(affix, 'p', sizeof affix);
    snprintf(model, sizeof model,
             "{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[],\"continuing_subword_prefix\":\"%.300s\"}}", affix);
    assert_status(&ctx, TP_UNSUPPORTED, tp_tokenizer_from_json(&ctx, "t", model, strlen(model), &t));

    for (int texts = 0; texts < 2; texts++) {
        tp_buf_clear(&json);
        tp_buf_text(&json, "\"post_processor\":{\"type\":\"TemplateProcessing\",\"pair\":[],\"single\":[");
        for (int i = 0; i < 100; i++)
            tp_buf_printf(&json, "%s{\"%s\":{\"id\":\"A\",\"type_id\":0}}", i > 0 ? "," : "",
                          texts ? "Sequence" : "SpecialToken");
        tp_buf_text(&json, "],\"special_tokens\":{\"A\":{\"id\":\"A\",\"ids\":[");
        for (int i = 0; i < 100; i++) tp_buf_text(&json, i > 0 ? ",0" : "0");
        tp_buf_text(&json, "]}}},");
        assert_status(&ctx, TP_UNSUPPORTED, open_with(&ctx, &json, &t));
    }
    tp_buf_free(&json);
}

/* The budget of steps is one for the whole text, however many pieces it is cut into. */
static void test_slow_pieces_add_up(void **state)
{
    (void)state;
    enum { PIECES = 2000, LENGTH = 14 };
    char text[PIECES * LENGTH];
    tp_ctx ctx;
    tp_tokenizer *t;
    tp_tokens tokens = {0};
    tp_buf json;
    tp_ctx_init(&ctx);
    tp_buf_init(&json, 0);
    tp_buf_text(&json,
                "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"String\":"
                "\" \"},\"behavior\":\"Isolated\"},{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a|a)*(?=[bc])\"},"
                "\"behavior\":\"Isolated\"}]},");
    for (size_t i = 0; i < sizeof text; i++) text[i] = i % LENGTH == LENGTH - 1 ? ' ' : 'a';
    assert_ok(&ctx, open_with(&ctx, &json, &t));
    assert_ok(&ctx, tp_tokenizer_encode(&ctx, t, (tp_span){text, LENGTH}, TP_ENCODE_PLAIN, &tokens));
    assert_int_equal(tokens.count, LENGTH);
    assert_status(&ctx, TP_UNSUPPORTED, tp_tokenizer_encode(&ctx, t, (tp_span){text, sizeof text}, TP_ENCODE_PLAIN, &tokens));
    tp_tokenizer_free(t);
    tp_tokens_free(&tokens);
    tp_buf_free(&json);
}

/* Added tokens at every place of a long text: blanks that take the blanks behind them along, and long ones that never end. */
static void test_long_runs_of_added_tokens(void **state)
{
    (void)state;
    enum { MANY = 1 << 20, LONG = 1000 };
    tp_ctx ctx;
    tp_tokenizer *t;
    tp_buf json;
    tp_ctx_init(&ctx);
    tp_buf_init(&json, 0);
    tp_buf_text(&json, "\"added_tokens\":[{\"id\":2,\"content\":\"\\t\",\"rstrip\":true,\"normalized\":false},"
                       "{\"id\":3,\"content\":\"");
    for (int i = 0; i < LONG; i++) tp_buf_char(&json, 'a');
    tp_buf_text(&json, "b\",\"normalized\":false}],");
    assert_ok(&ctx, open_with(&ctx, &json, &t));
    assert_int_equal(count_equal(&ctx, t, "\t", MANY), MANY);
    assert_int_equal(count_equal(&ctx, t, "a", MANY), MANY);
    tp_tokenizer_free(t);
    tp_buf_free(&json);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_every_allocation_may_fail),
        cmocka_unit_test(test_long_runs),
        cmocka_unit_test(test_invalid_text_is_refused),
        cmocka_unit_test(test_replacements_that_multiply),
        cmocka_unit_test(test_pipelines_have_limits),
        cmocka_unit_test(test_slow_pieces_add_up),
        cmocka_unit_test(test_long_runs_of_added_tokens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
