/* Opening a run, from the cheap to the costly: data, shapes, plan, then weights, slots, optimizer. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "base/allowance.h"
#include "base/log.h"
#include "base/mem.h"
#include "data/source.h"
#include "trainers/run.h"

#define RESERVE_SHARE    16   /* of the memory limit, one part for what kernels are only faster with */
#define RESERVE_WORK     1.02 /* and so much work of the products for it */
#define RECORDINGS_MOST  16   /* of micro-batches */
#define RECORDINGS_SHARE 32   /* of the memory that the run takes otherwise, one part for them */

static tp_status open_device(tp_run *run)
{
    tp_ctx *ctx = run->ctx;
    if (ctx->device == NULL) {
        TP_TRY(tp_device_open(ctx, run->config->run.device, (int)run->config->run.threads, &ctx->device));
        run->owns_device = true;
    }
    ctx->seed = (uint64_t)run->config->run.seed;
    ctx->device->any_order = !run->config->run.deterministic;
    const char *word = tp_schema_field(&tp_recipe_schema, "precision")->words[run->config->run.precision];
    char where[512];
    if (tp_device_precision(ctx, word, &run->precision) != TP_OK)
        return tp_fail_in(ctx, "%s: precision", tp_recipe_where(run->recipe, "precision", where, sizeof where));
    tp_ctx_init(&run->dry);
    run->dry.log = ctx->log;
    if (tp_device_open(&run->dry, "dry", 1, &run->dry.device) != TP_OK)
        return tp_fail(ctx, run->dry.status, "%s", run->dry.message);
    run->dry.device->logits_bytes = ctx->device->logits_bytes;
    run->dry.device->makes_swiglu_again = ctx->device->makes_swiglu_again;
    run->dry.device->drops_in_products = ctx->device->drops_in_products;
    return TP_OK;
}

/* A failure of the dry twin is the run's. */
static tp_status from_dry(tp_run *run, tp_status status)
{
    return status == TP_OK ? TP_OK : tp_fail(run->ctx, status, "%s", run->dry.message);
}

static tp_status read_start(tp_run *run)
{
    if (run->start.base_model != NULL) return TP_OK;
    return tp_adapter_config_read(run->ctx, run->config->run.adapter_path, &run->start);
}

/* The highest rank of the run's adapter. */
static tp_status room_rank(tp_run *run, int64_t *rank)
{
    const tp_lora_config *c = &run->config->lora;
    const tp_lora_spec *start = &run->start.spec;
    double most = (double)c->rank;
    if (run->config->run.adapter_path != NULL) {
        TP_TRY(read_start(run));
        most = (double)start->rank;
        for (size_t i = 0; i < start->n_rank_pattern; i++) most = fmax(most, start->rank_pattern[i].value);
    } else {
        for (size_t i = 0; i < c->rank_pattern.n; i++) most = fmax(most, c->rank_pattern.items[i].value);
    }
    *rank = (int64_t)most;
    return TP_OK;
}

static tp_status model_options(tp_run *run, tp_model_options *options)
{
    *options = (tp_model_options){.precision = run->precision};
    options->join = run->options.join || !run->ctx->device->backend->host_memory;
    return options->join ? room_rank(run, &options->room_rank) : TP_OK;
}

static tp_status open_shapes(tp_run *run)
{
    tp_model_options options;
    TP_TRY(model_options(run, &options));
    return from_dry(run, tp_model_open(&run->dry, run->config->run.base_model, &options, &run->shape_model));
}

/* ---- data ---- */

static bool needs_tokenizer(const tp_data_config *data)
{
    for (size_t i = 0; i < data->datasets.n; i++)
        if (data->datasets.items[i].type != TP_DATASET_TOKENS && !tp_ends_with(data->datasets.items[i].path, ".safetensors"))
            return true;
    for (size_t i = 0; i < data->test_datasets.n; i++)
        if (data->test_datasets.items[i].type != TP_DATASET_TOKENS &&
            !tp_ends_with(data->test_datasets.items[i].path, ".safetensors"))
            return true;
    return false;
}

static const char *tokenizer_path(const tp_config *config)
{
    return config->run.tokenizer != NULL ? config->run.tokenizer : config->run.base_model;
}

struct where {
    const tp_recipe *recipe;
    char text[512];
};

