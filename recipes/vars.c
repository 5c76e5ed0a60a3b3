/* Variables: `vars: {name: value}` and ${name} inside values.
 *
 * Filled in after includes and overrides, so both can set them. A value of a variable is not searched
 * again, keys are not searched at all, and the environment is never read. "$${" is the text "${". */
#include <stdio.h>
#include <string.h>

#include "recipes/parts.h"

static bool is_name(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        bool letter = (text[i] >= 'a' && text[i] <= 'z') || (text[i] >= 'A' && text[i] <= 'Z') || text[i] == '_';
        if (!letter && !(i > 0 && text[i] >= '0' && text[i] <= '9')) return false;
    }
    return n > 0;
}

static tp_status check_variables(tp_reading *r, const tp_yaml *vars)
{
    char found[100];
    if (vars->kind != TP_YAML_BLOCK)
        return tp_reading_problem(r, vars->at, "vars: expected a block of name: value, got %s",
                                  tp_yaml_describe(vars, found, sizeof found));
    for (const tp_yaml *v = vars->first; v != NULL; v = v->next) {
        if (!is_name(v->key, strlen(v->key)))
            TP_TRY(tp_reading_problem(r, v->key_at, "vars: \"%.80s\" is no name: letters, digits and _", v->key));
        if (v->kind != TP_YAML_SCALAR || tp_yaml_scalar_type(v, NULL) == TP_YAML_NULL)
            TP_TRY(tp_reading_problem(r, v->at, "vars.%.80s: expected a string, got %s", v->key,
                                      tp_yaml_describe(v, found, sizeof found)));
    }
    return TP_OK;
}

/* The value that the n bytes at name stand for, or NULL. */
static const char *value_of(const tp_yaml *vars, const char *name, size_t n)
{
    if (vars == NULL || vars->kind != TP_YAML_BLOCK) return NULL;
    for (const tp_yaml *v = vars->first; v != NULL; v = v->next)
        if (strlen(v->key) == n && memcmp(v->key, name, n) == 0) return v->kind == TP_YAML_SCALAR ? v->text : NULL;
    return NULL;
}

/* Fills one scalar through `out`. Variables may not grow the recipe beyond the size that a file may have. */
static tp_status fill(tp_reading *r, const tp_yaml *vars, tp_yaml *scalar, size_t *total, tp_buf *out)
{
    char path[512];
    tp_buf_clear(out);
    for (const char *p = scalar->text; *p != '\0';) {
        if (strncmp(p, "$${", 3) == 0) {
            tp_buf_text(out, "${");
            p += 3;
        } else if (strncmp(p, "${", 2) == 0) {
            size_t n = strcspn(p + 2, "}");
            const char *value = value_of(vars, p + 2, n);
            if (p[2 + n] == '\0')
                return tp_reading_problem(r, scalar->at, "%s: \"${\" without its \"}\"; write $${ for the text itself",
                                          tp_yaml_path(scalar, path, sizeof path));
            if (value == NULL)
                return tp_reading_problem(r, scalar->at, "%s: unknown variable ${%.*s}; vars does not define it",
                                          tp_yaml_path(scalar, path, sizeof path), n < 80 ? (int)n : 80, p + 2);
            *total += strlen(value);
            if (*total > TP_YAML_BYTES)
                return tp_reading_problem(r, scalar->at, "with its variables filled in, the recipe is longer than %zu bytes",
                                          TP_YAML_BYTES);
            tp_buf_text(out, value);
            p += 2 + n + 1;
        } else {
            tp_buf_char(out, *p++);
        }
    }
    TP_TRY(tp_buf_status(r->ctx, out, "variables"));
    scalar->text = tp_arena_strndup(r->ctx, &r->recipe->tree.arena, tp_buf_cstr(out), out->len);
    return scalar->text != NULL ? TP_OK : TP_NOMEM;
}

/* After the growth limit was met once, every later scalar would meet it too. */
static tp_status fill_all(tp_reading *r, const tp_yaml *vars, tp_buf *out)
{
    size_t total = 0;
    for (tp_yaml *node = r->recipe->root; node != NULL; node = tp_yaml_after(node, r->recipe->root)) {
        if (node->kind != TP_YAML_SCALAR || strstr(node->text, "${") == NULL) continue;
        TP_TRY(fill(r, vars, node, &total, out));
        if (total > TP_YAML_BYTES) return TP_OK;
    }
    return TP_OK;
}

tp_status tp_reading_variables(tp_reading *r)
{
    tp_yaml *vars = tp_yaml_find(r->recipe->root, "vars");
    if (vars != NULL) {
        tp_yaml_unlink(vars);
        TP_TRY(check_variables(r, vars));
    }
    tp_buf out;
    tp_buf_init(&out, 0);
    tp_status st = fill_all(r, vars, &out);
    tp_buf_free(&out);
    return st;
}
