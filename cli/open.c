/* Opening what commands work on. */
#include "cli/open.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"

/* Notes, and errors if there are several: main prints the one that decides, and one alone is not said twice. */
static void print_problems(const tp_problems *problems)
{
    for (size_t i = 0; i < problems->n; i++) {
        bool note = problems->items[i].status == TP_OK;
        if (note || problems->n_errors > 1) fprintf(stderr, "%s%s\n", note ? "note: " : "", problems->items[i].text);
    }
    if (problems->n_left_out > 0) fprintf(stderr, "... and %zu more problems\n", problems->n_left_out);
}

static tp_status check(tp_ctx *ctx, const tp_args *args, const char *const *optional, bool check_output, bool resumes,
                       tp_cli_recipe *r, tp_problems *problems)
{
    tp_recipe_options options = {.schema = &tp_recipe_schema,
                                 .overrides = args->positional + 1,
                                 .n_overrides = args->n_positional - 1,
                                 .optional = optional};
    const char *path = args->positional[0];
    if (strchr(path, '=') != NULL && !tp_path_exists(path))
        return tp_fail(ctx, TP_INVALID, "\"%s\" stands where RECIPE belongs: first the recipe's file, then key=value", path);
    TP_TRY(tp_recipe_load(ctx, path, &options, &r->config, problems, &r->recipe));
    TP_TRY(tp_config_available(ctx, r->recipe, &r->config, problems));
    TP_TRY(tp_recipe_check_inputs(ctx, r->recipe, problems));
    TP_TRY(tp_config_check_splits(ctx, r->recipe, &r->config, problems));
    if (!check_output) return TP_OK;
    if (resumes) r->config.output.resume_from_checkpoint = "auto"; /* the flag stands for the key */
    return tp_config_check_output(ctx, r->recipe, &r->config, problems);
}

tp_status tp_cli_recipe_open(tp_ctx *ctx, const tp_args *args, const char *const *optional, bool check_output, bool resumes,
                             tp_cli_recipe *r)
{
    tp_problems problems = {0};
    *r = (tp_cli_recipe){0};
    tp_status status = check(ctx, args, optional, check_output, resumes, r, &problems);
    print_problems(&problems);
    tp_problems_free(&problems);
    if (status != TP_OK) tp_cli_recipe_close(r);
    return status;
}

void tp_cli_recipe_close(tp_cli_recipe *r)
{
    tp_recipe_free(r->recipe);
    *r = (tp_cli_recipe){0};
}

tp_status tp_cli_model_open(tp_ctx *ctx, const tp_args *args, const char *path, tp_cli_model *opened)
{
    tp_model_options options = {.check_weights = true};
    const char *adapter = tp_args_value(args, "adapter");
    *opened = (tp_cli_model){0};
    TP_TRY(tp_cli_device(ctx, args));
    TP_TRY(tp_cli_precision(ctx, args, &options.precision));
    TP_TRY(tp_model_open(ctx, path, &options, &opened->model));
    if (adapter == NULL) return TP_OK;
    tp_status status = tp_adapter_open(ctx, opened->model, adapter, tp_args_has(args, "force"), &opened->adapter);
    if (status != TP_OK) tp_cli_model_close(opened);
    return status;
}

void tp_cli_model_close(tp_cli_model *opened)
{
    tp_adapter_close(opened->adapter);
    tp_model_free(opened->model);
    *opened = (tp_cli_model){0};
}

tp_status tp_cli_check_out_file(tp_ctx *ctx, const char *flag, const char *path)
{
    struct stat info;
    const char *slash = path != NULL ? strrchr(path, '/') : NULL;
    if (path == NULL) return TP_OK;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return tp_fail(ctx, TP_IO_WRITE, "--%s: %s exists and is not a regular file", flag, path);
    char *folder = slash != NULL ? tp_strndup(ctx, path, slash > path ? (size_t)(slash - path) : 1) : tp_strdup(ctx, ".");
    if (folder == NULL) return TP_NOMEM;
    tp_status status = TP_OK;
    if (!tp_path_is_folder(folder))
        status = tp_fail(ctx, TP_IO_WRITE, "--%s: %s: there is no folder %s", flag, path, folder);
    else if (faccessat(AT_FDCWD, folder, W_OK | X_OK, AT_EACCESS) != 0)
        status = tp_fail(ctx, TP_IO_WRITE, "--%s: %s: the folder cannot be written (read-only, or no permission)", flag, path);
    tp_free(folder);
    return status;
}

char *tp_cli_model_file(tp_ctx *ctx, const char *model, const char *file)
{
    if (!tp_path_is_folder(model)) return NULL;
    char *path = tp_path_join(ctx, model, file);
    if (path == NULL || tp_path_exists(path)) return path;
    tp_free(path);
    return NULL;
}
