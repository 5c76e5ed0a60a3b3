/* The template interpreter against recorded renders of Jinja2 (golden/chat/snippets.json) and against its own limits. */
#include "tests/support.h"

#include "base/json.h"
#include "base/mem.h"
#include "data/template.h"
#include "tests/failing_memory.h"

/* ---- tools ---- */

static tp_status render_text(tp_ctx *ctx, const char *text, const tp_template_options *options,
                             const tp_template_variable *variables, size_t n, tp_template_output *out)
{
    tp_template *tmpl;
    *out = (tp_template_output){0};
    TP_TRY(tp_template_compile(ctx, "t.jinja", text, strlen(text), &tmpl));
    tp_status st = tp_template_render(ctx, tmpl, options, variables, n, out);
    tp_template_free(tmpl);
    return st;
}

static void assert_renders(const char *text, const char *expected)
{
    tp_ctx ctx;
    tp_template_output out;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, render_text(&ctx, text, NULL, NULL, 0, &out));
    assert_string_equal(tp_buf_cstr(&out.text), expected);
    tp_template_output_free(&out);
}

static void assert_fails_with(const char *text, tp_template_error error)
{
    tp_ctx ctx;
    tp_template_output out;
    tp_ctx_init(&ctx);
    assert_status(&ctx, TP_INVALID, render_text(&ctx, text, NULL, NULL, 0, &out));
    assert_string_equal(tp_template_error_name(out.error), tp_template_error_name(error));
    assert_int_equal(out.text.len, 0);
    tp_template_output_free(&out);
}

static void assert_does_not_parse(const char *text, const char *message)
{
    tp_ctx ctx;
    tp_template *tmpl;
    tp_ctx_init(&ctx);
    assert_int_equal(tp_template_compile(&ctx, "t.jinja", text, strlen(text), &tmpl), TP_FORMAT);
    assert_null(tmpl);
    if (strstr(ctx.message, message) == NULL) fail_msg("\"%s\" does not contain \"%s\"", ctx.message, message);
}

static char *repeated(const char *before, const char *unit, size_t times, const char *after)
{
    tp_buf buf;
    tp_buf_init(&buf, 0);
    tp_buf_text(&buf, before);
    for (size_t i = 0; i < times; i++) tp_buf_text(&buf, unit);
    tp_buf_text(&buf, after);
    return buf.data;
}

/* ---- recorded snippets ---- */

static bool is_syntax_error(tp_span name)
{
    return tp_span_is(name, "TemplateSyntaxError") || tp_span_is(name, "TemplateAssertionError") ||
           tp_span_is(name, "SyntaxError");
}

/* Returns true if the snippet behaves as recorded; prints what differs. */
static bool check_snippet(const tp_json *row, const tp_template_variable *scope, size_t n_scope,
                          const tp_template_options *options)
{
    tp_ctx ctx;
    tp_template *tmpl = NULL;
    tp_template_output out = {0};
    tp_span text = tp_json_string(tp_json_get(row, "template")), error = tp_json_string(tp_json_get(row, "error"));
    const tp_json *rendered = tp_json_get(row, "rendered"), *message = tp_json_get(row, "message");
    tp_ctx_init(&ctx);
    tp_status st = tp_template_compile(&ctx, "snippet", text.data, text.len, &tmpl);
    bool compiled = st == TP_OK, same;
    if (compiled) st = tp_template_render(&ctx, tmpl, options, scope, n_scope, &out);
    tp_span got = {tp_buf_cstr(&out.text), out.text.len};
    if (rendered != NULL)
        same = st == TP_OK && tp_span_equal(got, tp_json_string(rendered));
    else if (!compiled)
        same = st == TP_FORMAT && is_syntax_error(error);
    else
        same = st == TP_INVALID && tp_span_is(error, tp_template_error_name(out.error));
    if (same && message != NULL)
        same = out.raised != NULL && tp_span_equal((tp_span){out.raised, out.raised_len}, tp_json_string(message));
    if (!same)
        print_message("template: %.*s\n  expected: %.*s\n  got:      %.*s %s\n", (int)text.len, text.data,
                      (int)(rendered != NULL ? tp_json_string(rendered).len : error.len),
                      rendered != NULL ? tp_json_string(rendered).data : error.data, (int)got.len, got.data, ctx.message);
    tp_template_output_free(&out);
    tp_template_free(tmpl);
    return same;
}

