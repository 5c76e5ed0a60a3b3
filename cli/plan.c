/* tapeft plan RECIPE: memory, work and time of a step, before any weight is read; with --fit, what makes it fit into so much.
 */
#include <string.h>

#include "cli/open.h"
#include "trainers/train.h"

/* --fit: the recipe's own values, to tell what was changed for it. */
struct fit {
    uint64_t bytes; /* 0: not asked for */
    tp_train_config train;
    int64_t max_seq_length;
};

/* The next thing that may make it fit: recomputation, smaller micro-batches in as many more passes, shorter rows. False if
 * nothing is left to change. */
static bool change(tp_config *config, const tp_plan *plan)
{
    tp_train_config *train = &config->train;
    if (train->gradient_checkpointing != TP_CHECKPOINTING_AUTO) {
        train->gradient_checkpointing = TP_CHECKPOINTING_AUTO;
        return true;
    }
    if (train->micro_batch_size > 1) {
        int64_t rows = train->micro_batch_size * train->gradient_accumulation_steps, batch = train->micro_batch_size / 2;
        while (rows % batch != 0) batch--; /* a step stays as large as it is */
        train->micro_batch_size = batch;
        train->gradient_accumulation_steps = rows / batch;
        return true;
    }
    if (plan->largest_length < 8 || plan->largest_length == config->data.max_seq_length) return false;
    config->data.max_seq_length = plan->largest_length;
    return true;
}

/* ---- printing ---- */

/* The overrides that do what --fit did, to be copied. */
static void write_switches(const struct fit *fit, const tp_config *now, const char *open, const char *between,
                           const char *close, tp_buf *out)
{
    const struct {
        const char *key;
        int64_t then, now;
    } numbers[] = {
        {"micro_batch_size", fit->train.micro_batch_size, now->train.micro_batch_size},
        {"gradient_accumulation_steps", fit->train.gradient_accumulation_steps, now->train.gradient_accumulation_steps},
        {"max_seq_length", fit->max_seq_length, now->data.max_seq_length},
    };
    const char *separator = open;
    if (fit->train.gradient_checkpointing != now->train.gradient_checkpointing) {
        tp_buf_printf(out, "%sgradient_checkpointing=auto%s", separator, close);
        separator = between;
    }
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (numbers[i].then == numbers[i].now) continue;
        tp_buf_printf(out, "%s%s=%lld%s", separator, numbers[i].key, (long long)numbers[i].now, close);
        separator = between;
    }
}

static void write_fit(const struct fit *fit, const tp_config *now, bool json, tp_buf *out)
{
    char size[32];
    if (json) {
        out->len -= strlen("}\n");
        tp_buf_text(out, ", \"switches\": [");
        write_switches(fit, now, "\"", ", \"", "\"", out);
        tp_buf_text(out, "]}\n");
        return;
    }
    tp_buf_printf(out, "fits into %s", tp_format_bytes(fit->bytes, size));
    write_switches(fit, now, " with ", " ", "", out);
    tp_buf_char(out, '\n');
}

static tp_status print_plan(tp_ctx *ctx, const tp_args *args, const tp_run *run, const struct fit *fit, const tp_config *config)
{
    tp_buf text;
    bool json = tp_args_has(args, "json");
    tp_buf_init(&text, 0);
    if (json)
        tp_plan_write_json(tp_run_plan(run), &text);
    else
        tp_plan_write_text(tp_run_plan(run), &text);
    if (fit->bytes > 0 && tp_run_plan(run)->peak <= fit->bytes && text.len > 2) write_fit(fit, config, json, &text);
    tp_status status = tp_buf_status(ctx, &text, "plan");
    if (status == TP_OK) status = tp_cli_print(ctx, text.data, text.len);
    tp_buf_free(&text);
    return status;
}

/* ---- the command ---- */

/* Opens the run that fits, or the last one that was tried. */
static tp_status open_run(tp_ctx *ctx, tp_cli_recipe *recipe, const struct fit *fit, tp_run **run)
{
    tp_train_options options = {.dry_run = true};
    struct tp_log *log = ctx->log;
    tp_status status;
    for (;;) {
        status = tp_run_open(ctx, recipe->recipe, &recipe->config, &options, run);
        ctx->log = NULL; /* what is to be said of the data has been said */
        const tp_plan *plan = status == TP_OK ? tp_run_plan(*run) : NULL;
        if (status != TP_OK || fit->bytes == 0 || plan->peak <= fit->bytes || !change(&recipe->config, plan)) break;
        status = tp_run_close(*run, TP_OK);
        if (status != TP_OK) break;
    }
    ctx->log = log;
    return status;
}

static tp_status read_fit(tp_ctx *ctx, const tp_args *args, struct fit *fit)
{
    const char *size = tp_args_value(args, "fit");
    if (size == NULL || tp_parse_size(size, &fit->bytes)) return TP_OK;
    return tp_fail(ctx, TP_INVALID, "--fit: expected a size such as 8GiB, got \"%s\"", size);
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    static const char *const optional[] = {"output_dir", NULL};
    struct fit fit = {0};
    tp_cli_recipe recipe;
    tp_run *run;
    TP_TRY(read_fit(ctx, args, &fit));
    TP_TRY(tp_cli_recipe_open(ctx, args, optional, false, false, &recipe));
    if (fit.bytes > 0) recipe.config.run.memory_limit = fit.bytes;
    fit.train = recipe.config.train;
    fit.max_seq_length = recipe.config.data.max_seq_length;
    tp_status status = tp_cli_open_device(ctx, recipe.config.run.device, recipe.config.run.threads);
    if (status == TP_OK) status = open_run(ctx, &recipe, &fit, &run);
    if (status == TP_OK) {
        status = tp_run_estimate(run);
        if (status == TP_OK) status = print_plan(ctx, args, run, &fit, &recipe.config);
        if (status == TP_OK) status = tp_run_fits(run);
        status = tp_run_close(run, status);
    }
    tp_cli_recipe_close(&recipe);
    return status;
}

static const tp_flag flags[] = {
    {"fit", "SIZE", false, false, "what to change so that it fits into SIZE, such as 8GiB"}, TP_FLAG_JSON, TP_FLAG_END};

const tp_command tp_command_plan = {"plan",
                                    "RECIPE [key=value ...] [--fit SIZE] [--json]",
                                    "memory, FLOPs and time per step, before any weight is read",
                                    flags,
                                    1,
                                    1000,
                                    run};
