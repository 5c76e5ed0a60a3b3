/* tapeft train RECIPE [key=value ...]: signals in, progress out; the work is trainers/. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/mem.h"
#include "cli/open.h"
#include "cli/signals.h"
#include "trainers/metrics.h"
#include "trainers/run.h"

static tp_status read_accept(tp_ctx *ctx, const char *text, unsigned *accept)
{
    static const struct {
        const char *name;
        unsigned bit;
    } names[] = {{"recipe", TP_ACCEPT_RECIPE},
                 {"data", TP_ACCEPT_DATA},
                 {"base", TP_ACCEPT_BASE},
                 {"version", TP_ACCEPT_VERSION},
                 {"devices", TP_ACCEPT_DEVICES}};
    while (text != NULL && *text != '\0') {
        size_t n = strcspn(text, ", "), i = 0;
        while (i < sizeof names / sizeof *names && (strlen(names[i].name) != n || memcmp(names[i].name, text, n) != 0)) i++;
        if (i == sizeof names / sizeof *names)
            return tp_fail(ctx, TP_INVALID, "--accept: expected recipe, data, base, version, devices, got \"%.*s\"", (int)n,
                           text);
        *accept |= names[i].bit;
        text += n + strspn(text + n, ", ");
    }
    return TP_OK;
}

/* ---- what is about to happen ---- */

/* Adapted modules that differ in their layer alone. */
struct kind {
    const char *name; /* "q_proj" */
    const tp_lora_module *first;
    int64_t n, parameters;
};

static bool is_of_kind(const struct kind *kind, const tp_lora_module *m)
{
    const tp_matrix *ours = &m->module->weight, *theirs = &kind->first->module->weight;
    return strcmp(kind->name, tp_module_name(m->module)) == 0 && m->rank == kind->first->rank &&
           m->alpha == kind->first->alpha && ours->rows == theirs->rows && ours->cols == theirs->cols;
}

static size_t sort_kinds(const tp_lora *lora, struct kind *kinds)
{
    size_t n = 0;
    for (size_t i = 0; i < lora->n_modules; i++) {
        const tp_lora_module *m = &lora->modules[i];
        size_t k = 0;
        while (k < n && !is_of_kind(&kinds[k], m)) k++;
        if (k == n) kinds[n++] = (struct kind){.name = tp_module_name(m->module), .first = m};
        kinds[k].n++;
        kinds[k].parameters += m->rank * (m->module->weight.rows + m->module->weight.cols);
    }
    return n;
}

static tp_status write_modules(tp_ctx *ctx, const tp_lora *lora, tp_buf *out)
{
    struct kind *kinds = tp_alloc(ctx, lora->n_modules, sizeof *kinds);
    if (kinds == NULL) return TP_NOMEM;
    size_t n = sort_kinds(lora, kinds);
    tp_buf_printf(out, "%-12s %7s %14s %5s %8s %11s\n", "module", "layers", "out x in", "rank", "scaling", "parameters");
    for (size_t i = 0; i < n; i++) {
        const tp_lora_module *m = kinds[i].first;
        char shape[48];
        snprintf(shape, sizeof shape, "%lld x %lld", (long long)m->module->weight.rows, (long long)m->module->weight.cols);
        tp_buf_printf(out, "%-12s %7lld %14s %5lld %8.4g %11lld\n", kinds[i].name, (long long)kinds[i].n, shape,
                      (long long)m->rank, (double)m->term.scaling, (long long)kinds[i].parameters);
    }
    tp_free(kinds);
    return TP_OK;
}

/* Results go to stdout: of a dry run the plan is the result. */
static tp_status print_beginning(const tp_run *run)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_printf(&text, "device %s, precision %s\n", run->ctx->device->backend->name,
                  run->precision == TP_BF16  ? "bf16"
                  : run->precision == TP_F16 ? "fp16"
                                             : "fp32");
    tp_status status = run->lora != NULL ? write_modules(run->ctx, run->lora, &text) : TP_OK;
    tp_plan_write_text(tp_run_plan(run), &text);
    if (status == TP_OK) status = tp_buf_status(run->ctx, &text, "plan");
    if (status == TP_OK && run->options.dry_run)
        status = tp_cli_print(run->ctx, text.data, text.len);
    else if (status == TP_OK)
        fputs(tp_buf_cstr(&text), stderr);
    tp_buf_free(&text);
    return status;
}

/* ---- --like ---- */

/* The recipe that made an adapter: in its folder, or, of a checkpoint, in the run's. */
static tp_status find_recipe(tp_ctx *ctx, const char *adapter, char **path)
{
    static const char *const places[] = {"recipe.yaml", "../recipe.yaml"};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        *path = tp_path_join(ctx, adapter, places[i]);
        if (*path == NULL || tp_path_exists(*path)) return ctx->status;
        tp_free(*path);
    }
    *path = NULL;
    if (!tp_path_is_folder(adapter)) return tp_fail(ctx, TP_IO_READ, "--like: there is no folder %s", adapter);
    return tp_fail(ctx, TP_IO_READ, "--like: %s: no recipe.yaml says how it was made", adapter);
}

static bool is_beneath(const char *path, const char *folder)
{
    char inner[PATH_MAX], outer[PATH_MAX];
    if (realpath(path, inner) == NULL || realpath(folder, outer) == NULL) return false;
    size_t n = strlen(outer);
    return strncmp(inner, outer, n) == 0 && (inner[n] == '/' || inner[n] == '\0');
}

