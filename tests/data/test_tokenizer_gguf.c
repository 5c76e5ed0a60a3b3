/* The tokenizers stored in GGUF files against the libraries that made them: ids of golden/gguf/tokenizer_cases.json. */
#include "tests/support.h"

#include "base/file.h"
#include "base/gguf.h"
#include "base/json.h"
#include "data/tokenizer.h"

struct opened {
    tp_ctx ctx;
    tp_gguf *file;
    tp_tokenizer *tokenizer;
    tp_json_doc *cases;
};

/* Rows with the key: ids, and the text again after decoding. */
static void check_rows(struct opened *o, const char *key, unsigned flags)
{
    tp_tokens tokens = {0};
    const tp_json *rows = tp_json_get(tp_json_root(o->cases), "cases");
    int bad = 0, n = 0;
    for (size_t i = 0; i < tp_json_count(rows); i++) {
        const tp_json *row = tp_json_at(rows, i), *ids = tp_json_get(row, key);
        tp_span text = tp_json_string(tp_json_get(row, "text"));
        if (ids == NULL) continue;
        assert_ok(&o->ctx, tp_tokenizer_encode(&o->ctx, o->tokenizer, text, flags, &tokens));
        bool same = tokens.count == tp_json_count(ids);
        tp_buf decoded;
        int32_t *list = calloc(tokens.count + 1, sizeof *list);
        for (size_t k = 0; k < tokens.count; k++) {
            int64_t id = -1;
            same = same && tp_json_i64(tp_json_at(ids, k), &id) && id == tokens.items[k].id;
            list[k] = tokens.items[k].id;
        }
        tp_buf_init(&decoded, 0);
        assert_ok(&o->ctx, tp_tokenizer_decode(&o->ctx, o->tokenizer, list, tokens.count, false, &decoded));
        bool back = tp_span_equal((tp_span){tp_buf_cstr(&decoded), decoded.len}, text);
        /* U+2581 in the text comes back as a blank: SentencePiece's own ambiguity */
        if (memmem(text.data, text.len, "\xe2\x96\x81", 3) != NULL && flags == TP_ENCODE_SPECIAL_AS_TEXT) back = true;
        if (!same || !back)
            print_error("%s: \"%.*s\" %s, decoded \"%s\"\n", key, (int)text.len, text.data, same ? "same ids" : "other ids",
                        tp_buf_cstr(&decoded));
        bad += !same + !back;
        tp_buf_free(&decoded);
        free(list);
        n++;
    }
    print_message("%s: %d texts, %d differences\n", key, n, bad);
    tp_tokens_free(&tokens);
    assert_true(n > 0);
    assert_int_equal(bad, 0);
}

static void check_byte_level(struct opened *o)
{
    check_rows(o, "bpe", TP_ENCODE_PLAIN);
    assert_int_equal(tp_tokenizer_size(o->tokenizer), 384);
    assert_int_equal(tp_tokenizer_role(o->tokenizer, TP_TOKEN_BOS), 1);
    assert_int_equal(tp_tokenizer_role(o->tokenizer, TP_TOKEN_EOS), 2);
    assert_int_equal(tp_tokenizer_role(o->tokenizer, TP_TOKEN_PAD), 2);
    assert_false(tp_tokenizer_adds_bos(o->tokenizer));
    assert_true(tp_tokenizer_is_special(o->tokenizer, 1));
    assert_false(tp_tokenizer_is_special(o->tokenizer, 3));
    tp_span template_ = tp_tokenizer_chat_template(o->tokenizer, NULL);
    assert_non_null(template_.data);
    assert_memory_equal(template_.data, "{% for m in messages %}", 23);
}

static void check_scores(struct opened *o)
{
    check_rows(o, "spm", TP_ENCODE_SPECIAL_AS_TEXT);
    assert_true(tp_tokenizer_adds_bos(o->tokenizer));
    assert_false(tp_tokenizer_adds_eos(o->tokenizer));
    tp_tokens tokens = {0};
    assert_ok(&o->ctx, tp_tokenizer_encode(&o->ctx, o->tokenizer, tp_span_of("hello</s>"), TP_ENCODE_ADD_SPECIAL, &tokens));
    assert_int_equal(tokens.items[0].id, 1);
    assert_int_equal(tokens.items[tokens.count - 1].id, 2);
    tp_tokens_free(&tokens);
}

