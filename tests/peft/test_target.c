/* Which modules an adapter applies to: PEFT's verdicts, path by path. */
#include "tests/support.h"

#include <math.h>

#include "peft/target.h"
#include "tests/peers.h"

#define MOST 8

/* The strings of a span have no NUL behind them. */
struct strings {
    char text[MOST][128];
    const char *list[MOST];
    size_t n;
};

static void add_string(struct strings *s, tp_span text)
{
    assert_true(s->n < MOST && text.len < sizeof s->text[0]);
    memcpy(s->text[s->n], text.data, text.len);
    s->text[s->n][text.len] = '\0';
    s->list[s->n] = s->text[s->n];
    s->n++;
}

static tp_names names_of(const tp_json *value, struct strings *s)
{
    bool is_text = tp_json_type_of(value) == TP_JSON_STRING;
    s->n = 0;
    if (is_text) add_string(s, tp_json_string(value));
    for (size_t i = 0; tp_json_type_of(value) == TP_JSON_ARRAY && i < tp_json_count(value); i++)
        add_string(s, tp_json_string(tp_json_at(value, i)));
    return (tp_names){is_text, s->list, s->n};
}

struct targets {
    tp_targets spec;
    struct strings include, exclude, pattern;
    int64_t layers[MOST];
};

static void read_targets(const tp_json *options, struct targets *t)
{
    const tp_json *layers = tp_json_get(options, "layers_to_transform");
    t->spec = (tp_targets){.include = names_of(tp_json_get(options, "target_modules"), &t->include),
                           .exclude = names_of(tp_json_get(options, "exclude_modules"), &t->exclude)};
    (void)names_of(tp_json_get(options, "layers_pattern"), &t->pattern);
    t->spec.layers_pattern = t->pattern.list;
    t->spec.n_layers_pattern = t->pattern.n;
    t->spec.layers = t->layers;
    if (tp_json_i64(layers, &t->layers[0])) t->spec.n_layers = 1;
    for (size_t i = 0; tp_json_type_of(layers) == TP_JSON_ARRAY && i < tp_json_count(layers); i++) {
        assert_true(i < MOST && tp_json_i64(tp_json_at(layers, i), &t->layers[i]));
        t->spec.n_layers++;
    }
}

static const char *path_at(const tp_json *paths, size_t i, struct strings *s)
{
    s->n = 0;
    add_string(s, tp_json_string(tp_json_at(paths, i)));
    return s->list[0];
}

static void test_list_and_regex(void **state)
{
    tp_ctx ctx;
    size_t n = 0, positive = 0;
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "targets");
    const tp_json *paths = tp_json_get(tp_json_root(doc), "paths"), *cases = tp_json_get(tp_json_root(doc), "cases");
    for (size_t c = 0; c < tp_json_count(cases); c++) {
        static struct targets t;
        read_targets(tp_json_get(tp_json_at(cases, c), "options"), &t);
        const tp_json *expected = tp_json_get(tp_json_at(cases, c), "matches");
        for (size_t i = 0; i < tp_json_count(paths); i++, n++) {
            static struct strings s;
            bool matches, wanted = tp_json_bool(tp_json_at(expected, i), false);
            assert_ok(&ctx, tp_target_match(&ctx, &t.spec, path_at(paths, i, &s), false, &matches, NULL));
            if (matches != wanted)
                fail_msg("case %zu (%s, ...): \"%s\": %s, PEFT says %s", c, t.include.list[0], s.list[0],
                         matches ? "matches" : "does not", wanted ? "yes" : "no");
            positive += wanted;
        }
    }
    tp_json_free(doc);
    print_message("%zu verdicts, %zu of them yes\n", n, positive);
    assert_true(n > 500 && positive > 100);
}