static void test_snippets(void **state)
{
    enum { MAX_SCOPE = 64 };
    tp_ctx ctx;
    tp_json_doc *index, *doc;
    char path[4096], now[32];
    tp_template_time time;
    tp_template_variable scope[MAX_SCOPE];
    char names[MAX_SCOPE][32];
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "chat/index.json"), 1 << 20, &index));
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "chat/snippets.json"), 1 << 24, &doc));
    tp_span text = tp_json_string(tp_json_get(tp_json_root(index), "now"));
    snprintf(now, sizeof now, "%.*s", (int)text.len, text.data);
    assert_true(tp_template_time_parse(now, &time));
    const tp_json *values = tp_json_get(tp_json_root(doc), "scope"), *rows = tp_json_get(tp_json_root(doc), "snippets");
    size_t n_scope = tp_json_count(values), failed = 0;
    assert_in_range(n_scope, 1, MAX_SCOPE);
    for (size_t i = 0; i < n_scope; i++) {
        snprintf(names[i], sizeof names[i], "%.*s", (int)tp_json_key_at(values, i).len, tp_json_key_at(values, i).data);
        scope[i] = (tp_template_variable){.name = names[i], .json = tp_json_at(values, i)};
    }
    const tp_template_options options = {.now = &time};
    assert_true(tp_json_count(rows) > 0);
    for (size_t i = 0; i < tp_json_count(rows); i++) failed += !check_snippet(tp_json_at(rows, i), scope, n_scope, &options);
    print_message("%zu of %zu snippets behave as recorded\n", tp_json_count(rows) - failed, tp_json_count(rows));
    assert_int_equal(failed, 0);
    tp_json_free(doc);
    tp_json_free(index);
}

/* ---- what the records do not cover ---- */

static void test_provenance(void **state)
{
    static const char messages[] = "[{\"role\":\"user\",\"content\":\"  Hello, W\xC3\xB6rld!  \"},"
                                   "{\"role\":\"assistant\",\"content\":\"a|b|c\",\"reasoning_content\":\"why\","
                                   "\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{\"x\":1,\"y\":\"two\"}}}]}]";
    static const struct {
        const char *text;
        const char *expected;
        const char *spans; /* message.field:begin-end */
    } cases[] = {
        {"<{{ messages[0].content }}>", "<  Hello, W\xC3\xB6rld!  >", "0.1:1-19 "},
        {"<{{ messages[0].content | trim }}>", "<Hello, W\xC3\xB6rld!>", "0.1:1-15 "},
        {"{% set m = messages[0] %}{{ 'Q: ' + m['content'].strip() + '\n' }}", "Q: Hello, W\xC3\xB6rld!\n", "0.1:3-17 "},
        {"{{ messages[0].content.strip()[7:] }}", "W\xC3\xB6rld!", "0.1:0-7 "},
        {"{{ messages[0].content.strip()[::-1] }}", "!dlr\xC3\xB6W ,olleH", "0.1:0-14 "},
        {"{{ messages[0].content | replace('Hello', 'Bye') | trim }}", "Bye, W\xC3\xB6rld!", "0.1:3-12 "},
        {"{{ messages[0].content | upper | trim }}", "HELLO, W\xC3\x96RLD!", "0.1:0-14 "},
        {"{{ messages[1].content.split('|') | join(' + ') }}", "a + b + c", "1.1:0-1 1.1:4-5 1.1:8-9 "},
        {"{% for c in messages[1].content %}{{ c }}{% endfor %}", "a|b|c", "1.1:0-5 "},
        {"{% set x %}[{{ messages[1].content }}]{% endset %}{{ x }}{{ x[1:3] }}", "[a|b|c]a|", "1.1:1-6 1.1:7-9 "},
        {"{% macro f(c) %}({{ c }}){% endmacro %}{{ f(messages[1].content) }}", "(a|b|c)", "1.1:1-6 "},
        {"{% filter upper %}x{{ messages[1].content }}{% endfilter %}", "XA|B|C", "1.1:1-6 "},
        {"{{ messages[1].reasoning_content ~ '/' ~ messages[1].content }}", "why/a|b|c", "1.2:0-3 1.1:4-9 "},
        {"{% for t in messages[1].tool_calls %}{{ t.function.name }} {{ t.function.arguments | tojson }}{% endfor %}",
         "f {\"x\": 1, \"y\": \"two\"}", "1.3:0-1 1.3:2-22 "},
        {"{{ messages[1].content | tojson }}", "\"a|b|c\"", "1.1:1-6 "},
        {"{{ '%s!' | format(messages[1].content) }}", "a|b|c!", "1.1:0-5 "},
        {"{{ messages[1].content | indent(2, true) }}", "  a|b|c", "1.1:2-7 "},
        {"{{ messages[0].role }}{{ messages | length }}", "user2", ""},
        {"{{ messages[1].content }}{{ messages[1].content }}", "a|b|ca|b|c", "1.1:0-10 "},
        {"{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}",
         "  Hello, W\xC3\xB6rld!  a|b|c", "0.1:0-18 1.1:18-23 "},
    };
    tp_ctx ctx;
    tp_json_doc *doc;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_json_parse(&ctx, messages, strlen(messages), &(tp_json_options){.name = "messages"}, &doc));
    const tp_template_variable variable = {.name = "messages", .json = tp_json_root(doc)};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tp_template_output out;
        tp_buf spans;
        tp_buf_init(&spans, 0);
        assert_ok(&ctx, render_text(&ctx, cases[i].text, NULL, &variable, 1, &out));
        assert_string_equal(tp_buf_cstr(&out.text), cases[i].expected);
        for (size_t k = 0; k < out.n_spans; k++)
            tp_buf_printf(&spans, "%zu.%d:%zu-%zu ", out.spans[k].message, (int)out.spans[k].field, out.spans[k].begin,
                          out.spans[k].end);
        if (strcmp(tp_buf_cstr(&spans), cases[i].spans) != 0)
            fail_msg("%s: spans %s, expected %s", cases[i].text, tp_buf_cstr(&spans), cases[i].spans);
        tp_buf_free(&spans);
        tp_template_output_free(&out);
    }
    tp_json_free(doc);
}

