/* Saving and finding checkpoints. The protocol (temporary folder, fsync, manifest, verify, rename) is base/file.h's publish. */
#include "trainers/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/version.h"

#define PREFIX        "ckpt-"
#define STATE_VERSION 1

/* ---- state.json ---- */

static void put_f64(tp_buf *out, const char *key, double value)
{
    tp_buf_printf(out, ",\n  \"%s\": ", key);
    tp_json_write_f64(out, value, 17); /* NaN becomes null */
}

static void write_state(const tp_run_state *s, tp_buf *out)
{
    tp_buf_printf(out,
                  "{\n  \"format\": %d,\n  \"step\": %lld,\n  \"updates\": %lld,\n  \"skipped_in_row\": %lld,\n  "
                  "\"over_threshold\": %lld",
                  STATE_VERSION, (long long)s->step, (long long)s->updates, (long long)s->skipped_in_row,
                  (long long)s->over_threshold);
    put_f64(out, "loss_mean", s->loss_mean);
    put_f64(out, "loss_var", s->loss_var);
    put_f64(out, "best_metric", s->best_metric);
    if (s->scale.value > 0)
        tp_buf_printf(out, ",\n  \"loss_scale\": %.17g,\n  \"loss_scale_streak\": %lld", s->scale.value,
                      (long long)s->scale.streak);
    tp_buf_printf(out,
                  ",\n  \"loss_count\": %lld,\n  \"best_step\": %lld,\n  \"evals_without_gain\": %lld,\n  \"eval_pending\": %s",
                  (long long)s->loss_count, (long long)s->best_step, (long long)s->evals_without_gain,
                  s->eval_pending ? "true" : "false");
    tp_buf_printf(out,
                  ",\n  \"run_id\": \"%s\",\n  \"recipe\": \"%s\",\n  \"data\": \"%s\",\n  \"base\": \"%s\",\n  \"tokenizer\": "
                  "\"%s\",\n  \"version\": \"%s\",\n  \"device\": \"%s\"\n}\n",
                  s->run_id, s->recipe, s->data, s->base, s->tokenizer, s->version, s->device);
}

static tp_status read_text(tp_ctx *ctx, const tp_json_doc *doc, const char *key, char *out, size_t size)
{
    tp_span text;
    TP_TRY(tp_json_need_string(ctx, doc, tp_json_root(doc), key, true, &text));
    if (text.len >= size) return tp_fail(ctx, TP_CHECKPOINT, "state.json: %s is too long", key);
    memcpy(out, text.data, text.len);
    out[text.len] = '\0';
    return TP_OK;
}

static tp_status parse_state(tp_ctx *ctx, const tp_json_doc *doc, tp_run_state *s)
{
    const tp_json *root = tp_json_root(doc);
    int64_t format = 0;
    *s = (tp_run_state){.best_metric = NAN};
    TP_TRY(tp_json_need_i64(ctx, doc, root, "format", true, 1, INT32_MAX, &format));
    if (format > STATE_VERSION)
        return tp_fail(ctx, TP_CHECKPOINT, "state.json: format %lld, this version reads up to %d", (long long)format,
                       STATE_VERSION);
    TP_TRY(tp_json_need_i64(ctx, doc, root, "step", true, 0, INT64_MAX, &s->step));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "updates", true, 0, INT64_MAX, &s->updates));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "skipped_in_row", true, 0, INT64_MAX, &s->skipped_in_row));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "over_threshold", true, 0, INT64_MAX, &s->over_threshold));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "loss_count", true, 0, INT64_MAX, &s->loss_count));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "best_step", true, 0, INT64_MAX, &s->best_step));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "evals_without_gain", true, 0, INT64_MAX, &s->evals_without_gain));
    TP_TRY(tp_json_need_f64(ctx, doc, root, "loss_mean", true, -1e300, 1e300, &s->loss_mean));
    TP_TRY(tp_json_need_f64(ctx, doc, root, "loss_var", true, -1e300, 1e300, &s->loss_var));
    TP_TRY(tp_json_need_f64(ctx, doc, root, "best_metric", false, -1e300, 1e300, &s->best_metric));
    TP_TRY(tp_json_need_bool(ctx, doc, root, "eval_pending", false, &s->eval_pending));
    TP_TRY(tp_json_need_f64(ctx, doc, root, "loss_scale", false, 0, TP_LOSS_SCALE_MOST, &s->scale.value));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "loss_scale_streak", false, 0, TP_LOSS_SCALE_INTERVAL, &s->scale.streak));
    if (!tp_loss_scale_valid(&s->scale))
        return tp_fail(ctx, TP_CHECKPOINT, "state.json: loss_scale %g with a streak of %lld steps", s->scale.value,
                       (long long)s->scale.streak);
    TP_TRY(read_text(ctx, doc, "run_id", s->run_id, sizeof s->run_id));
    TP_TRY(read_text(ctx, doc, "recipe", s->recipe, sizeof s->recipe));
    TP_TRY(read_text(ctx, doc, "data", s->data, sizeof s->data));
    TP_TRY(read_text(ctx, doc, "base", s->base, sizeof s->base));
    TP_TRY(read_text(ctx, doc, "version", s->version, sizeof s->version));
    return read_text(ctx, doc, "device", s->device, sizeof s->device);
}

