/* One value, the other way: is it set, are two the same, and as YAML on one line. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/json.h"
#include "recipes/parts.h"

static bool same_text(const char *a, const char *b)
{
    return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

static bool same_strings(const tp_strings *a, const tp_strings *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++)
        if (strcmp(a->items[i], b->items[i]) != 0) return false;
    return true;
}

static bool same_ints(const tp_ints *a, const tp_ints *b)
{
    return a->n == b->n && (a->n == 0 || memcmp(a->items, b->items, a->n * sizeof *a->items) == 0);
}

static bool same_numbers(const tp_number_map *a, const tp_number_map *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++)
        if (strcmp(a->items[i].name, b->items[i].name) != 0 || a->items[i].value != b->items[i].value) return false;
    return true;
}

static bool same_string_map(const tp_string_map *a, const tp_string_map *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++)
        if (strcmp(a->items[i].name, b->items[i].name) != 0 || strcmp(a->items[i].value, b->items[i].value) != 0) return false;
    return true;
}

static bool same_tokens(const tp_token_list *a, const tp_token_list *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++)
        if (!same_text(a->items[i].text, b->items[i].text) || a->items[i].id != b->items[i].id) return false;
    return true;
}

static const void *block_at(const tp_section *section, const tp_blocks *blocks, size_t i)
{
    return (const char *)blocks->items + i * section->item_bytes;
}

/* Blocks hold no blocks of their own, so this goes one level deep. */
static bool same_blocks(const tp_section *section, const tp_blocks *a, const tp_blocks *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++)
        for (size_t f = 0; f < section->n_fields; f++) {
            const tp_field *field = &section->fields[f];
            if (!tp_value_same(field, tp_field_in(field, block_at(section, a, i)), tp_field_in(field, block_at(section, b, i))))
                return false;
        }
    return true;
}

bool tp_value_same(const tp_field *field, const void *a, const void *b)
{
    switch (field->type) {
    case TP_FIELD_BOOL: return *(const bool *)a == *(const bool *)b;
    case TP_FIELD_INT: return *(const int64_t *)a == *(const int64_t *)b;
    case TP_FIELD_FLOAT: return *(const double *)a == *(const double *)b;
    case TP_FIELD_SIZE: return *(const uint64_t *)a == *(const uint64_t *)b;
    case TP_FIELD_STRING:
    case TP_FIELD_INPUT:
    case TP_FIELD_OUTPUT: return same_text(*(const char *const *)a, *(const char *const *)b);
    case TP_FIELD_ENUM: return *(const int *)a == *(const int *)b;
    case TP_FIELD_ENUMS:
    case TP_FIELD_LAYERS: return same_ints(a, b);
    case TP_FIELD_STRINGS: return same_strings(a, b);
    case TP_FIELD_PATTERNS: {
        const tp_patterns *p = a, *q = b;
        return p->kind == q->kind && same_text(p->text, q->text) && same_strings(&p->list, &q->list);
    }
    case TP_FIELD_COUNT_MAP:
    case TP_FIELD_NUMBER_MAP: return same_numbers(a, b);
    case TP_FIELD_STRING_MAP: return same_string_map(a, b);
    case TP_FIELD_TOKENS: return same_tokens(a, b);
    case TP_FIELD_SHARE: {
        const tp_share *p = a, *q = b;
        return p->fraction == q->fraction && p->rows == q->rows;
    }
    case TP_FIELD_BLOCKS: return same_blocks(field->block, a, b);
    default: return false;
    }
}

static tp_blocks blocks_at(const void *at)
{
    tp_blocks blocks;
    memcpy(&blocks, at, sizeof blocks);
    return blocks;
}

