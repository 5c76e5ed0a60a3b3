/* Held-out loss: the sum over labels in f64, divided once. */
#include <math.h>

#include "trainers/run.h"

static tp_status batch_loss(tp_ctx *ctx, const tp_eval_parts *p, const tp_host_batch *host, double *sum)
{
    tp_batch view = tp_host_batch_view(host), batch;
    if (host->n_labels == 0) return TP_OK;
    TP_TRY(tp_batch_upload(ctx, p->buffers, &view, &batch));
    tp_pass pass = {.tape = p->tape, .batch = &batch, .adapters_off = p->adapters_off};
    tp_cross_entropy_spec spec = {.head = &p->model->head.weight,
                                  .rows = batch.label_rows,
                                  .labels = batch.labels,
                                  .n = batch.n_labels,
                                  .grad_scale = 1,
                                  .losses = p->losses};
    tp_tape_no_grad_begin(p->tape);
    tp_linear_cross_entropy(p->tape, tp_model_forward(p->model, &pass), &spec);
    tp_tape_no_grad_end(p->tape);
    tp_status status = tp_tape_status(p->tape);
    if (status == TP_OK)
        status = ctx->device->backend->copy_out(ctx, p->host_losses, p->losses, (size_t)host->n_labels * sizeof *p->losses);
    tp_tape_reset(p->tape);
    for (int64_t i = 0; status == TP_OK && i < host->n_labels; i++) *sum += (double)p->host_losses[i];
    return status;
}

tp_status tp_evaluate(tp_ctx *ctx, const tp_eval_parts *parts, const tp_dataset *data, tp_evaluation *result)
{
    double sum = 0;
    *result = (tp_evaluation){0};
    for (int64_t i = 0; i < tp_dataset_micro_batches(data); i++) {
        if (parts->stop != NULL && *parts->stop != 0) return tp_fail(ctx, TP_PREEMPTED, "stopped while evaluating");
        TP_TRY(tp_dataset_get(ctx, data, 0, i, parts->batch));
        TP_TRY(batch_loss(ctx, parts, parts->batch, &sum));
        result->labels += parts->batch->n_labels;
        result->rows += parts->batch->n_segments;
    }
    result->loss = result->labels > 0 ? sum / (double)result->labels : NAN;
    result->perplexity = exp(result->loss);
    return TP_OK;
}
