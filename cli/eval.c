/* tapeft eval RECIPE or MODEL: how well a model, with or without an adapter, predicts or answers held-out data.
 *
 * Both forms end in one configuration: a recipe's own, or the defaults of the field tables with the flags written over them. */
#include <math.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "cli/eval_gsm8k.h"
#include "cli/open.h"
#include "cli/signals.h"
#include "data/source.h"
#include "models/measure.h"
#include "trainers/run.h"

/* Rows of logits made at once: 64 x 150,000 f32 are 38 MB. */
#define LOGITS_ROWS 64
#define MAX_COLUMNS 16

enum { LOSS = 1, ACCURACY = 2, EXACT = 4, GSM8K = 8 };

static const struct {
    const char *name;
    unsigned bit;
} metrics[] = {{"loss", LOSS}, {"accuracy", ACCURACY}, {"exact", EXACT}, {"gsm8k", GSM8K}};
#define N_METRICS (sizeof metrics / sizeof *metrics)

struct job {
    tp_ctx *ctx;
    const tp_args *args;
    const volatile sig_atomic_t *stop;
    unsigned wanted; /* metrics */
    bool from_recipe;
    tp_cli_recipe recipe;      /* the user's, or one of defaults alone */
    tp_dataset_config *blocks; /* copies of the held-out blocks with flags applied */
    tp_string_entry columns[MAX_COLUMNS];
    char *columns_text;

    tp_tokenizer *tokenizer; /* NULL: ready tokens, and no metric needs text */
    tp_cli_model opened;
    tp_dataset *data;
    tp_tape *tape;
    tp_batch_buffers buffers;
    tp_host_batch batch;
    int64_t most_rows, most_labels; /* of a micro-batch */
    float *losses, *host_losses;    /* device and host, [most_labels] */
    float *logits;                  /* host, [LOGITS_ROWS, vocab] */

    tp_evaluation evaluation;
    int64_t labels, labels_right, rows, rows_right; /* of accuracy and exact */
    tp_gsm8k_score gsm8k;
};

/* ---- flags into the configuration ---- */

static tp_status read_metrics(struct job *job)
{
    const char *text = tp_args_value(job->args, "metric");
    if (text == NULL) text = "loss";
    while (*text != '\0') {
        size_t n = strcspn(text, ", "), i = 0;
        while (i < N_METRICS && (strlen(metrics[i].name) != n || memcmp(metrics[i].name, text, n) != 0)) i++;
        if (i == N_METRICS)
            return tp_fail(job->ctx, TP_INVALID,
                           "--metric: expected loss, accuracy, exact, gsm8k or a list of them, got \"%.*s\"", (int)n, text);
        job->wanted |= metrics[i].bit;
        text += n + strspn(text + n, ", ");
    }
    return job->wanted != 0
               ? TP_OK
               : tp_fail(job->ctx, TP_INVALID, "--metric: expected loss, accuracy, exact, gsm8k or a list of them");
}

static tp_status open_recipe(struct job *job)
{
    static const char *const optional[] = {"output_dir", NULL}, *const all_optional[] = {"base_model", "datasets", "output_dir",
                                                                                         NULL};
    const char *what = job->args->positional[0], *defaults = "adapter: lora\n";
    job->from_recipe = tp_ends_with(what, ".yaml") || tp_ends_with(what, ".yml");
    if (job->from_recipe) return tp_cli_recipe_open(job->ctx, job->args, optional, false, false, &job->recipe);
    if (job->args->n_positional > 1)
        return tp_fail(job->ctx, TP_INVALID, "\"%s\": only recipes take key=value; use the flags", job->args->positional[1]);
    if (!tp_args_has(job->args, "data")) return tp_fail(job->ctx, TP_INVALID, "eval: --data FILE is needed with a model");
    tp_recipe_options options = {.schema = &tp_recipe_schema, .optional = all_optional};
    tp_problems problems = {0};
    tp_status status = tp_recipe_parse(job->ctx, "defaults", defaults, strlen(defaults), &options, &job->recipe.config,
                                       &problems, &job->recipe.recipe);
    tp_problems_free(&problems);
    job->recipe.config.run.base_model = what;
    job->recipe.config.run.tokenizer = what;
    return status;
}