bool tp_value_is_set(const tp_field *field, const void *at)
{
    switch (field->type) {
    case TP_FIELD_STRING:
    case TP_FIELD_INPUT:
    case TP_FIELD_OUTPUT: return *(const char *const *)at != NULL;
    case TP_FIELD_INT: return field->otherwise != NULL || *(const int64_t *)at != TP_UNSET;
    case TP_FIELD_FLOAT: return field->otherwise != NULL || *(const double *)at != 0;
    case TP_FIELD_LAYERS: return ((const tp_ints *)at)->n > 0;
    case TP_FIELD_PATTERNS: return ((const tp_patterns *)at)->kind != TP_PATTERNS_UNSET;
    case TP_FIELD_BLOCKS: return field->otherwise != NULL || blocks_at(at).n > 0;
    default: return true;
    }
}

/* ---- writing ---- */

/* What YAML 1.1 takes for a bool; others may read our files too. */
static bool is_old_bool(const char *text)
{
    static const char *const words[] = {"yes", "no", "on", "off", "Yes", "No", "On", "Off", "YES", "NO", "ON", "OFF"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strcmp(text, words[i]) == 0) return true;
    return false;
}

/* Plain where a reader of YAML cannot take it for anything but the same text. */
static bool plain_is_safe(const char *text)
{
    static const char first[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_/.";
    static const char rest[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_/.-+0123456789";
    tp_yaml scalar = {.kind = TP_YAML_SCALAR, .plain = true, .text = text};
    return text[0] != '\0' && strchr(first, text[0]) != NULL && strspn(text, rest) == strlen(text) &&
           strcmp(text, "...") != 0 && !is_old_bool(text) && tp_yaml_scalar_type(&scalar, NULL) == TP_YAML_TEXT;
}

/* Characters that double quotes would fold, or that YAML does not print. */
static bool needs_escape(uint32_t c)
{
    return c < 0x20 || (c >= 0x7f && c <= 0xa0) || c == 0x2028 || c == 0x2029 || c == 0xfeff || c == 0xfffe || c == 0xffff;
}

/* A "${" of the text itself is written "$${" in values, which is read as the text "${" again; keys are not
 * searched for variables. */
static void write_quoted(tp_buf *out, const char *text, bool is_key)
{
    size_t n = strlen(text);
    tp_buf_char(out, '"');
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        int length = tp_utf8_decode(text + i, n - i, &c);
        if (length == 0) { /* cannot come from a recipe, which is UTF-8 */
            c = 0xfffd;
            length = 1;
        }
        if (c == '"' || c == '\\')
            tp_buf_printf(out, "\\%c", (char)c);
        else if (c == '$' && text[i + 1] == '{' && !is_key)
            tp_buf_text(out, "$$");
        else if (c == '\n')
            tp_buf_text(out, "\\n");
        else if (needs_escape(c))
            tp_buf_printf(out, "\\u%04x", (unsigned)c);
        else
            tp_buf_codepoint(out, c);
        i += (size_t)length;
    }
    tp_buf_char(out, '"');
}

static void write_string(tp_buf *out, const char *text)
{
    if (plain_is_safe(text))
        tp_buf_text(out, text);
    else
        write_quoted(out, text, false);
}

/* A key of more than 1024 characters is a key only behind a question mark. */
static void write_key(tp_buf *out, const char *key)
{
    if (strlen(key) > 150) tp_buf_text(out, "? ");
    if (plain_is_safe(key))
        tp_buf_text(out, key);
    else
        write_quoted(out, key, true);
    tp_buf_text(out, ": ");
}

/* Exact. 1e-08 becomes 1.0e-08: the same number, and a number in YAML 1.1 too. */
static void write_float(tp_buf *out, double value)
{
    size_t before = out->len;
    tp_json_write_f64(out, value, 17);
    const char *text = tp_buf_cstr(out) + (out->failed ? 0 : before), *e = strchr(text, 'e');
    if (out->failed || e == NULL || strchr(text, '.') != NULL) return;
    char exponent[16];
    snprintf(exponent, sizeof exponent, "%s", e);
    out->len -= strlen(exponent);
    tp_buf_printf(out, ".0%s", exponent);
}

static void separate(tp_buf *out, size_t i)
{
    if (i > 0) tp_buf_text(out, ", ");
}

static void write_strings(tp_buf *out, const tp_strings *list)
{
    tp_buf_char(out, '[');
    for (size_t i = 0; i < list->n; i++) {
        separate(out, i);
        write_string(out, list->items[i]);
    }
    tp_buf_char(out, ']');
}

static void write_ints(tp_buf *out, const tp_ints *list, const char *const *words)
{
    tp_buf_char(out, '[');
    for (size_t i = 0; i < list->n; i++) {
        separate(out, i);
        if (words != NULL)
            tp_buf_text(out, words[list->items[i]]);
        else
            tp_buf_printf(out, "%" PRId64, list->items[i]);
    }
    tp_buf_char(out, ']');
}

static void write_numbers(tp_buf *out, const tp_number_map *map)
{
    tp_buf_char(out, '{');
    for (size_t i = 0; i < map->n; i++) {
        separate(out, i);
        write_key(out, map->items[i].name);
        write_float(out, map->items[i].value);
    }
    tp_buf_char(out, '}');
}

static void write_string_map(tp_buf *out, const tp_string_map *map)
{
    tp_buf_char(out, '{');
    for (size_t i = 0; i < map->n; i++) {
        separate(out, i);
        write_key(out, map->items[i].name);
        write_string(out, map->items[i].value);
    }
    tp_buf_char(out, '}');
}

static void write_tokens(tp_buf *out, const tp_token_list *list)
{
    tp_buf_char(out, '[');
    for (size_t i = 0; i < list->n; i++) {
        separate(out, i);
        if (list->items[i].text != NULL)
            write_string(out, list->items[i].text);
        else
            tp_buf_printf(out, "%" PRId64, list->items[i].id);
    }
    tp_buf_char(out, ']');
}

static void write_size(tp_buf *out, uint64_t bytes)
{
    static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    if (bytes == 0) {
        tp_buf_text(out, "auto");
        return;
    }
    for (; bytes % 1024 == 0 && unit < 4; unit++) bytes /= 1024;
    tp_buf_printf(out, "%" PRIu64 "%s", bytes, units[unit]);
}

static void write_patterns(tp_buf *out, const tp_patterns *patterns)
{
    if (patterns->kind == TP_PATTERNS_LIST)
        write_strings(out, &patterns->list);
    else
        write_string(out, patterns->text);
}

void tp_value_write(const tp_field *field, const void *at, tp_buf *out)
{
    switch (field->type) {
    case TP_FIELD_BOOL: tp_buf_text(out, *(const bool *)at ? "true" : "false"); break;
    case TP_FIELD_INT: tp_buf_printf(out, "%" PRId64, *(const int64_t *)at); break;
    case TP_FIELD_FLOAT: write_float(out, *(const double *)at); break;
    case TP_FIELD_SIZE: write_size(out, *(const uint64_t *)at); break;
    case TP_FIELD_STRING:
    case TP_FIELD_INPUT:
    case TP_FIELD_OUTPUT: write_string(out, *(const char *const *)at); break;
    case TP_FIELD_ENUM: tp_buf_text(out, field->words[*(const int *)at]); break;
    case TP_FIELD_ENUMS: write_ints(out, at, field->words); break;
    case TP_FIELD_LAYERS: write_ints(out, at, NULL); break;
    case TP_FIELD_STRINGS: write_strings(out, at); break;
    case TP_FIELD_PATTERNS: write_patterns(out, at); break;
    case TP_FIELD_COUNT_MAP:
    case TP_FIELD_NUMBER_MAP: write_numbers(out, at); break;
    case TP_FIELD_STRING_MAP: write_string_map(out, at); break;
    case TP_FIELD_TOKENS: write_tokens(out, at); break;
    case TP_FIELD_SHARE: {
        const tp_share *share = at;
        if (share->rows > 0)
            tp_buf_printf(out, "%" PRId64, share->rows);
        else
            write_float(out, share->fraction);
        break;
    }
    default: break;
    }
}
