/* The output folder: one writer, what is in it, where a run goes on, and what it leaves behind. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/version.h"
#include "trainers/run.h"

/* Everything a run writes, by name; checkpoints by prefix. Overwriting removes these and nothing else. */
static const char *const our_folders[] = {"adapter", "best", NULL};
static const char *const our_files[] = {
    "metrics.jsonl", "timing.jsonl", "samples.jsonl", "loss.svg", "recipe.yaml", "plan.json", NULL};

static const char *resume_mode(const tp_run *run)
{
    return run->options.resume != NULL ? run->options.resume : run->config->output.resume_from_checkpoint;
}
static bool resumes(const tp_run *run)
{
    return strcmp(resume_mode(run), "none") != 0;
}

/* ---- the folder ---- */

static tp_status lock_folder(tp_run *run)
{
    char *path = tp_path_join(run->ctx, run->config->output.output_dir, ".lock");
    if (path == NULL) return TP_NOMEM;
    run->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    tp_status status = TP_OK;
    if (run->lock < 0)
        status = tp_fail(run->ctx, TP_IO_WRITE, "%s: %s", path, strerror(errno));
    else if (flock(run->lock, LOCK_EX | LOCK_NB) != 0)
        status = tp_fail(run->ctx, TP_DEVICE, "%s: another process is training into this folder", path);
    tp_free(path);
    return status;
}

static tp_status remove_checkpoints(tp_run *run)
{
    const char *folder = run->config->output.output_dir;
    DIR *dir = opendir(folder);
    if (dir == NULL) return tp_fail(run->ctx, TP_IO_READ, "%s: %s", folder, strerror(errno));
    tp_status status = TP_OK;
    for (struct dirent *entry; status == TP_OK && (entry = readdir(dir)) != NULL;) {
        int64_t step;
        if (!tp_starts_with(entry->d_name, "ckpt-") || !tp_parse_i64(entry->d_name + 5, &step)) continue;
        char *path = tp_path_join(run->ctx, folder, entry->d_name);
        status = path != NULL ? tp_folder_remove(run->ctx, path) : TP_NOMEM;
        tp_free(path);
    }
    closedir(dir);
    return status;
}

static tp_status remove_ours(tp_run *run)
{
    const char *folder = run->config->output.output_dir;
    TP_TRY(remove_checkpoints(run));
    for (const char *const *name = our_folders; *name != NULL; name++) {
        char *path = tp_path_join(run->ctx, folder, *name);
        tp_status status = path == NULL ? TP_NOMEM : tp_path_exists(path) ? tp_folder_remove(run->ctx, path) : TP_OK;
        tp_free(path);
        TP_TRY(status);
    }
    for (const char *const *name = our_files; *name != NULL; name++) {
        char *path = tp_path_join(run->ctx, folder, *name);
        if (path == NULL) return TP_NOMEM;
        (void)unlink(path);
        tp_free(path);
    }
    return TP_OK;
}

static bool adapter_is_there(tp_run *run)
{
    char *path = tp_path_join(run->ctx, run->config->output.output_dir, "adapter/adapter_model.safetensors");
    bool there = path != NULL && tp_path_exists(path);
    tp_free(path);
    return there;
}

/* ---- fingerprints ---- */

static void to_hex(const uint8_t digest[32], char hex[65])
{
    for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
}

/* What "auto" is on this device. */
static int settled_precision(const tp_run *run, const tp_config *c)
{
    if (c->run.precision == TP_PRECISION_TF32) return TP_PRECISION_TF32;
    return run->precision == TP_BF16 ? TP_PRECISION_BF16 : run->precision == TP_F16 ? TP_PRECISION_FP16 : TP_PRECISION_FP32;
}

/* Leaves what shapes the numbers: not where and how often the run writes, nor what it runs on. */
static void neutralise(const tp_run *run, tp_config *c)
{
    c->output = (tp_output_config){.output_dir = "-",
                                   .save_minutes = 0,
                                   .save_total_limit = 1,
                                   .save_optimizer = true,
                                   .resume_from_checkpoint = "none",
                                   .eval_steps = c->output.eval_steps,
                                   .evals_per_epoch = c->output.evals_per_epoch,
                                   .load_best_model_at_end = c->output.load_best_model_at_end,
                                   .metric_for_best_model = c->output.metric_for_best_model,
                                   .early_stopping_patience = c->output.early_stopping_patience,
                                   .logging_steps = 1,
                                   .report_to = c->output.report_to};
    c->data.cache_dir = NULL;
    c->run.threads = 0;
    c->run.memory_limit = 0;
    c->run.device = "auto";
    c->run.precision = settled_precision(run, c);
}

