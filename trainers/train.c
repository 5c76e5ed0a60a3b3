/* The training loop: the first file to read.
 *
 * A step is a group of micro-batches whose losses are summed over labels and divided by the labels of the whole group, so that
 * accumulation, padding and uneven lengths cannot change what a step means. Gradients add up in the flat buffer; one norm, one
 * clip, one update. The update kernel itself refuses a step whose loss or norm is not finite. */
#include "trainers/train.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "trainers/run.h"

static bool told_to(const volatile sig_atomic_t *flag)
{
    return flag != NULL && *flag != 0;
}

/* The micro-batches of step `step` (from 0), unless they are there: the last group of an epoch may be short. */
static tp_status get_group(tp_run *run, int64_t step)
{
    int64_t most = run->config->train.gradient_accumulation_steps, first = step % run->steps_per_epoch * most;
    if (run->group_step == step) return TP_OK;
    run->group_step = -1;
    run->group_n = run->micro_batches - first < most ? run->micro_batches - first : most;
    run->group_labels = run->group_tokens = 0;
    for (int64_t i = 0; i < run->group_n; i++) {
        TP_TRY(tp_dataset_get(run->ctx, run->data, step / run->steps_per_epoch, first + i, &run->group[i]));
        run->group_labels += run->group[i].n_labels;
        run->group_tokens += run->group[i].n_tokens;
        TP_TRY(tp_buckets_fill(run->ctx, &run->buckets, &run->group[i]));
    }
    run->group_step = step;
    return TP_OK;
}

/* The same while the device is at work, up to what it is to begin with. What fails will fail again, in the step that it belongs
 * to. */
static void get_group_early(tp_run *run, int64_t step)
{
    if (run->ctx->device->backend->host_memory || step >= run->steps) return;
    if (get_group(run, step) != TP_OK) {
        tp_ctx_clear(run->ctx);
        return;
    }
    tp_batch host = tp_host_batch_view(&run->group[0]), batch = tp_batch_uploaded(&run->buffers, &host);
    tp_replay_prepare(run->ctx, run->replay, &batch, run->group[0].any_segments);
}

/* The kernels of a micro-batch: a tp_replay_pass. Only what is in the batch, and what lies in device memory, may differ from
 * one to the next. */
static tp_status forward_and_backward(void *state, const tp_batch *batch, uint64_t *trace)
{
    tp_run *run = state;
    tp_pass pass = {.tape = run->tape,
                    .batch = batch,
                    .training = true,
                    .recompute_every = run->plan.shape.recompute_every,
                    .remade_layers = run->plan.shape.remade_layers,
                    .remade_gates = run->plan.shape.remade_gates,
                    .recomputed_layers = run->plan.shape.recomputed_layers,
                    .recomputed_rows = run->plan.shape.recomputed_rows,
                    .parked_inputs = run->plan.shape.parked_inputs};
    tp_cross_entropy_spec spec = {.head = &run->model->head.weight,
                                  .rows = batch->label_rows,
                                  .labels = batch->labels,
                                  .n = batch->n_labels,
                                  .state = run->optim->step_state};
    if (run->places != NULL) tp_tape_follow_places(run->tape, run->places, run->n_places);
    tp_tensor *total = tp_linear_cross_entropy(run->tape, tp_model_forward(run->model, &pass), &spec);
    tp_status status = tp_tape_status(run->tape);
    if (status == TP_OK) status = tp_tape_backward(run->tape, total);
    *trace = tp_tape_trace(run->tape);
    tp_tape_reset(run->tape);
    return status;
}

/* Forward and backward of micro-batch i of the group; its gradients are added, its loss (divided by the step's labels) too. */
static tp_status run_micro_batch(tp_run *run, int64_t i)
{
    int64_t most = run->config->train.gradient_accumulation_steps;
    tp_batch host = tp_host_batch_view(&run->group[i]), batch;
    if (host.n_labels == 0) return TP_OK; /* no labels, no gradient: contributes nothing */
    TP_TRY(tp_batch_upload(run->ctx, &run->buffers, &host, &batch));
    TP_TRY(tp_optim_micro_batch(run->ctx, run->optim, (uint64_t)(run->group_step * most + i), 1.0f / (float)run->group_labels));
    return tp_replay_run(run->ctx, run->replay, &batch, run->group[i].any_segments, forward_and_backward, run);
}