static const char *where_key(void *state, const char *key)
{
    struct where *w = state;
    return tp_recipe_where(w->recipe, key, w->text, sizeof w->text);
}

/* Their prompts, which say how long the KV cache gets. */
static tp_status open_samples(tp_run *run)
{
    const tp_config *config = run->config;
    char where[512];
    if (config->output.sample_prompts.n == 0) return TP_OK;
    tp_samples_options options = {.prompts = config->output.sample_prompts,
                                  .tokenizer = run->tokenizer,
                                  .tokenizer_path = tokenizer_path(config),
                                  .prompt = tp_dataset_prompt(run->data),
                                  .model = run->shape_model};
    if (tp_samples_open(run->ctx, &options, &run->samples) == TP_OK) return TP_OK;
    return tp_fail_in(run->ctx, "%s: sample_prompts", tp_recipe_where(run->recipe, "sample_prompts", where, sizeof where));
}

static tp_status open_data(tp_run *run)
{
    const tp_config *config = run->config;
    const tp_model_config *model = &run->shape_model->config;
    if (needs_tokenizer(&config->data)) TP_TRY(tp_tokenizer_for(run->ctx, tokenizer_path(config), &run->tokenizer));
    run->max_length = config->data.max_seq_length != TP_UNSET ? config->data.max_seq_length
                      : model->max_positions < 2048           ? model->max_positions
                                                              : 2048;
    if (run->max_length > model->max_positions) {
        char where[512];
        return tp_fail(run->ctx, TP_INVALID, "%s: max_seq_length: %lld is more than the model's %lld",
                       tp_recipe_where(run->recipe, "max_seq_length", where, sizeof where), (long long)run->max_length,
                       (long long)model->max_positions);
    }
    struct where where = {.recipe = run->recipe};
    tp_dataset_options options = {.config = &config->data,
                                  .tokenizer = run->tokenizer,
                                  .max_positions = model->max_positions,
                                  .vocab_size = model->vocab_size,
                                  .micro_batch_size = config->train.micro_batch_size,
                                  .max_length = run->max_length,
                                  .keeps_tokens = !run->options.dry_run,
                                  .seed = (uint64_t)config->run.seed,
                                  .where = where_key,
                                  .where_state = &where};
    options.micro_batch_size_given = tp_recipe_given(run->recipe, "micro_batch_size");
    TP_TRY(tp_dataset_open(run->ctx, &options, &run->data));
    options.held_out = true;
    TP_TRY(tp_dataset_open(run->ctx, &options, &run->held_out));
    TP_TRY(open_samples(run));
    run->micro_batches = tp_dataset_micro_batches(run->data);
    return run->micro_batches > 0 ? TP_OK : tp_fail(run->ctx, TP_FORMAT, "the data sets hold no row to train on");
}

static void count_steps(tp_run *run)
{
    const tp_train_config *c = &run->config->train;
    int64_t group = c->gradient_accumulation_steps;
    run->steps_per_epoch = (run->micro_batches + group - 1) / group;
    run->steps = c->max_steps > 0 ? c->max_steps : (int64_t)ceil(c->num_epochs * (double)run->steps_per_epoch);
    int64_t warmup = c->warmup_steps != TP_UNSET ? c->warmup_steps : (int64_t)ceil(c->warmup_ratio * (double)run->steps);
    tp_schedule_kind kind = c->lr_scheduler == TP_LR_COSINE   ? TP_SCHEDULE_COSINE
                            : c->lr_scheduler == TP_LR_LINEAR ? TP_SCHEDULE_LINEAR
                                                              : TP_SCHEDULE_CONSTANT;
    run->schedule = (tp_schedule){kind, c->learning_rate, c->min_lr_ratio, warmup, run->steps};
}

/* ---- the adapter ---- */

/* How a message calls one of PEFT's keys: by the recipe's place and name. */
static const char *call_key(void *state, const char *key, const char *member)
{
    struct where *w = state;
    char place[400];
    if (strcmp(key, "target_modules") == 0) key = "lora_target_modules";
    if (strcmp(key, "exclude_modules") == 0) key = "lora_exclude_modules";
    tp_recipe_where_member(w->recipe, key, member != NULL ? member : "", place, sizeof place);
    snprintf(w->text, sizeof w->text, "%s: %s", place, key);
    return w->text;
}

