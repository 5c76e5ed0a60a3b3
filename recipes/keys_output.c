/* What a run leaves behind, and what follows it. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "recipes/keys.h"

#define AT(member)   offsetof(tp_config, output.member)
#define IN(member)   offsetof(tp_serve_adapter_config, member)
#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const report_words[] = {"jsonl", "tensorboard", NULL};
static const char *const resume_words[] = {"none", "auto", NULL};
static const char *const dtype_words[] = {"base", "fp32", "bf16", "fp16", NULL};
static const char *const format_words[] = {"safetensors", "gguf", NULL};

static bool has_merge(const void *config)
{
    return ((const tp_config *)config)->output.merge.present;
}
static bool has_serve(const void *config)
{
    return ((const tp_config *)config)->output.serve.present;
}
static bool has_samples(const void *config)
{
    return ((const tp_config *)config)->output.sample_prompts.n > 0;
}
static const tp_when samples = {"recipes with sample_prompts", "sample_prompts", has_samples};
static const tp_when merge = {"recipes with a merge block", NULL, has_merge};
static const tp_when serve = {"recipes with a serve block", NULL, has_serve};

static const tp_field adapter_fields[] = {
    {.key = "name", .type = TP_FIELD_STRING, .offset = IN(name), .required = true, .help = "the `model` of requests"},
    {.key = "path", .type = TP_FIELD_INPUT, .offset = IN(path), .required = true, .help = "adapter folder"},
};

static const tp_section adapter_section = {
    .title = "Served adapter",
    .fields = adapter_fields,
    .n_fields = COUNT(adapter_fields),
    .item_bytes = sizeof(tp_serve_adapter_config),
};

static const tp_field fields[] = {
    {.key = "output_dir",
     .type = TP_FIELD_OUTPUT,
     .offset = AT(output_dir),
     .required = true,
     .help = "folder for everything that the run writes"},
    {.key = "overwrite",
     .type = TP_FIELD_BOOL,
     .offset = AT(overwrite),
     .otherwise = "false",
     .help = "use an existing folder; removes only files of ours",
     .aliases = (const tp_alias[]){{.name = "overwrite_output_dir"}, {0}}},
    {.key = "save_steps",
     .type = TP_FIELD_INT,
     .offset = AT(save_steps),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "checkpoint every so many steps; 0: off",
     .aliases = (const tp_alias[]){{.name = "save_every"}, {0}}},
    {.key = "saves_per_epoch",
     .type = TP_FIELD_INT,
     .offset = AT(saves_per_epoch),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "checkpoints in each epoch; 0: off"},
    {.key = "save_minutes",
     .type = TP_FIELD_FLOAT,
     .offset = AT(save_minutes),
     .otherwise = "15",
     .range = TP_FROM(0),
     .help = "checkpoint after so many minutes; 0: off"},
    {.key = "save_total_limit",
     .type = TP_FIELD_INT,
     .offset = AT(save_total_limit),
     .otherwise = "2",
     .range = TP_FROM(1),
     .help = "checkpoints to keep",
     .aliases = (const tp_alias[]){{.name = "keep_last_n_checkpoints"}, {0}}},
    {.key = "save_optimizer",
     .type = TP_FIELD_BOOL,
     .offset = AT(save_optimizer),
     .otherwise = "true",
     .help = "checkpoints can be resumed from",
     .aliases = (const tp_alias[]){{.name = "save_only_model", .from = "!"}, {0}}},
    {.key = "resume_from_checkpoint",
     .type = TP_FIELD_INPUT,
     .offset = AT(resume_from_checkpoint),
     .otherwise = "none",
     .words = resume_words,
     .help = "auto: the newest valid one; none there yet: starts afresh in the folder",
     .aliases = (const tp_alias[]){{.name = "auto_resume_from_checkpoints", .from = "true", .to = "auto"},
                                   {.name = "auto_resume_from_checkpoints", .from = "false", .to = "none"},
                                   {0}}},
    {.key = "eval_steps",
     .type = TP_FIELD_INT,
     .offset = AT(eval_steps),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "evaluate every so many steps; 0: off",
     .aliases = (const tp_alias[]){{.name = "steps_per_eval"}, {0}}},
    {.key = "evals_per_epoch",
     .type = TP_FIELD_INT,
     .offset = AT(evals_per_epoch),
     .otherwise = "1",
     .range = TP_FROM(0),
     .help = "evaluations in each epoch, if there is held-out data"},
    {.key = "load_best_model_at_end",
     .type = TP_FIELD_BOOL,
     .offset = AT(load_best_model_at_end),
     .otherwise = "false",
     .help = "the final adapter is the best one evaluated"},
    {.key = "metric_for_best_model",
     .type = TP_FIELD_STRING,
     .offset = AT(metric_for_best_model),
     .otherwise = "eval_loss",
     .help = "what is best"},
    {.key = "early_stopping_patience",
     .type = TP_FIELD_INT,
     .offset = AT(early_stopping_patience),
     .otherwise = "0",
     .range = TP_FROM(0),
     .help = "evaluations without a better one that end the run; 0: off",
     .aliases = (const tp_alias[]){{.name = "early_stopping_steps"}, {0}}},
    {.key = "logging_steps",
     .type = TP_FIELD_INT,
     .offset = AT(logging_steps),
     .otherwise = "1",
     .range = TP_FROM(1),
     .help = "progress every so many steps",
     .aliases = (const tp_alias[]){{.name = "log_every_n_steps"}, {.name = "steps_per_report"}, {0}}},
    {.key = "report_to",
     .type = TP_FIELD_ENUMS,
     .offset = AT(report_to),
     .otherwise = "jsonl",
     .words = report_words,
     .help = "logs to write"},
    {.key = "plot_loss", .type = TP_FIELD_BOOL, .offset = AT(plot_loss), .otherwise = "true", .help = "draws `loss.svg`"},
    {.key = "sample_prompts",
     .type = TP_FIELD_STRINGS,
     .offset = AT(sample_prompts),
     .otherwise = "[]",
     .help = "texts to continue while training, into `samples.jsonl`"},
    {.key = "sample_steps",
     .type = TP_FIELD_INT,
     .offset = AT(sample_steps),
     .otherwise = "0",
     .range = TP_FROM(0),
     .when = &samples,
     .help = "every so many steps, and at the end; 0: at the end only"},
    {.key = "merge.out",
     .type = TP_FIELD_OUTPUT,
     .offset = AT(merge.out),
     .required = true,
     .when = &merge,
     .help = "folder for the base with the adapter folded in, as `tapeft merge` writes it",
     .aliases = (const tp_alias[]){{.name = "export_dir"}, {0}}},
    {.key = "merge.dtype",
     .type = TP_FIELD_ENUM,
     .offset = AT(merge.dtype),
     .otherwise = "base",
     .words = dtype_words,
     .when = &merge,
     .help = "type of its tensors"},
    {.key = "merge.format",
     .type = TP_FIELD_ENUM,
     .offset = AT(merge.format),
     .otherwise = "safetensors",
     .words = format_words,
     .when = &merge,
     .help = "kind of file"},
    {.key = "merge.proof",
     .type = TP_FIELD_INPUT,
     .offset = AT(merge.proof),
     .when = &merge,
     .help = "data on which merged and unmerged are compared"},
    {.key = "serve.host",
     .type = TP_FIELD_STRING,
     .offset = AT(serve.host),
     .otherwise = "127.0.0.1",
     .when = &serve,
     .help = "address"},
    {.key = "serve.port",
     .type = TP_FIELD_INT,
     .offset = AT(serve.port),
     .otherwise = "8080",
     .range = TP_RANGE(0, 65535),
     .when = &serve,
     .help = "0: any that is free"},
    {.key = "serve.adapters",
     .type = TP_FIELD_BLOCKS,
     .offset = AT(serve.adapters),
     .otherwise = "[]",
     .block = &adapter_section,
     .when = &serve,
     .help = "adapters to load at the start"},
    {.key = "serve.adapter_dir",
     .type = TP_FIELD_INPUT,
     .offset = AT(serve.adapter_dir),
     .when = &serve,
     .help = "folder from which requests may load adapters"},
    {.key = "serve.max_adapters",
     .type = TP_FIELD_INT,
     .offset = AT(serve.max_adapters),
     .otherwise = "16",
     .range = TP_RANGE(1, 65536),
     .when = &serve,
     .help = "adapters on the device at once"},
    {.key = "serve.max_cpu_adapters",
     .type = TP_FIELD_INT,
     .offset = AT(serve.max_cpu_adapters),
     .otherwise = "256",
     .range = TP_RANGE(1, 65536),
     .when = &serve,
     .help = "adapters in host memory at once"},
    {.key = "serve.max_batch",
     .type = TP_FIELD_INT,
     .offset = AT(serve.max_batch),
     .otherwise = "32",
     .range = TP_RANGE(1, 4096),
     .when = &serve,
     .help = "requests in one pass"},
    {.key = "serve.context",
     .type = TP_FIELD_INT,
     .offset = AT(serve.context),
     .otherwise = "4096",
     .range = TP_FROM(8),
     .when = &serve,
     .help = "tokens of one request, with its reply"},
    {.key = "serve.kv_memory",
     .type = TP_FIELD_SIZE,
     .offset = AT(serve.kv_memory),
     .otherwise = "auto",
     .when = &serve,
     .help = "memory for keys and values"},
    {.key = "serve.api_key_file",
     .type = TP_FIELD_INPUT,
     .offset = AT(serve.api_key_file),
     .when = &serve,
     .help = "key of requests"},
    {.key = "serve.admin_key_file",
     .type = TP_FIELD_INPUT,
     .offset = AT(serve.admin_key_file),
     .when = &serve,
     .help = "key of loading and unloading"},
};

static void settle(const tp_recipe *recipe, void *config)
{
    tp_config *c = config;
    c->output.merge.present = tp_recipe_given(recipe, "merge");
    c->output.serve.present = tp_recipe_given(recipe, "serve");
}

static bool holds_data_out(const tp_config *c)
{
    return c->data.test_datasets.n > 0 || c->data.val_set_size.rows > 0 || c->data.val_set_size.fraction > 0;
}

static tp_status check(tp_check *chk, const void *config)
{
    const tp_config *c = config;
    const tp_output_config *o = &c->output;
    if (strcmp(o->resume_from_checkpoint, "auto") == 0 && !o->save_optimizer)
        TP_TRY(tp_check_problem(chk, "save_optimizer",
                                "false leaves nothing that resume_from_checkpoint: auto could resume from"));
    if (holds_data_out(c)) return TP_OK;
    if (o->load_best_model_at_end)
        TP_TRY(tp_check_problem(chk, "load_best_model_at_end", "needs held-out data: test_datasets or val_set_size"));
    if (o->early_stopping_patience > 0)
        TP_TRY(tp_check_problem(chk, "early_stopping_patience", "needs held-out data: test_datasets or val_set_size"));
    if (o->eval_steps > 0) TP_TRY(tp_check_problem(chk, "eval_steps", "needs held-out data: test_datasets or val_set_size"));
    return TP_OK;
}

const tp_section tp_output_section = {
    .title = "Output",
    .fields = fields,
    .n_fields = COUNT(fields),
    .settle = settle,
    .check = check,
};

/* ---- the output folder ---- */

