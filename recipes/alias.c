/* Names of other tools, read as ours.
 *
 *     cutoff_len: 512        ->  max_seq_length: 512
 *     mask_prompt: true      ->  train_on_inputs: false
 *     bf16: true             ->  precision: bf16
 *     quantization: nf4      ->  quant: {type: nf4}
 *
 * Each is noted once. One beside its own key is an error, for only one of them can be meant. */
#include <stdio.h>
#include <string.h>

#include "recipes/parts.h"

/* The rows for one name: `match` is the row that translates this value, `field` its key. */
struct candidates {
    size_t n_fields; /* keys that know the name */
    size_t n_plain;  /* of these, keys that take any value */
    const tp_field *field;
    const tp_alias *match;
    char wanted[200]; /* the values that have a meaning, for the message */
};

static bool value_is(const tp_yaml *node, const char *from)
{
    tp_yaml_value value;
    if (node->kind != TP_YAML_SCALAR) return false;
    bool is_bool = tp_yaml_scalar_type(node, &value) == TP_YAML_BOOL;
    if (strcmp(from, "!") == 0) return is_bool;
    return strcmp(is_bool ? value.boolean ? "true" : "false" : node->text, from) == 0;
}

static void want(struct candidates *c, const char *value)
{
    size_t n = strlen(c->wanted);
    snprintf(c->wanted + n, sizeof c->wanted - n, "%s%s", n > 0 ? ", " : "", strcmp(value, "!") == 0 ? "true, false" : value);
}

static const tp_alias as_it_is = {.name = ""};

/* The first row that fits the node wins; a row for any value is the last resort of its key. */
static void look_at_field(struct candidates *c, const tp_field *field, const char *name, const tp_yaml *node)
{
    const tp_alias *any = NULL;
    bool knows = false;
    for (const tp_alias *a = field->aliases; a != NULL && a->name != NULL; a++) {
        if (!tp_same_name(a->name, name)) continue;
        knows = true;
        if (a->from != NULL) want(c, a->from);
        if (a->from == NULL || a->open) any = a;
        if (node == NULL || a->from == NULL || c->match != NULL || !value_is(node, a->from)) continue;
        c->match = a;
        c->field = field;
    }
    c->n_fields += knows;
    c->n_plain += any != NULL;
    if (any != NULL && c->match == NULL) {
        c->match = any->from == NULL ? any : &as_it_is;
        c->field = field;
    }
}

static struct candidates find_candidates(const tp_schema *schema, const char *name, const tp_yaml *node)
{
    struct candidates c = {.n_fields = 0};
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++)
            look_at_field(&c, &schema->sections[s]->fields[f], name, node);
    return c;
}

bool tp_name_is_ambiguous(const tp_schema *schema, const char *name)
{
    return find_candidates(schema, name, NULL).n_plain > 1;
}

const char *tp_name_of_alias(const tp_schema *schema, const char *name)
{
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++)
            for (const tp_alias *a = schema->sections[s]->fields[f].aliases; a != NULL && a->name != NULL; a++)
                if (tp_same_name(a->name, name)) return schema->sections[s]->fields[f].key;
    return NULL;
}

/* ---- renaming ---- */

static tp_status note(tp_reading *r, const tp_yaml *node, const tp_field *field, const char *old, bool translated)
{
    char place[512];
    tp_mark_text(node->key_at, place, sizeof place);
    if (!translated) return tp_problems_add(r->ctx, r->problems, TP_OK, "%s: read `%s` as `%s`", place, node->key, field->key);
    return tp_problems_add(r->ctx, r->problems, TP_OK, "%s: read `%s: %.60s` as `%s: %s`", place, node->key, old, field->key,
                           node->text);
}

/* Moves the node to the place of its own key, which may be in a block. */
static tp_status move(tp_reading *r, tp_yaml *root, tp_yaml *node, const char *key)
{
    const char *dot = strchr(key, '.');
    if (dot == NULL) {
        tp_yaml_set_key(node, key, node->key_at);
        return TP_OK;
    }
    char *name = tp_arena_strndup(r->ctx, &r->recipe->tree.arena, key, (size_t)(dot - key));
    if (name == NULL) return TP_NOMEM;
    tp_yaml *block = tp_yaml_find(root, name);
    if (block == NULL) {
        block = tp_yaml_new(r->ctx, &r->recipe->tree, TP_YAML_BLOCK, node->at, NULL);
        if (block == NULL) return TP_NOMEM;
        tp_yaml_set_key(block, name, node->key_at);
        tp_yaml_append(root, block);
    }
    tp_yaml_unlink(node);
    tp_yaml_set_key(node, dot + 1, node->key_at);
    if (block->kind == TP_YAML_BLOCK) tp_yaml_append(block, node);
    return TP_OK; /* a `quant` that is no block is reported when it is read */
}