/* Of the resolved recipe. */
static tp_status digest_recipe(tp_run *run, char hex[65])
{
    tp_config c = *run->config;
    tp_buf text;
    uint8_t digest[32];
    neutralise(run, &c);
    tp_buf_init(&text, 0);
    tp_schema_write(&tp_recipe_schema, &c, &text);
    tp_status status = tp_buf_status(run->ctx, &text, "recipe");
    if (status == TP_OK) tp_sha256(text.data, text.len, digest);
    if (status == TP_OK) to_hex(digest, hex);
    tp_buf_free(&text);
    return status;
}

static tp_status fill_identity(tp_run *run, tp_run_state *state)
{
    char text[65 * 3 + 1];
    uint8_t digest[32];
    TP_TRY(digest_recipe(run, state->recipe));
    snprintf(state->data, sizeof state->data, "%.64s", tp_dataset_fingerprint(run->data));
    snprintf(state->base, sizeof state->base, "%.64s", run->shape_model->fingerprint);
    if (run->tokenizer != NULL)
        snprintf(state->tokenizer, sizeof state->tokenizer, "%.64s", tp_tokenizer_identity(run->tokenizer));
    snprintf(state->version, sizeof state->version, "%s", TP_VERSION);
    snprintf(state->device, sizeof state->device, "%s", run->ctx->device->backend->name);
    snprintf(text, sizeof text, "%s%s%s", state->recipe, state->data, state->base);
    tp_sha256(text, strlen(text), digest);
    to_hex(digest, state->run_id);
    return TP_OK;
}

/* " (lora_r, seed)": the keys in which the recipe that stands beside a checkpoint differs; "" if it cannot be told. */
static void list_changed_keys(tp_run *run, const char *checkpoint, char *out, size_t size)
{
    static const char *const optional[] = {"output_dir", NULL};
    const char *slash = strrchr(checkpoint, '/');
    tp_recipe_options options = {.schema = &tp_recipe_schema, .optional = optional};
    tp_problems problems = {0};
    tp_recipe *recipe = NULL;
    tp_config then, now;
    tp_ctx quiet;
    char path[PATH_MAX];
    out[0] = '\0';
    tp_ctx_init(&quiet);
    snprintf(path, sizeof path, "%.*srecipe.yaml", slash != NULL ? (int)(slash - checkpoint) + 1 : 0, checkpoint);
    if (tp_recipe_load(&quiet, path, &options, &then, &problems, &recipe) == TP_OK) {
        size_t n = 0, from = 0;
        neutralise(run, &then);
        now = *run->config;
        neutralise(run, &now);
        for (const char *key; (key = tp_schema_difference(&tp_recipe_schema, &then, &now, &from)) != NULL && n < size;)
            n += (size_t)snprintf(out + n, size - n, "%s%s", n == 0 ? " (" : ", ", key);
        if (n > 0 && n + 1 < size) snprintf(out + n, size - n, ")");
    }
    tp_recipe_free(recipe);
    tp_problems_free(&problems);
}

/* Something that two runs may differ in. */
struct part {
    const char *what;
    bool differs;
    unsigned accept;
};

/* Writes "recipe,data" into list: what differs and was not accepted. */
static void list_differences(const tp_run *run, const struct part *parts, size_t n, char *list, size_t size)
{
    list[0] = '\0';
    for (size_t i = 0; i < n; i++)
        if (parts[i].differs && (run->options.accept & parts[i].accept) == 0)
            snprintf(list + strlen(list), size - strlen(list), "%s%s", list[0] != '\0' ? "," : "", parts[i].what);
}

static tp_status check_identity(tp_run *run, const char *path, const tp_run_state *then, const tp_run_state *now)
{
    const struct part parts[] = {
        {"recipe", strcmp(then->recipe, now->recipe) != 0, TP_ACCEPT_RECIPE},
        {"data", strcmp(then->data, now->data) != 0, TP_ACCEPT_DATA},
        {"base", strcmp(then->base, now->base) != 0, TP_ACCEPT_BASE},
        {"version", strcmp(then->version, now->version) != 0, TP_ACCEPT_VERSION},
        {"devices", strcmp(then->device, now->device) != 0, TP_ACCEPT_DEVICES},
    };
    char list[128], keys[256] = "";
    list_differences(run, parts, sizeof parts / sizeof *parts, list, sizeof list);
    if (list[0] == '\0') return TP_OK;
    if (tp_starts_with(list, "recipe")) list_changed_keys(run, path, keys, sizeof keys);
    return tp_fail(run->ctx, TP_CHECKPOINT, "%s was made with other settings: %s changed%s; --accept=%s goes on all the same",
                   path, list, keys, list);
}

