/* The YAML filter: limits at limit - 1, limit, limit + 1; places; core schema; what is refused. */
#include "tests/support.h"

#include <math.h>

#include "base/mem.h"
#include "recipes/yaml.h"

struct fixture {
    tp_ctx ctx;
    tp_yaml_tree tree;
    tp_problems problems;
    tp_yaml *root;
};

static int open_fixture(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    tp_ctx_init(&f->ctx);
    tp_yaml_tree_init(&f->tree);
    *state = f;
    return 0;
}

static int close_fixture(void **state)
{
    struct fixture *f = *state;
    tp_yaml_tree_free(&f->tree);
    tp_problems_free(&f->problems);
    free(f);
    return 0;
}

static tp_yaml *parse_bytes(struct fixture *f, const char *text, size_t n)
{
    assert_ok(&f->ctx, tp_yaml_parse(&f->ctx, &f->tree, &f->problems, "f.yaml", false, text, n, &f->root));
    return f->root;
}

static tp_yaml *parse(struct fixture *f, const char *text)
{
    return parse_bytes(f, text, strlen(text));
}

/* The text is refused, and the first problem begins and ends so. */
static void refused(const char *text, const char *begins, const char *contains)
{
    void *state;
    open_fixture(&state);
    struct fixture *f = state;
    parse(f, text);
    if (f->problems.n_errors == 0) fail_msg("accepted: %s", text);
    if (strncmp(f->problems.items[0].text, begins, strlen(begins)) != 0 || strstr(f->problems.items[0].text, contains) == NULL)
        fail_msg("%s\n  got      %s\n  expected %s ... %s", text, f->problems.items[0].text, begins, contains);
    close_fixture(&state);
}

static char *repeat(const char *piece, size_t times, size_t *n)
{
    size_t m = strlen(piece);
    char *text = malloc(m * times + 1);
    for (size_t i = 0; i < times; i++) memcpy(text + i * m, piece, m);
    text[m * times] = '\0';
    *n = m * times;
    return text;
}

static void test_tree(void **state)
{
    struct fixture *f = *state;
    char out[200];
    tp_yaml *root = parse(f, "a: 1\nb:\n  - {c: x, d: 'y'}\n  - z\n");
    assert_non_null(root);
    assert_int_equal(root->n, 2);
    tp_yaml *item = tp_yaml_at(tp_yaml_find(root, "b"), 0);
    tp_yaml *d = tp_yaml_find(item, "d");
    assert_string_equal(d->text, "y");
    assert_false(d->plain);
    assert_true(tp_yaml_find(item, "c")->plain);
    assert_string_equal(tp_mark_text(d->at, out, sizeof out), "f.yaml:3:15");
    assert_string_equal(tp_mark_text(d->key_at, out, sizeof out), "f.yaml:3:12");
    assert_string_equal(tp_yaml_path(d, out, sizeof out), "b.0.d");
    size_t n = 0;
    for (const tp_yaml *node = root; node != NULL; node = tp_yaml_after(node, root)) n++;
    assert_int_equal(n, 7); /* the root, a, b, the inner block, c, d, z */
}

static void test_changing(void **state)
{
    struct fixture *f = *state;
    tp_yaml *root = parse(f, "a: 1\nb: 2\nc: 3\n");
    tp_yaml *b = tp_yaml_find(root, "b"), *c = tp_yaml_find(root, "c");
    tp_yaml_unlink(c);
    assert_int_equal(root->n, 2);
    assert_ptr_equal(root->last, b);
    tp_yaml_unlink(tp_yaml_find(root, "a"));
    assert_ptr_equal(root->first, b);
    tp_yaml_replace(b, c);
    assert_ptr_equal(root->first, c);
    assert_ptr_equal(root->last, c);
    assert_int_equal(root->n, 1);
    assert_null(c->next);
    assert_null(tp_yaml_find(root, "b"));
}

/* Depth: `levels` lists, one in the other. */
static size_t errors_at_depth(size_t levels)
{
    void *state;
    open_fixture(&state);
    struct fixture *f = state;
    size_t n, m;
    char *open = repeat("[", levels, &n), *close = repeat("]", levels, &m), *text = malloc(n + m + 1);
    memcpy(text, open, n);
    memcpy(text + n, close, m);
    parse_bytes(f, text, n + m);
    size_t errors = f->problems.n_errors;
    free(open);
    free(close);
    free(text);
    close_fixture(&state);
    return errors;
}

static void test_R6_depth(void **state)
{
    (void)state;
    assert_int_equal(errors_at_depth(TP_YAML_DEPTH - 1), 0);
    assert_int_equal(errors_at_depth(TP_YAML_DEPTH), 0);
    assert_int_equal(errors_at_depth(TP_YAML_DEPTH + 1), 1);
}

/* Without the limit this would take minutes and gigabytes; with it, the 65th bracket ends it. The node count shows
 * that nothing beyond was built. */
