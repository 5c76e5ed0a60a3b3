/* golden/bad/yaml: every record's verdict, exit class, line, key, nearest name and value, and the messages' manners. */
#include "tests/support.h"

#include <ctype.h>

#include "base/json.h"
#include "recipes/keys.h"

#define INDEX_BYTES ((size_t)64 << 20)

/* What one recipe gave. */
struct outcome {
    tp_ctx ctx;
    tp_config config;
    tp_problems problems;
    tp_recipe *recipe;
    tp_status status;
};

static void load(struct outcome *o, const char *path)
{
    memset(o, 0, sizeof *o);
    tp_ctx_init(&o->ctx);
    tp_recipe_options options = {.schema = &tp_recipe_schema};
    o->status = tp_recipe_load(&o->ctx, path, &options, &o->config, &o->problems, &o->recipe);
}

static void release(struct outcome *o)
{
    tp_recipe_free(o->recipe);
    tp_problems_free(&o->problems);
}

/* True if some problem (errors only, or notes only) holds the text. */
static bool mentions(const struct outcome *o, bool note, const char *text)
{
    for (size_t i = 0; i < o->problems.n; i++) {
        const tp_problem *p = &o->problems.items[i];
        if ((p->status == TP_OK) == note && strstr(p->text, text) != NULL) return true;
    }
    return false;
}

static void string_of(const tp_json *object, const char *key, char *out, size_t size)
{
    tp_span s = tp_json_string(tp_json_get(object, key));
    snprintf(out, size, "%.*s", (int)s.len, s.data != NULL ? s.data : "");
}

static void check_manners(const char *path, const char *text)
{
    if (text[0] == '\0') fail_msg("%s: an empty message", path);
    for (const char *p = text; *p != '\0'; p++)
        if (iscntrl((unsigned char)*p)) fail_msg("%s: a raw control character in the message", path);
    assert_int_equal(tp_utf8_valid_prefix(text, strlen(text)), strlen(text));
}

/* The record's value, against what lies in the config. */
static void check_value(const char *path, const tp_json *record, const tp_config *config)
{
    char key[100], text[200];
    double number = 0;
    string_of(record, "key", key, sizeof key);
    const tp_json *value = tp_json_get(record, "value");
    const tp_field *field = tp_schema_field(&tp_recipe_schema, key);
    if (field == NULL) fail_msg("%s: no field %s", path, key);
    const void *at = (const char *)config + field->offset;
    bool good = false;
    switch (field->type) {
    case TP_FIELD_BOOL: good = *(const bool *)at == tp_json_bool(value, !*(const bool *)at); break;
    case TP_FIELD_INT: good = tp_json_f64(value, &number) && (double)*(const int64_t *)at == number; break;
    case TP_FIELD_FLOAT: good = tp_json_f64(value, &number) && *(const double *)at == number; break;
    default: string_of(record, "value", text, sizeof text); good = strcmp(*(const char *const *)at, text) == 0;
    }
    if (!good) fail_msg("%s: %s has another value", path, key);
}

static void check_refusal(const char *path, const tp_json *record, const struct outcome *o)
{
    char text[200];
    int64_t number;
    if (o->status == TP_OK) fail_msg("%s: accepted", path);
    assert_null(o->recipe);
    assert_true(tp_json_i64(tp_json_get(record, "class"), &number));
    if (tp_status_exit_code(o->status) != number)
        fail_msg("%s: exit class %d: %s", path, tp_status_exit_code(o->status), o->ctx.message);
    if (tp_json_i64(tp_json_get(record, "line"), &number)) {
        snprintf(text, sizeof text, ".yaml:%lld:", (long long)number);
        if (strstr(o->ctx.message, text) == NULL) fail_msg("%s: line %lld: %s", path, (long long)number, o->ctx.message);
    }
    string_of(record, "key", text, sizeof text);
    if (!mentions(o, false, text)) fail_msg("%s: key %s: %s", path, text, o->ctx.message);
    string_of(record, "nearest", text, sizeof text);
    if (!mentions(o, false, text)) fail_msg("%s: nearest %s: %s", path, text, o->ctx.message);
}

static void check_case(const tp_json *record)
{
    char name[200], relative[220], path[1024], verdict[20], what[300];
    struct outcome o;
    string_of(record, "path", name, sizeof name);
    string_of(record, "verdict", verdict, sizeof verdict);
    string_of(record, "what", what, sizeof what);
    snprintf(relative, sizeof relative, "bad/%s", name);
    load(&o, golden_path(path, sizeof path, relative));
    for (size_t i = 0; i < o.problems.n; i++) check_manners(name, o.problems.items[i].text);
    if (o.status != TP_OK) check_manners(name, o.ctx.message);
    if (strcmp(verdict, "refuse") == 0) check_refusal(name, record, &o);
    if (strcmp(verdict, "accept") == 0 && o.status != TP_OK) fail_msg("%s: %s", name, o.ctx.message);
    if (o.status == TP_OK && tp_json_get(record, "value") != NULL) check_value(name, record, &o.config);
    if (strstr(what, "reported once") != NULL) assert_int_equal(o.problems.n, 1);
    release(&o);
}

static void test_records(void **state)
{
    char path[1024];
    tp_ctx ctx;
    tp_json_doc *doc = NULL;
    size_t n = 0;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "bad/index.json"), INDEX_BYTES, &doc));
    const tp_json *cases = tp_json_get(tp_json_root(doc), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        const tp_json *record = tp_json_at(cases, i);
        tp_span name = tp_json_string(tp_json_get(record, "path"));
        if (name.len < 5 || memcmp(name.data, "yaml/", 5) != 0) continue;
        check_case(record);
        n++;
    }
    tp_json_free(doc);
    print_message("%zu records\n", n);
    assert_true(n > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_records)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
