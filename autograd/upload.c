/* One block of device memory for the four integer arrays of a batch. */
#include "autograd/upload.h"

static size_t total_bytes(const tp_batch_buffers *b)
{
    return (size_t)(2 * b->rows + 2 * b->labels) * sizeof(int32_t);
}

tp_status tp_batch_buffers_open(tp_ctx *ctx, int64_t rows, int64_t labels, tp_batch_buffers *buffers)
{
    *buffers = (tp_batch_buffers){.rows = rows, .labels = labels, .device = ctx->device};
    buffers->memory = ctx->device->backend->alloc(ctx, ctx->device, total_bytes(buffers));
    return buffers->memory != NULL ? TP_OK : TP_NOMEM;
}

void tp_batch_buffers_close(tp_batch_buffers *buffers)
{
    if (buffers->memory != NULL) buffers->device->backend->free(buffers->device, buffers->memory, total_bytes(buffers));
    *buffers = (tp_batch_buffers){0};
}

tp_batch tp_batch_uploaded(const tp_batch_buffers *buffers, const tp_batch *host)
{
    tp_batch batch = *host;
    batch.ids = buffers->memory;
    batch.positions = batch.ids + buffers->rows;
    batch.label_rows = batch.positions + buffers->rows;
    batch.labels = batch.label_rows + buffers->labels;
    return batch;
}

tp_status tp_batch_upload(tp_ctx *ctx, tp_batch_buffers *buffers, const tp_batch *host, tp_batch *batch)
{
    const tp_backend *backend = ctx->device->backend;
    if (host->n > buffers->rows || host->n_labels > buffers->labels)
        return tp_fail(ctx, TP_SHAPE, "a batch of %lld rows and %lld labels, room for %lld and %lld", (long long)host->n,
                       (long long)host->n_labels, (long long)buffers->rows, (long long)buffers->labels);
    int32_t *ids = buffers->memory, *positions = ids + buffers->rows, *label_rows = positions + buffers->rows,
            *labels = label_rows + buffers->labels;
    size_t row_bytes = (size_t)host->n * sizeof *ids, label_bytes = (size_t)host->n_labels * sizeof *ids;
    TP_TRY(backend->copy_in(ctx, ids, host->ids, row_bytes));
    TP_TRY(backend->copy_in(ctx, positions, host->positions, row_bytes));
    if (host->n_labels > 0) {
        TP_TRY(backend->copy_in(ctx, label_rows, host->label_rows, label_bytes));
        TP_TRY(backend->copy_in(ctx, labels, host->labels, label_bytes));
    }
    *batch = tp_batch_uploaded(buffers, host);
    return TP_OK;
}