/* What an adapter does not say cannot differ. */
static bool differs(const char *then, const char *now)
{
    return then[0] != '\0' && strcmp(then, now) != 0;
}

/* The run that made options.like had the same files, version and kind of device. */
static tp_status check_like(tp_run *run)
{
    const tp_run_state *now = &run->state;
    tp_adapter_made then;
    char list[128];
    if (run->options.like == NULL) return TP_OK;
    TP_TRY(tp_adapter_read_made(run->ctx, run->options.like, &then));
    const struct part parts[] = {
        {"data", differs(then.data, now->data) || differs(then.tokenizer, now->tokenizer), TP_ACCEPT_DATA},
        {"base", differs(then.base, now->base), TP_ACCEPT_BASE},
        {"version", differs(then.version, now->version), TP_ACCEPT_VERSION},
        {"devices", differs(then.device, now->device), TP_ACCEPT_DEVICES},
    };
    list_differences(run, parts, sizeof parts / sizeof *parts, list, sizeof list);
    if (list[0] == '\0') return TP_OK;
    return tp_fail(run->ctx, TP_CHECKPOINT,
                   "--like %s: that adapter was made from something else: %s changed; --accept=%s "
                   "trains all the same",
                   run->options.like, list, list);
}

/* ---- where to go on ---- */

/* The checkpoint to resume from (tp_free), or NULL for a fresh start. */
static tp_status find_checkpoint(tp_run *run, char **path)
{
    const char *mode = resume_mode(run);
    *path = NULL;
    if (!resumes(run)) return TP_OK;
    if (strcmp(mode, "auto") == 0) return tp_checkpoint_newest(run->ctx, run->config->output.output_dir, path);
    TP_TRY(tp_publish_verify(run->ctx, mode, NULL));
    *path = tp_strdup(run->ctx, mode);
    return *path != NULL ? TP_OK : TP_NOMEM;
}

static tp_status read_checkpoint(tp_run *run, const char *path)
{
    tp_run_state now = {0}, then;
    TP_TRY(tp_checkpoint_read_state(run->ctx, path, &then));
    TP_TRY(fill_identity(run, &now));
    run->state = then;
    bool complete = (then.step >= run->steps && !then.eval_pending) || tp_run_stops_early(run);
    run->finished = complete && adapter_is_there(run) && strcmp(resume_mode(run), "auto") == 0;
    if (!run->finished) TP_TRY(check_identity(run, path, &then, &now));
    memcpy(run->state.run_id, now.run_id, sizeof now.run_id);
    memcpy(run->state.recipe, now.recipe, sizeof now.recipe);
    memcpy(run->state.data, now.data, sizeof now.data);
    memcpy(run->state.base, now.base, sizeof now.base);
    memcpy(run->state.tokenizer, now.tokenizer, sizeof now.tokenizer);
    memcpy(run->state.version, now.version, sizeof now.version);
    memcpy(run->state.device, now.device, sizeof now.device);
    return TP_OK;
}

static tp_status write_text(tp_run *run, const char *name, tp_buf *text)
{
    char *path = tp_path_join(run->ctx, run->config->output.output_dir, name);
    tp_status status = path != NULL ? tp_buf_status(run->ctx, text, name) : TP_NOMEM;
    if (status == TP_OK) status = tp_file_write(run->ctx, path, text->data, text->len);
    tp_free(path);
    tp_buf_free(text);
    return status;
}

void tp_run_write_recipe(const tp_run *run, tp_buf *out)
{
    tp_config c = *run->config;
    c.run.precision = settled_precision(run, &c);
    tp_schema_write(&tp_recipe_schema, &c, out);
}

static tp_status write_settings(tp_run *run)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_run_write_recipe(run, &text);
    TP_TRY(write_text(run, "recipe.yaml", &text));
    tp_plan_write_json(&run->plan, &text);
    return write_text(run, "plan.json", &text);
}

