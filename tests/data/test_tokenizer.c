/* Tokenizers against the reference library: ids, decoded texts, pairs of every file in golden/tokenizers whose model is
 * BPE; and what must hold for any of them: places, streaming, threads' scratch, running out of memory elsewhere. */
#include "tests/support.h"

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "data/tokenizer.h"

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
    size_t n_before = read_ids(tp_json_get(root, "before"), &before), n_after = read_ids(tp_json_get(root, "after"), &after), n_full;
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
    if (!same) print_error("%s: decoded \"%s\", expected \"%.*s\"\n", g->name, tp_buf_cstr(&whole), (int)expected.len, expected.data);
    if (!streamed) print_error("%s: streamed \"%s\", expected \"%.*s\"\n", g->name, tp_buf_cstr(&stream), (int)expected.len, expected.data);
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
    print_message("%s: %zu texts, %zu id lists, %zu pairs, %d differences\n", g->name, tp_json_count(cases), tp_json_count(decode),
                  tp_json_count(pairs), bad);
    tp_tokens_free(&tokens);
    assert_int_equal(bad, 0);
}

static void test_golden_cases(void **state)
{
    (void)state;
    each_golden(check_cases);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_cases),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