static tp_status dump_gradients(tp_run *run)
{
    tp_params *params = &run->lora->params;
    tp_rows grads = {params->grads, TP_F32, params->elements};
    tp_scale_args unscale = {.n = 1, .dim = params->elements, .x = grads, .y = grads, .alpha = 1 / run->optim->loss_scale},
                  again = unscale;
    if (run->options.dump_gradients == NULL || run->state.step != 0) return TP_OK;
    if (run->optim->loss_scale == 1) return tp_params_save(run->ctx, params, params->grads, run->options.dump_gradients);
    again.alpha = run->optim->loss_scale;
    TP_TRY(tp_run_scale(run->ctx, &unscale));
    TP_TRY(tp_params_save(run->ctx, params, params->grads, run->options.dump_gradients));
    return tp_run_scale(run->ctx, &again);
}

/* How far above the mean a loss may be (spike_zscore). */
static double loss_spread(const tp_run *run)
{
    const int64_t settle = 20;
    double z = run->config->train.spike_zscore;
    return z > 0 && run->state.loss_count >= settle ? z * sqrt(run->state.loss_var) : (double)INFINITY;
}

/* Running mean and variance of the loss; true if this one stands out, as the update saw too. Only losses that were used count.
 */
static bool is_spike(tp_run *run, double loss)
{
    tp_run_state *s = &run->state;
    const double memory = 0.98;
    if (loss - s->loss_mean > loss_spread(run)) return true;
    double d = s->loss_count > 0 ? loss - s->loss_mean : 0;
    if (s->loss_count == 0) s->loss_mean = loss;
    s->loss_mean += (1 - memory) * d;
    s->loss_var = memory * (s->loss_var + (1 - memory) * d * d);
    s->loss_count++;
    return false;
}

/* Guards that end a run: too many steps in a row without an update, or a loss that stays above the threshold. A step that cost
 * no more than half of the loss scale was a search for one, unless it was the loss that overflowed, which no scale prevents. */
static tp_status check_guards(tp_run *run, double loss, bool updated, bool scale_fell)
{
    const tp_train_config *c = &run->config->train;
    tp_run_state *s = &run->state;
    s->skipped_in_row = updated ? 0 : s->skipped_in_row + (scale_fell && isfinite(loss) ? 0 : 1);
    if (s->skipped_in_row >= c->max_skipped_steps)
        return tp_fail(
            run->ctx, TP_NUMERIC,
            "step %lld: %lld steps in a row had a loss or gradient that is not finite; the last good checkpoint stands",
            (long long)s->step + 1, (long long)s->skipped_in_row);
    bool over = c->loss_watchdog_threshold > 0 && !(loss <= c->loss_watchdog_threshold);
    s->over_threshold = over ? s->over_threshold + 1 : 0;
    if (over && s->over_threshold >= c->loss_watchdog_patience)
        return tp_fail(run->ctx, TP_NUMERIC, "step %lld: the loss was above loss_watchdog_threshold %g for %lld steps in a row",
                       (long long)s->step + 1, c->loss_watchdog_threshold, (long long)s->over_threshold);
    return TP_OK;
}

static void say_skipped(tp_run *run, bool scale_fell)
{
    char scale[64] = "";
    if (scale_fell) snprintf(scale, sizeof scale, "; the loss scale falls to %g", run->state.scale.value);
    tp_metrics_say(run->metrics, "step %lld: the loss or the gradient is not finite; the step is skipped%s",
                   (long long)run->state.step + 1, scale);
}

/* The group forward and backward, then the update: all of it is with the device when this returns. */
static tp_status start_step(tp_run *run, double rate)
{
    if (run->state.scale.value > 0) run->optim->loss_scale = (float)run->state.scale.value;
    TP_TRY(tp_optim_begin(run->ctx, run->optim, rate, run->state.loss_mean, loss_spread(run)));
    TP_TRY(tp_params_zero_grads(run->ctx, &run->lora->params));
    for (int64_t i = 0; i < run->group_n; i++) {
        tp_status status = run_micro_batch(run, i);
        if (status == TP_DEVICE) tp_fail_in(run->ctx, "micro-batch %lld of %lld", (long long)i + 1, (long long)run->group_n);
        TP_TRY(status);
    }
    TP_TRY(dump_gradients(run));
    return tp_optim_update(run->ctx, run->optim);
}