static tp_status attach(tp_run *run, tp_ctx *ctx, tp_model *model, tp_lora **lora)
{
    struct where where = {.recipe = run->recipe};
    tp_lora_spec spec;
    bool continues = run->config->run.adapter_path != NULL;
    if (continues) TP_TRY(read_start(run));
    TP_TRY(tp_run_lora_spec(run, model, &spec));
    if (!continues) {
        spec.call = call_key;
        spec.call_state = &where;
    }
    tp_status status = tp_lora_attach(ctx, model, &spec, lora);
    return ctx == &run->dry ? from_dry(run, status) : status;
}

/* ---- the plan ---- */

static int group_size(const tp_run *run)
{
    const tp_train_config *c = &run->config->train;
    int64_t layers = run->shape_model->config.n_layers;
    switch (c->gradient_checkpointing) {
    case TP_CHECKPOINTING_FULL:
    case TP_CHECKPOINTING_OFFLOAD: return 1;
    case TP_CHECKPOINTING_EVERY_K: return (int)(c->gradient_checkpointing_k < layers ? c->gradient_checkpointing_k : layers);
    case TP_CHECKPOINTING_SQRT: return (int)ceil(sqrt((double)layers));
    default: return 0;
    }
}

/* Host memory is another memory only on some devices. */
static bool parks_inputs(const tp_run *run)
{
    const tp_train_config *c = &run->config->train;
    bool wanted = c->activation_offloading || c->gradient_checkpointing == TP_CHECKPOINTING_OFFLOAD;
    return wanted && (run->options.join || !run->ctx->device->backend->host_memory);
}

static uint64_t memory_limit(const tp_run *run)
{
    const tp_device *device = run->ctx->device;
    uint64_t machine = device->memory_bytes, wanted = run->config->run.memory_limit;
    tp_allowance allowance;
    tp_allowance_read("", &allowance);
    if (device->backend->host_memory && allowance.container_bytes < machine) machine = allowance.container_bytes;
    return wanted > 0 ? wanted : machine / 10 * 9;
}

/* Memory that kernels are faster with: what the plan leaves, or what little work that is done again frees. */
static tp_status reserve(tp_run *run, tp_lora *lora, bool fit, uint64_t limit)
{
    const tp_backend *backend = run->ctx->device->backend;
    tp_plan *plan = &run->plan, other = *plan;
    uint64_t bytes = 0;
    if (backend->reserve == NULL || plan->peak > limit) return TP_OK;
    TP_TRY(backend->reserve(run->ctx, &plan->attention, limit / RESERVE_SHARE, &bytes));
    if (bytes == 0) return TP_OK;
    tp_plan_shape shape = plan->shape;
    shape.workspace_bytes += bytes;
    if (plan->peak + bytes > limit && fit) {
        shape.remade_layers = shape.remade_gates = shape.recomputed_layers = 0;
        shape.recomputed_rows = 0;
        TP_TRY(from_dry(run, tp_plan_fit(&run->dry, run->shape_model, lora, &shape, limit, &other)));
    } else {
        TP_TRY(from_dry(run, tp_plan_make(&run->dry, run->shape_model, lora, &shape, &other)));
    }
    const double before = plan->flops_f32 + plan->flops_narrow, after = other.flops_f32 + other.flops_narrow;
    if (other.peak > limit || after > before * RESERVE_WORK)
        return backend->reserve(run->ctx, &plan->attention, 0, &bytes); /* given back */
    *plan = other;
    return TP_OK;
}

/* As many logits at once as fit, but for half a percent, into what the sweep needs anyway: the head's products are quicker. */
static tp_status more_logits(tp_run *run, tp_lora *lora, uint64_t limit)
{
    tp_device *dry = run->dry.device;
    const uint64_t least = dry->logits_bytes, most = run->plan.peak + run->plan.peak / 200;
    for (uint64_t bytes = 4 * least; bytes > least; bytes /= 2) {
        tp_plan plan;
        dry->logits_bytes = bytes;
        TP_TRY(tp_plan_make(&run->dry, run->shape_model, lora, &run->plan.shape, &plan));
        if (plan.peak > most || plan.peak > limit) continue;
        run->plan = plan;
        run->ctx->device->logits_bytes = bytes;
        return TP_OK;
    }
    dry->logits_bytes = least;
    return TP_OK;
}

/* Whether a micro-batch's kernels and the places they work on depend on its shape alone. Parked inputs wait in memory that
 * grows, frequencies of some ropes are copied to the device for each length. */
