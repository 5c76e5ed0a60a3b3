/* Tokenizers against the reference library: ids, decoded texts, pairs of every file in golden/tokenizers whose model is
 * BPE; and what must hold for any of them: places in the
 * text, streaming, special tokens as text, the files of a folder. */
#include "tests/support.h"

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "data/tokenizer.h"
#include "tests/scratch.h"

struct golden {
    char name[64];
    tp_tokenizer *tokenizer;
    tp_json_doc *cases;
};

static void join(char out[1024], const char *a, const char *b, const char *c)
{
    snprintf(out, 1024, "%s/%s/%s", a, b, c);
}

/* Calls `check` for every BPE tokenizer of the golden data; other models must be refused by name. */
static void each_golden(void (*check)(tp_ctx *, const struct golden *))
{
    char root[512], path[1024];
    tp_ctx ctx;
    tp_json_doc *index;
    int n = 0;
    tp_ctx_init(&ctx);
    golden_path(root, sizeof root, "tokenizers");
    snprintf(path, sizeof path, "%s/index.json", root);
    assert_ok(&ctx, tp_json_read(&ctx, path, 1 << 26, &index));
    const tp_json *list = tp_json_get(tp_json_root(index), "tokenizers");
    for (size_t i = 0; i < tp_json_count(list); i++) {
        struct golden g = {{0}, NULL, NULL};
        tp_span name = tp_json_key_at(list, i);
        snprintf(g.name, sizeof g.name, "%.*s", (int)name.len, name.data);
        join(path, root, g.name, "tokenizer.json");
        if (!tp_path_exists(path)) continue; /* the subset in the repository holds some of the listed ones */
        tp_status status = tp_tokenizer_open(&ctx, path, &g.tokenizer);
        if (status == TP_UNSUPPORTED) {
            assert_true(strstr(ctx.message, "Unigram") != NULL || strstr(ctx.message, "WordPiece") != NULL ||
                        strstr(ctx.message, "Precompiled") != NULL);
            tp_ctx_clear(&ctx);
            continue;
        }
        if (status != TP_OK) fail_msg("%s: %s", path, ctx.message);
        join(path, root, g.name, "cases.json");
        assert_ok(&ctx, tp_json_read(&ctx, path, 1 << 26, &g.cases));
        check(&ctx, &g);
        tp_json_free(g.cases);
        tp_tokenizer_free(g.tokenizer);
        n++;
    }
    tp_json_free(index);
    assert_true(n > 0);
}

static size_t read_ids(const tp_json *list, int32_t **ids)
{
    size_t n = tp_json_count(list);
    *ids = calloc(n + 1, sizeof **ids);
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        assert_true(tp_json_i64(tp_json_at(list, i), &id));
        (*ids)[i] = (int32_t)id;
    }
    return n;
}

static void print_text(const char *name, tp_span text, const char *what)
{
    print_error("%s: %s differ for \"%.*s\"\n", name, what, (int)text.len, text.data);
}

static bool same_ids(const struct golden *g, tp_span text, const char *what, const tp_tokens *got, const int32_t *ids, size_t n)
{
    bool same = got->count == n;
    for (size_t i = 0; same && i < n; i++) same = got->items[i].id == ids[i];
    if (same) return true;
    print_text(g->name, text, what);
    for (size_t i = 0; i < got->count; i++) print_error(" %d", got->items[i].id);
    print_error("\n expected\n");
    for (size_t i = 0; i < n; i++) print_error(" %d", ids[i]);
    print_error("\n");
    return false;
}