/* One optimizer step. The device has the next group to begin with when it is done with this one. */
static tp_status run_step(tp_run *run)
{
    int64_t step = run->state.step;
    double rate = tp_schedule_rate(&run->schedule, step), began = tp_now(), cpu_began = tp_cpu_seconds();
    tp_optim_result result;
    TP_TRY(get_group(run, step));
    int64_t labels = run->group_labels, tokens = run->group_tokens, replayed = tp_replay_count(run->replay);
    tp_status status = start_step(run, rate);
    if (status == TP_OK) {
        get_group_early(run, step + 1);
        status = tp_optim_end(run->ctx, run->optim, &result);
    }
    if (status == TP_DEVICE) tp_fail_in(run->ctx, "step %lld", (long long)step + 1);
    TP_TRY(status);
    double loss = result.loss_sum;
    bool spike = isfinite(loss) && is_spike(run, loss);
    if (spike)
        tp_metrics_say(run->metrics, "step %lld: loss %.4f stands out (spike_zscore); the step is skipped", (long long)step + 1,
                       loss);
    double scale = run->state.scale.value;
    bool scale_fell = tp_loss_scale_update(&run->state.scale, isfinite(result.grad_norm));
    if (!result.finite && !spike) say_skipped(run, scale_fell);
    TP_TRY(check_guards(run, loss, result.finite || spike, scale_fell));
    TP_TRY(tp_model_check(run->ctx, run->model));
    run->state.step = step + 1;
    run->state.updates = run->optim->steps;

    double seconds = tp_now() - began;
    run->seconds_in_steps += seconds;
    run->steps_here++;
    tp_step_report report = {.step = step + 1,
                             .steps = run->steps,
                             .loss = loss,
                             .grad_norm = result.grad_norm,
                             .learning_rate = rate,
                             .loss_scale = scale,
                             .labels = labels,
                             .tokens = tokens,
                             .seconds = seconds,
                             .cpu_seconds = tp_cpu_seconds() - cpu_began,
                             .seconds_left = run->seconds_in_steps / (double)run->steps_here * (double)(run->steps - step - 1),
                             .resident_bytes = tp_resident_bytes(),
                             .replayed = replayed < 0 ? -1 : tp_replay_count(run->replay) - replayed};
    tp_metrics_step(run->ctx, run->metrics, &report,
                    (step + 1) % run->config->output.logging_steps == 0 || step + 1 == run->steps);
    return TP_OK;
}

/* True every `every` steps, or `per_epoch` times an epoch, evenly, and at the end. */
static bool is_due(const tp_run *run, int64_t every, int64_t per_epoch)
{
    int64_t step = run->state.step;
    if (every > 0 && step % every == 0) return true;
    if (per_epoch <= 0) return false;
    int64_t in_epoch = (step - 1) % run->steps_per_epoch + 1;
    return in_epoch * per_epoch / run->steps_per_epoch != (in_epoch - 1) * per_epoch / run->steps_per_epoch;
}

static bool evaluation_is_due(const tp_run *run)
{
    const tp_output_config *c = &run->config->output;
    bool last = run->state.step == run->steps;
    return run->held_out != NULL && (last || is_due(run, c->eval_steps, c->eval_steps > 0 ? 0 : c->evals_per_epoch));
}

bool tp_run_stops_early(const tp_run *run)
{
    int64_t patience = run->config->output.early_stopping_patience;
    return patience > 0 && run->state.evals_without_gain >= patience;
}

static tp_status evaluate_held_out(tp_run *run, tp_evaluation *result)
{
    tp_eval_parts parts = {.model = run->model,
                           .tape = run->tape,
                           .buffers = &run->buffers,
                           .batch = &run->eval_batch,
                           .losses = run->losses,
                           .host_losses = run->host_losses,
                           .stop = run->options.stop};
    return tp_evaluate(run->ctx, &parts, run->held_out, result);
}

/* Held-out loss; remembers the best and keeps its adapter. */
static tp_status evaluate(tp_run *run)
{
    const tp_output_config *c = &run->config->output;
    tp_evaluation result;
    TP_TRY(evaluate_held_out(run, &result));
    tp_metrics_eval(run->ctx, run->metrics, run->state.step, result.loss);
    run->state.eval_pending = false;
    if (!(run->state.best_metric <= result.loss) && isfinite(result.loss)) { /* also true while there is none (NaN) */
        tp_status status = c->load_best_model_at_end ? tp_run_publish_adapter(run, "best") : TP_OK;
        if (status != TP_OK && status != TP_IO_WRITE) return status;
        run->state.evals_without_gain = 0;
        if (status == TP_OK) {
            run->state.best_metric = result.loss;
            run->state.best_step = run->state.step;
            return TP_OK;
        }
        tp_warn(run->ctx, "%s; the run goes on with the best adapter so far that was kept", run->ctx->message);
        tp_ctx_clear(run->ctx);
        return TP_OK;
    }
    run->state.evals_without_gain++;
    if (tp_run_stops_early(run))
        tp_metrics_say(run->metrics, "no better held-out loss in %lld evaluations: stopping early",
                       (long long)run->state.evals_without_gain);
    return TP_OK;
}

/* What the adapter makes of the prompts, every sample_steps steps and at the end. A finished run has nothing left to stop for.
 */
