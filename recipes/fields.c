/* Walks the tree along the field tables: every value into the config, every problem into the list.
 *
 *   defaults -> values, unknown keys -> names that depend on the adapter -> settled defaults
 *            -> keys without effect -> missing keys -> rules between keys
 *
 * A problem never ends the walk: the value keeps its default and the walk goes on. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "recipes/parts.h"

#define KEY_BYTES 128 /* longer than any key of ours */
#define NAMES_MAX 512

/* The keys that may stand at one place: those of all sections at the root, of one section in a list of blocks. */
struct scope {
    const tp_section *const *sections;
    size_t n_sections;
    const char *prefix; /* "quant." inside that block, else "" */
    bool is_root;
};

static tp_status problem_at(tp_reading *r, const tp_yaml *node, tp_mark at, const char *text)
{
    char path[512]; /* finding the number of an element takes time: not for lines that are only counted */
    if (tp_problems_full(r->problems)) return tp_reading_problem(r, at, "%s", text);
    return tp_reading_problem(r, at, "%s: %s", tp_yaml_path(node, path, sizeof path), text);
}

/* ---- looking up ---- */

static const tp_field *find_field(const struct scope *scope, const char *key)
{
    char path[2 * KEY_BYTES];
    if (strlen(key) >= KEY_BYTES || strchr(key, '.') != NULL) return NULL; /* dots are for overrides */
    snprintf(path, sizeof path, "%s%s", scope->prefix, key);
    for (size_t s = 0; s < scope->n_sections; s++)
        for (size_t f = 0; f < scope->sections[s]->n_fields; f++)
            if (tp_same_name(scope->sections[s]->fields[f].key, path)) return &scope->sections[s]->fields[f];
    return NULL;
}

/* True if keys such as "<name>.type" exist. */
static bool is_block_name(const struct scope *scope, const char *name)
{
    size_t n = strlen(name);
    for (size_t s = 0; s < scope->n_sections; s++)
        for (size_t f = 0; f < scope->sections[s]->n_fields; f++) {
            const char *key = scope->sections[s]->fields[f].key;
            if (key[0] == name[0] && strncmp(key, name, n) == 0 && key[n] == '.') return true;
        }
    return false;
}

/* ---- unknown keys ---- */

/* Small letters, underscores: what was probably meant by "Num-Epochs". */
static void normalise(const char *key, char out[KEY_BYTES])
{
    size_t i = 0;
    for (; key[i] != '\0' && i + 1 < KEY_BYTES; i++)
        out[i] = key[i] == '-' || key[i] == ' ' ? '_' : key[i] >= 'A' && key[i] <= 'Z' ? (char)(key[i] - 'A' + 'a') : key[i];
    out[i] = '\0';
}

/* The names that may stand in this scope, without the prefix; dotted ones as they are. */
static void list_names(const struct scope *scope, const char *names[NAMES_MAX])
{
    size_t n = 0, skip = strlen(scope->prefix);
    for (size_t s = 0; s < scope->n_sections; s++)
        for (size_t f = 0; f < scope->sections[s]->n_fields && n + 1 < NAMES_MAX; f++) {
            const char *key = scope->sections[s]->fields[f].key;
            if (strncmp(key, scope->prefix, skip) == 0) names[n++] = key + skip;
        }
    names[n] = NULL;
}

static void list_aliases(const tp_schema *schema, const char *names[NAMES_MAX])
{
    size_t n = 0;
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++)
            for (const tp_alias *a = schema->sections[s]->fields[f].aliases; a != NULL && a->name != NULL && n + 1 < NAMES_MAX;
                 a++)
                names[n++] = a->name;
    names[n] = NULL;
}

/* A key of a block that is written without it: "block" for "quant.block". */
static const char *key_in_block(const struct scope *scope, const char *name)
{
    for (size_t s = 0; s < scope->n_sections; s++)
        for (size_t f = 0; f < scope->sections[s]->n_fields; f++) {
            const char *key = scope->sections[s]->fields[f].key, *dot = strchr(key, '.');
            if (dot != NULL && strcmp(dot + 1, name) == 0) return key;
        }
    return NULL;
}

static const tp_refused_key *find_refused(const tp_schema *schema, const char *name)
{
    for (const tp_refused_key *k = schema->refused; k != NULL && k->name != NULL; k++)
        if (tp_same_name(k->name, name)) return k;
    return NULL;
}

