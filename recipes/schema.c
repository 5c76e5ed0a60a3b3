/* What else the tables are good for: finding a field, comparing two configs, writing one as YAML. */
#include "recipes/schema.h"

#include <string.h>

#include "recipes/parts.h"

/* ---- finding ---- */

static const tp_field *field_of(const tp_section *section, const char *key, size_t n)
{
    for (size_t f = 0; f < section->n_fields; f++) {
        const char *own = section->fields[f].key;
        if (own[0] == key[0] && strncmp(own, key, n) == 0 && own[n] == '\0') return &section->fields[f];
    }
    return NULL;
}

const tp_field *tp_schema_field(const tp_schema *schema, const char *key)
{
    const char *items = strstr(key, "[].");
    size_t n = items != NULL ? (size_t)(items - key) : strlen(key);
    const tp_field *field = NULL;
    for (size_t s = 0; s < schema->n_sections && field == NULL; s++) field = field_of(schema->sections[s], key, n);
    if (field == NULL || items == NULL) return field;
    return field->block != NULL ? field_of(field->block, items + 3, strlen(items + 3)) : NULL;
}

const char *tp_schema_difference(const tp_schema *schema, const void *a, const void *b, size_t *from)
{
    size_t i = 0;
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++, i++) {
            const tp_field *field = &schema->sections[s]->fields[f];
            if (i < *from || tp_value_same(field, tp_field_in(field, a), tp_field_in(field, b))) continue;
            *from = i + 1;
            return field->key;
        }
    *from = i;
    return NULL;
}

/* ---- writing ---- */

static bool is_written(const tp_field *field, const void *config)
{
    return tp_value_is_set(field, tp_field_in(field, config)) && (field->when == NULL || field->when->holds(config));
}

/* One block of a list: "  - path: x" and its other keys below. */
static void write_item(const tp_section *section, const void *item, const char *indent, tp_buf *out)
{
    const char *lead = "  - ";
    for (size_t f = 0; f < section->n_fields; f++) {
        const tp_field *field = &section->fields[f];
        if (!tp_value_is_set(field, tp_field_in(field, item))) continue;
        tp_buf_printf(out, "%s%s%s: ", indent, lead, field->key);
        tp_value_write(field, tp_field_in(field, item), out);
        tp_buf_char(out, '\n');
        lead = "    ";
    }
}

static void write_blocks(const tp_field *field, const tp_blocks *blocks, const char *indent, tp_buf *out)
{
    if (blocks->n == 0) {
        tp_buf_text(out, " []\n");
        return;
    }
    tp_buf_char(out, '\n');
    for (size_t i = 0; i < blocks->n; i++)
        write_item(field->block, (const char *)blocks->items + i * field->block->item_bytes, indent, out);
}

/* Members of one block stand together in their table; the block's name is written before the first of them. */
static void write_section(const tp_section *section, const void *config, tp_buf *out)
{
    const char *open = "";
    size_t open_bytes = 0;
    for (size_t f = 0; f < section->n_fields; f++) {
        const tp_field *field = &section->fields[f];
        if (!is_written(field, config)) continue;
        const char *dot = strchr(field->key, '.'), *name = dot != NULL ? dot + 1 : field->key;
        size_t bytes = dot != NULL ? (size_t)(dot - field->key) : 0;
        if (dot != NULL && (bytes != open_bytes || strncmp(open, field->key, bytes) != 0))
            tp_buf_printf(out, "%.*s:\n", (int)bytes, field->key);
        open = field->key;
        open_bytes = bytes;
        tp_buf_printf(out, "%s%s:", dot != NULL ? "  " : "", name);
        if (field->type == TP_FIELD_BLOCKS) {
            tp_blocks blocks;
            memcpy(&blocks, tp_field_in(field, config), sizeof blocks);
            write_blocks(field, &blocks, dot != NULL ? "  " : "", out);
            continue;
        }
        tp_buf_char(out, ' ');
        tp_value_write(field, tp_field_in(field, config), out);
        tp_buf_char(out, '\n');
    }
}

void tp_schema_write(const tp_schema *schema, const void *config, tp_buf *out)
{
    for (size_t s = 0; s < schema->n_sections; s++) {
        size_t before = out->len;
        tp_buf_printf(out, "%s# %s\n", s > 0 ? "\n" : "", schema->sections[s]->title);
        size_t heading = out->len;
        write_section(schema->sections[s], config, out);
        if (out->len != heading || out->failed) continue;
        out->len = before; /* nothing of this section has an effect: no heading either */
        if (out->data != NULL) out->data[before] = '\0';
    }
}
