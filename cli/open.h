/* What several commands open: a recipe, a model with its adapter, a prompt. */
#ifndef TP_CLI_OPEN_H
#define TP_CLI_OPEN_H

#include "adapters/adapter.h"
#include "cli/command.h"
#include "data/tokenizer.h"
#include "recipes/keys.h"

/* A recipe after all checks; problems and notes have been printed to stderr. */
typedef struct tp_cli_recipe {
    tp_recipe *recipe;
    tp_config config;
} tp_cli_recipe;

/* Text, availability and input paths; the output folder too if check_output. optional: keys this command can do without. */
tp_status tp_cli_recipe_open(tp_ctx *ctx, const tp_args *args, const char *const *optional, bool check_output, bool resumes,
                             tp_cli_recipe *recipe) TP_MUST_CHECK;
void tp_cli_recipe_close(tp_cli_recipe *recipe);

/* A model on the device of --device with the adapter of --adapter, in --precision. */
typedef struct tp_cli_model {
    tp_model *model;
    tp_adapter *adapter; /* NULL: none */
} tp_cli_model;
tp_status tp_cli_model_open(tp_ctx *ctx, const tp_args *args, const char *path, tp_cli_model *opened) TP_MUST_CHECK;
void tp_cli_model_close(tp_cli_model *opened);

/* Before any work: IO_WRITE unless a file could be made, or replaced, at the path that --<flag> names. NULL is fine. */
tp_status tp_cli_check_out_file(tp_ctx *ctx, const char *flag, const char *path) TP_MUST_CHECK;

/* NUL-terminated path of `file` in a model folder, or NULL if there is none (or no memory: ctx tells). tp_free. */
char *tp_cli_model_file(tp_ctx *ctx, const char *model, const char *file);

#endif