static void sample(tp_run *run)
{
    bool last = run->state.step == run->steps || tp_run_stops_early(run);
    if (run->samples == NULL || run->state.step == 0) return;
    if (last || is_due(run, run->config->output.sample_steps, 0))
        tp_samples_make(run->ctx, run->samples, run->metrics, run->state.step, last ? NULL : run->options.stop);
}

static bool save_is_due(const tp_run *run)
{
    const tp_output_config *c = &run->config->output;
    if (told_to(run->options.save)) {
        *run->options.save = 0;
        return true;
    }
    return is_due(run, c->save_steps, c->saves_per_epoch) ||
           (c->save_minutes > 0 && tp_now() - run->last_save >= 60 * c->save_minutes);
}

tp_status tp_run_train(tp_run *run)
{
    if (run->finished || run->options.dry_run) return TP_OK;
    tp_metrics_start(run->ctx, run->metrics, run->state.step, tp_now() - run->options.process_start);
    if (!run->state.eval_pending) sample(run); /* what was not done when the run was told to stop */
    while ((run->state.step < run->steps || run->state.eval_pending) && !tp_run_stops_early(run)) {
        if (told_to(run->options.stop)) {
            TP_TRY(tp_run_save(run, "stopped"));
            return tp_fail(run->ctx, TP_PREEMPTED, "stopped after step %lld of %lld; --resume goes on from there",
                           (long long)run->state.step, (long long)run->steps);
        }
        if (!run->state.eval_pending) {
            TP_TRY(run_step(run));
            run->state.eval_pending = evaluation_is_due(run);
        }
        tp_status status = run->state.eval_pending ? evaluate(run) : TP_OK;
        if (status == TP_PREEMPTED) { /* told to stop while evaluating: the step counts, the evaluation is yet to be done */
            tp_ctx_clear(run->ctx);
            continue;
        }
        TP_TRY(status);
        sample(run);
        if (save_is_due(run)) (void)tp_run_save(run, "interval"); /* a failed save is warned about and tried again later */
    }
    if (tp_run_stops_early(run)) run->steps = run->state.step;
    return tp_run_finish(run);
}

/* One step's batches, and the held-out ones. */
static tp_status tune_pass(tp_run *run)
{
    TP_TRY(get_group(run, 0));
    TP_TRY(tp_optim_begin(run->ctx, run->optim, 0, 0, (double)INFINITY));
    for (int64_t i = 0; i < run->group_n; i++) TP_TRY(run_micro_batch(run, i));
    if (run->held_out == NULL) return TP_OK;
    tp_evaluation ignored;
    return evaluate_held_out(run, &ignored);
}

tp_status tp_run_tune(tp_run *run, tp_buf *report)
{
    const tp_backend *backend = run->ctx->device->backend;
    if (backend->tune_begin == NULL)
        return tp_fail(run->ctx, TP_UNSUPPORTED,
                       "device %s: there is nothing to tune; it chooses its kernels by the CPU's model", backend->name);
    backend->tune_begin(run->ctx->device);
    tp_status status = tune_pass(run);
    return status == TP_OK ? backend->tune_end(run->ctx, report) : status;
}

/* The checkpoint's loss scale, or the first one. */
static void start_scale(tp_run *run)
{
    tp_loss_scale *scale = &run->state.scale;
    double first = run->options.loss_scale > 0 ? run->options.loss_scale : run->precision == TP_F16 ? TP_LOSS_SCALE_FIRST : 0;
    if (first == 0 || scale->value == 0) *scale = (tp_loss_scale){.value = first};
}

tp_status tp_run_open(tp_ctx *ctx, const tp_recipe *recipe, const tp_config *config, const tp_train_options *options,
                      tp_run **result)
{
    tp_run *run = tp_alloc(ctx, 1, sizeof *run);
    if (run == NULL) return TP_NOMEM;
    *run = (tp_run){.ctx = ctx,
                    .recipe = recipe,
                    .config = config,
                    .options = *options,
                    .lock = -1,
                    .group_step = -1,
                    .opened = tp_now(),
                    .last_save = tp_now()};
    run->state.best_metric = NAN;
    tp_status status = tp_run_setup(run);
    start_scale(run);
    if (status == TP_OK && !options->dry_run && !options->tune) status = tp_run_resume(run);
    if (status != TP_OK) return tp_run_close(run, status);
    *result = run;
    return TP_OK;
}

const tp_plan *tp_run_plan(const tp_run *run)
{
    return &run->plan;
}
int64_t tp_run_step(const tp_run *run)
{
    return run->state.step;
}
int64_t tp_run_steps(const tp_run *run)
{
    return run->steps;
}