static void test_R6_million_brackets(void **state)
{
    struct fixture *f = *state;
    size_t n;
    char *text = repeat("[", 1000000, &n);
    parse_bytes(f, text, n);
    free(text);
    assert_null(f->root);
    assert_int_equal(f->problems.n_errors, 1);
    assert_non_null(strstr(f->problems.items[0].text, "f.yaml:1:65: nested deeper than 64 levels"));
    assert_true(f->tree.n_nodes <= TP_YAML_DEPTH + 1);
}

static size_t errors_with_nodes(size_t nodes)
{
    void *state;
    open_fixture(&state);
    struct fixture *f = state;
    size_t n;
    char *text = repeat("- x\n", nodes - 1, &n); /* and the list itself */
    parse_bytes(f, text, n);
    size_t errors = f->problems.n_errors;
    free(text);
    close_fixture(&state);
    return errors;
}

static void test_node_limit(void **state)
{
    (void)state;
    assert_int_equal(errors_with_nodes(TP_YAML_NODES - 1), 0);
    assert_int_equal(errors_with_nodes(TP_YAML_NODES), 0);
    assert_int_equal(errors_with_nodes(TP_YAML_NODES + 1), 1);
}

static size_t errors_with_bytes(size_t bytes)
{
    void *state;
    open_fixture(&state);
    struct fixture *f = state;
    char *text = malloc(bytes);
    memset(text, 'x', bytes);
    memcpy(text, "a: ", 3);
    parse_bytes(f, text, bytes);
    size_t errors = f->problems.n_errors;
    free(text);
    close_fixture(&state);
    return errors;
}

static void test_R10_size_limit(void **state)
{
    (void)state;
    assert_int_equal(errors_with_bytes(TP_YAML_BYTES - 1), 0);
    assert_int_equal(errors_with_bytes(TP_YAML_BYTES), 0);
    assert_int_equal(errors_with_bytes(TP_YAML_BYTES + 1), 1);
    assert_int_equal(errors_with_bytes(5u << 20), 1);
}

static void test_R4_repeated_keys(void **state)
{
    struct fixture *f = *state;
    parse(f, "a: 1\nb: 2\n\"a\": 3\nc: {d: 1, d: 2}\nb: 4\n");
    assert_int_equal(f->problems.n_errors, 3);
    assert_string_equal(f->problems.items[0].text, "f.yaml:3:1: a: given twice, first at f.yaml:1:1");
    assert_string_equal(f->problems.items[1].text, "f.yaml:4:11: d: given twice, first at f.yaml:4:5");
    assert_string_equal(f->problems.items[2].text, "f.yaml:5:1: b: given twice, first at f.yaml:2:1");
}

static void test_refusals(void **state)
{
    (void)state;
    refused("a: &x 1\n", "f.yaml:1:4: ", "anchor &x");
    refused("a: *x\n", "f.yaml:1:4: ", "alias *x");
    refused("a: &x [*x]\n", "f.yaml:1:4: ", "anchor &x");
    refused("a: !!str 1\n", "f.yaml:1:4: ", "tag ");
    refused("a: ! 1\n", "f.yaml:1:4: ", "tag ");
    refused("!!map {a: 1}\n", "f.yaml:1:1: ", "tag ");
    refused("%TAG ! tag:x,2000:\n---\na: 1\n", "f.yaml:1:1: ", "tags");
    refused("%YAML 1.1\n---\na: 1\n", "f.yaml:1:1: ", "YAML 1.2");
    refused("%FOO bar\n---\na: 1\n", "f.yaml:1:5: ", "unknown directive");
    refused("a: 1\n---\nb: 2\n", "f.yaml:2:1: ", "second document");
    refused("<<: {a: 1}\n", "f.yaml:1:1: ", "merge");
    refused("? [a]\n: 1\n", "f.yaml:1:3: ", "got a list");
    refused("? {a: 1}\n: 1\n", "f.yaml:1:3: ", "got a block");
    refused("a:\n\t- b\n", "f.yaml:2:1: ", "tab");
    refused("a: \"x\n", "f.yaml:", "quoted scalar");
    refused("a: \"x\\0y\"\n", "f.yaml:1:4: ", "NUL");
    refused("a: \x01\n", "f.yaml:1:4: ", "U+0001");
    refused("a: \xc2\x85\xc2\x80\n", "f.yaml:1:5: ", "U+0080");
    refused("a: 1\nb: \xff\n", "f.yaml:2:4: ", "0xff is not UTF-8");
    refused("\xff\xfe"
            "a",
            "f.yaml:1:1: ", "UTF-16");
}

static void test_R10_byte_order_mark(void **state)
{
    struct fixture *f = *state;
    tp_yaml *root = parse(f, "\xef\xbb\xbf"
                             "a: 1\n");
    assert_int_equal(tp_yaml_find(root, "a")->key_at.column, 1);
}

static void test_empty(void **state)
{
    struct fixture *f = *state;
    assert_null(parse(f, ""));
    assert_null(parse(f, "# nothing\n"));
    assert_int_equal(f->problems.n_errors, 0);
}