static tp_status read_type(struct job *job, int *type)
{
    const char *text = tp_args_value(job->args, "type");
    for (int i = 0; text != NULL; i++) {
        const char *word = tp_config_word("datasets[].type", i);
        if (*word == '\0')
            return tp_fail(job->ctx, TP_INVALID, "--type: expected auto, completion, instruction, chat or tokens, got \"%s\"",
                           text);
        *type = i;
        if (strcmp(word, text) == 0) break;
    }
    if (*type == TP_DATASET_PREFERENCE || *type == TP_DATASET_KTO || *type == TP_DATASET_CLASSIFY)
        return tp_fail(job->ctx, TP_UNSUPPORTED, "--type %s: this version cannot evaluate it", text);
    return TP_OK;
}

/* ours=theirs,ours=theirs */
static tp_status read_columns(struct job *job, tp_string_map *columns)
{
    const char *given = tp_args_value(job->args, "columns");
    *columns = (tp_string_map){job->columns, 0};
    if (given == NULL) return TP_OK;
    job->columns_text = tp_strdup(job->ctx, given);
    if (job->columns_text == NULL) return TP_NOMEM;
    for (char *text = job->columns_text; *text != '\0';) {
        size_t n = strcspn(text, ",");
        char *next = text + n + (text[n] == ',');
        text[n] = '\0';
        char *equals = strchr(text, '=');
        if (equals == NULL || equals == text || equals[1] == '\0' || columns->n == MAX_COLUMNS)
            return tp_fail(job->ctx, TP_INVALID, "--columns: expected up to %d pairs ours=theirs, got \"%s\"", MAX_COLUMNS,
                           given);
        *equals = '\0';
        job->columns[columns->n++] = (tp_string_entry){text, equals + 1};
        text = next;
    }
    return TP_OK;
}

/* The blocks to evaluate: --data in place of the recipe's test_datasets. */
static tp_status choose_blocks(struct job *job)
{
    tp_data_config *data = &job->recipe.config.data;
    const char *path = tp_args_value(job->args, "data");
    const tp_datasets *from = &data->test_datasets;
    size_t n = path != NULL ? 1 : from->n;
    if (path == NULL &&
        (tp_args_has(job->args, "type") || tp_args_has(job->args, "columns") || tp_args_has(job->args, "system")))
        return tp_fail(job->ctx, TP_INVALID, "--type, --columns and --system describe the file of --data");
    if (path != NULL && !tp_path_exists(path)) return tp_fail(job->ctx, TP_IO_READ, "--data: %s does not exist", path);
    if (n == 0 && !(data->val_set_size.fraction > 0) && data->val_set_size.rows == 0)
        return tp_fail(job->ctx, TP_INVALID, "%s names no held-out data: set test_datasets or val_set_size, or give --data",
                       job->args->positional[0]);
    if (n == 0 && (tp_args_has(job->args, "limit") || (job->wanted & GSM8K) != 0))
        return tp_fail(job->ctx, TP_INVALID, "--limit and gsm8k need test_datasets in the recipe, or --data");
    job->blocks = tp_alloc(job->ctx, n, sizeof *job->blocks);
    if (job->blocks == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++) {
        tp_dataset_config *block = &job->blocks[i];
        int64_t limit = INT64_MAX;
        *block = path != NULL ? (tp_dataset_config){.path = path,
                                                    .split = "test",
                                                    .system = tp_args_value(job->args, "system"),
                                                    .weight = 1,
                                                    .limit = TP_UNSET}
                              : from->items[i];
        if (path != NULL) TP_TRY(read_type(job, &block->type));
        if (path != NULL) TP_TRY(read_columns(job, &block->columns));
        TP_TRY(tp_args_i64(job->ctx, job->args, "limit", 1, INT64_MAX - 1, &limit));
        if (block->limit == TP_UNSET || block->limit > limit) block->limit = limit != INT64_MAX ? limit : TP_UNSET;
    }
    data->test_datasets = (tp_datasets){job->blocks, n};
    if (path != NULL) data->val_set_size = (tp_share){0};
    return TP_OK;
}