/* Whatever is wrong inside a checkpoint is exit class 6. */
static tp_status as_checkpoint_error(tp_ctx *ctx, tp_status status, const char *path)
{
    if (status == TP_OK || status == TP_NOMEM) return status;
    ctx->status = TP_CHECKPOINT;
    return tp_fail_in(ctx, "%s", path);
}

tp_status tp_checkpoint_read_state(tp_ctx *ctx, const char *path, tp_run_state *state)
{
    char *file = tp_path_join(ctx, path, "state.json");
    tp_json_doc *doc = NULL;
    tp_status status = file != NULL ? tp_json_read(ctx, file, TP_STATE_BYTES, &doc) : TP_NOMEM;
    if (status == TP_OK) status = parse_state(ctx, doc, state);
    tp_json_free(doc);
    tp_free(file);
    return as_checkpoint_error(ctx, status, path);
}

/* ---- saving ---- */

static tp_status write_parts(tp_ctx *ctx, tp_publish *publish, const tp_lora *lora, const tp_model *model,
                             const tp_optim *optim, const tp_run_state *state)
{
    tp_adapter_origin origin = {.tokenizer = state->tokenizer, .data = state->data, .device = state->device};
    TP_TRY(tp_adapter_write(ctx, lora, model, &origin, publish));
    if (optim != NULL) {
        char *path = tp_path_join(ctx, tp_publish_staging(publish), "optimizer.safetensors");
        tp_status status = path != NULL ? tp_optim_save(ctx, optim, path) : TP_NOMEM;
        tp_free(path);
        TP_TRY(status);
        TP_TRY(tp_publish_adopt(ctx, publish, "optimizer.safetensors"));
    }
    tp_buf text;
    tp_buf_init(&text, 0);
    write_state(state, &text);
    tp_status status = tp_buf_status(ctx, &text, "state.json");
    if (status == TP_OK) status = tp_publish_add(ctx, publish, "state.json", text.data, text.len);
    tp_buf_free(&text);
    return status;
}

tp_status tp_checkpoint_save(tp_ctx *ctx, const char *folder, const tp_lora *lora, const tp_model *model, const tp_optim *optim,
                             const tp_run_state *state)
{
    char name[48], manifest[160];
    tp_publish *publish = NULL;
    snprintf(name, sizeof name, PREFIX "%lld", (long long)state->step);
    snprintf(manifest, sizeof manifest, "{\"format\": %d, \"run_id\": \"%s\", \"step\": %lld}", STATE_VERSION, state->run_id,
             (long long)state->step);
    char *path = tp_path_join(ctx, folder, name);
    tp_status status = path != NULL ? tp_publish_begin(ctx, path, &publish) : TP_NOMEM;
    tp_free(path);
    TP_TRY(status);
    status = write_parts(ctx, publish, lora, model, optim, state);
    if (status != TP_OK) {
        tp_publish_discard(publish);
        return status;
    }
    return tp_publish_commit(ctx, publish, manifest, true);
}

/* ---- finding ---- */

struct listing {
    int64_t *steps; /* descending */
    size_t n, capacity;
};

static int descending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