static bool repeats(const tp_run *run)
{
    const tp_plan_shape *shape = &run->plan.shape;
    bool parks = shape->parked_inputs && (shape->recompute_every > 0 || shape->recomputed_layers > 0);
    return run->ctx->device->backend->capture_begin != NULL && !parks &&
           !tp_rope_depends_on_length(&run->shape_model->config.rope);
}

/* As many recordings as there is memory for. Where all micro-batches have the largest one's rows, one shape is all there is,
 * but for the last of an epoch. */
static void plan_recordings(tp_run *run, uint64_t limit, int64_t tokens)
{
    tp_plan *plan = &run->plan;
    const uint64_t each = (uint64_t)plan->calls * run->ctx->device->backend->recorded_call_bytes;
    const bool even = tokens == run->micro_batches * plan->shape.rows;
    if (!repeats(run) || each == 0 || plan->peak > limit) return;
    const uint64_t share = plan->peak / RECORDINGS_SHARE, left = limit - plan->peak;
    plan->recorded_most = (int64_t)((share < left ? share : left) / each);
    if (plan->recorded_most < 2 && left >= 2 * each) plan->recorded_most = 2;
    if (plan->recorded_most > RECORDINGS_MOST) plan->recorded_most = RECORDINGS_MOST;
    if (even && plan->recorded_most > 2) plan->recorded_most = 2;
    plan->recordings = (uint64_t)plan->recorded_most * each;
    plan->peak += plan->recordings;
}

/* Filling up micro-batches costs about a twentieth of the largest one; recordings save a microsecond for each call of a kernel.
 * The rates are those of a fast GPU, and the same everywhere, for what is added up depends on this. Turning a recording to
 * other segments is work of the host: the device hides it where each step is one micro-batch, which is known early, or where
 * micro-batches are about as long as the longest, as packed ones are. */
static void choose_buckets(tp_run *run, int64_t tokens)
{
    const tp_plan *plan = &run->plan;
    const double f32_rate = 5e13, narrow_rate = 5e14, copy_rate = 2.5e12, call_saves = 1e-6, filled = 1.0 / 20;
    double seconds = plan->flops_f32 / f32_rate + plan->flops_narrow / narrow_rate + plan->bytes_moved / copy_rate;
    bool pays = seconds / (double)plan->shape.accumulation * filled < (double)plan->calls * call_saves;
    bool hidden = plan->shape.accumulation == 1 || 2 * tokens >= run->micro_batches * plan->shape.rows;
    if (plan->recorded_most > 0 && plan->shape.recomputed_rows == 0 && pays && hidden)
        run->buckets = tp_buckets_for(plan->shape.rows, plan->shape.labels);
}

static tp_status make_plan(tp_run *run)
{
    tp_lora *lora;
    int64_t rows, labels, segments, longest, eval_rows = 0, eval_labels = 0, ignored;
    tp_dataset_counts counts;
    TP_TRY(attach(run, &run->dry, run->shape_model, &lora));
    tp_dataset_largest(run->data, &rows, &labels, &segments, &longest);
    if (run->held_out != NULL) tp_dataset_largest(run->held_out, &eval_rows, &eval_labels, &ignored, &ignored);
    tp_dataset_count(run->data, &counts);
    bool momentum = run->config->train.optimizer == TP_OPTIMIZER_SGD;
    tp_plan_shape shape = {.rows = rows,
                           .labels = labels,
                           .segments = segments,
                           .longest_segment = longest,
                           .eval_rows = eval_rows,
                           .eval_labels = eval_labels,
                           .accumulation = run->config->train.gradient_accumulation_steps,
                           .recompute_every = group_size(run),
                           .parked_inputs = parks_inputs(run),
                           .uneven = counts.tokens != run->micro_batches * rows,
                           .own_memory = !run->ctx->device->backend->host_memory,
                           .any_order = run->ctx->device->any_order && run->ctx->device->backend->reserve != NULL,
                           .train = true,
                           .optimizer_states = momentum ? run->config->train.momentum > 0 : 2,
                           .sample_context = run->samples != NULL ? tp_samples_context(run->samples) : 0,
                           .piece_bytes = run->ctx->device->backend->piece_bytes,
                           .workspace_bytes = run->ctx->device->workspace_bytes,
                           .host_bytes = (uint64_t)counts.rows_used * 64};
    uint64_t limit = memory_limit(run);
    bool fit = run->config->train.gradient_checkpointing == TP_CHECKPOINTING_AUTO;
    tp_status status = from_dry(run, tp_params_train(&run->dry, &lora->params));
    if (status == TP_OK)
        status = from_dry(run, fit ? tp_plan_fit(&run->dry, run->shape_model, lora, &shape, limit, &run->plan)
                                   : tp_plan_make(&run->dry, run->shape_model, lora, &shape, &run->plan));
    if (status == TP_OK) status = reserve(run, lora, fit, limit);
    if (status == TP_OK) status = from_dry(run, more_logits(run, lora, limit));
    if (status == TP_OK && (run->options.dry_run || run->plan.peak > limit))
        status = from_dry(run, tp_plan_largest(&run->dry, run->shape_model, lora, &shape, fit, limit,
                                               run->config->train.micro_batch_size, run->max_length,
                                               run->shape_model->config.max_positions, &run->plan));
    /* Host memory has room for batches that fall differently. */
    if (status == TP_OK && !run->ctx->device->backend->host_memory && run->plan.shape.recomputed_rows == 0)
        status = from_dry(run, tp_plan_places(&run->dry, run->shape_model, &run->plan.shape, &run->places, &run->n_places));
    tp_lora_free(lora);
    TP_TRY(status);
    plan_recordings(run, limit, counts.tokens);
    choose_buckets(run, counts.tokens);
    return run->options.dry_run ? TP_OK : tp_run_fits(run); /* what does not fit can still be looked at */
}

