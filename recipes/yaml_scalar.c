/* What a scalar means: the core schema of YAML 1.2, and nothing of 1.1.
 *
 *   null    ~  null  Null  NULL  and nothing at all
 *   bool    true  True  TRUE  false  False  FALSE      (yes, no, on, off are text)
 *   int     -?[0-9]+  0o17  0x1F                       (010 is ten, 1_000 and 1:30 are text)
 *   float   1.5  .5  1e-4  .inf  .nan                  (1e-4 is a number, unlike in 1.1)
 *
 * And how nodes are shown in messages. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "recipes/yaml.h"

static bool is_one_of(const char *text, const char *a, const char *b, const char *c)
{
    return strcmp(text, a) == 0 || strcmp(text, b) == 0 || strcmp(text, c) == 0;
}

static size_t digits(const char *text)
{
    return strspn(text, "0123456789");
}

/* [-+]?[0-9]+ | 0o[0-7]+ | 0x[0-9a-fA-F]+; sets *base. */
static bool is_int(const char *text, int *base)
{
    *base = 10;
    if (text[0] == '0' && (text[1] == 'o' || text[1] == 'x')) {
        *base = text[1] == 'o' ? 8 : 16;
        size_t n = strspn(text + 2, *base == 8 ? "01234567" : "0123456789abcdefABCDEF");
        return n > 0 && text[2 + n] == '\0';
    }
    if (*text == '-' || *text == '+') text++;
    size_t n = digits(text);
    return n > 0 && text[n] == '\0';
}

/* [-+]? ( \.[0-9]+ | [0-9]+ ( \.[0-9]* )? ) ( [eE] [-+]? [0-9]+ )? */
static bool is_decimal(const char *text)
{
    if (*text == '-' || *text == '+') text++;
    size_t whole = digits(text);
    text += whole;
    if (*text == '.') {
        size_t fraction = digits(++text);
        if (whole == 0 && fraction == 0) return false;
        text += fraction;
    } else if (whole == 0) {
        return false;
    }
    if (*text == 'e' || *text == 'E') {
        text++;
        if (*text == '-' || *text == '+') text++;
        size_t n = digits(text);
        if (n == 0) return false;
        text += n;
    }
    return *text == '\0';
}

static bool read_int(const char *text, tp_yaml_value *value)
{
    int base;
    if (!is_int(text, &base)) return false;
    char *end;
    errno = 0;
    value->integer = strtoll(base == 10 ? text : text + 2, &end, base);
    value->fits = errno == 0;
    value->number = base == 10 ? strtod(text, &end) : (double)value->integer;
    return true;
}

/* Numbers beyond the range of doubles become infinite, which no field accepts. */
static bool read_float(const char *text, tp_yaml_value *value)
{
    const char *bare = *text == '-' || *text == '+' ? text + 1 : text;
    if (is_one_of(bare, ".inf", ".Inf", ".INF")) {
        value->number = *text == '-' ? -INFINITY : INFINITY;
        return true;
    }
    if (is_one_of(text, ".nan", ".NaN", ".NAN")) {
        value->number = NAN;
        return true;
    }
    if (!is_decimal(text)) return false;
    value->number = strtod(text, NULL); /* the C locale: nothing in tapeft calls setlocale */
    return true;
}

tp_yaml_type tp_yaml_scalar_type(const tp_yaml *scalar, tp_yaml_value *value)
{
    tp_yaml_value unused;
    if (value == NULL) value = &unused;
    *value = (tp_yaml_value){0};
    const char *text = scalar->text;
    if (!scalar->plain) return TP_YAML_TEXT;
    if (text[0] == '\0' || strcmp(text, "~") == 0 || is_one_of(text, "null", "Null", "NULL")) return TP_YAML_NULL;
    if (is_one_of(text, "true", "True", "TRUE")) {
        value->boolean = true;
        return TP_YAML_BOOL;
    }
    if (is_one_of(text, "false", "False", "FALSE")) return TP_YAML_BOOL;
    if (read_int(text, value)) return TP_YAML_INT;
    return read_float(text, value) ? TP_YAML_FLOAT : TP_YAML_TEXT;
}

const char *tp_mark_text(tp_mark mark, char *out, size_t size)
{
    if (mark.line == 0)
        snprintf(out, size, "%s", mark.source);
    else
        snprintf(out, size, "%s:%" PRIu32 ":%" PRIu32, mark.source, mark.line, mark.column);
    return out;
}

static size_t index_of(const tp_yaml *node)
{
    size_t i = 0;
    for (const tp_yaml *c = node->parent->first; c != node; c = c->next) i++;
    return i;
}

const char *tp_yaml_path(const tp_yaml *node, char *out, size_t size)
{
    const tp_yaml *way[TP_YAML_DEPTH + 1];
    size_t n = 0, used = 0;
    out[0] = '\0';
    for (; node->parent != NULL && n < TP_YAML_DEPTH + 1; node = node->parent) way[n++] = node;
    while (n-- > 0 && used < size) {
        const char *dot = used > 0 ? "." : "";
        int wrote = way[n]->key != NULL ? snprintf(out + used, size - used, "%s%.80s", dot, way[n]->key)
                                        : snprintf(out + used, size - used, "%s%zu", dot, index_of(way[n]));
        used += wrote > 0 ? (size_t)wrote : 0;
    }
    return out;
}

const char *tp_yaml_describe(const tp_yaml *node, char *out, size_t size)
{
    if (node->kind == TP_YAML_LIST)
        snprintf(out, size, "a list");
    else if (node->kind == TP_YAML_BLOCK)
        snprintf(out, size, "a block");
    else if (!node->plain)
        snprintf(out, size, "the string \"%.60s\"", node->text);
    else if (tp_yaml_scalar_type(node, NULL) == TP_YAML_NULL)
        snprintf(out, size, "no value (null)");
    else if (tp_yaml_scalar_type(node, NULL) == TP_YAML_TEXT)
        snprintf(out, size, "\"%.60s\"", node->text);
    else
        snprintf(out, size, "%.60s", node->text);
    return out;
}