static tp_status configure(struct job *job)
{
    tp_config *config = &job->recipe.config;
    TP_TRY(read_metrics(job));
    TP_TRY(open_recipe(job));
    TP_TRY(choose_blocks(job));
    if (tp_args_has(job->args, "adapter")) config->run.adapter_path = tp_args_value(job->args, "adapter");
    if (tp_args_has(job->args, "device")) config->run.device = tp_args_value(job->args, "device");
    TP_TRY(tp_args_i64(job->ctx, job->args, "threads", 0, 4096, &config->run.threads));
    TP_TRY(tp_args_i64(job->ctx, job->args, "max-length", 8, INT32_MAX, &config->data.max_seq_length));
    return tp_args_i64(job->ctx, job->args, "batch", 1, 4096, &config->train.micro_batch_size);
}

/* ---- opening ---- */

/* The flag's, or else the recipe's. */
static tp_status open_precision(struct job *job, tp_dtype *precision)
{
    const char *word = tp_schema_field(&tp_recipe_schema, "precision")->words[job->recipe.config.run.precision];
    char where[512];
    if (tp_args_has(job->args, "precision")) return tp_cli_precision(job->ctx, job->args, precision);
    if (tp_device_precision(job->ctx, word, precision) == TP_OK) return TP_OK;
    return tp_fail_in(job->ctx, "%s: precision", tp_recipe_where(job->recipe.recipe, "precision", where, sizeof where));
}

static tp_status open_model(struct job *job)
{
    const tp_run_config *run = &job->recipe.config.run;
    tp_model_options options = {.check_weights = true};
    TP_TRY(tp_cli_open_device(job->ctx, run->device, run->threads));
    TP_TRY(open_precision(job, &options.precision));
    TP_TRY(tp_model_open(job->ctx, run->base_model, &options, &job->opened.model));
    if (run->adapter_path == NULL) return TP_OK;
    return tp_adapter_open(job->ctx, job->opened.model, run->adapter_path, tp_args_has(job->args, "force"),
                           &job->opened.adapter);
}

static bool has_text(const tp_datasets *blocks)
{
    for (size_t i = 0; i < blocks->n; i++)
        if (blocks->items[i].type != TP_DATASET_TOKENS && !tp_ends_with(blocks->items[i].path, ".safetensors")) return true;
    return false;
}

static bool needs_tokenizer(const struct job *job)
{
    const tp_data_config *data = &job->recipe.config.data;
    return (job->wanted & GSM8K) != 0 || has_text(&data->test_datasets) || has_text(&data->datasets);
}

struct where {
    const tp_recipe *recipe;
    char text[512];
};

static const char *where_key(void *state, const char *key)
{
    struct where *where = state;
    return tp_recipe_where(where->recipe, key, where->text, sizeof where->text);
}