tp_status tp_run_fits(const tp_run *run)
{
    char need[32], have[32];
    uint64_t limit = memory_limit(run);
    if (run->plan.peak <= limit) return TP_OK;
    if (run->plan.largest_batch == 0 && run->plan.largest_length == 0)
        return tp_fail(run->ctx, TP_NOMEM, "the run needs %s, %s are there: no batch and no length would fit",
                       tp_format_bytes(run->plan.peak, need), tp_format_bytes(limit, have));
    return tp_fail(
        run->ctx, TP_NOMEM,
        "the run needs %s, %s are there: lower micro_batch_size (up to %lld fits) or max_seq_length (up to %lld fits)%s",
        tp_format_bytes(run->plan.peak, need), tp_format_bytes(limit, have), (long long)run->plan.largest_batch,
        (long long)run->plan.largest_length,
        run->config->train.gradient_checkpointing == TP_CHECKPOINTING_AUTO ? "" : ", or let gradient_checkpointing be auto");
}

/* ---- weights and what is trained ---- */

static tp_status open_model(tp_run *run)
{
    tp_model_options options;
    TP_TRY(model_options(run, &options));
    options.check_weights = run->config->train.check_base_weights;
    TP_TRY(tp_model_open(run->ctx, run->config->run.base_model, &options, &run->model));
    TP_TRY(attach(run, run->ctx, run->model, &run->lora));
    if (run->config->run.adapter_path == NULL) return tp_lora_initialise(run->ctx, run->lora);
    char *path = tp_path_join(run->ctx, run->config->run.adapter_path, "adapter_model.safetensors");
    tp_status status = path != NULL ? tp_adapter_load_values(run->ctx, path, &run->lora->params) : TP_NOMEM;
    tp_free(path);
    return status;
}

static tp_status open_trainer(tp_run *run)
{
    const tp_train_config *c = &run->config->train;
    tp_ctx *ctx = run->ctx;
    int64_t rows = run->plan.shape.rows, labels = run->plan.shape.labels;
    if (run->plan.shape.eval_rows > rows) rows = run->plan.shape.eval_rows;
    if (run->plan.shape.eval_labels > labels) labels = run->plan.shape.eval_labels;
    tp_optim_options options = {c->adam_beta1, c->adam_beta2, c->adam_epsilon, c->momentum, c->weight_decay, c->max_grad_norm};
    TP_TRY(tp_params_train(ctx, &run->lora->params));
    TP_TRY(tp_optim_open(ctx, tp_config_word("optimizer", c->optimizer), &options, &run->lora->params, &run->optim));
    TP_TRY(tp_tape_new(ctx, run->plan.arena, run->precision, &run->tape));
    tp_tape_set_state(run->tape, run->optim->step_state);
    bool records = !run->options.tune && getenv("TAPEFT_NO_GRAPHS") == NULL; /* the variable is for comparisons */
    TP_TRY(tp_replay_open(ctx, records ? run->plan.recorded_most : 0, &run->replay));
    TP_TRY(tp_batch_buffers_open(ctx, rows, labels, &run->buffers));
    if (run->samples != NULL) TP_TRY(tp_samples_begin(ctx, run->samples, run->model));
    run->group = tp_alloc(ctx, (size_t)c->gradient_accumulation_steps, sizeof *run->group);
    run->losses = ctx->device->backend->alloc(ctx, ctx->device, (size_t)labels * sizeof *run->losses);
    run->host_losses = tp_alloc(ctx, (size_t)labels, sizeof *run->host_losses);
    return run->group != NULL && run->losses != NULL && run->host_losses != NULL ? TP_OK : TP_NOMEM;
}

