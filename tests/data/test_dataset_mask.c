/* Which tokens are learned: against the masks that transformers gives for templates with {% generation %} (golden/chat), and,
 * for templates without, against masks made by hand. */
#include "tests/support.h"

#include "base/file.h"
#include "base/json.h"
#include "data/mask.h"

typedef struct suite {
    tp_ctx ctx;
    tp_tokenizer *tokenizer;
    tp_json_doc *conversations;
    size_t cases, recut; /* recut: cutting gives other tokens than encoding in one piece */
} suite;

static void suite_begin(suite *s)
{
    char path[4096];
    *s = (suite){.cases = 0};
    tp_ctx_init(&s->ctx);
    assert_ok(&s->ctx, tp_tokenizer_open(&s->ctx, golden_path(path, sizeof path, "chat/tokenizer.json"), &s->tokenizer));
    assert_ok(&s->ctx,
              tp_json_read(&s->ctx, golden_path(path, sizeof path, "chat/conversations.json"), 1 << 24, &s->conversations));
}

static void suite_end(suite *s)
{
    tp_json_free(s->conversations);
    tp_tokenizer_free(s->tokenizer);
}

/* ---- against recorded masks ---- */

static const tp_json *messages_of(const suite *s, tp_span name)
{
    const tp_json *all = tp_json_get(tp_json_root(s->conversations), "conversations");
    for (size_t i = 0; i < tp_json_count(all); i++)
        if (tp_span_equal(tp_json_string(tp_json_get(tp_json_at(all, i), "name")), name))
            return tp_json_get(tp_json_at(all, i), "messages");
    fail_msg("%.*s: no such conversation", (int)name.len, name.data);
    return NULL;
}

static bool in_ranges(const tp_json *ranges, size_t i)
{
    int64_t begin, end;
    for (size_t k = 0; k < tp_json_count(ranges); k++) {
        const tp_json *range = tp_json_at(ranges, k);
        assert_true(tp_json_i64(tp_json_at(range, 0), &begin) && tp_json_i64(tp_json_at(range, 1), &end));
        if ((int64_t)i >= begin && (int64_t)i < end) return true;
    }
    return false;
}

static bool same_ids(const tp_json *ids, const tp_encoded *e)
{
    int64_t id;
    if (tp_json_count(ids) != e->tokens.count) return false;
    for (size_t i = 0; i < e->tokens.count; i++)
        if (!tp_json_i64(tp_json_at(ids, i), &id) || id != e->ids[i]) return false;
    return true;
}

/* The first token is never a label, whatever the reference says. */
static void check_labels(const tp_json *row, const tp_encoded *e)
{
    int64_t n = 0;
    for (size_t i = 0; i < e->tokens.count; i++) {
        bool expected = i > 0 && in_ranges(tp_json_get(row, "mask"), i);
        if (e->labels[i] != (expected ? e->ids[i] : TP_NO_LABEL))
            fail_msg("%.*s: label of token %zu", (int)tp_json_string(tp_json_get(row, "conversation")).len,
                     tp_json_string(tp_json_get(row, "conversation")).data, i);
        n += expected;
    }
    assert_int_equal(e->n_labels, n);
}

/* Where cutting changed tokens, every byte is still learned or not as the spans say, and nothing was lost. */
static void check_bytes(suite *s, const tp_json *row, const tp_sample *sample, const tp_encoded *e)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    assert_ok(&s->ctx, tp_tokenizer_decode(&s->ctx, s->tokenizer, e->ids, e->tokens.count, false, &text));
    assert_int_equal(text.len, sample->text.len);
    assert_memory_equal(text.data, sample->text.data, text.len);
    tp_buf_free(&text);
    for (size_t i = 1; i < e->tokens.count; i++) {
        bool learned = false;
        for (size_t b = e->tokens.items[i].begin; b < e->tokens.items[i].end; b++)
            learned = learned || in_ranges(tp_json_get(row, "spans"), b);
        assert_int_equal(e->labels[i] != TP_NO_LABEL, learned);
    }
}

