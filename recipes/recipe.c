/* Loading, from the file to the checked config; the order of the steps is told in recipe.h. */
#include "recipes/recipe.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "recipes/parts.h"

tp_status tp_reading_problem(tp_reading *r, tp_mark at, const char *format, ...)
{
    char text[1024], place[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return tp_problems_add(r->ctx, r->problems, TP_INVALID, "%s: %s", tp_mark_text(at, place, sizeof place), text);
}

void tp_recipe_free(tp_recipe *recipe)
{
    if (recipe == NULL) return;
    tp_yaml_tree_free(&recipe->tree);
    tp_free(recipe);
}

/* After the text was read: overrides, variables, values. A tree that could not be read ends here, for
 * complaints about what it lacks would only hide the cause. */
static tp_status finish(tp_reading *r, const tp_recipe_options *options, void *config)
{
    if (r->recipe->root == NULL) return TP_OK;
    for (size_t i = 0; i < options->n_overrides; i++) TP_TRY(tp_reading_override(r, i + 1, options->overrides[i]));
    TP_TRY(tp_reading_variables(r));
    return tp_reading_fields(r, options->optional, config);
}

/* From a file, or from text where that is not NULL. */
static tp_status load(tp_ctx *ctx, const char *name, const char *text, size_t n, const tp_recipe_options *options, void *config,
                      tp_problems *problems, tp_recipe **recipe)
{
    *recipe = NULL;
    tp_recipe *made = tp_alloc(ctx, 1, sizeof *made);
    if (made == NULL) return TP_NOMEM;
    tp_yaml_tree_init(&made->tree);
    made->schema = options->schema;
    made->name = tp_arena_strndup(ctx, &made->tree.arena, name, strlen(name));
    tp_reading r = {.ctx = ctx, .recipe = made, .problems = problems};
    tp_status st = made->name == NULL ? TP_NOMEM
                   : text != NULL     ? tp_reading_text(&r, name, text, n, &made->root)
                                      : tp_reading_file(&r, name, &made->root);
    if (st == TP_OK) st = finish(&r, options, config);
    if (st == TP_OK) st = tp_problems_status(ctx, problems);
    if (st == TP_OK)
        *recipe = made;
    else
        tp_recipe_free(made);
    return st;
}

tp_status tp_recipe_load(tp_ctx *ctx, const char *path, const tp_recipe_options *options, void *config, tp_problems *problems,
                         tp_recipe **recipe)
{
    return load(ctx, path, NULL, 0, options, config, problems, recipe);
}

tp_status tp_recipe_parse(tp_ctx *ctx, const char *name, const char *text, size_t n, const tp_recipe_options *options,
                          void *config, tp_problems *problems, tp_recipe **recipe)
{
    return load(ctx, name, text != NULL ? text : "", n, options, config, problems, recipe);
}

bool tp_recipe_given(const tp_recipe *recipe, const char *key)
{
    return tp_yaml_walk(recipe->root, key) != NULL;
}

const char *tp_recipe_where(const tp_recipe *recipe, const char *key, char *out, size_t size)
{
    const tp_yaml *node = tp_yaml_walk(recipe->root, key);
    if (node == NULL)
        snprintf(out, size, "%s", recipe->name);
    else
        tp_mark_text(node->at, out, size);
    return out;
}

const char *tp_recipe_where_member(const tp_recipe *recipe, const char *key, const char *member, char *out, size_t size)
{
    const tp_yaml *block = tp_yaml_walk(recipe->root, key), *node = block != NULL ? tp_yaml_find(block, member) : NULL;
    return node != NULL ? tp_mark_text(node->at, out, size) : tp_recipe_where(recipe, key, out, size);
}

const char *tp_recipe_name(const tp_recipe *recipe)
{
    return recipe->name;
}

/* ---- paths ---- */

static tp_status check_path(tp_ctx *ctx, const tp_field *field, const tp_yaml *node, tp_problems *problems)
{
    char place[512], key[256];
    if (node == NULL || field->type != TP_FIELD_INPUT) return TP_OK;
    for (const char *const *word = field->words; word != NULL && *word != NULL; word++)
        if (strcmp(node->text, *word) == 0) return TP_OK;
    if (tp_path_exists(node->text)) return TP_OK;
    return tp_problems_add(ctx, problems, TP_IO_READ, "%s: %s: %s does not exist", tp_mark_text(node->at, place, sizeof place),
                           tp_yaml_path(node, key, sizeof key), node->text);
}

static tp_status check_field(tp_ctx *ctx, const tp_field *field, const tp_yaml *node, tp_problems *problems)
{
    if (node == NULL || field->type != TP_FIELD_BLOCKS) return check_path(ctx, field, node, problems);
    for (const tp_yaml *item = node->first; item != NULL; item = item->next)
        for (size_t f = 0; f < field->block->n_fields; f++)
            TP_TRY(check_path(ctx, &field->block->fields[f], tp_yaml_find(item, field->block->fields[f].key), problems));
    return TP_OK;
}

tp_status tp_recipe_check_inputs(tp_ctx *ctx, const tp_recipe *recipe, tp_problems *problems)
{
    const tp_schema *schema = recipe->schema;
    for (size_t s = 0; s < schema->n_sections; s++)
        for (size_t f = 0; f < schema->sections[s]->n_fields; f++) {
            const tp_field *field = &schema->sections[s]->fields[f];
            TP_TRY(check_field(ctx, field, tp_yaml_walk(recipe->root, field->key), problems));
        }
    return tp_problems_status(ctx, problems);
}