static void test_generation_moves_with_its_text(void **state)
{
    tp_ctx ctx;
    tp_template_output out;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, render_text(&ctx,
                                "{% macro f() %}ab{% generation %}cd{% endgeneration %}{% endmacro %}xy{{ f() }}{% generation "
                                "%}{% endgeneration %}",
                                NULL, NULL, 0, &out));
    assert_string_equal(tp_buf_cstr(&out.text), "xyabcd");
    assert_int_equal(out.n_generation, 2);
    assert_int_equal(out.generation[0].begin, 4);
    assert_int_equal(out.generation[0].end, 6);
    assert_int_equal(out.generation[1].begin, 6);
    assert_int_equal(out.generation[1].end, 6);
    tp_template_output_free(&out);
}

static void test_raised_text_is_exact(void **state)
{
    tp_ctx ctx;
    tp_template_output out;
    (void)state;
    tp_ctx_init(&ctx);
    assert_status(&ctx, TP_INVALID, render_text(&ctx, "x{{ raise_exception('a\\n\\x00\\u00e9' * 800) }}", NULL, NULL, 0, &out));
    assert_int_equal(out.error, TP_TEMPLATE_RAISED);
    assert_int_equal(out.raised_len, 5 * 800);
    assert_memory_equal(out.raised,
                        "a\n\0\xC3\xA9"
                        "a",
                        6);
    tp_template_output_free(&out);
}

