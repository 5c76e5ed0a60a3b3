/* Reading a recipe: file, includes, overrides, variables, then values checked against field tables.
 *
 *     tp_config config;                                            // keys.h
 *     tp_problems problems = {0};
 *     tp_recipe *recipe;
 *     st = tp_recipe_load(ctx, path, &options, &config, &problems, &recipe);   // text: class 2
 *     if (st == TP_OK) st = tp_config_available(ctx, recipe, &config, &problems);  // class 3
 *     if (st == TP_OK) st = tp_recipe_check_inputs(ctx, recipe, &problems);        // class 3
 *     if (st == TP_OK) st = tp_config_check_output(ctx, recipe, &config, &problems); // class 2
 *     ... print every line of problems, notes too; on success use config ...
 *     tp_recipe_free(recipe); tp_problems_free(&problems);
 *
 * Each step reports all of its problems before it fails. The rules of the format (includes, variables,
 * overrides, names of other tools) are those of docs/recipes.md. */
#ifndef TP_RECIPES_RECIPE_H
#define TP_RECIPES_RECIPE_H

#include "base/status.h"
#include "recipes/problems.h"
#include "recipes/schema.h"

#define TP_RECIPE_INCLUDE_DEPTH 8
#define TP_RECIPE_FILES         64 /* files that one recipe may be made of */

typedef struct tp_recipe_options {
    const tp_schema *schema;
    const char *const *overrides; /* "key=value" or "~key", in order; later ones win */
    size_t n_overrides;
    /* NULL-terminated: required keys that this command can do without ("output_dir" for eval). May be NULL. */
    const char *const *optional;
} tp_recipe_options;

/* Reads the file into *config (schema->config_bytes; strings and arrays live in the recipe). On failure
 * *recipe is NULL and *config is not to be used. INVALID: the text has problems; IO_READ: the file, or
 * one that it includes, cannot be read; NOMEM. The problems list is added to, never cleared. */
TP_API tp_status tp_recipe_load(tp_ctx *ctx, const char *path, const tp_recipe_options *options, void *config,
                                tp_problems *problems, tp_recipe **recipe) TP_MUST_CHECK;

/* The same for text in memory; `name` stands for the file in messages. include is refused: there is no
 * folder for it to be relative to. */
TP_API tp_status tp_recipe_parse(tp_ctx *ctx, const char *name, const char *text, size_t n, const tp_recipe_options *options,
                                 void *config, tp_problems *problems, tp_recipe **recipe) TP_MUST_CHECK;

TP_API void tp_recipe_free(tp_recipe *recipe); /* accepts NULL */

/* True if the recipe itself sets the key, as "quant.type", "datasets.0.limit" or a block's name. */
TP_API bool tp_recipe_given(const tp_recipe *recipe, const char *key);

/* "lora.yaml:4:9", the place of the key's value, or the recipe's name if it is not set there. Returns `out`. */
TP_API const char *tp_recipe_where(const tp_recipe *recipe, const char *key, char *out, size_t size);

/* The same for a member of a block, whose name may hold dots (rank_pattern); the block's place if it is not there. */
TP_API const char *tp_recipe_where_member(const tp_recipe *recipe, const char *key, const char *member, char *out, size_t size);

/* The recipe's name: its path, as it was given. */
TP_API const char *tp_recipe_name(const tp_recipe *recipe);

/* Every path that the recipe wants to read exists: else IO_READ, naming each with its line. */
TP_API tp_status tp_recipe_check_inputs(tp_ctx *ctx, const tp_recipe *recipe, tp_problems *problems) TP_MUST_CHECK;

#endif
