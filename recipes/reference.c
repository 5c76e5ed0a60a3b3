/* docs/recipes.md from the field tables: one table a section, one row a key. */
#include <stdio.h>
#include <string.h>

#include "recipes/parts.h"

/* Table cells may not hold a bar. */
static void write_cell(tp_buf *out, const char *text)
{
    for (; *text != '\0'; text++) {
        if (*text == '|') tp_buf_char(out, '\\');
        tp_buf_char(out, *text);
    }
}

static void write_default(const tp_field *field, tp_buf *out)
{
    if (field->required)
        tp_buf_text(out, "required");
    else if (field->default_note != NULL)
        write_cell(out, field->default_note);
    else if (field->otherwise != NULL)
        tp_buf_printf(out, "`%s`", field->otherwise);
    else
        tp_buf_text(out, "unset");
}

static void write_aliases(const tp_field *field, tp_buf *out)
{
    const char *last = "";
    for (const tp_alias *a = field->aliases; a != NULL && a->name != NULL; a++) {
        if (strcmp(a->name, last) == 0) continue; /* rows that translate values of one name stand together */
        tp_buf_printf(out, "%s`%s`%s", last[0] != '\0' ? ", " : "", a->name,
                      a->from != NULL && strcmp(a->from, "!") == 0 ? " (opposite)" : "");
        last = a->name;
    }
}

static void write_row(const tp_field *field, tp_buf *out)
{
    char expected[400];
    tp_buf_printf(out, "| `%s` | ", field->key);
    write_default(field, out);
    tp_buf_text(out, " | ");
    write_cell(out, tp_value_expected(field, false, expected, sizeof expected));
    tp_buf_text(out, " | ");
    write_cell(out, field->help);
    if (field->when != NULL) {
        tp_buf_text(out, "; only for ");
        write_cell(out, field->when->text);
    }
    tp_buf_text(out, " | ");
    write_aliases(field, out);
    tp_buf_text(out, " |\n");
}

static void write_table(const tp_section *section, tp_buf *out)
{
    tp_buf_text(out, "| key | default | expected | meaning | read as this key |\n|---|---|---|---|---|\n");
    for (size_t f = 0; f < section->n_fields; f++) write_row(&section->fields[f], out);
    if (section->note != NULL) tp_buf_printf(out, "\n%s\n", section->note);
}

static void write_refused(const tp_schema *schema, tp_buf *out)
{
    tp_buf_text(out, "\n## Refused keys\n\nTools give these names different meanings:\n\n");
    for (const tp_refused_key *k = schema->refused; k != NULL && k->name != NULL; k++)
        tp_buf_printf(out, "- `%s`: %s\n", k->name, k->why);
}

static const char *const introduction =
    "# Recipes\n\n"
    "<!-- Written from the field tables in recipes/; change those instead. -->\n\n"
    "A recipe is one YAML file of `key: value` lines (YAML 1.2, UTF-8, no tags, anchors or aliases; at most 1 MiB, 64 levels,\n"
    "10,000 nodes). `1e-4` is a number; `no`, `yes`, `on` and `off` are text, say `true` or `false`. Every problem is listed "
    "in\n"
    "one pass, with file, line and column, before a model is opened: unknown and repeated keys, wrong types, values out of "
    "range,\n"
    "and keys without effect for the chosen adapter, objective or optimizer.\n\n"
    "- `include: base.yaml`, or a list: relative to the including file, at most 8 levels deep. The file's own keys win over "
    "what it\n"
    "  includes, later files over earlier ones; blocks merge by key, lists are replaced.\n"
    "- `vars: {name: value}` fills `${name}` inside values; `$${` is the text `${`. Environment variables are not read.\n"
    "- Overrides on the command line: `key=value` with dots and indices (`quant.block=128`, `datasets.0.limit=100`), and "
    "`~key`\n"
    "  deletes. The value is YAML and is checked like the file's.\n"
    "- Names that other tools use are read, and reported once; one beside its own key is an error.\n"
    "- Paths are relative to the working directory; nothing is downloaded.\n";

void tp_schema_write_reference(const tp_schema *schema, tp_buf *out)
{
    tp_buf_text(out, introduction);
    for (size_t s = 0; s < schema->n_sections; s++) {
        const tp_section *section = schema->sections[s];
        tp_buf_printf(out, "\n## %s\n\n", section->title);
        write_table(section, out);
        for (size_t f = 0; f < section->n_fields; f++) {
            const tp_field *field = &section->fields[f];
            bool first = true; /* of the keys that share this kind of block */
            for (size_t g = 0; g < f; g++) first = first && section->fields[g].block != field->block;
            if (field->block == NULL || !first) continue;
            tp_buf_printf(out, "\n### Each block of `%s`\n\n", field->key);
            write_table(field->block, out);
        }
    }
    write_refused(schema, out);
}

/* ---- one key ---- */

static void write_line(const char *label, const char *text, tp_buf *out)
{
    tp_buf_printf(out, "  %-10s %s\n", label, text);
}

static void write_key(const char *prefix, const tp_field *field, tp_buf *out)
{
    char expected[400];
    tp_buf aliases;
    tp_buf_printf(out, "%s%s\n", prefix, field->key);
    write_line("meaning", field->help, out);
    write_line("expected", tp_value_expected(field, false, expected, sizeof expected), out);
    const char *otherwise = field->default_note != NULL ? field->default_note : field->otherwise;
    write_line("default", field->required ? "none: required" : otherwise != NULL ? otherwise : "unset", out);
    if (field->when != NULL) write_line("only for", field->when->text, out);
    tp_buf_init(&aliases, 0);
    write_aliases(field, &aliases);
    if (aliases.len > 0) write_line("read as it", tp_buf_cstr(&aliases), out);
    out->failed = out->failed || aliases.failed;
    tp_buf_free(&aliases);
}

static bool is_of_block(const char *key, const char *block)
{
    size_t n = strlen(block);
    return strncmp(key, block, n) == 0 && key[n] == '.';
}

bool tp_schema_write_key(const tp_schema *schema, const char *name, tp_buf *out)
{
    char prefix[80] = "";
    const char *items = strstr(name, "[].");
    const tp_field *field = tp_schema_field(schema, name);
    size_t before = out->len;
    if (field == NULL && tp_name_of_alias(schema, name) != NULL)
        field = tp_schema_field(schema, tp_name_of_alias(schema, name));
    if (field != NULL && items != NULL) snprintf(prefix, sizeof prefix, "%.*s", (int)(items + 3 - name), name);
    if (field != NULL) write_key(prefix, field, out);
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++)
            if (is_of_block(schema->sections[s]->fields[f].key, name)) write_key("", &schema->sections[s]->fields[f], out);
    for (size_t i = 0; field != NULL && field->block != NULL && i < field->block->n_fields; i++) {
        snprintf(prefix, sizeof prefix, "%.60s[].", field->key);
        write_key(prefix, &field->block->fields[i], out);
    }
    return out->len > before;
}