/* Facts of Jinja2 and Python that templates lean on and no record shows. */
static void test_semantics(void **state)
{
    (void)state;
    assert_renders("{% for i in [1, 2] %}{% continue %}{% else %}none{% endfor %}", "none");
    assert_renders("{% for i in range(3) if i != 1 %}{{ loop.last }}{{ loop.length }}{{ loop.nextitem }} {% endfor %}",
                   "False22 True2 ");
    assert_renders(
        "{% set ns = namespace(go=true) %}{% for i in range(4) if ns.go %}{{ i }}{% set ns.go = i < 1 %}{% endfor %}", "01");
    assert_renders("{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "False");
    assert_renders("{{ 'x' if false else 'y' | upper if true }}", "Y");
    assert_renders("{{ missing | nosuch if false }}{% if false %}{{ 1 is nosuch }}{% endif %}", "");
    assert_renders("{{ 7 % -3 }} {{ -7 // 2 }} {{ 7.5 // -2 }} {{ -7.5 % 2 }}", "-2 -4 -4.0 0.5");
    assert_renders("{{ 170141183460469231731687303715884105727 }} {{ -170141183460469231731687303715884105727 - 1 }}",
                   "170141183460469231731687303715884105727 -170141183460469231731687303715884105728");
    assert_renders("{{ [1, 2] | map('string') | join }}{{ ([1, 2] | map('string'))[0] is defined }}", "12False");
    assert_renders("{{ ('<' | escape) + '<' }}{{ ('<' | escape) ~ '<' }}", "&lt;&lt;&lt;<");
    assert_fails_with("{% if true %}{{ 1 is nosuch }}{% endif %}", TP_TEMPLATE_RUNTIME);
    assert_fails_with("{{ 170141183460469231731687303715884105727 + 1 }}", TP_TEMPLATE_OVERFLOW);
    assert_fails_with("{{ strftime_now('%Y') }}", TP_TEMPLATE_RUNTIME);
    assert_fails_with("{{ namespace(_x=1) }}", TP_TEMPLATE_SECURITY);
    assert_fails_with("{{ [].append }}{{ [].append(1) }}", TP_TEMPLATE_SECURITY);
}

static void test_messages_name_the_place(void **state)
{
    (void)state;
    assert_does_not_parse("a\n{% if x %}\n", "t.jinja:2: found the end of the template, expected {% elif %}");
    assert_does_not_parse("a\n\n{{ 1 + }}", "t.jinja:3: found '}}', expected an expression");
    assert_does_not_parse("{{ (1] }}", "t.jinja:1: found ']', expected ')'");
    assert_does_not_parse("{{ x | nosuch }}", "t.jinja:1: there is no filter named 'nosuch'");
    assert_does_not_parse("\n{% for x in y %}{% generation %}{% break %}{% endgeneration %}{% endfor %}", "t.jinja:2: ");
    assert_does_not_parse("\xFF", "not UTF-8 at byte 0");
}

/* ---- limits ---- */

static void test_nesting_is_limited(void **state)
{
    (void)state;
    char *parens = repeated("{{ ", "(", 256, "1");
    char *closed = repeated(parens, ")", 256, " }}");
    assert_renders(closed, "1");
    free(parens);
    free(closed);
    static const char *const units[] = {"(", "[", "{1:", "-", "x[", "f(", "1 if 1 else "};
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        char *text = repeated("{{ ", units[i], 50000, "1 }}");
        assert_does_not_parse(text, "256 nested parentheses");
        free(text);
    }
    char *sum = repeated("{{ 0", " + 1", 100000, " }}");
    assert_does_not_parse(sum, "1000 operators in a row");
    free(sum);
    char *nots = repeated("{{ ", "not ", 100000, "1 }}");
    assert_does_not_parse(nots, "1000 operators in a row");
    free(nots);
    char *ifs = repeated("", "{% if 1 %}", 100000, "");
    assert_does_not_parse(ifs, "128 nested statements");
    free(ifs);
    char *elifs = repeated("{% if 0 %}", "{% elif 0 %}", 10000, "{% else %}x{% endif %}");
    assert_renders(elifs, "x");
    free(elifs);
    tp_buf call;
    tp_buf_init(&call, 0);
    tp_buf_text(&call, "{{ f(");
    for (int i = 0; i <= 1024; i++) tp_buf_printf(&call, "a%d=1,", i);
    tp_buf_text(&call, ") }}");
    assert_does_not_parse(tp_buf_cstr(&call), "1024 keywords in a call");
    tp_buf_free(&call);
    char *large = repeated("", "0123456789abcdef", (1 << 16) + 1, "");
    assert_does_not_parse(large, "the limit is 1048576");
    free(large);
}