static void check_case(suite *s, const tp_template *tmpl, const tp_chat_variable *tokens, size_t n_tokens, const tp_json *row)
{
    uint8_t flags[64];
    tp_chat_text text;
    tp_sample sample = {0};
    tp_encoded e = {0};
    const tp_json *messages = messages_of(s, tp_json_string(tp_json_get(row, "conversation")));
    const tp_template_time now = {2025, 3, 9, 7, 5, 2};
    tp_chat_input input = {.messages = messages,
                           .kwargs = tp_json_get(row, "kwargs"),
                           .tokens = tokens,
                           .n_tokens = n_tokens,
                           .options = {.now = &now}};
    input.add_generation_prompt = tp_json_bool(tp_json_get(row, "add_generation_prompt"), false);
    assert_in_range(tp_json_count(messages), 1, sizeof flags);
    for (size_t i = 0; i < tp_json_count(messages); i++) {
        bool assistant = tp_span_is(tp_json_string(tp_json_get(tp_json_at(messages, i), "role")), "assistant");
        flags[i] = assistant ? TP_MESSAGE_ASSISTANT | TP_MESSAGE_TRAINED : 0;
    }
    assert_ok(&s->ctx, tp_chat_render(&s->ctx, tmpl, &input, &text));
    assert_true(tp_span_equal((tp_span){tp_buf_cstr(&text.text), text.text.len}, tp_json_string(tp_json_get(row, "rendered"))));
    assert_ok(&s->ctx, tp_sample_from_chat(&s->ctx, &text, flags, tp_json_count(messages), true, &sample));
    assert_ok(&s->ctx, tp_sample_encode(&s->ctx, s->tokenizer, &sample, 0, sample.text.len, false, &e));
    assert_true(same_ids(tp_json_get(row, "ids"), &e));
    check_labels(row, &e);
    assert_ok(&s->ctx, tp_sample_encode(&s->ctx, s->tokenizer, &sample, 0, sample.text.len, true, &e));
    if (same_ids(tp_json_get(row, "ids"), &e)) {
        check_labels(row, &e);
    } else {
        s->recut++;
        check_bytes(s, row, &sample, &e);
    }
    s->cases++;
    tp_template_output_free(&text);
    tp_sample_free(&sample);
    tp_encoded_free(&e);
}

static void check_template(suite *s, tp_span name)
{
    enum { MAX_TOKENS = 16 };
    char path[4096], relative[256], names[MAX_TOKENS][64], values[MAX_TOKENS][256], *source;
    tp_chat_variable tokens[MAX_TOKENS];
    tp_json_doc *meta, *cases;
    tp_template *tmpl;
    size_t n;
    snprintf(relative, sizeof relative, "chat/%.*s/cases.json", (int)name.len, name.data);
    assert_ok(&s->ctx, tp_json_read(&s->ctx, golden_path(path, sizeof path, relative), 1 << 24, &cases));
    snprintf(relative, sizeof relative, "chat/%.*s/meta.json", (int)name.len, name.data);
    assert_ok(&s->ctx, tp_json_read(&s->ctx, golden_path(path, sizeof path, relative), 1 << 20, &meta));
    snprintf(relative, sizeof relative, "chat/%.*s/template.jinja", (int)name.len, name.data);
    assert_ok(&s->ctx, tp_file_read(&s->ctx, golden_path(path, sizeof path, relative), 1 << 20, &source, &n));
    assert_ok(&s->ctx, tp_template_compile(&s->ctx, relative, source, n, &tmpl));
    const tp_json *special = tp_json_get(tp_json_root(meta), "special_tokens"),
                  *rows = tp_json_get(tp_json_root(cases), "cases");
    assert_in_range(tp_json_count(special), 0, MAX_TOKENS);
    for (size_t i = 0; i < tp_json_count(special); i++) {
        tp_span key = tp_json_key_at(special, i), value = tp_json_string(tp_json_at(special, i));
        snprintf(names[i], sizeof names[i], "%.*s", (int)key.len, key.data);
        snprintf(values[i], sizeof values[i], "%.*s", (int)value.len, value.data);
        tokens[i] = (tp_chat_variable){names[i], values[i]};
    }
    for (size_t i = 0; i < tp_json_count(rows); i++)
        if (tp_json_get(tp_json_at(rows, i), "ids") != NULL &&
            tp_json_get(tp_json_at(rows, i), "continue_final_message") == NULL)
            check_case(s, tmpl, tokens, tp_json_count(special), tp_json_at(rows, i));
    tp_template_free(tmpl);
    free(source);
    tp_json_free(meta);
    tp_json_free(cases);
}