tp_status tp_run_prepare_folder(tp_run *run)
{
    const tp_output_config *c = &run->config->output;
    char *path = NULL;
    TP_TRY(fill_identity(run, &run->state));
    TP_TRY(check_like(run));
    TP_TRY(tp_folder_make(run->ctx, c->output_dir));
    TP_TRY(lock_folder(run));
    TP_TRY(tp_checkpoint_sweep(run->ctx, c->output_dir));
    TP_TRY(find_checkpoint(run, &path));
    tp_status status = path != NULL ? read_checkpoint(run, path) : TP_OK;
    if (status == TP_OK && path == NULL && c->overwrite && !resumes(run)) status = remove_ours(run);
    tp_free(path);
    if (status != TP_OK || run->finished) return status;
    return write_settings(run);
}

tp_status tp_run_resume(tp_run *run)
{
    char *path;
    if (run->finished) {
        tp_note(run->ctx, "%s: the run had finished at step %lld; nothing to do", run->config->output.output_dir,
                (long long)run->state.step);
        return TP_OK;
    }
    TP_TRY(tp_metrics_open(run->ctx, run->config->output.output_dir, run->state.step, run->options.progress, &run->metrics));
    if (run->samples != NULL)
        TP_TRY(tp_metrics_open_samples(run->ctx, run->metrics, run->config->output.output_dir, run->state.step));
    TP_TRY(find_checkpoint(run, &path));
    if (path == NULL) return TP_OK;
    tp_status status = tp_checkpoint_load(run->ctx, path, run->lora, run->options.fresh_optimizer ? NULL : run->optim);
    if (status == TP_OK) {
        run->optim->steps = run->options.fresh_optimizer ? 0 : run->state.updates;
        tp_metrics_say(run->metrics, "resuming from %s: step %lld of %lld", path, (long long)run->state.step,
                       (long long)run->steps);
    }
    tp_free(path);
    return status;
}

/* ---- what is left behind ---- */

tp_status tp_run_save(tp_run *run, const char *why)
{
    const tp_output_config *c = &run->config->output;
    tp_ctx *ctx = run->ctx;
    tp_status status =
        tp_checkpoint_save(ctx, c->output_dir, run->lora, run->model, c->save_optimizer ? run->optim : NULL, &run->state);
    run->last_save = tp_now();
    if (status == TP_OK) {
        tp_checkpoint_rotate(ctx, c->output_dir, run->state.run_id, c->save_total_limit);
        return TP_OK;
    }
    if (strcmp(why, "interval") == 0) { /* the run goes on; the older checkpoint stands */
        char bytes[32];
        uint64_t need = (uint64_t)run->lora->params.elements * sizeof(float) * (uint64_t)(1 + run->plan.shape.optimizer_states);
        tp_warn(ctx, "no checkpoint at step %lld (%s): %s; the run goes on and tries again", (long long)run->state.step,
                tp_format_bytes(need, bytes), ctx->message);
        tp_ctx_clear(ctx);
    }
    return status;
}

/* The best adapter's values in place of the last ones. */
static tp_status load_best(tp_run *run)
{
    if (!run->config->output.load_best_model_at_end || run->held_out == NULL || run->state.best_step == run->state.step ||
        isnan(run->state.best_metric))
        return TP_OK;
    char *path = tp_path_join(run->ctx, run->config->output.output_dir, "best/adapter_model.safetensors");
    tp_status status = path != NULL ? tp_adapter_load_values(run->ctx, path, &run->lora->params) : TP_NOMEM;
    tp_free(path);
    if (status == TP_OK)
        tp_metrics_say(run->metrics, "the adapter is the one of step %lld: held-out loss %.4f", (long long)run->state.best_step,
                       run->state.best_metric);
    return status;
}

tp_status tp_run_finish(tp_run *run)
{
    const tp_output_config *c = &run->config->output;
    char problem[TP_MESSAGE_BYTES];
    tp_status saved = tp_run_save(run, "end");
    snprintf(problem, sizeof problem, "%s", run->ctx->message);
    tp_ctx_clear(run->ctx); /* the adapter is what the run was for: it is tried even so */
    TP_TRY(load_best(run));
    TP_TRY(tp_run_publish_adapter(run, "adapter"));
    if (c->plot_loss && tp_plot_loss(run->ctx, c->output_dir) != TP_OK) {
        tp_warn(run->ctx, "no loss.svg: %s", run->ctx->message);
        tp_ctx_clear(run->ctx);
    }
    if (run->options.progress) tp_metrics_say(run->metrics, "adapter: %s/adapter", c->output_dir);
    return saved == TP_OK ? TP_OK
                          : tp_fail(run->ctx, saved, "%s/adapter is complete, but the last checkpoint is missing: %s",
                                    c->output_dir, problem);
}
