/* One value: from a node of the tree to the struct member that a field describes.
 *
 * A table has one reader per field type. A reader that meets something else than it wants names the
 * node and goes no further; the caller says where it stands, what was expected and what was found. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "recipes/parts.h"

#define LAYERS_MAX 4096 /* as many as the program can run */

typedef tp_status reader(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong);

static bool in_range(const tp_range *range, double value)
{
    if (!range->set) return isfinite(value);
    if (!(value >= range->min) || (range->above && !(value > range->min))) return false;
    return isfinite(value) && value <= range->max && !(range->below && !(value < range->max));
}

static void *new_array(tp_reading *r, size_t count, size_t size)
{
    return tp_arena_alloc(r->ctx, &r->recipe->tree.arena, count, size);
}

/* ---- scalars ---- */

static bool scalar_int(const tp_field *field, const tp_yaml *node, int64_t *out)
{
    tp_yaml_value value;
    if (node->kind != TP_YAML_SCALAR || tp_yaml_scalar_type(node, &value) != TP_YAML_INT) return false;
    if (!value.fits || !in_range(&field->range, (double)value.integer)) return false;
    *out = value.integer;
    return true;
}

static bool scalar_float(const tp_field *field, const tp_yaml *node, double *out)
{
    tp_yaml_value value;
    if (node->kind != TP_YAML_SCALAR) return false;
    tp_yaml_type type = tp_yaml_scalar_type(node, &value);
    if ((type != TP_YAML_INT && type != TP_YAML_FLOAT) || !in_range(&field->range, value.number)) return false;
    *out = value.number;
    return true;
}

/* Text, whatever it looks like: `no` and 010 stay what they are. No value at all is no text. */
static bool scalar_text(const tp_yaml *node, const char **out)
{
    if (node->kind != TP_YAML_SCALAR || tp_yaml_scalar_type(node, NULL) == TP_YAML_NULL) return false;
    *out = node->text;
    return true;
}

static bool scalar_word(const tp_field *field, const tp_yaml *node, int *out)
{
    tp_yaml_value value;
    const char *text;
    if (!scalar_text(node, &text)) return false;
    if (tp_yaml_scalar_type(node, &value) == TP_YAML_BOOL) text = value.boolean ? "true" : "false";
    for (int i = 0; field->words[i] != NULL; i++) {
        if (strcmp(text, field->words[i]) != 0) continue;
        *out = i;
        return true;
    }
    return false;
}

static tp_status read_bool(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    tp_yaml_value value;
    (void)r, (void)field;
    if (node->kind != TP_YAML_SCALAR || tp_yaml_scalar_type(node, &value) != TP_YAML_BOOL)
        *wrong = node;
    else
        *(bool *)at = value.boolean;
    return TP_OK;
}

static tp_status read_int(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    (void)r;
    if (!scalar_int(field, node, at)) *wrong = node;
    return TP_OK;
}

static tp_status read_float(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    (void)r;
    if (!scalar_float(field, node, at)) *wrong = node;
    return TP_OK;
}

static tp_status read_size(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    const char *text;
    (void)r, (void)field;
    if (!scalar_text(node, &text))
        *wrong = node;
    else if (strcmp(text, "auto") == 0)
        *(uint64_t *)at = 0;
    else if (!tp_parse_size(text, at))
        *wrong = node;
    return TP_OK;
}

static tp_status read_string(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    (void)r, (void)field;
    if (!scalar_text(node, at)) *wrong = node;
    return TP_OK;
}

static tp_status read_path(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    const char *text;
    (void)r, (void)field;
    if (!scalar_text(node, &text) || text[0] == '\0')
        *wrong = node;
    else
        *(const char **)at = text;
    return TP_OK;
}

static tp_status read_enum(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    (void)r;
    if (!scalar_word(field, node, at)) *wrong = node;
    return TP_OK;
}

static tp_status read_share(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    tp_yaml_value value;
    tp_share *share = at;
    (void)r;
    if (node->kind != TP_YAML_SCALAR) {
        *wrong = node;
        return TP_OK;
    }
    tp_yaml_type type = tp_yaml_scalar_type(node, &value);
    if (type == TP_YAML_INT && value.fits && value.integer >= 0)
        *share = (tp_share){.rows = value.integer};
    else if (type == TP_YAML_FLOAT && in_range(&field->range, value.number))
        *share = (tp_share){.fraction = value.number};
    else
        *wrong = node;
    return TP_OK;
}

