/* tapeft tune RECIPE: the fastest algorithms for the products of this recipe on this GPU, kept for later runs. */
#include "cli/open.h"
#include "trainers/train.h"

static tp_status tune(tp_ctx *ctx, tp_run *run)
{
    tp_buf report;
    tp_buf_init(&report, 0);
    tp_status status = tp_run_tune(run, &report);
    if (status == TP_OK) status = tp_buf_status(ctx, &report, "report");
    if (status == TP_OK) status = tp_cli_print(ctx, report.data, report.len);
    tp_buf_free(&report);
    return status;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    static const char *const optional[] = {"output_dir", NULL};
    tp_train_options options = {.tune = true};
    tp_cli_recipe recipe;
    tp_run *run;
    TP_TRY(tp_cli_recipe_open(ctx, args, optional, false, false, &recipe));
    tp_status status = tp_cli_open_device(ctx, recipe.config.run.device, recipe.config.run.threads);
    if (status == TP_OK) status = tp_run_open(ctx, recipe.recipe, &recipe.config, &options, &run);
    if (status == TP_OK) status = tp_run_close(run, tune(ctx, run));
    tp_cli_recipe_close(&recipe);
    return status;
}

static const tp_flag flags[] = {TP_FLAG_END};

const tp_command tp_command_tune = {
    "tune", "RECIPE [key=value ...]", "measure which product algorithms are fastest on this GPU for a recipe", flags, 1, 1000,
    run};