/* Why files cannot be made at `path`, which may not exist yet: NULL if they can. The nearest folder that does
 * exist decides. */
static const char *cannot_write(tp_ctx *ctx, const char *path, tp_status *st)
{
    struct stat info;
    char *at = tp_strdup(ctx, path);
    const char *why = NULL;
    *st = at != NULL ? TP_OK : TP_NOMEM;
    if (at == NULL) return NULL;
    while (stat(at, &info) != 0) {
        char *slash = strrchr(at, '/');
        if (slash == at)
            slash[1] = '\0';
        else if (slash != NULL)
            *slash = '\0';
        else
            at[0] = '.', at[1] = '\0';           /* any path has room for it: it is not empty */
        if (slash == NULL || slash == at) break; /* "/" or ".": there is nothing above */
    }
    if (stat(at, &info) != 0 || !S_ISDIR(info.st_mode))
        why = "stands below a file, not a folder";
    else if (faccessat(AT_FDCWD, at, W_OK | X_OK, AT_EACCESS) != 0)
        why = "cannot be written (read-only, or no permission)";
    tp_free(at);
    return why;
}

static bool is_same_folder(const struct stat *folder, const char *path)
{
    struct stat info;
    return path != NULL && stat(path, &info) == 0 && info.st_dev == folder->st_dev && info.st_ino == folder->st_ino;
}