static tp_status open_data(struct job *job)
{
    const tp_config *config = &job->recipe.config;
    const tp_model_config *model = &job->opened.model->config;
    int64_t length = config->data.max_seq_length, segments, longest;
    struct where where = {.recipe = job->recipe.recipe};
    if (length == TP_UNSET) length = model->max_positions < 2048 ? model->max_positions : 2048;
    if (length > model->max_positions)
        return tp_fail(job->ctx, TP_INVALID, "max_seq_length %lld is more than the model's %lld", (long long)length,
                       (long long)model->max_positions);
    if (needs_tokenizer(job))
        TP_TRY(tp_tokenizer_for(job->ctx, config->run.tokenizer != NULL ? config->run.tokenizer : config->run.base_model,
                                &job->tokenizer));
    tp_dataset_options options = {.config = &config->data,
                                  .held_out = true,
                                  .tokenizer = job->tokenizer,
                                  .max_positions = model->max_positions,
                                  .vocab_size = model->vocab_size,
                                  .micro_batch_size = config->train.micro_batch_size,
                                  .max_length = length,
                                  .seed = (uint64_t)config->run.seed,
                                  .where = job->from_recipe ? where_key : NULL,
                                  .where_state = &where};
    options.micro_batch_size_given =
        tp_args_has(job->args, "batch") || (job->from_recipe && tp_recipe_given(job->recipe.recipe, "micro_batch_size"));
    TP_TRY(tp_dataset_open(job->ctx, &options, &job->data));
    tp_dataset_largest(job->data, &job->most_rows, &job->most_labels, &segments, &longest);
    return job->most_labels > 0 ? TP_OK : tp_fail(job->ctx, TP_FORMAT, "the data holds no label to predict");
}

/* What a pass over the largest micro-batch needs. */
static tp_status open_passes(struct job *job)
{
    tp_ctx *ctx = job->ctx;
    tp_model *model = job->opened.model;
    bool rank = (job->wanted & (ACCURACY | EXACT)) != 0;
    size_t bytes = 0;
    TP_TRY(tp_model_measure(
        ctx, model, &(tp_measure){.rows = job->most_rows, .labels = job->most_labels, .logits_rows = rank ? LOGITS_ROWS : 0},
        &bytes));
    TP_TRY(tp_tape_new(ctx, bytes, model->precision, &job->tape));
    TP_TRY(tp_batch_buffers_open(ctx, job->most_rows, job->most_labels, &job->buffers));
    job->losses = ctx->device->backend->alloc(ctx, ctx->device, (size_t)job->most_labels * sizeof *job->losses);
    job->host_losses = tp_alloc(ctx, (size_t)job->most_labels, sizeof *job->host_losses);
    if (rank) job->logits = tp_alloc_raw(ctx, (size_t)LOGITS_ROWS * (size_t)model->config.vocab_size, sizeof *job->logits);
    return job->losses != NULL && job->host_losses != NULL && (job->logits != NULL || !rank) ? TP_OK : TP_NOMEM;
}

static void close_passes(struct job *job)
{
    tp_device *device = job->ctx->device;
    tp_tape_free(job->tape);
    tp_batch_buffers_close(&job->buffers);
    if (job->losses != NULL) device->backend->free(device, job->losses, (size_t)job->most_labels * sizeof *job->losses);
    tp_free(job->host_losses);
    tp_free(job->logits);
    tp_host_batch_free(&job->batch);
    job->tape = NULL;
    job->losses = job->host_losses = job->logits = NULL;
}

/* ---- accuracy ---- */

/* Ties go to the lower id, as in greedy decoding. */
static tp_status is_right(struct job *job, const float *logits, int32_t label, bool *right)
{
    int64_t best = 0;
    for (int64_t v = 0; v < job->opened.model->config.vocab_size; v++) {
        if (isnan(logits[v])) return tp_fail(job->ctx, TP_NUMERIC, "the logit of token %lld is not a number", (long long)v);
        if (logits[v] > logits[best]) best = v;
    }
    *right = best == label;
    return TP_OK;
}

/* Which labels of the micro-batch are right: into host_losses as 1 or 0. */
static tp_status rank_labels(struct job *job, tp_tensor *hidden, const tp_batch *batch)
{
    const tp_matrix *head = &job->opened.model->head.weight;
    size_t mark = tp_tape_mark(job->tape), row = (size_t)job->opened.model->config.vocab_size;
    for (int64_t first = 0; first < batch->n_labels; first += LOGITS_ROWS) {
        int64_t n = batch->n_labels - first < LOGITS_ROWS ? batch->n_labels - first : LOGITS_ROWS;
        tp_tensor *logits = tp_logits(job->tape, hidden, head, batch->label_rows + first, n);
        TP_TRY(tp_tape_status(job->tape));
        TP_TRY(job->ctx->device->backend->copy_out(job->ctx, job->logits, logits->data, (size_t)n * row * sizeof *job->logits));
        tp_tape_rewind(job->tape, mark, NULL);
        for (int64_t i = 0; i < n; i++) {
            bool right = false;
            TP_TRY(is_right(job, job->logits + (size_t)i * row, job->batch.labels[first + i], &right));
            job->host_losses[first + i] = right ? 1 : 0;
        }
    }
    return TP_OK;
}