static int check_encoded(tp_ctx *ctx, const struct golden *g, const tp_json *row, tp_tokens *tokens)
{
    int32_t *ids, *before, *after, *full;
    int bad = 0;
    tp_span text = tp_json_string(tp_json_get(row, "text"));
    const tp_json *root = tp_json_root(g->cases), *special = tp_json_get(row, "ids_special");
    size_t n = read_ids(tp_json_get(row, "ids"), &ids);
    size_t n_before = read_ids(tp_json_get(root, "before"), &before), n_after = read_ids(tp_json_get(root, "after"), &after),
           n_full;
    assert_ok(ctx, tp_tokenizer_encode(ctx, g->tokenizer, text, TP_ENCODE_PLAIN, tokens));
    bad += !same_ids(g, text, "ids", tokens, ids, n);
    if (special != NULL) {
        n_full = read_ids(special, &full);
    } else {
        n_full = n_before + n + n_after;
        full = calloc(n_full + 1, sizeof *full);
        memcpy(full, before, n_before * sizeof *full);
        memcpy(full + n_before, ids, n * sizeof *full);
        memcpy(full + n_before + n, after, n_after * sizeof *full);
    }
    assert_ok(ctx, tp_tokenizer_encode(ctx, g->tokenizer, text, TP_ENCODE_ADD_SPECIAL, tokens));
    bad += !same_ids(g, text, "ids with special tokens", tokens, full, n_full);
    free(ids);
    free(before);
    free(after);
    free(full);
    return bad;
}

static int check_decoded(tp_ctx *ctx, const struct golden *g, const int32_t *ids, size_t n, bool skip, tp_span expected)
{
    tp_buf whole, stream;
    tp_stream_decoder *decoder;
    tp_buf_init(&whole, 0);
    tp_buf_init(&stream, 0);
    assert_ok(ctx, tp_tokenizer_decode(ctx, g->tokenizer, ids, n, skip, &whole));
    assert_ok(ctx, tp_stream_decoder_new(ctx, g->tokenizer, skip, &decoder));
    for (size_t i = 0; i < n; i++) {
        assert_ok(ctx, tp_stream_decoder_push(ctx, decoder, ids[i], &stream));
        assert_int_equal(tp_utf8_valid_prefix(tp_buf_cstr(&stream), stream.len), stream.len);
    }
    assert_ok(ctx, tp_stream_decoder_finish(ctx, decoder, &stream));
    bool same = tp_span_equal((tp_span){tp_buf_cstr(&whole), whole.len}, expected);
    bool streamed = tp_span_equal((tp_span){tp_buf_cstr(&stream), stream.len}, expected);
    if (!same)
        print_error("%s: decoded \"%s\", expected \"%.*s\"\n", g->name, tp_buf_cstr(&whole), (int)expected.len, expected.data);
    if (!streamed)
        print_error("%s: streamed \"%s\", expected \"%.*s\"\n", g->name, tp_buf_cstr(&stream), (int)expected.len,
                    expected.data);
    tp_stream_decoder_free(decoder);
    tp_buf_free(&whole);
    tp_buf_free(&stream);
    return !same + !streamed;
}

/* decoded is left out when it equals the text, decoded_skip when it equals decoded. */
static int check_decoding(tp_ctx *ctx, const struct golden *g, const tp_json *row)
{
    int32_t *ids;
    size_t n = read_ids(tp_json_get(row, "ids"), &ids);
    const tp_json *decoded = tp_json_get(row, "decoded"), *skip = tp_json_get(row, "decoded_skip");
    tp_span plain = tp_json_string(decoded != NULL ? decoded : tp_json_get(row, "text"));
    int bad = check_decoded(ctx, g, ids, n, false, plain);
    bad += check_decoded(ctx, g, ids, n, true, skip != NULL ? tp_json_string(skip) : plain);
    free(ids);
    return bad;
}