/* ---- lists ---- */

/* A list of words; one word alone stands for a list of it. */
static tp_status read_enums(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    bool alone = node->kind == TP_YAML_SCALAR;
    size_t n = alone ? 1 : node->n, i = 0;
    if (node->kind == TP_YAML_BLOCK || n == 0) {
        *wrong = node;
        return TP_OK;
    }
    int64_t *items = new_array(r, n, sizeof *items);
    if (items == NULL) return TP_NOMEM;
    for (const tp_yaml *c = alone ? node : node->first; i < n; c = c->next, i++) {
        int word = 0;
        if (!scalar_word(field, c, &word)) {
            *wrong = c;
            return TP_OK;
        }
        items[i] = word;
    }
    *(tp_ints *)at = (tp_ints){items, n};
    return TP_OK;
}

static tp_status read_strings(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    (void)field;
    if (node->kind != TP_YAML_LIST) {
        *wrong = node;
        return TP_OK;
    }
    const char **items = new_array(r, node->n, sizeof *items);
    if (items == NULL) return TP_NOMEM;
    size_t i = 0;
    for (const tp_yaml *c = node->first; c != NULL; c = c->next, i++) {
        if (scalar_text(c, &items[i]) && items[i][0] != '\0') continue;
        *wrong = c;
        return TP_OK;
    }
    *(tp_strings *)at = (tp_strings){items, node->n};
    return TP_OK;
}

static tp_status read_patterns(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    tp_patterns patterns = {.kind = TP_PATTERNS_LIST};
    int word;
    if (node->kind == TP_YAML_LIST) {
        TP_TRY(read_strings(r, field, node, &patterns.list, wrong));
    } else if (!scalar_text(node, &patterns.text) || patterns.text[0] == '\0') {
        *wrong = node;
    } else if (field->words != NULL && scalar_word(field, node, &word)) {
        patterns.kind = TP_PATTERNS_WORD;
    } else {
        patterns.kind = TP_PATTERNS_REGEX;
    }
    if (*wrong == NULL) *(tp_patterns *)at = patterns;
    return TP_OK;
}

/* 3, or "8-15" with both ends. */
static bool parse_layers(const tp_yaml *node, int64_t *first, int64_t *last)
{
    const char *text;
    if (!scalar_text(node, &text)) return false;
    size_t n = strspn(text, "0123456789");
    size_t m = text[n] == '-' ? strspn(text + n + 1, "0123456789") : 0;
    bool range = m > 0;
    if (n == 0 || n > 6 || m > 6 || text[range ? n + 1 + m : n] != '\0') return false;
    *first = strtol(text, NULL, 10);
    *last = range ? strtol(text + n + 1, NULL, 10) : *first;
    return *first <= *last && *last < LAYERS_MAX;
}

/* Ascending, each once: a thousand overlapping ranges cost no more than the layers that exist. */
static tp_status read_layers(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    bool chosen[LAYERS_MAX] = {false};
    bool alone = node->kind == TP_YAML_SCALAR;
    size_t n = alone ? 1 : node->n, n_chosen = 0, i = 0;
    (void)field;
    if (node->kind == TP_YAML_BLOCK || n == 0) {
        *wrong = node;
        return TP_OK;
    }
    for (const tp_yaml *c = alone ? node : node->first; i < n; c = c->next, i++) {
        int64_t first, last;
        if (!parse_layers(c, &first, &last)) {
            *wrong = c;
            return TP_OK;
        }
        for (int64_t layer = first; layer <= last; layer++) {
            n_chosen += !chosen[layer];
            chosen[layer] = true;
        }
    }
    int64_t *items = new_array(r, n_chosen, sizeof *items);
    if (items == NULL) return TP_NOMEM;
    size_t used = 0;
    for (int64_t layer = 0; layer < LAYERS_MAX; layer++)
        if (chosen[layer]) items[used++] = layer;
    *(tp_ints *)at = (tp_ints){items, n_chosen};
    return TP_OK;
}

