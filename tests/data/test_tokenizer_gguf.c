/* The tokenizers stored in GGUF files against the libraries that made them: ids of golden/gguf/tokenizer_cases.json. */
#include "tests/support.h"

#include "base/gguf.h"
#include "base/json.h"
#include "data/tokenizer.h"

struct opened {
    tp_ctx ctx;
    tp_gguf *file;
    tp_tokenizer *tokenizer;
    tp_json_doc *cases;
};

static void open_golden(struct opened *o, const char *name)
{
    char path[512], relative[256];
    tp_ctx_init(&o->ctx);
    snprintf(relative, sizeof relative, "gguf/%s", name);
    assert_ok(&o->ctx, tp_gguf_open(&o->ctx, golden_path(path, sizeof path, relative), &o->file));
    assert_ok(&o->ctx, tp_tokenizer_from_gguf(&o->ctx, o->file, &o->tokenizer));
    assert_ok(&o->ctx, tp_json_read(&o->ctx, golden_path(path, sizeof path, "gguf/tokenizer_cases.json"), 1 << 26, &o->cases));
}

static void close_golden(struct opened *o)
{
    tp_json_free(o->cases);
    tp_tokenizer_free(o->tokenizer);
    tp_gguf_close(o->file);
}

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
        if (!same || !back) print_error("%s: \"%.*s\" %s, decoded \"%s\"\n", key, (int)text.len, text.data, same ? "same ids" : "other ids", tp_buf_cstr(&decoded));
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

static void test_byte_level(void **state)
{
    (void)state;
    struct opened o;
    open_golden(&o, "tiny_bf16.gguf");
    check_rows(&o, "bpe", TP_ENCODE_PLAIN);
    assert_int_equal(tp_tokenizer_size(o.tokenizer), 384);
    assert_int_equal(tp_tokenizer_role(o.tokenizer, TP_TOKEN_BOS), 1);
    assert_int_equal(tp_tokenizer_role(o.tokenizer, TP_TOKEN_EOS), 2);
    assert_int_equal(tp_tokenizer_role(o.tokenizer, TP_TOKEN_PAD), 2);
    assert_false(tp_tokenizer_adds_bos(o.tokenizer));
    assert_true(tp_tokenizer_is_special(o.tokenizer, 1));
    assert_false(tp_tokenizer_is_special(o.tokenizer, 3));
    tp_span template_ = tp_tokenizer_chat_template(o.tokenizer, NULL);
    assert_non_null(template_.data);
    assert_memory_equal(template_.data, "{% for m in messages %}", 23);
    close_golden(&o);
}

static void test_scores(void **state)
{
    (void)state;
    struct opened o;
    open_golden(&o, "mixed.gguf");
    check_rows(&o, "spm", TP_ENCODE_SPECIAL_AS_TEXT);
    assert_true(tp_tokenizer_adds_bos(o.tokenizer));
    assert_false(tp_tokenizer_adds_eos(o.tokenizer));
    tp_tokens tokens = {0};
    assert_ok(&o.ctx, tp_tokenizer_encode(&o.ctx, o.tokenizer, tp_span_of("hello</s>"), TP_ENCODE_ADD_SPECIAL, &tokens));
    assert_int_equal(tokens.items[0].id, 1);
    assert_int_equal(tokens.items[tokens.count - 1].id, 2);
    tp_tokens_free(&tokens);
    close_golden(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_byte_level),
        cmocka_unit_test(test_scores),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