static int check_pair(tp_ctx *ctx, const struct golden *g, const tp_json *row, tp_tokens *tokens)
{
    int32_t *ids, *types;
    tp_span a = tp_json_string(tp_json_get(row, "a")), b = tp_json_string(tp_json_get(row, "b"));
    size_t n = read_ids(tp_json_get(row, "ids"), &ids);
    assert_int_equal(read_ids(tp_json_get(row, "type_ids"), &types), n);
    assert_ok(ctx, tp_tokenizer_encode_pair(ctx, g->tokenizer, a, b, TP_ENCODE_ADD_SPECIAL, tokens));
    int bad = !same_ids(g, a, "ids of the pair", tokens, ids, n);
    for (size_t i = 0; bad == 0 && i < n; i++) bad += tokens->items[i].type_id != types[i];
    free(ids);
    free(types);
    return bad;
}

static void check_cases(tp_ctx *ctx, const struct golden *g)
{
    tp_tokens tokens = {0};
    const tp_json *root = tp_json_root(g->cases), *cases = tp_json_get(root, "cases");
    const tp_json *decode = tp_json_get(root, "decode"), *pairs = tp_json_get(root, "pairs");
    int bad = 0;
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        bad += check_encoded(ctx, g, tp_json_at(cases, i), &tokens);
        bad += check_decoding(ctx, g, tp_json_at(cases, i));
    }
    for (size_t i = 0; i < tp_json_count(decode); i++) bad += check_decoding(ctx, g, tp_json_at(decode, i));
    for (size_t i = 0; i < tp_json_count(pairs); i++) bad += check_pair(ctx, g, tp_json_at(pairs, i), &tokens);
    print_message("%s: %zu texts, %zu id lists, %zu pairs, %d differences\n", g->name, tp_json_count(cases),
                  tp_json_count(decode), tp_json_count(pairs), bad);
    tp_tokens_free(&tokens);
    assert_int_equal(bad, 0);
}

static void test_golden_cases(void **state)
{
    (void)state;
    each_golden(check_cases);
}

/* ---- small tokenizers of our own ---- */

#define VOCAB                                                                                                                  \
    "\"vocab\":{\"<u>\":0,\"\u2581\":1,\"a\":2,\"b\":3,\"\u2581a\":4,\"ab\":5,\"<0xC3>\":6,\"<0xA9>\":7,\"<s>\":8,\"</"        \
    "s>\":9,\"i\":10}"
#define SPM_MODEL                                                                                                              \
    "\"added_tokens\":[{\"id\":8,\"content\":\"<s>\",\"special\":true},{\"id\":9,\"content\":\"</s>\",\"special\":true}],"     \
    "\"model\":{\"type\":\"BPE\",\"unk_token\":\"<u>\",\"byte_fallback\":true," VOCAB ",\"merges\":[\"\u2581 a\",\"a b\"]}"

static tp_tokenizer *from_text(tp_ctx *ctx, const char *json)
{
    tp_tokenizer *t;
    assert_ok(ctx, tp_tokenizer_from_json(ctx, "t", json, strlen(json), &t));
    return t;
}

struct expected {
    int32_t id;
    size_t begin, end;
};

static void check_tokens(tp_ctx *ctx, const tp_tokenizer *t, const char *text, unsigned flags, const struct expected *expected,
                         size_t n)
{
    tp_tokens tokens = {0};
    assert_ok(ctx, tp_tokenizer_encode(ctx, t, tp_span_of(text), flags, &tokens));
    assert_int_equal(tokens.count, n);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(tokens.items[i].id, expected[i].id);
        assert_int_equal(tokens.items[i].begin, expected[i].begin);
        assert_int_equal(tokens.items[i].end, expected[i].end);
    }
    tp_tokens_free(&tokens);
}