static tp_status read_tokens(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    if (node->kind != TP_YAML_LIST) {
        *wrong = node;
        return TP_OK;
    }
    tp_token_entry *items = new_array(r, node->n, sizeof *items);
    if (items == NULL) return TP_NOMEM;
    size_t i = 0;
    for (const tp_yaml *c = node->first; c != NULL; c = c->next, i++) {
        bool number = c->kind == TP_YAML_SCALAR && tp_yaml_scalar_type(c, NULL) == TP_YAML_INT;
        if (number ? scalar_int(field, c, &items[i].id) : scalar_text(c, &items[i].text) && items[i].text[0] != '\0') continue;
        *wrong = c;
        return TP_OK;
    }
    *(tp_token_list *)at = (tp_token_list){items, node->n};
    return TP_OK;
}

/* ---- maps ---- */

static tp_status read_numbers(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    if (node->kind != TP_YAML_BLOCK) {
        *wrong = node;
        return TP_OK;
    }
    tp_number_entry *items = new_array(r, node->n, sizeof *items);
    if (items == NULL) return TP_NOMEM;
    size_t i = 0;
    for (const tp_yaml *c = node->first; c != NULL; c = c->next, i++) {
        int64_t count = 0;
        bool fits = field->type == TP_FIELD_COUNT_MAP ? scalar_int(field, c, &count) : scalar_float(field, c, &items[i].value);
        if (!fits || c->key[0] == '\0') {
            *wrong = c;
            return TP_OK;
        }
        if (field->type == TP_FIELD_COUNT_MAP) items[i].value = (double)count;
        items[i].name = c->key;
    }
    *(tp_number_map *)at = (tp_number_map){items, node->n};
    return TP_OK;
}

static tp_status read_string_map(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    (void)field;
    if (node->kind != TP_YAML_BLOCK) {
        *wrong = node;
        return TP_OK;
    }
    tp_string_entry *items = new_array(r, node->n, sizeof *items);
    if (items == NULL) return TP_NOMEM;
    size_t i = 0;
    for (const tp_yaml *c = node->first; c != NULL; c = c->next, i++) {
        items[i].name = c->key;
        if (c->key[0] != '\0' && scalar_text(c, &items[i].value) && items[i].value[0] != '\0') continue;
        *wrong = c;
        return TP_OK;
    }
    *(tp_string_map *)at = (tp_string_map){items, node->n};
    return TP_OK;
}

static reader *const readers[TP_FIELD_TYPE_COUNT] = {
    [TP_FIELD_BOOL] = read_bool,
    [TP_FIELD_INT] = read_int,
    [TP_FIELD_FLOAT] = read_float,
    [TP_FIELD_SIZE] = read_size,
    [TP_FIELD_STRING] = read_string,
    [TP_FIELD_INPUT] = read_path,
    [TP_FIELD_OUTPUT] = read_path,
    [TP_FIELD_ENUM] = read_enum,
    [TP_FIELD_ENUMS] = read_enums,
    [TP_FIELD_STRINGS] = read_strings,
    [TP_FIELD_PATTERNS] = read_patterns,
    [TP_FIELD_LAYERS] = read_layers,
    [TP_FIELD_COUNT_MAP] = read_numbers,
    [TP_FIELD_NUMBER_MAP] = read_numbers,
    [TP_FIELD_STRING_MAP] = read_string_map,
    [TP_FIELD_TOKENS] = read_tokens,
    [TP_FIELD_SHARE] = read_share,
};

tp_status tp_value_read(tp_reading *r, const tp_field *field, const tp_yaml *node, void *at, const tp_yaml **wrong)
{
    *wrong = NULL;
    return readers[field->type](r, field, node, at, wrong);
}

/* Defaults in the tables are a scalar, "[]", "{}", or a list of one scalar: no need for a parser. */
tp_status tp_value_default(tp_reading *r, const tp_field *field, void *at)
{
    const char *text = field->otherwise;
    if (text == NULL && field->type == TP_FIELD_INT) *(int64_t *)at = TP_UNSET;
    if (text == NULL || field->type == TP_FIELD_BLOCKS) return TP_OK; /* no blocks are all zero */
    tp_yaml node = {.kind = TP_YAML_SCALAR, .plain = true, .text = text};
    tp_yaml only = node;
    if (text[0] == '{') node.kind = TP_YAML_BLOCK;
    if (text[0] == '[') node.kind = TP_YAML_LIST;
    if (text[0] == '[' && text[1] != ']') {
        only.text = tp_arena_strndup(r->ctx, &r->recipe->tree.arena, text + 1, strlen(text) - 2);
        if (only.text == NULL) return TP_NOMEM;
        tp_yaml_append(&node, &only);
    }
    const tp_yaml *wrong = NULL;
    TP_TRY(tp_value_read(r, field, &node, at, &wrong));
    return wrong == NULL ? TP_OK : tp_fail(r->ctx, TP_INTERNAL, "%s: the default \"%s\" is not valid", field->key, text);
}