/* What speaks against the folder, NULL if nothing does. */
static const char *objection(tp_ctx *ctx, const tp_config *config, tp_status *st)
{
    const tp_output_config *o = &config->output;
    struct stat info;
    *st = TP_OK;
    if (stat(o->output_dir, &info) == 0) {
        if (!S_ISDIR(info.st_mode)) return "is a file, expected a folder";
        if (is_same_folder(&info, config->run.base_model)) return "is the model's folder";
        if (is_same_folder(&info, config->run.adapter_path)) return "is the folder of adapter_path";
        if (!o->overwrite && strcmp(o->resume_from_checkpoint, "none") == 0)
            return "exists; set overwrite: true or resume_from_checkpoint: auto, or choose another";
    }
    return cannot_write(ctx, o->output_dir, st);
}

tp_status tp_config_check_output(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config, tp_problems *problems)
{
    char place[512];
    tp_status st;
    if (config->output.output_dir == NULL) return TP_OK; /* a command that writes none */
    const char *why = objection(ctx, config, &st);
    TP_TRY(st);
    if (why != NULL)
        TP_TRY(tp_problems_add(ctx, problems, TP_INVALID, "%s: output_dir: %s %s",
                               tp_recipe_where(recipe, "output_dir", place, sizeof place), config->output.output_dir, why));
    return tp_problems_status(ctx, problems);
}