/* Every GGUF file of the golden data that has a tokenizer, by its model. */
static void test_golden_files(void **state)
{
    (void)state;
    char path[512], relative[256];
    struct opened o;
    int n = 0;
    tp_ctx_init(&o.ctx);
    assert_ok(&o.ctx, tp_json_read(&o.ctx, golden_path(path, sizeof path, "gguf/tokenizer_cases.json"), 1 << 26, &o.cases));
    static const char *const names[] = {"tiny_bf16.gguf", "tiny_q4_0.gguf", "tiny_q8_0.gguf", "mixed.gguf"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        tp_span model = {NULL, 0};
        snprintf(relative, sizeof relative, "gguf/%s", names[i]);
        if (!tp_path_exists(golden_path(path, sizeof path, relative))) continue; /* the subset in the repository */
        assert_ok(&o.ctx, tp_gguf_open(&o.ctx, path, &o.file));
        assert_ok(&o.ctx, tp_gguf_need_string(&o.ctx, o.file, "tokenizer.ggml.model", true, &model));
        assert_ok(&o.ctx, tp_tokenizer_from_gguf(&o.ctx, o.file, &o.tokenizer));
        if (tp_span_is(model, "llama"))
            check_scores(&o);
        else
            check_byte_level(&o);
        tp_tokenizer_free(o.tokenizer);
        tp_gguf_close(o.file);
        n++;
    }
    tp_json_free(o.cases);
    assert_true(n > 0);
}

/* ---- a file of our own ---- */

static void put(tp_buf *b, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++) tp_buf_char(b, (char)(value >> 8 * i));
}

static void put_text(tp_buf *b, const char *text)
{
    put(b, strlen(text), 8);
    tp_buf_text(b, text);
}

static void put_array(tp_buf *b, const char *key, tp_gguf_type element, size_t n)
{
    put_text(b, key);
    put(b, TP_GGUF_ARRAY, 4);
    put(b, element, 4);
    put(b, n, 8);
}

struct piece {
    const char *text;
    float score;
    int type;
};

/* "abc" can be ab+c or a+bc; "x" is no token but a part of one; U+00E9 has both its bytes, U+00E8 only the first. */
static const struct piece pieces[] = {
    {"<unk>", 0, 2},    {"<s>", 0, 3},    {"\u2581", -1, 1}, {"a", -9, 1},     {"b", -9, 1},
    {"c", -9, 1},       {"ab", -3, 1},    {"bc", -2, 1},     {"abc", -5, 1},   {"ax", -4, 1},
    {"\u2581a", -8, 1}, {"<0xC3>", 0, 6}, {"<0xA9>", 0, 6},  {"[user]", 0, 4},
};
#define N_PIECES (sizeof pieces / sizeof *pieces)

static void write_file(tp_buf *b, const char *model, const char *pre, bool scores, bool merges)
{
    tp_buf_init(b, 0);
    tp_buf_append(b, "GGUF\3\0\0\0", 8);
    put(b, 0, 8);
    put(b, (uint64_t)5 + scores + merges, 8);
    const char *strings[][2] = {{"tokenizer.ggml.model", model}, {"tokenizer.ggml.pre", pre}};
    for (int i = 0; i < 2; i++) {
        put_text(b, strings[i][0]);
        put(b, TP_GGUF_STRING, 4);
        put_text(b, strings[i][1]);
    }
    put_array(b, "tokenizer.ggml.tokens", TP_GGUF_STRING, N_PIECES);
    for (size_t i = 0; i < N_PIECES; i++) put_text(b, pieces[i].text);
    put_array(b, "tokenizer.ggml.token_type", TP_GGUF_I32, N_PIECES);
    for (size_t i = 0; i < N_PIECES; i++) put(b, (uint64_t)pieces[i].type, 4);
    if (scores) {
        put_array(b, "tokenizer.ggml.scores", TP_GGUF_F32, N_PIECES);
        for (size_t i = 0; i < N_PIECES; i++) tp_buf_append(b, &pieces[i].score, 4);
    }
    if (merges) put_array(b, "tokenizer.ggml.merges", TP_GGUF_STRING, 0);
    put_text(b, "tokenizer.ggml.unknown_token_id");
    put(b, TP_GGUF_U32, 4);
    put(b, 0, 4);
}