static void test_R7_core_schema(void **state)
{
    static const struct {
        const char *text;
        tp_yaml_type type;
        double number;
    } cases[] = {
        {"1e-4", TP_YAML_FLOAT, 1e-4},
        {"5e-5", TP_YAML_FLOAT, 5e-5},
        {"1E4", TP_YAML_FLOAT, 1e4},
        {".5", TP_YAML_FLOAT, 0.5},
        {"5.", TP_YAML_FLOAT, 5},
        {"-1.5e+3", TP_YAML_FLOAT, -1500},
        {".inf", TP_YAML_FLOAT, INFINITY},
        {"-.INF", TP_YAML_FLOAT, -INFINITY},
        {"1e309", TP_YAML_FLOAT, INFINITY},
        {"010", TP_YAML_INT, 10},
        {"0x1F", TP_YAML_INT, 31},
        {"0o17", TP_YAML_INT, 15},
        {"+7", TP_YAML_INT, 7},
        {"-7", TP_YAML_INT, -7},
        {"0", TP_YAML_INT, 0},
        {"1:30", TP_YAML_TEXT, 0},
        {"1_000", TP_YAML_TEXT, 0},
        {"1,5", TP_YAML_TEXT, 0},
        {"0x", TP_YAML_TEXT, 0},
        {"0o8", TP_YAML_TEXT, 0},
        {".", TP_YAML_TEXT, 0},
        {"e5", TP_YAML_TEXT, 0},
        {"1e", TP_YAML_TEXT, 0},
        {"--1", TP_YAML_TEXT, 0},
        {"no", TP_YAML_TEXT, 0},
        {"yes", TP_YAML_TEXT, 0},
        {"on", TP_YAML_TEXT, 0},
        {"off", TP_YAML_TEXT, 0},
        {"tRUE", TP_YAML_TEXT, 0},
        {"inf", TP_YAML_TEXT, 0},
        {"nan", TP_YAML_TEXT, 0},
        {"0X1F", TP_YAML_TEXT, 0},
        {"-0x1F", TP_YAML_TEXT, 0},
        {"true", TP_YAML_BOOL, 0},
        {"False", TP_YAML_BOOL, 0},
        {"TRUE", TP_YAML_BOOL, 0},
        {"null", TP_YAML_NULL, 0},
        {"~", TP_YAML_NULL, 0},
        {"", TP_YAML_NULL, 0},
        {"Null", TP_YAML_NULL, 0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tp_yaml scalar = {.kind = TP_YAML_SCALAR, .plain = true, .text = cases[i].text};
        tp_yaml_value value;
        tp_yaml_type type = tp_yaml_scalar_type(&scalar, &value);
        if (type != cases[i].type) fail_msg("%s: type %d, expected %d", cases[i].text, (int)type, (int)cases[i].type);
        if (value.number != cases[i].number) fail_msg("%s: %g, expected %g", cases[i].text, value.number, cases[i].number);
        scalar.plain = false;
        assert_int_equal(tp_yaml_scalar_type(&scalar, &value), TP_YAML_TEXT);
    }
    tp_yaml nan = {.kind = TP_YAML_SCALAR, .plain = true, .text = ".nan"};
    tp_yaml_value value;
    assert_int_equal(tp_yaml_scalar_type(&nan, &value), TP_YAML_FLOAT);
    assert_true(isnan(value.number));
    tp_yaml big = {.kind = TP_YAML_SCALAR, .plain = true, .text = "9223372036854775808"};
    assert_int_equal(tp_yaml_scalar_type(&big, &value), TP_YAML_INT);
    assert_false(value.fits);
    big.text = "9223372036854775807";
    assert_int_equal(tp_yaml_scalar_type(&big, &value), TP_YAML_INT);
    assert_true(value.fits);
    assert_true(value.integer == INT64_MAX);
}

/* A list of problems that is full counts on. */
static void test_problem_limit(void **state)
{
    struct fixture *f = *state;
    for (int i = 0; i < TP_PROBLEMS_MAX + 5; i++)
        assert_ok(&f->ctx, tp_problems_add(&f->ctx, &f->problems, TP_INVALID, "problem\x1b %d", i));
    assert_int_equal(f->problems.n, TP_PROBLEMS_MAX);
    assert_int_equal(f->problems.n_errors, TP_PROBLEMS_MAX + 5);
    assert_int_equal(f->problems.n_left_out, 5);
    assert_string_equal(f->problems.items[0].text, "problem\\x1b 0");
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    assert_int_equal(tp_problems_status(&ctx, &f->problems), TP_INVALID);
    assert_string_equal(ctx.message, "problem\\x1b 0 (and 104 more)");
}

#define WITH_FIXTURE(test) cmocka_unit_test_setup_teardown(test, open_fixture, close_fixture)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_FIXTURE(test_tree),
        WITH_FIXTURE(test_changing),
        cmocka_unit_test(test_R6_depth),
        WITH_FIXTURE(test_R6_million_brackets),
        cmocka_unit_test(test_node_limit),
        cmocka_unit_test(test_R10_size_limit),
        WITH_FIXTURE(test_R4_repeated_keys),
        cmocka_unit_test(test_refusals),
        WITH_FIXTURE(test_R10_byte_order_mark),
        WITH_FIXTURE(test_empty),
        cmocka_unit_test(test_R7_core_schema),
        WITH_FIXTURE(test_problem_limit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