/* A row counts as right if all its labels are; rows without labels do not count. */
static void count_right(struct job *job)
{
    const tp_host_batch *b = &job->batch;
    int64_t label = 0;
    for (int64_t s = 0; s < b->n_segments; s++) {
        int64_t end = b->segments[s].q_start + b->segments[s].q_len, n = 0, right = 0;
        for (; label < b->n_labels && b->label_rows[label] < end; label++, n++) right += job->host_losses[label] > 0;
        job->labels += n;
        job->labels_right += right;
        job->rows += n > 0;
        job->rows_right += n > 0 && right == n;
    }
}

static tp_status rank_batch(struct job *job)
{
    const tp_host_batch *b = &job->batch;
    tp_batch host = tp_host_batch_view(b), batch;
    if (b->n_labels == 0) return TP_OK;
    TP_TRY(tp_batch_upload(job->ctx, &job->buffers, &host, &batch));
    tp_pass pass = {.tape = job->tape, .batch = &batch};
    tp_tape_no_grad_begin(job->tape);
    tp_status status = rank_labels(job, tp_model_forward(job->opened.model, &pass), &batch);
    tp_tape_no_grad_end(job->tape);
    tp_tape_reset(job->tape);
    if (status == TP_OK) count_right(job);
    return status;
}

static tp_status rank_all(struct job *job)
{
    for (int64_t i = 0; i < tp_dataset_micro_batches(job->data); i++) {
        if (*job->stop != 0) return tp_fail(job->ctx, TP_PREEMPTED, "stopped while evaluating");
        TP_TRY(tp_dataset_get(job->ctx, job->data, 0, i, &job->batch));
        TP_TRY(rank_batch(job));
    }
    return TP_OK;
}

/* ---- the command ---- */

static tp_status measure(struct job *job)
{
    if ((job->wanted & (LOSS | ACCURACY | EXACT)) != 0) TP_TRY(open_passes(job));
    if ((job->wanted & LOSS) != 0) {
        tp_eval_parts parts = {.model = job->opened.model,
                               .tape = job->tape,
                               .buffers = &job->buffers,
                               .batch = &job->batch,
                               .losses = job->losses,
                               .host_losses = job->host_losses,
                               .stop = job->stop};
        TP_TRY(tp_evaluate(job->ctx, &parts, job->data, &job->evaluation));
        if (!isfinite(job->evaluation.loss))
            return tp_fail(job->ctx, TP_NUMERIC, "the loss over %lld labels is not finite", (long long)job->evaluation.labels);
    }
    if ((job->wanted & (ACCURACY | EXACT)) != 0) TP_TRY(rank_all(job));
    close_passes(job); /* the cache of the replies may need the memory */
    if ((job->wanted & GSM8K) == 0) return TP_OK;
    return tp_gsm8k_run(job->ctx, job->opened.model, job->tokenizer, job->data, job->stop, &job->gsm8k);
}

static double share(int64_t part, int64_t whole)
{
    return whole > 0 ? (double)part / (double)whole : 0;
}

/* Lines "name value", or members of an object. */
struct report {
    bool json, any;
    tp_buf text;
};

static void put_name(struct report *r, const char *name)
{
    if (r->json)
        tp_buf_printf(&r->text, "%s\"%s\": ", r->any ? ", " : "{", name);
    else
        tp_buf_printf(&r->text, "%s%-16s ", r->any ? "\n" : "", name);
    r->any = true;
}