static void check_ids(tp_ctx *ctx, const tp_tokenizer *t, const char *text, const int32_t *ids, size_t n)
{
    tp_tokens tokens = {0};
    assert_ok(ctx, tp_tokenizer_encode(ctx, t, tp_span_of(text), TP_ENCODE_PLAIN, &tokens));
    assert_int_equal(tokens.count, n);
    for (size_t i = 0; i < n; i++) assert_int_equal(tokens.items[i].id, ids[i]);
    tp_tokens_free(&tokens);
}

/* Merges by score, worked out by hand. */
static void test_scores_by_hand(void **state)
{
    (void)state;
    tp_ctx ctx;
    tp_buf bytes;
    tp_gguf *file;
    tp_tokenizer *t;
    tp_ctx_init(&ctx);
    write_file(&bytes, "llama", "default", true, false);
    assert_ok(&ctx, tp_gguf_parse(&ctx, "small.gguf", bytes.data, bytes.len, &file));
    assert_ok(&ctx, tp_tokenizer_from_gguf(&ctx, file, &t));
    check_ids(&ctx, t, "abc", (int32_t[]){2, 8}, 2); /* bc before ab, then a+bc; the mark in front stays */
    check_ids(&ctx, t, "ab", (int32_t[]){2, 6}, 2);
    check_ids(&ctx, t, "a", (int32_t[]){10}, 1);
    check_ids(&ctx, t, "bax", (int32_t[]){2, 4, 9}, 3); /* x alone is no token */
    check_ids(&ctx, t, "x", (int32_t[]){2, 0}, 2);      /* and its byte is none either */
    check_ids(&ctx, t, "\u00e9\u00e8", (int32_t[]){2, 11, 12, 0}, 4);
    check_ids(&ctx, t, "a[user]<s>b", (int32_t[]){10, 13, 1, 2, 4}, 5);
    assert_true(tp_tokenizer_is_special(t, 1) && !tp_tokenizer_is_special(t, 13));
    tp_tokenizer_free(t);
    tp_gguf_close(file);
    tp_buf_free(&bytes);
}

static void test_refused_metadata(void **state)
{
    (void)state;
    static const struct {
        const char *model, *pre;
        bool scores, merges;
        tp_status status;
    } rows[] = {
        {"bert", "default", true, false, TP_UNSUPPORTED}, /* another model */
        {"gpt2", "default", true, false, TP_FORMAT},      /* no merges */
        {"llama", "default", false, false, TP_FORMAT},    /* no scores */
        {"gpt2", "nonsense", false, true, TP_UNSUPPORTED}, {"gpt2", "", false, true, TP_UNSUPPORTED},
        {"gpt2", "llama", false, true, TP_UNSUPPORTED}, /* part of a name */
    };
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        tp_buf bytes;
        tp_gguf *file;
        tp_tokenizer *t;
        write_file(&bytes, rows[i].model, rows[i].pre, rows[i].scores, rows[i].merges);
        assert_ok(&ctx, tp_gguf_parse(&ctx, "small.gguf", bytes.data, bytes.len, &file));
        assert_status(&ctx, rows[i].status, tp_tokenizer_from_gguf(&ctx, file, &t));
        assert_null(t);
        tp_gguf_close(file);
        tp_buf_free(&bytes);
    }
}

/* All names of the table: their patterns compile and are not refused. */
static void test_pre_tokenizer_names(void **state)
{
    (void)state;
    static const char *const names[] = {"default", "llama-bpe", "llama3",         "gpt-2",      "smollm", "qwen2",
                                        "dbrx",    "falcon",    "tekken",         "gpt-4o",     "bloom",  "olmo",
                                        "glm4",    "refact",    "deepseek-coder", "deepseek-v3"};
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        tp_buf bytes;
        tp_gguf *file;
        tp_tokenizer *t;
        write_file(&bytes, "gpt2", names[i], false, true);
        assert_ok(&ctx, tp_gguf_parse(&ctx, "small.gguf", bytes.data, bytes.len, &file));
        assert_ok(&ctx, tp_tokenizer_from_gguf(&ctx, file, &t));
        check_ids(&ctx, t, "a1b2 .c", (int32_t[]){3, 4, 5}, 3); /* the other bytes are no tokens */
        tp_tokenizer_free(t);
        tp_gguf_close(file);
        tp_buf_free(&bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_files),
        cmocka_unit_test(test_scores_by_hand),
        cmocka_unit_test(test_refused_metadata),
        cmocka_unit_test(test_pre_tokenizer_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