static tp_status check_adapter(tp_run *run)
{
    char where[512];
    if (!tp_config_has_adapter(run->config, TP_ADAPTER_NONE)) return TP_OK;
    return tp_fail(run->ctx, TP_INVALID, "%s: adapter: none leaves nothing to train; it is for eval",
                   tp_recipe_where(run->recipe, "adapter", where, sizeof where));
}

/* Out of memory although the plan fitted: somebody else has it. */
static tp_status beside_the_plan(tp_run *run, tp_status status)
{
    tp_buf text;
    if (status != TP_NOMEM) return status;
    tp_buf_init(&text, 0);
    tp_plan_write_memory(&run->plan, &text);
    tp_fail_in(run->ctx, "the plan (%s)", tp_buf_cstr(&text));
    tp_buf_free(&text);
    return status;
}

/* The one number an evaluation makes. */
static tp_status check_metric(tp_run *run)
{
    const char *metric = run->config->output.metric_for_best_model;
    char where[512];
    if (metric == NULL || strcmp(metric, "eval_loss") == 0) return TP_OK;
    return tp_fail(run->ctx, TP_INVALID, "%s: metric_for_best_model: expected eval_loss, got \"%s\"",
                   tp_recipe_where(run->recipe, "metric_for_best_model", where, sizeof where), metric);
}

tp_status tp_run_setup(tp_run *run)
{
    TP_TRY(check_adapter(run));
    TP_TRY(check_metric(run));
    TP_TRY(open_device(run));
    TP_TRY(open_shapes(run));
    TP_TRY(open_data(run));
    count_steps(run);
    TP_TRY(make_plan(run));
    if (run->options.dry_run) return TP_OK;
    if (!run->options.tune) TP_TRY(tp_run_prepare_folder(run));
    if (run->finished) return TP_OK;
    tp_status status = open_model(run);
    if (status == TP_OK) status = open_trainer(run);
    return beside_the_plan(run, status);
}

tp_status tp_run_close(tp_run *run, tp_status status)
{
    if (run == NULL) return status;
    tp_ctx *ctx = run->ctx;
    tp_metrics_close(run->metrics);
    tp_samples_close(run->samples);
    tp_replay_close(run->replay);
    tp_optim_close(run->optim);
    tp_tape_free(run->tape);
    tp_free(run->places);
    tp_batch_buffers_close(&run->buffers);
    for (int64_t i = 0; run->group != NULL && i < run->config->train.gradient_accumulation_steps; i++)
        tp_host_batch_free(&run->group[i]);
    tp_free(run->group);
    tp_host_batch_free(&run->eval_batch);
    if (run->losses != NULL) {
        int64_t labels =
            run->plan.shape.labels > run->plan.shape.eval_labels ? run->plan.shape.labels : run->plan.shape.eval_labels;
        ctx->device->backend->free(ctx->device, run->losses, (size_t)labels * sizeof *run->losses);
    }
    tp_free(run->host_losses);
    tp_lora_free(run->lora);
    tp_free(run->patterns);
    tp_adapter_config_free(&run->start);
    tp_model_free(run->model);
    tp_dataset_close(run->data);
    tp_dataset_close(run->held_out);
    tp_tokenizer_free(run->tokenizer);
    tp_model_free(run->shape_model);
    if (run->dry.device != NULL) tp_device_close(run->dry.device);
    if (run->owns_device) {
        tp_device_close(ctx->device);
        ctx->device = NULL;
    }
    if (run->lock >= 0) close(run->lock);
    tp_free(run);
    return status;
}
