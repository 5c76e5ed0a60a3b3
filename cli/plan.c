/* tapeft plan RECIPE: memory, work and time of a step, before any weight is read. */
#include <string.h>

#include "cli/open.h"
#include "trainers/train.h"

static tp_status print_plan(tp_ctx *ctx, const tp_args *args, const tp_run *run)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    if (tp_args_has(args, "json"))
        tp_plan_write_json(tp_run_plan(run), &text);
    else
        tp_plan_write_text(tp_run_plan(run), &text);
    tp_status status = tp_buf_status(ctx, &text, "plan");
    if (status == TP_OK) status = tp_cli_print(ctx, text.data, text.len);
    tp_buf_free(&text);
    return status;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    static const char *const optional[] = {"output_dir", NULL};
    tp_train_options options = {.dry_run = true};
    tp_cli_recipe recipe;
    tp_run *run;
    TP_TRY(tp_cli_recipe_open(ctx, args, optional, false, false, &recipe));
    tp_status status = tp_cli_open_device(ctx, recipe.config.run.device, recipe.config.run.threads);
    if (status == TP_OK) status = tp_run_open(ctx, recipe.recipe, &recipe.config, &options, &run);
    if (status == TP_OK) {
        status = tp_run_estimate(run);
        if (status == TP_OK) status = print_plan(ctx, args, run);
        if (status == TP_OK) status = tp_run_fits(run);
        status = tp_run_close(run, status);
    }
    tp_cli_recipe_close(&recipe);
    return status;
}

static const tp_flag flags[] = {TP_FLAG_JSON, TP_FLAG_END};

const tp_command tp_command_plan = {
    "plan", "RECIPE [key=value ...] [--json]", "memory, FLOPs and time per step, before any weight is read", flags, 1, 1000,
    run};