/* The run needs a folder of its own: the recipe names the one that the adapter was made in. */
static tp_status check_new_folder(tp_ctx *ctx, const tp_args *args)
{
    const char *adapter = tp_args_value(args, "like"), *folder = NULL;
    for (size_t i = 0; i < args->n_positional; i++)
        if (tp_starts_with(args->positional[i], "output_dir=")) folder = strchr(args->positional[i], '=') + 1;
    if (folder == NULL) return tp_fail(ctx, TP_INVALID, "--like: name a folder for the new run: output_dir=DIR");
    if (strchr(args->positional[0], '=') == NULL && args->positional[0][0] != '~')
        return tp_fail(ctx, TP_INVALID, "--like takes the adapter's own recipe; \"%s\" is one too many", args->positional[0]);
    if (is_beneath(adapter, folder))
        return tp_fail(ctx, TP_INVALID, "output_dir: %s holds the adapter that --like repeats; name another folder", folder);
    return TP_OK;
}

/* All words are overrides of that recipe. */
static tp_status open_like(tp_ctx *ctx, const tp_args *args, bool check_output, bool resume, tp_cli_recipe *recipe)
{
    char *path = NULL;
    tp_args with = *args;
    TP_TRY(check_new_folder(ctx, args));
    TP_TRY(find_recipe(ctx, tp_args_value(args, "like"), &path));
    with.n_positional++;
    with.positional = tp_alloc(ctx, with.n_positional, sizeof *with.positional);
    tp_status status = with.positional != NULL ? TP_OK : TP_NOMEM;
    if (status == TP_OK) {
        with.positional[0] = path;
        memcpy(with.positional + 1, args->positional, args->n_positional * sizeof *with.positional);
        status = tp_cli_recipe_open(ctx, &with, NULL, check_output, resume, recipe);
    }
    tp_free(with.positional);
    tp_free(path);
    return status;
}

/* ---- the command ---- */

static tp_status run_training(tp_ctx *ctx, const tp_cli_recipe *recipe, const tp_train_options *options)
{
    tp_run *run;
    TP_TRY(tp_run_open(ctx, recipe->recipe, &recipe->config, options, &run));
    tp_status status = options->dry_run ? tp_run_estimate(run) : TP_OK;
    if (status != TP_OK) return tp_run_close(run, status);
    status = run->finished || !(options->progress || options->dry_run) ? TP_OK : print_beginning(run);
    if (status == TP_OK) status = tp_run_fits(run);
    return tp_run_close(run, status == TP_OK ? tp_run_train(run) : status);
}

/* Flags about resuming in a run that begins afresh are a mistake, most likely a forgotten --resume. */
static tp_status check_resuming(tp_ctx *ctx, const tp_args *args, const tp_cli_recipe *recipe)
{
    static const char *const flags_of_resuming[] = {"fresh-optimizer", "accept"};
    bool like = tp_args_has(args, "like");
    if (tp_args_has(args, "resume") || strcmp(recipe->config.output.resume_from_checkpoint, "none") != 0) return TP_OK;
    for (size_t i = 0; i < sizeof flags_of_resuming / sizeof *flags_of_resuming; i++)
        if (tp_args_has(args, flags_of_resuming[i]) && !(like && strcmp(flags_of_resuming[i], "accept") == 0))
            return tp_fail(ctx, TP_INVALID, "--%s: without effect, since nothing is resumed; add --resume",
                           flags_of_resuming[i]);
    return TP_OK;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    bool resume = tp_args_has(args, "resume");
    const char *from = tp_args_value(args, "resume");
    tp_train_options options = {.resume = resume ? (from != NULL ? from : "auto") : NULL,
                                .fresh_optimizer = tp_args_has(args, "fresh-optimizer"),
                                .like = tp_args_value(args, "like"),
                                .force = tp_args_has(args, "force"),
                                .dry_run = tp_args_has(args, "dry-run"),
                                .dump_gradients = tp_args_value(args, "dump-gradients"),
                                .stop = tp_cli_catch_stop(),
                                .save = tp_cli_catch_save(),
                                .progress = !tp_args_has(args, "quiet"),
                                .process_start = tp_now()};
    tp_cli_recipe recipe;
    for (size_t i = 0; tp_args_value_at(args, "accept", i) != NULL; i++)
        TP_TRY(read_accept(ctx, tp_args_value_at(args, "accept", i), &options.accept));
    TP_TRY(tp_cli_check_out_file(ctx, "dump-gradients", options.dump_gradients));
    TP_TRY(options.like != NULL ? open_like(ctx, args, !options.dry_run, resume, &recipe)
                                : tp_cli_recipe_open(ctx, args, NULL, !options.dry_run, resume, &recipe));
    tp_status status = check_resuming(ctx, args, &recipe);
    if (status == TP_OK) status = run_training(ctx, &recipe, &options);
    tp_cli_recipe_close(&recipe);
    return status;
}

static const tp_flag flags[] = {
    {"dry-run", NULL, false, false, "check shapes and print the plan; write nothing"},
    {"resume", "CKPT", true, false, "go on from the newest checkpoint, or from the one named"},
    {"fresh-optimizer", NULL, false, false, "resume without the optimizer's state"},
    {"like", "ADAPTER", false, false,
     "repeat the run that made an adapter, with output_dir=DIR and other keys in place of RECIPE"},
    {"accept", "WHAT", false, true, "what may differ on resume, and with --like: recipe, data, base, version, devices"},
    {"dump-gradients", "FILE", false, false, "write the gradients of step 1 before clipping"},
    {"quiet", NULL, false, false, "no plan and no progress on stderr"},
    TP_FLAG_FORCE,
    TP_FLAG_END,
};

const tp_command tp_command_train = {"train",
                                     "RECIPE [key=value ...] [flags] | --like ADAPTER output_dir=DIR [key=value ...]",
                                     "train an adapter from a recipe",
                                     flags,
                                     1,
                                     1000,
                                     run};