static void test_recorded_masks(void **state)
{
    char path[4096];
    suite s;
    tp_json_doc *index;
    (void)state;
    suite_begin(&s);
    assert_ok(&s.ctx, tp_json_read(&s.ctx, golden_path(path, sizeof path, "chat/index.json"), 1 << 20, &index));
    const tp_json *templates = tp_json_get(tp_json_root(index), "templates");
    for (size_t i = 0; i < tp_json_count(templates); i++) {
        int64_t masks;
        assert_true(tp_json_i64(tp_json_get(tp_json_at(templates, i), "masks"), &masks));
        if (masks > 0) check_template(&s, tp_json_key_at(templates, i));
    }
    print_message("%zu recorded masks; cut at replies, %zu of the texts give other tokens\n", s.cases, s.recut);
    assert_true(s.cases > 50);
    assert_true(s.recut * 4 < s.cases);
    tp_json_free(index);
    suite_end(&s);
}

/* ---- templates without marks ---- */

static const char plain[] =
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}";

/* Renders rows, encodes with cuts, and returns the text with every learned stretch of tokens in brackets. */
static void brackets(suite *s, const char *source, const tp_chat_message *rows, const uint8_t *flags, size_t n, tp_buf *out)
{
    tp_template *tmpl;
    tp_chat_text text;
    tp_sample sample = {0};
    tp_encoded e = {0};
    const tp_chat_input input = {.rows = rows, .n_rows = n};
    assert_ok(&s->ctx, tp_template_compile(&s->ctx, "test", source, strlen(source), &tmpl));
    assert_ok(&s->ctx, tp_chat_render(&s->ctx, tmpl, &input, &text));
    assert_ok(&s->ctx, tp_sample_from_chat(&s->ctx, &text, flags, n, tp_template_has_generation(tmpl), &sample));
    assert_ok(&s->ctx, tp_sample_encode(&s->ctx, s->tokenizer, &sample, 0, sample.text.len, true, &e));
    tp_buf_clear(out);
    for (size_t i = 0; i < e.tokens.count; i++) {
        bool learned = e.labels[i] >= 0, before = i > 0 && e.labels[i - 1] >= 0;
        if (learned && !before) tp_buf_char(out, '[');
        if (!learned && before) tp_buf_char(out, ']');
        tp_buf_append(out, sample.text.data + e.tokens.items[i].begin, e.tokens.items[i].end - e.tokens.items[i].begin);
    }
    if (e.tokens.count > 0 && e.labels[e.tokens.count - 1] >= 0) tp_buf_char(out, ']');
    tp_template_free(tmpl);
    tp_template_output_free(&text);
    tp_sample_free(&sample);
    tp_encoded_free(&e);
}

#define TEXT(literal)                                                                                                          \
    {                                                                                                                          \
        literal, sizeof literal - 1                                                                                            \
    }
#define MESSAGE(name, text)                                                                                                    \
    {                                                                                                                          \
        .role = name, .content = TEXT(text)                                                                                    \
    }