/* Advice on an unknown key, in out. */
static void advise(const tp_schema *schema, const struct scope *scope, const char *key, char *out, size_t size)
{
    const char *names[NAMES_MAX], *found;
    char name[KEY_BYTES];
    struct scope top = {schema->sections, schema->n_sections, "", true};
    normalise(key, name);
    out[0] = '\0';
    const char *dot = strchr(key, '.');
    if (dot != NULL && tp_schema_field(schema, key) != NULL) {
        snprintf(out, size, "; in a file it is a block, %.*s: {%s: ...}", (int)(dot - key), key, dot + 1);
        return;
    }
    if (find_field(scope, name) != NULL) {
        snprintf(out, size, "; did you mean %s?", name);
        return;
    }
    if (!scope->is_root && find_field(&top, name) != NULL) {
        snprintf(out, size, "; %s stands at the top level", name);
        return;
    }
    if (scope->is_root && (found = key_in_block(scope, name)) != NULL) {
        snprintf(out, size, "; did you mean %s?", found);
        return;
    }
    list_names(scope, names);
    if ((found = tp_nearest_name(name, names)) != NULL) {
        snprintf(out, size, "; did you mean %s?", found);
        return;
    }
    if (!scope->is_root) return;
    list_aliases(schema, names);
    if ((found = tp_nearest_name(name, names)) != NULL)
        snprintf(out, size, "; did you mean %s, here called %s?", found, tp_name_of_alias(schema, found));
}

static tp_status unknown_key(tp_reading *r, const struct scope *scope, const tp_yaml *node)
{
    const tp_refused_key *refused = scope->is_root ? find_refused(r->recipe->schema, node->key) : NULL;
    char advice[256] = "", text[512];
    if (refused == NULL && !tp_problems_full(r->problems)) advise(r->recipe->schema, scope, node->key, advice, sizeof advice);
    if (refused != NULL)
        snprintf(text, sizeof text, "refused, tools disagree about it: %s", refused->why);
    else
        snprintf(text, sizeof text, "unknown key%s", advice);
    return problem_at(r, node, node->key_at, text);
}

/* ---- values ---- */

static tp_status wrong_value(tp_reading *r, const tp_field *field, tp_yaml *node, const tp_yaml *culprit)
{
    char expected[300], found[100], text[512];
    snprintf(text, sizeof text, "expected %s, got %s", tp_value_expected(field, culprit != node, expected, sizeof expected),
             tp_yaml_describe(culprit, found, sizeof found));
    node->wrong = true;
    return problem_at(r, culprit, culprit->at, text);
}

static tp_status set_defaults(tp_reading *r, const tp_section *const *sections, size_t n_sections, void *config)
{
    for (size_t s = 0; s < n_sections; s++)
        for (size_t f = 0; f < sections[s]->n_fields; f++)
            TP_TRY(tp_value_default(r, &sections[s]->fields[f], tp_field_at(&sections[s]->fields[f], config)));
    return TP_OK;
}

static tp_status read_item(tp_reading *r, const tp_section *section, const tp_yaml *item, void *config);

static tp_status read_blocks(tp_reading *r, const tp_field *field, tp_yaml *node, void *at)
{
    const tp_section *section = field->block;
    if (node->kind != TP_YAML_LIST) return wrong_value(r, field, node, node);
    if (node->n == 0 && field->required) return problem_at(r, node, node->at, "expected at least one block, got an empty list");
    char *items = tp_arena_alloc(r->ctx, &r->recipe->tree.arena, node->n, section->item_bytes);
    if (items == NULL) return TP_NOMEM;
    size_t i = 0;
    for (const tp_yaml *c = node->first; c != NULL; c = c->next, i++) {
        TP_TRY(set_defaults(r, &section, 1, items + i * section->item_bytes));
        if (c->kind == TP_YAML_BLOCK)
            TP_TRY(read_item(r, section, c, items + i * section->item_bytes));
        else
            TP_TRY(wrong_value(r, field, node, c));
    }
    /* The config's own type has a typed pointer here: same bytes, so they are copied, not assigned. */
    tp_blocks blocks = {items, node->n};
    memcpy(at, &blocks, sizeof blocks);
    return TP_OK;
}

static tp_status read_value(tp_reading *r, const tp_field *field, tp_yaml *node, void *config)
{
    if (field->type == TP_FIELD_BLOCKS) return read_blocks(r, field, node, tp_field_at(field, config));
    const tp_yaml *culprit = NULL;
    TP_TRY(tp_value_read(r, field, node, tp_field_at(field, config), &culprit));
    return culprit != NULL ? wrong_value(r, field, node, culprit) : TP_OK;
}

/* Calls itself for blocks of dotted keys, which go one level deep, and through read_item for lists of them. */
static tp_status read_block(tp_reading *r, const struct scope *scope, const tp_yaml *block, void *config)
{
    for (tp_yaml *node = block->first; node != NULL; node = node->next) {
        const tp_field *field = find_field(scope, node->key);
        if (field != NULL) {
            TP_TRY(read_value(r, field, node, config));
        } else if (scope->prefix[0] == '\0' && is_block_name(scope, node->key)) {
            char prefix[KEY_BYTES + 1];
            snprintf(prefix, sizeof prefix, "%s.", node->key);
            struct scope inner = {scope->sections, scope->n_sections, prefix, false};
            if (node->kind == TP_YAML_BLOCK)
                TP_TRY(read_block(r, &inner, node, config));
            else
                TP_TRY(problem_at(r, node, node->at, "expected a block of key: value"));
        } else if (!scope->is_root || !tp_name_is_ambiguous(r->recipe->schema, node->key)) {
            TP_TRY(unknown_key(r, scope, node));
        }
    }
    return TP_OK;
}