/* ---- for messages ---- */

const char *tp_range_text(const tp_range *range, char *out, size_t size)
{
    char from[40], to[40];
    snprintf(from, sizeof from, "%.10g", range->min);
    snprintf(to, sizeof to, "%.10g", range->max);
    if (!range->set)
        out[0] = '\0';
    else if (isinf(range->max))
        snprintf(out, size, " %s %s", range->above ? ">" : ">=", from);
    else if (range->above || range->below)
        snprintf(out, size, " %s %s and %s %s", range->above ? ">" : ">=", from, range->below ? "<" : "<=", to);
    else
        snprintf(out, size, " from %s to %s", from, to);
    return out;
}

static void append(char *out, size_t size, const char *text)
{
    size_t n = strlen(out);
    if (n < size) snprintf(out + n, size - n, "%s", text);
}

static void append_words(char *out, size_t size, const char *const *words)
{
    for (size_t i = 0; words != NULL && words[i] != NULL; i++) {
        if (i > 0) append(out, size, ", ");
        append(out, size, words[i]);
    }
}

static const char *const expected[TP_FIELD_TYPE_COUNT] = {
    [TP_FIELD_BOOL] = "true or false",
    [TP_FIELD_INT] = "an integer",
    [TP_FIELD_FLOAT] = "a number",
    [TP_FIELD_SIZE] = "a size such as 8GiB, or auto",
    [TP_FIELD_STRING] = "a string",
    [TP_FIELD_INPUT] = "a path",
    [TP_FIELD_OUTPUT] = "a path",
    [TP_FIELD_ENUM] = "one of ",
    [TP_FIELD_ENUMS] = "one of ",
    [TP_FIELD_STRINGS] = "a list of strings",
    [TP_FIELD_PATTERNS] = "a list of names, or a regular expression",
    [TP_FIELD_LAYERS] = "layer numbers below 4096 or a range such as \"8-15\"",
    [TP_FIELD_COUNT_MAP] = "a block of pattern: integer",
    [TP_FIELD_NUMBER_MAP] = "a block of pattern: number",
    [TP_FIELD_STRING_MAP] = "a block of name: string",
    [TP_FIELD_TOKENS] = "a list of token ids or token strings",
    [TP_FIELD_SHARE] = "a number of rows, or a fraction",
    [TP_FIELD_BLOCKS] = "a list of blocks",
};

static const char *const expected_element[TP_FIELD_TYPE_COUNT] = {
    [TP_FIELD_ENUMS] = "one of ",        [TP_FIELD_STRINGS] = "a string",
    [TP_FIELD_PATTERNS] = "a string",    [TP_FIELD_LAYERS] = "a layer number below 4096 or a range such as \"8-15\"",
    [TP_FIELD_COUNT_MAP] = "an integer", [TP_FIELD_NUMBER_MAP] = "a number",
    [TP_FIELD_STRING_MAP] = "a string",  [TP_FIELD_TOKENS] = "a token id or a token string",
    [TP_FIELD_BLOCKS] = "a block",
};

const char *tp_value_expected(const tp_field *field, bool element, char *out, size_t size)
{
    char range[80];
    bool words_only = field->type == TP_FIELD_ENUM || field->type == TP_FIELD_ENUMS;
    snprintf(out, size, "%s", (element ? expected_element : expected)[field->type]);
    append(out, size, tp_range_text(&field->range, range, sizeof range));
    if (field->words == NULL || (element && !words_only)) return out;
    if (!words_only) append(out, size, ", or one of ");
    append_words(out, size, field->words);
    if (field->type == TP_FIELD_ENUMS && !element) append(out, size, ", or a list of them");
    return out;
}