static void put_number(struct report *r, const char *name, double value, int digits)
{
    put_name(r, name);
    tp_json_write_f64(&r->text, value, r->json ? 17 : digits);
}

static void put_count(struct report *r, const char *name, int64_t value)
{
    put_name(r, name);
    tp_buf_printf(&r->text, "%lld", (long long)value);
}

static tp_status print(const struct job *job)
{
    const tp_evaluation *e = &job->evaluation;
    const tp_gsm8k_score *g = &job->gsm8k;
    bool loss = (job->wanted & LOSS) != 0, ranked = (job->wanted & (ACCURACY | EXACT)) != 0;
    struct report r = {.json = tp_args_has(job->args, "json")};
    tp_buf_init(&r.text, 0);
    if (loss) put_number(&r, "loss", e->loss, 6);
    if (loss) put_number(&r, "perplexity", e->perplexity, 6);
    if ((job->wanted & ACCURACY) != 0) put_number(&r, "accuracy", share(job->labels_right, job->labels), 4);
    if ((job->wanted & EXACT) != 0) put_number(&r, "exact", share(job->rows_right, job->rows), 4);
    if (loss || ranked) put_count(&r, "labels", loss ? e->labels : job->labels);
    if (loss || ranked) put_count(&r, "rows", loss ? e->rows : job->rows);
    if ((job->wanted & GSM8K) != 0) {
        put_number(&r, "gsm8k", share(g->correct, g->problems), 4);
        put_count(&r, "gsm8k_correct", g->correct);
        put_count(&r, "gsm8k_answered", g->answered);
        put_count(&r, "gsm8k_problems", g->problems);
    }
    tp_buf_text(&r.text, r.json ? "}\n" : "\n");
    tp_status status = tp_buf_status(job->ctx, &r.text, "result");
    if (status == TP_OK) status = tp_cli_print(job->ctx, r.text.data, r.text.len);
    tp_buf_free(&r.text);
    return status;
}

static void close_job(struct job *job)
{
    close_passes(job);
    tp_dataset_close(job->data);
    tp_cli_model_close(&job->opened);
    tp_tokenizer_free(job->tokenizer);
    tp_cli_recipe_close(&job->recipe);
    tp_free(job->blocks);
    tp_free(job->columns_text);
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    struct job job = {.ctx = ctx, .args = args};
    tp_status status = configure(&job);
    if (status == TP_OK) status = open_model(&job);
    if (status == TP_OK) status = open_data(&job);
    job.stop = tp_cli_catch_stop();
    if (status == TP_OK) status = measure(&job);
    if (status == TP_OK) status = print(&job);
    close_job(&job);
    return status;
}

static const tp_flag flags[] = {
    {"adapter", "DIR", false, false, "a PEFT adapter folder (default: the recipe's adapter_path, or none)"},
    {"data", "FILE", false, false, "held-out rows in place of the recipe's"},
    {"type", "T", false, false, "of --data: auto, completion, instruction, chat, tokens (default auto)"},
    {"columns", "OURS=THEIRS,...", false, false, "of --data: column names"},
    {"system", "TEXT", false, false, "of --data: system message of rows without one"},
    {"limit", "N", false, false, "only the first N rows of each data set"},
    {"metric", "M,...", false, false, "loss, accuracy (labels), exact (rows), gsm8k (default loss)"},
    {"max-length", "N", false, false, "tokens per row (default: the recipe's, or 2048, or the model's if less)"},
    {"batch", "N", false, false, "rows per pass (default: the recipe's, or 1)"},
    TP_FLAG_JSON,
    TP_FLAG_PRECISION,
    TP_FLAG_DEVICE,
    TP_FLAG_THREADS,
    TP_FLAG_FORCE,
    TP_FLAG_END,
};

const tp_command tp_command_eval = {"eval",
                                    "RECIPE [key=value ...] | MODEL --data FILE [--adapter DIR] [--metric M] ...",
                                    "loss, perplexity, accuracy, or GSM8K answers on held-out data",
                                    flags,
                                    1,
                                    1000,
                                    run};