/* ---- what is missing ---- */

static bool is_optional(const char *const *optional, const char *key)
{
    for (; optional != NULL && *optional != NULL; optional++)
        if (strcmp(*optional, key) == 0) return true;
    return false;
}

/* The block in which a required key must stand, or NULL if that block is absent. */
static const tp_yaml *home_of(const tp_yaml *block, const char *key)
{
    char name[KEY_BYTES];
    const char *dot = strchr(key, '.');
    if (dot == NULL) return block;
    snprintf(name, sizeof name, "%.*s", (int)(dot - key), key);
    const tp_yaml *home = tp_yaml_find(block, name);
    return home != NULL && home->kind == TP_YAML_BLOCK ? home : NULL;
}

static tp_status check_required(tp_reading *r, const struct scope *scope, const tp_yaml *block, const char *const *optional)
{
    char expected[300], path[512];
    for (size_t s = 0; s < scope->n_sections; s++)
        for (size_t f = 0; f < scope->sections[s]->n_fields; f++) {
            const tp_field *field = &scope->sections[s]->fields[f];
            const tp_yaml *home = field->required ? home_of(block, field->key) : NULL;
            if (home == NULL || is_optional(optional, field->key) || tp_yaml_walk(block, field->key) != NULL) continue;
            tp_yaml_path(block, path, sizeof path);
            tp_mark at = home == r->recipe->root ? (tp_mark){.source = r->recipe->name} : home->at;
            TP_TRY(tp_reading_problem(r, at, "%s%s%s: missing; expected %s", path, path[0] != '\0' ? "." : "", field->key,
                                      tp_value_expected(field, false, expected, sizeof expected)));
        }
    return TP_OK;
}

static tp_status read_item(tp_reading *r, const tp_section *section, const tp_yaml *item, void *config)
{
    struct scope scope = {&section, 1, "", false};
    TP_TRY(read_block(r, &scope, item, config));
    return check_required(r, &scope, item, NULL);
}

/* ---- rules between keys ---- */

static tp_status check_effect(tp_reading *r, const tp_field *field, const void *config)
{
    if (field->when == NULL || field->when->holds(config)) return TP_OK;
    const tp_yaml *node = tp_yaml_walk(r->recipe->root, field->key);
    const tp_yaml *decider = field->when->key != NULL ? tp_yaml_walk(r->recipe->root, field->when->key) : NULL;
    if (node == NULL || (decider != NULL && decider->wrong)) return TP_OK;
    char text[256];
    snprintf(text, sizeof text, "has no effect here; it is for %s", field->when->text);
    return problem_at(r, node, node->key_at, text);
}

static tp_status check_rules(tp_reading *r, const void *config)
{
    const tp_schema *schema = r->recipe->schema;
    tp_check check = {r->ctx, r->recipe, r->problems};
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++)
            TP_TRY(check_effect(r, &schema->sections[s]->fields[f], config));
    for (size_t s = 0; s < schema->n_sections; s++)
        if (schema->sections[s]->check != NULL) TP_TRY(schema->sections[s]->check(&check, config));
    return TP_OK;
}

tp_status tp_check_problem(tp_check *check, const char *key, const char *format, ...)
{
    char text[512], place[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return tp_problems_add(check->ctx, check->problems, TP_INVALID, "%s: %s: %s",
                           tp_recipe_where(check->recipe, key, place, sizeof place), key, text);
}

bool tp_check_given(const tp_check *check, const char *key)
{
    return tp_recipe_given(check->recipe, key);
}

/* ---- everything ---- */

/* Names that depend on the adapter can be told only after it was read; their values are read then. */
static tp_status read_late_names(tp_reading *r, const struct scope *scope, void *config)
{
    for (tp_yaml *node = r->recipe->root->first, *next; node != NULL; node = next) {
        const tp_field *field = NULL;
        next = node->next;
        if (find_field(scope, node->key) != NULL || !tp_name_is_ambiguous(r->recipe->schema, node->key)) continue;
        TP_TRY(tp_reading_settle_name(r, node, config, &field));
        if (node->parent != NULL) next = node->next; /* what followed may have been replaced */
        if (field != NULL) TP_TRY(read_value(r, field, node, config));
    }
    return TP_OK;
}

tp_status tp_reading_fields(tp_reading *r, const char *const *optional, void *config)
{
    const tp_schema *schema = r->recipe->schema;
    struct scope top = {schema->sections, schema->n_sections, "", true};
    memset(config, 0, schema->config_bytes);
    TP_TRY(set_defaults(r, schema->sections, schema->n_sections, config));
    TP_TRY(read_block(r, &top, r->recipe->root, config));
    TP_TRY(read_late_names(r, &top, config));
    for (size_t s = 0; s < schema->n_sections; s++)
        if (schema->sections[s]->settle != NULL) schema->sections[s]->settle(r->recipe, config);
    TP_TRY(check_rules(r, config));
    return check_required(r, &top, r->recipe->root, optional);
}