/* Runs in a stack of 8 MB, as everything does. */
static void test_recursion_is_limited(void **state)
{
    (void)state;
    assert_fails_with("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", TP_TEMPLATE_RECURSION);
    assert_fails_with("{% macro f(x) %}{% for i in [1] %}{% if x %}{% filter trim %}{% set y %}{{ [[f(x) ~ 'a']] | "
                      "map('first') | join }}{% endset %}{{ y }}{% endfilter %}"
                      "{% endif %}{% endfor %}{% endmacro %}{{ f(1) }}",
                      TP_TEMPLATE_RECURSION);
    assert_fails_with("{% macro f() %}{{ caller() }}{% call f() %}x{% endcall %}{% endmacro %}{% call f() %}{% endcall %}",
                      TP_TEMPLATE_RECURSION);
    assert_fails_with("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", TP_TEMPLATE_RECURSION);
    assert_fails_with("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", TP_TEMPLATE_RECURSION);
    static const char *const uses[] = {"{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x == ns.y }}", "{{ ns.x < ns.y }}"};
    for (size_t i = 0; i < sizeof uses / sizeof uses[0]; i++) {
        char text[300];
        snprintf(text, sizeof text,
                 "{%% set ns = namespace(x=[], y=[]) %%}{%% for i in range(9000) %%}{%% set ns.x = [ns.x] %%}{%% set ns.y = "
                 "[ns.y] %%}{%% endfor %%}%s",
                 uses[i]);
        assert_fails_with(text, TP_TEMPLATE_RECURSION);
    }
}

static void test_work_is_limited(void **state)
{
    static const char *const greedy[] = {
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{% set ns = namespace(s='x') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ ([0] * 1000000000) | length }}",
        "{{ 'abc' | center(999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{% set l = range(100000) | list %}{% for i in l %}{{ l | unique | list | length }}{% endfor %}",
        "{% set s = 'ab' * 4000000 %}{% for i in range(100000) %}{{ s.rfind('b' * 1000000) }}{% endfor %}",
        "{% set s = '<' * 4000000 %}{{ s | striptags }}",
        "{% for i in range(100000) %}{{ range(100000) | list | sort | first }}{% endfor %}",
        "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}{{ s.isalpha() }}{% endfor %}",
        "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}{{ s is lower }}{% endfor %}",
        "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}{{ s.isidentifier() }}{% endfor %}",
        "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}{{ s | wordcount }}{% endfor %}",
        "{% set s = 'a' * 4000000 %}{% for i in range(100000) %}{% for j in range(100) %}{{ s < s }}{% endfor %}{% endfor %}",
    };
    (void)state;
    for (size_t i = 0; i < sizeof greedy / sizeof greedy[0]; i++) assert_fails_with(greedy[i], TP_TEMPLATE_LIMIT);
}

/* Uses most of what allocates. */
static const char busy[] =
    "{% macro f(a, b=2) %}{{ a }}{{ kwargs }}{% endmacro %}{% for m in [1, 'x', {'k': [2.5]}] %}{{ f(m, z=1) | upper }}{{ "
    "loop.cycle(1, 2) }}"
    "{% set x %}{{ m }}{% endset %}{{ x | tojson | indent(2) }}{% endfor %}{{ 'a b'.split() | map('title') | join('-') }}"
    "{% for x in range(40) if x is odd %}{{ loop.length }}{% set y = x %}{% endfor %}{{ '%s{}' % 'a' }}{{ (1, [2]) | list }}";

static void test_memory_limit_at_every_size(void **state)
{
    tp_ctx ctx;
    tp_template *tmpl;
    bool worked = false;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_template_compile(&ctx, "t", busy, strlen(busy), &tmpl));
    for (size_t limit = 16; !worked && limit < 100000; limit += 16) {
        tp_template_output out;
        const tp_template_options options = {.max_memory = limit};
        tp_status st = tp_template_render(&ctx, tmpl, &options, NULL, 0, &out);
        worked = st == TP_OK;
        if (!worked) assert_int_equal(out.error, TP_TEMPLATE_LIMIT);
        tp_template_output_free(&out);
        tp_ctx_clear(&ctx);
    }
    assert_true(worked);
    tp_template_free(tmpl);
}

static tp_status compile_and_render(tp_ctx *ctx)
{
    tp_template_output out;
    tp_status st = render_text(ctx, busy, NULL, NULL, 0, &out);
    tp_template_output_free(&out);
    return st;
}

static void test_every_allocation_may_fail(void **state)
{
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    assert_survives_failing_memory(&ctx, compile_and_render(&ctx));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_snippets),
        cmocka_unit_test(test_provenance),
        cmocka_unit_test(test_generation_moves_with_its_text),
        cmocka_unit_test(test_raised_text_is_exact),
        cmocka_unit_test(test_semantics),
        cmocka_unit_test(test_messages_name_the_place),
        cmocka_unit_test(test_nesting_is_limited),
        cmocka_unit_test(test_recursion_is_limited),
        cmocka_unit_test(test_work_is_limited),
        cmocka_unit_test(test_memory_limit_at_every_size),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