/* The first key that matches wins, in the order of the file. */
static void test_patterns(void **state)
{
    tp_ctx ctx;
    size_t found = 0;
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "targets");
    const tp_json *paths = tp_json_get(tp_json_root(doc), "paths"), *cases = tp_json_get(tp_json_root(doc), "patterns");
    for (size_t c = 0; c < tp_json_count(cases); c++) {
        static struct strings keys, s;
        const tp_json *list = tp_json_get(tp_json_at(cases, c), "patterns"),
                      *expected = tp_json_get(tp_json_at(cases, c), "values");
        tp_pattern patterns[MOST];
        keys.n = 0;
        for (size_t i = 0; i < tp_json_count(list); i++) {
            const tp_json *pair = tp_json_at(list, i);
            add_string(&keys, tp_json_string(tp_json_at(pair, 0)));
            patterns[i] = (tp_pattern){keys.list[i], peer_item(pair, 1)};
        }
        for (size_t i = 0; i < tp_json_count(paths); i++) {
            double value, wanted = NAN;
            int index;
            bool any = tp_json_f64(tp_json_at(expected, i), &wanted);
            assert_ok(&ctx, tp_pattern_value(&ctx, patterns, keys.n, path_at(paths, i, &s), -1, &value, &index));
            if (value != (any ? wanted : -1))
                fail_msg("pattern case %zu: \"%s\": %g, PEFT has %g", c, s.list[0], value, wanted);
            assert_int_equal(index >= 0, any);
            found += any;
        }
    }
    tp_json_free(doc);
    assert_true(found > 20);
}

static void test_all_linear(void **state)
{
    tp_ctx ctx;
    (void)state;
    tp_ctx_init(&ctx);
    tp_json_doc *doc = peer_table(&ctx, "targets");
    const tp_json *models = tp_json_get(tp_json_root(doc), "all_linear");
    assert_true(tp_json_count(models) > 0);
    for (size_t m = 0; m < tp_json_count(models); m++) {
        const tp_json *paths = tp_json_get(tp_json_at(models, m), "paths"),
                      *expected = tp_json_get(tp_json_at(models, m), "matches");
        for (size_t i = 0; i < tp_json_count(paths); i++) {
            static struct strings s;
            tp_targets all = {.all_linear = true};
            bool matches;
            const char *path = path_at(paths, i, &s);
            assert_ok(&ctx, tp_target_match(&ctx, &all, path, strcmp(path, "lm_head") == 0, &matches, NULL));
            assert_int_equal(matches, tp_json_bool(tp_json_at(expected, i), false));
        }
    }
    tp_json_free(doc);
}

static void test_which_entry(void **state)
{
    static const char *const list[] = {"up_proj", "q_proj", "model.layers.1.mlp.up_proj"};
    tp_targets t = {.include = {false, list, 3}};
    tp_ctx ctx;
    bool matches;
    int entry;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_target_match(&ctx, &t, "model.layers.0.self_attn.q_proj", false, &matches, &entry));
    assert_true(matches && entry == 1);
    assert_ok(&ctx, tp_target_match(&ctx, &t, "model.layers.0.self_attn.k_proj", false, &matches, &entry));
    assert_true(!matches && entry == -1);
    assert_ok(&ctx, tp_target_match(&ctx, &t, "model.layers.1.mlp.up_proj", false, &matches, &entry));
    assert_true(matches && entry == 2); /* the whole path, though an ending stands before it */
}

/* A regular expression from an adapter file may be wrong, or made to take for ever. */
static void test_bad_regex(void **state)
{
    static const char *const broken[] = {"(q_proj"}, *const costly[] = {"(a+)+(a+)+(a+)+(a+)+b"};
    tp_targets t = {.include = {true, broken, 1}};
    tp_ctx ctx;
    bool matches;
    (void)state;
    tp_ctx_init(&ctx);
    assert_status(&ctx, TP_INVALID, tp_target_match(&ctx, &t, "model.q_proj", false, &matches, NULL));
    t.include.list = costly;
    assert_status(
        &ctx, TP_INVALID,
        tp_target_match(&ctx, &t, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaacb", false, &matches, NULL));
    t.include.list = broken;
    t.include.is_regex = false; /* a list entry is a name, not an expression */
    assert_ok(&ctx, tp_target_match(&ctx, &t, "model.(q_proj", false, &matches, NULL));
    assert_true(matches);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_list_and_regex), cmocka_unit_test(test_patterns),  cmocka_unit_test(test_all_linear),
        cmocka_unit_test(test_which_entry),    cmocka_unit_test(test_bad_regex),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
