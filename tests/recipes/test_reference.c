/* docs/recipes.md is what the field tables say. To write it again:
 *     make build/tests/tools/recipe_reference && build/tests/tools/recipe_reference >docs/recipes.md */
#include "tests/support.h"

#include "base/file.h"
#include "base/mem.h"
#include "recipes/keys.h"

#define MANUAL "docs/recipes.md"

static void test_manual(void **state)
{
    tp_ctx ctx;
    char *text;
    size_t n, line = 1;
    tp_buf expected;
    (void)state;
    tp_ctx_init(&ctx);
    tp_buf_init(&expected, 0);
    tp_schema_write_reference(&tp_recipe_schema, &expected);
    assert_ok(&ctx, tp_file_read(&ctx, MANUAL, (size_t)1 << 22, &text, &n));
    const char *wanted = tp_buf_cstr(&expected);
    for (size_t i = 0; i < n && i < expected.len && text[i] == wanted[i]; i++) line += text[i] == '\n';
    if (n != expected.len || memcmp(text, wanted, n) != 0)
        fail_msg(MANUAL ":%zu differs from the field tables; write it again", line);
    tp_free(text);
    tp_buf_free(&expected);
}

/* Each key of the tables has one row there, each row the five cells of its heading, and nobody is left without an explanation.
 */
static void test_rows(void **state)
{
    tp_buf text;
    size_t keys = 0, rows = 0;
    (void)state;
    tp_buf_init(&text, 0);
    tp_schema_write_reference(&tp_recipe_schema, &text);
    for (size_t s = 0; s < tp_recipe_schema.n_sections; s++)
        for (size_t f = 0; f < tp_recipe_schema.sections[s]->n_fields; f++, keys++) {
            const tp_field *field = &tp_recipe_schema.sections[s]->fields[f];
            char start[160];
            snprintf(start, sizeof start, "\n| `%s` | ", field->key);
            if (strstr(tp_buf_cstr(&text), start) == NULL) fail_msg("%s is not in the reference", field->key);
            assert_true(field->help != NULL && field->help[0] != '\0');
        }
    for (const char *line = tp_buf_cstr(&text); *line != '\0'; line = strchr(line, '\n') + 1) {
        size_t bars = 0, n = strcspn(line, "\n");
        if (*line != '|') continue;
        for (size_t i = 0; i < n; i++) bars += line[i] == '|' && (i == 0 || line[i - 1] != '\\');
        if (bars != 6) fail_msg("%zu bars: %.*s", bars, (int)n, line);
        rows++;
    }
    assert_true(keys > 80 && rows >= keys);
    tp_buf_free(&text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_manual), cmocka_unit_test(test_rows)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
