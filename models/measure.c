/* A twin of the model made of shapes alone does one pass on an arena without memory. */
#include "models/measure.h"

#include "autograd/upload.h"

static tp_status run_pass(tp_ctx *dry, tp_model *twin, tp_tape *tape, const tp_measure *what)
{
    tp_kv_cache cache = {0};
    tp_batch_buffers buffers;
    int64_t most = what->labels > what->logits_rows ? what->labels : what->logits_rows;
    if (what->context > 0) TP_TRY(tp_kv_cache_open(dry, twin, what->context, &cache));
    tp_status status = tp_batch_buffers_open(dry, what->rows, most + 1, &buffers);
    if (status == TP_OK) {
        int64_t before = what->context > 0 ? what->context - what->rows : 0;
        tp_segment segment = {.q_len = what->rows, .k_len = before + what->rows};
        tp_batch batch = {.n = what->rows,
                          .ids = buffers.memory,
                          .positions = buffers.memory,
                          .max_position = before + what->rows,
                          .segments = &segment,
                          .n_segments = 1};
        tp_pass pass = {.tape = tape, .batch = &batch, .cache = what->context > 0 ? &cache : NULL};
        tp_cross_entropy_spec loss = {
            .head = &twin->head.weight, .rows = buffers.memory, .labels = buffers.memory, .n = what->labels, .grad_scale = 1};
        cache.used = before;
        tp_tape_no_grad_begin(tape);
        tp_tensor *hidden = tp_model_forward(twin, &pass);
        if (what->logits_rows > 0) tp_logits(tape, hidden, &twin->head.weight, buffers.memory, what->logits_rows);
        if (what->labels > 0) tp_linear_cross_entropy(tape, hidden, &loss);
        tp_tape_no_grad_end(tape);
        status = tp_tape_status(tape);
        tp_batch_buffers_close(&buffers);
    }
    tp_kv_cache_close(&cache);
    return status;
}

static tp_status measure(tp_ctx *dry, const tp_model *model, const tp_measure *what, size_t *bytes)
{
    tp_model *twin;
    tp_tape *tape;
    tp_model_options options = {.precision = model->precision};
    TP_TRY(tp_model_from_config(dry, &model->config, &options, &twin));
    for (size_t i = 0; i < twin->n_linears && i < model->n_linears; i++) twin->linears[i]->slot = model->linears[i]->slot;
    tp_model_join_like(twin, model);
    tp_status status = tp_tape_new(dry, 0, model->precision, &tape);
    if (status == TP_OK) {
        status = run_pass(dry, twin, tape, what);
        *bytes = tp_tape_peak(tape);
        tp_tape_free(tape);
    }
    tp_model_free(twin);
    return status;
}

tp_status tp_model_measure(tp_ctx *ctx, const tp_model *model, const tp_measure *what, size_t *bytes)
{
    tp_ctx dry;
    tp_ctx_init(&dry);
    tp_status status = tp_device_open(&dry, "dry", 1, &dry.device);
    if (status == TP_OK) {
        dry.device->logits_bytes = ctx->device->logits_bytes;
        dry.device->makes_swiglu_again = ctx->device->makes_swiglu_again;
        status = measure(&dry, model, what, bytes);
        tp_device_close(dry.device);
    }
    return status == TP_OK ? TP_OK : tp_fail(ctx, status, "%s", dry.message);
}