/* Through normalizers that insert, widen, drop and replace. By hand. */
static void test_places(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_tokenizer *t =
        from_text(&ctx, "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\u2581\"},"
                        "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\u2581\"}]}," SPM_MODEL "}");
    check_tokens(&ctx, t, "ab a", TP_ENCODE_PLAIN, (struct expected[]){{4, 0, 1}, {3, 1, 2}, {4, 2, 4}}, 3);
    check_tokens(&ctx, t, "b<s>a\u00e9", TP_ENCODE_PLAIN,
                 (struct expected[]){{1, 0, 0}, {3, 0, 1}, {8, 1, 4}, {4, 4, 5}, {6, 5, 6}, {7, 6, 7}}, 6);
    tp_tokenizer_free(t);
    t = from_text(
        &ctx,
        "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"},{\"type\":\"Strip\",\"strip_left\":true,"
        "\"strip_right\":true},{\"type\":\"Lowercase\"},{\"type\":\"StripAccents\"}]},"
        "\"pre_tokenizer\":{\"type\":\"WhitespaceSplit\"}," SPM_MODEL "}");
    /* two blanks; E with an acute as one character; B; a blank; fullwidth a; capital I with a dot, which becomes i and a mark
     */
    check_tokens(&ctx, t, "  \u00c9B \uff41\u0130 ", TP_ENCODE_PLAIN,
                 (struct expected[]){{6, 2, 3}, {7, 3, 4}, {3, 4, 5}, {2, 6, 9}, {10, 9, 11}}, 5);
    tp_tokenizer_free(t);
}

static void test_special_tokens_as_text(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_tokenizer *t = from_text(&ctx, "{" SPM_MODEL "}");
    check_tokens(&ctx, t, "a<s>", TP_ENCODE_PLAIN, (struct expected[]){{2, 0, 1}, {8, 1, 4}}, 2);
    check_tokens(&ctx, t, "a<s>", TP_ENCODE_SPECIAL_AS_TEXT, (struct expected[]){{2, 0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}},
                 4);
    assert_int_equal(tp_tokenizer_size(t), 11);
    assert_int_equal(tp_tokenizer_id(t, tp_span_of("ab")), 5);
    assert_int_equal(tp_tokenizer_id(t, tp_span_of("nothing")), -1);
    assert_true(tp_tokenizer_is_special(t, 8) && !tp_tokenizer_is_special(t, 5) && !tp_tokenizer_is_special(t, -1));
    assert_null(tp_tokenizer_token(t, 11).data);
    tp_tokenizer_free(t);
}

/* One tp_tokens for several tokenizers: the cache of words must not leak from one to the next. */
static void test_cache_belongs_to_a_tokenizer(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_tokens tokens = {0};
    tp_ctx_init(&ctx);
    for (int i = 0; i < 6; i++) {
        char json[1024];
        snprintf(json, sizeof json, "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[%s]}}",
                 i % 2 ? "\"a b\"" : "");
        tp_tokenizer *t = from_text(&ctx, json);
        for (int k = 0; k < 2; k++) {
            assert_ok(&ctx, tp_tokenizer_encode(&ctx, t, tp_span_of("ab"), TP_ENCODE_PLAIN, &tokens));
            assert_int_equal(tokens.count, i % 2 ? 1 : 2);
        }
        tp_tokenizer_free(t);
    }
    tp_tokens_free(&tokens);
}

/* What the text of a tokenizer's every golden case tells about places: in order, inside, and without gap for
 * byte-level ones that have all bytes (SmolLM2's vocabulary lacks some, which are dropped as in the reference library). */
static void check_case_places(tp_ctx *ctx, const struct golden *g)
{
    tp_tokens tokens = {0};
    const tp_json *cases = tp_json_get(tp_json_root(g->cases), "cases");
    bool tiles = strcmp(g->name, "gpt2") == 0 || strcmp(g->name, "llama3") == 0;
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        tp_span text = tp_json_string(tp_json_get(tp_json_at(cases, i), "text"));
        size_t end = 0;
        assert_ok(ctx, tp_tokenizer_encode(ctx, g->tokenizer, text, TP_ENCODE_PLAIN, &tokens));
        for (size_t k = 0; k < tokens.count; k++) {
            const tp_token *token = &tokens.items[k];
            assert_true(token->begin <= token->end && token->end <= text.len);
            if (tiles) assert_int_equal(token->begin, end);
            end = token->end;
        }
        if (tiles) assert_int_equal(end, text.len);
    }
    tp_tokens_free(&tokens);
}