static void test_turns(void **state)
{
    static const tp_chat_message rows[] = {MESSAGE("system", "S"), MESSAGE("user", "Hi A"), MESSAGE("assistant", "A"),
                                           MESSAGE("user", "A"), MESSAGE("assistant", " B\n")};
    enum { A = TP_MESSAGE_ASSISTANT, T = TP_MESSAGE_TRAINED };
    suite s;
    tp_buf out;
    (void)state;
    suite_begin(&s);
    tp_buf_init(&out, 0);
    brackets(&s, plain, rows, (const uint8_t[]){0, 0, A | T, 0, A | T}, 5, &out);
    assert_string_equal(
        out.data, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi A<|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n"
                  "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n[ B\n<|im_end|>]\n");
    brackets(&s, plain, rows, (const uint8_t[]){0, 0, A, 0, A | T}, 5, &out);
    assert_string_equal(
        out.data, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi A<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                  "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n[ B\n<|im_end|>]\n");
    brackets(&s, plain, rows, (const uint8_t[]){T, T, A, T, A}, 5, &out);
    assert_string_equal(
        out.data, "<|im_start|>system\n[S<|im_end|>]\n<|im_start|>user\n[Hi A<|im_end|>]\n<|im_start|>assistant\nA<|im_end|>\n"
                  "<|im_start|>user\n[A<|im_end|>]\n<|im_start|>assistant\n B\n<|im_end|>\n");
    tp_buf_free(&out);
    suite_end(&s);
}

/* The end-of-turn token need not follow at once; where none comes before the next message, the turn ends with its content. */
static void test_ends_of_turns(void **state)
{
    static const tp_chat_message rows[] = {MESSAGE("user", "u"), MESSAGE("assistant", "one"), MESSAGE("user", "v"),
                                           MESSAGE("assistant", "two")};
    static const uint8_t flags[] = {0, TP_MESSAGE_ASSISTANT | TP_MESSAGE_TRAINED, 0, TP_MESSAGE_ASSISTANT | TP_MESSAGE_TRAINED};
    suite s;
    tp_buf out;
    (void)state;
    suite_begin(&s);
    tp_buf_init(&out, 0);
    brackets(&s, "{% for m in messages %}{{ m.content }} . </s><s>{% endfor %}", rows, flags, 4, &out);
    assert_string_equal(out.data, "u . </s><s>[one . </s>]<s>v . </s><s>[two . </s>]<s>");
    brackets(&s, "{% for m in messages %}({{ m.content }}){% endfor %}", rows, flags, 4, &out);
    assert_string_equal(out.data, "(u)([one])(v)([two])");
    tp_buf_free(&out);
    suite_end(&s);
}

/* {% generation %} wins over turns; a trained message of the user has its turn beside it. */
static void test_marks_win(void **state)
{
    static const char marked[] =
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}>{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}";
    static const tp_chat_message rows[] = {MESSAGE("user", "u"), MESSAGE("assistant", ""), MESSAGE("user", "v"),
                                           MESSAGE("assistant", "two")};
    enum { A = TP_MESSAGE_ASSISTANT, T = TP_MESSAGE_TRAINED };
    suite s;
    tp_buf out;
    (void)state;
    suite_begin(&s);
    tp_buf_init(&out, 0);
    brackets(&s, marked, rows, (const uint8_t[]){0, A | T, 0, A | T}, 4, &out);
    assert_string_equal(out.data, "u</s>[></s>]v</s>[>two</s>]");
    brackets(&s, marked, rows, (const uint8_t[]){0, A | T, T, A}, 4, &out);
    assert_string_equal(out.data, "u</s>[></s>v</s>]>two</s>");
    brackets(&s, marked, rows, (const uint8_t[]){0, A, 0, A | T}, 4, &out);
    assert_string_equal(out.data, "u</s>></s>v</s>[>two</s>]");
    tp_buf_free(&out);
    suite_end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recorded_masks),
        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_ends_of_turns),
        cmocka_unit_test(test_marks_win),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