static tp_status list_steps(tp_ctx *ctx, const char *folder, struct listing *list)
{
    *list = (struct listing){0};
    DIR *dir = opendir(folder);
    if (dir == NULL) return errno == ENOENT ? TP_OK : tp_fail(ctx, TP_IO_READ, "%s: %s", folder, strerror(errno));
    tp_status status = TP_OK;
    for (struct dirent *entry; status == TP_OK && (entry = readdir(dir)) != NULL;) {
        int64_t step;
        if (!tp_starts_with(entry->d_name, PREFIX) || !tp_parse_i64(entry->d_name + strlen(PREFIX), &step) || step < 0)
            continue;
        status = tp_grow(ctx, &list->steps, &list->capacity, list->n + 1, sizeof *list->steps);
        if (status == TP_OK) list->steps[list->n++] = step;
    }
    closedir(dir);
    if (list->n > 0) qsort(list->steps, list->n, sizeof *list->steps, descending);
    return status;
}

static char *step_path(tp_ctx *ctx, const char *folder, int64_t step)
{
    char name[48];
    snprintf(name, sizeof name, PREFIX "%lld", (long long)step);
    return tp_path_join(ctx, folder, name);
}

tp_status tp_checkpoint_newest(tp_ctx *ctx, const char *folder, char **path)
{
    struct listing list;
    size_t damaged = 0;
    *path = NULL;
    tp_status status = list_steps(ctx, folder, &list);
    for (size_t i = 0; i < list.n && status == TP_OK && *path == NULL; i++) {
        char *candidate = step_path(ctx, folder, list.steps[i]);
        if (candidate == NULL)
            status = TP_NOMEM;
        else if (tp_publish_verify(ctx, candidate, NULL) == TP_OK) {
            *path = candidate;
            continue;
        } else if (ctx->status == TP_NOMEM)
            status = TP_NOMEM;
        else {
            tp_warn(ctx, "%s; falling back to an older checkpoint", ctx->message);
            tp_ctx_clear(ctx);
            damaged++;
        }
        tp_free(candidate);
    }
    tp_free(list.steps);
    if (status == TP_OK && *path == NULL && damaged > 0)
        return tp_fail(ctx, TP_CHECKPOINT, "%s: none of its %zu checkpoints is intact", folder, damaged);
    return status;
}

tp_status tp_checkpoint_load(tp_ctx *ctx, const char *path, tp_lora *lora, tp_optim *optim)
{
    char *file = tp_path_join(ctx, path, "adapter_model.safetensors");
    tp_status status = file != NULL ? tp_adapter_load_values(ctx, file, &lora->params) : TP_NOMEM;
    tp_free(file);
    if (status != TP_OK || optim == NULL) return as_checkpoint_error(ctx, status, path);
    file = tp_path_join(ctx, path, "optimizer.safetensors");
    if (file == NULL) return TP_NOMEM;
    if (!tp_path_exists(file))
        status = tp_fail(ctx, TP_CHECKPOINT, "no optimizer state; --fresh-optimizer goes on without it");
    else
        status = tp_optim_load(ctx, optim, file);
    tp_free(file);
    return as_checkpoint_error(ctx, status, path);
}

/* ---- housekeeping ---- */

static bool belongs_to(tp_ctx *ctx, const char *path, const char *run_id)
{
    tp_run_state state;
    bool ours = tp_checkpoint_read_state(ctx, path, &state) == TP_OK && strcmp(state.run_id, run_id) == 0;
    tp_ctx_clear(ctx);
    return ours;
}

void tp_checkpoint_rotate(tp_ctx *ctx, const char *folder, const char *run_id, int64_t keep)
{
    struct listing list;
    int64_t kept = 0;
    tp_status status = list_steps(ctx, folder, &list);
    for (size_t i = 0; i < list.n && status == TP_OK; i++) {
        char *path = step_path(ctx, folder, list.steps[i]);
        if (path == NULL)
            status = TP_NOMEM;
        else if (belongs_to(ctx, path, run_id) && ++kept > keep)
            status = tp_folder_remove(ctx, path);
        tp_free(path);
    }
    tp_free(list.steps);
    if (status == TP_OK) return;
    tp_warn(ctx, "an old checkpoint could not be removed: %s", ctx->message);
    tp_ctx_clear(ctx);
}

tp_status tp_checkpoint_sweep(tp_ctx *ctx, const char *folder)
{
    return tp_publish_sweep(ctx, folder, ""); /* folders, and files such as plan.json */
}