static void test_golden_places(void **state)
{
    (void)state;
    each_golden(check_case_places);
}

/* ---- folders ---- */

static void write_file(tp_ctx *ctx, scratch *s, const char *name, const char *text)
{
    assert_ok(ctx, tp_file_write(ctx, scratch_path(s, name), text, strlen(text)));
}

static bool span_is(tp_span span, const char *text)
{
    return span.data != NULL && tp_span_is(span, text);
}

static void test_folder(void **state)
{
    (void)state;
    scratch s;
    tp_ctx ctx;
    tp_tokenizer *t;
    tp_span name, text;
    tp_ctx_init(&ctx);
    scratch_begin(&s);
    write_file(&ctx, &s, "tokenizer.json",
               "{" SPM_MODEL ",\"post_processor\":{\"type\":\"BertProcessing\",\"cls\":[\"<s>\",8],\"sep\":[\"</s>\",9]}}");
    assert_ok(&ctx, tp_tokenizer_open(&ctx, s.folder, &t));
    assert_int_equal(tp_tokenizer_role(t, TP_TOKEN_BOS), -1);
    assert_null(tp_tokenizer_chat_template(t, NULL).data);
    tp_tokenizer_free(t);
    write_file(&ctx, &s, "tokenizer_config.json",
               "{\"bos_token\":\"<s>\",\"eos_token\":{\"content\":\"</"
               "s>\",\"lstrip\":false},\"pad_token\":null,\"add_bos_token\":true,"
               "\"chat_template\":[{\"name\":\"default\",\"template\":\"D\"},{\"name\":\"tool_use\",\"template\":\"T\"}]}");
    write_file(&ctx, &s, "special_tokens_map.json",
               "{\"bos_token\":\"other\",\"unk_token\":\"<u>\",\"additional_special_tokens\":[\"a\",\"b\"]}");
    assert_ok(&ctx, tp_tokenizer_open(&ctx, s.folder, &t));
    assert_int_equal(tp_tokenizer_role(t, TP_TOKEN_BOS), 8);
    assert_int_equal(tp_tokenizer_role(t, TP_TOKEN_EOS), 9);
    assert_int_equal(tp_tokenizer_role(t, TP_TOKEN_UNK), 0);
    assert_int_equal(tp_tokenizer_role(t, TP_TOKEN_PAD), -1);
    assert_true(span_is(tp_tokenizer_role_text(t, TP_TOKEN_EOS), "</s>"));
    assert_true(tp_tokenizer_adds_bos(t) && tp_tokenizer_adds_eos(t));
    assert_true(span_is(tp_tokenizer_chat_template(t, NULL), "D"));
    assert_true(span_is(tp_tokenizer_chat_template(t, "tool_use"), "T"));
    assert_null(tp_tokenizer_chat_template(t, "rag").data);
    size_t n = 0, additional = 0;
    for (; tp_tokenizer_named(t, n, &name, &text); n++) additional += span_is(name, "additional_special_tokens");
    assert_int_equal(n, 5);
    assert_int_equal(additional, 2);
    tp_tokenizer_free(t);
    write_file(&ctx, &s, "chat_template.jinja", "J\n");
    assert_ok(&ctx, tp_tokenizer_open(&ctx, s.folder, &t));
    assert_true(span_is(tp_tokenizer_chat_template(t, NULL), "J\n")); /* the file beside wins */
    tp_tokenizer_free(t);
    write_file(&ctx, &s, "tokenizer_config.json", "[]");
    assert_status(&ctx, TP_FORMAT, tp_tokenizer_open(&ctx, s.folder, &t));
    assert_null(t);
    scratch_end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_cases),
        cmocka_unit_test(test_golden_places),
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_special_tokens_as_text),
        cmocka_unit_test(test_cache_belongs_to_a_tokenizer),
        cmocka_unit_test(test_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