static tp_status rename_node(tp_reading *r, tp_yaml *root, tp_yaml *node, const tp_field *field, const tp_alias *alias)
{
    char place[512];
    const tp_yaml *twin = tp_yaml_walk(root, field->key);
    if (twin != NULL) {
        tp_status st = tp_reading_problem(r, node->key_at, "%s: another name for %s, which is set at %s; keep one of them",
                                          node->key, field->key, tp_mark_text(twin->key_at, place, sizeof place));
        tp_yaml_unlink(node);
        return st;
    }
    const char *old = node->text;
    bool translated = alias->from != NULL;
    if (translated && strcmp(alias->from, "!") == 0) {
        tp_yaml_value value;
        tp_yaml_scalar_type(node, &value);
        node->text = value.boolean ? "false" : "true";
    } else if (translated) {
        node->text = alias->to;
        node->plain = true;
    }
    TP_TRY(note(r, node, field, old, translated));
    return move(r, root, node, field->key);
}

static tp_status name_node(tp_reading *r, tp_yaml *root, tp_yaml *node)
{
    const tp_schema *schema = r->recipe->schema;
    if (tp_schema_field(schema, node->key) != NULL) return TP_OK;
    struct candidates c = find_candidates(schema, node->key, node);
    if (c.n_fields == 0 || c.n_plain > 1) return TP_OK;
    if (c.match != NULL) return rename_node(r, root, node, c.field, c.match);
    char found[100], ours[128];
    snprintf(ours, sizeof ours, "%s", tp_name_of_alias(schema, node->key));
    tp_status st = tp_reading_problem(r, node->at, "%s: another name for %s; expected one of %s, got %s", node->key, ours,
                                      c.wanted, tp_yaml_describe(node, found, sizeof found));
    tp_yaml_unlink(node);
    return st;
}

tp_status tp_reading_names(tp_reading *r, tp_yaml *root)
{
    if (root->kind != TP_YAML_BLOCK) return TP_OK;
    for (tp_yaml *node = root->first, *next; node != NULL; node = next) {
        next = node->next;
        TP_TRY(name_node(r, root, node));
    }
    return TP_OK;
}

/* ---- names that depend on the adapter ---- */

/* The one field that knows the name and has an effect with this config; NULL if none or several do. */
static const tp_field *field_in_effect(const tp_schema *schema, const char *name, const void *config)
{
    const tp_field *found = NULL;
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++) {
            const tp_field *field = &schema->sections[s]->fields[f];
            struct candidates c = {.n_fields = 0};
            look_at_field(&c, field, name, NULL);
            if (c.n_fields == 0 || (field->when != NULL && !field->when->holds(config))) continue;
            if (found != NULL) return NULL;
            found = field;
        }
    return found;
}

static bool is_override(const tp_yaml *node)
{
    return tp_starts_with(node->key_at.source, "override ");
}

/* An override by another tool's name replaces the file's key, as it does by ours. */
static void replace_twin(tp_reading *r, const tp_yaml *node, const tp_field *field)
{
    tp_yaml *twin = tp_yaml_walk(r->recipe->root, field->key);
    if (twin != NULL && is_override(node) && !is_override(twin)) tp_yaml_unlink(twin);
}

tp_status tp_reading_settle_name(tp_reading *r, tp_yaml *node, const void *config, const tp_field **field)
{
    *field = field_in_effect(r->recipe->schema, node->key, config);
    if (*field == NULL)
        return tp_reading_problem(r, node->key_at, "%s: several keys go by this name; say which, as %s does", node->key,
                                  tp_name_of_alias(r->recipe->schema, node->key));
    size_t errors = r->problems->n_errors;
    replace_twin(r, node, *field);
    TP_TRY(rename_node(r, r->recipe->root, node, *field, &as_it_is));
    if (r->problems->n_errors > errors) *field = NULL;
    return TP_OK;
}
