/* From a padded table of ids to rows and segments. */
#include "autograd/batch.h"

#include "backend/backend.h"
#include "base/mem.h"

/* One sequence of the table: its tokens are columns begin .. end - 1. */
struct run {
    int64_t begin, end;
};

static tp_status find_run(tp_ctx *ctx, const int64_t *mask, int64_t row, int64_t n, struct run *run)
{
    *run = (struct run){0, mask == NULL ? n : 0};
    if (mask == NULL) return TP_OK;
    for (int64_t c = 0; c < n; c++) {
        if (mask[c] != 0 && mask[c] != 1)
            return tp_fail(ctx, TP_INVALID, "attention_mask[%lld, %lld]: expected 0 or 1, got %lld", (long long)row,
                           (long long)c, (long long)mask[c]);
        if (mask[c] == 0) continue;
        if (run->end == 0)
            run->begin = c;
        else if (run->end != c)
            return tp_fail(ctx, TP_INVALID, "attention_mask[%lld, %lld]: a second run of ones; a row is one run",
                           (long long)row, (long long)c);
        run->end = c + 1;
    }
    return TP_OK;
}

/* Rows without a token keep id and position 0. */
static tp_status fill_row(tp_ctx *ctx, const int64_t *ids, int64_t row, struct run run, int64_t vocab_size, int32_t *out_ids,
                          int32_t *out_positions)
{
    for (int64_t c = run.begin; c < run.end; c++) {
        if (ids[c] < 0 || ids[c] >= vocab_size)
            return tp_fail(ctx, TP_INVALID, "input_ids[%lld, %lld]: token %lld, the vocabulary has %lld", (long long)row,
                           (long long)c, (long long)ids[c], (long long)vocab_size);
        out_ids[c] = (int32_t)ids[c];
        out_positions[c] = (int32_t)(c - run.begin);
    }
    return TP_OK;
}

static tp_status fill(tp_ctx *ctx, const int64_t *ids, const int64_t *mask, int64_t n_rows, int64_t n_columns,
                      int64_t vocab_size, tp_owned_batch *owned, int32_t *host)
{
    tp_batch *batch = &owned->batch;
    for (int64_t r = 0; r < n_rows; r++) {
        struct run run;
        int64_t at = r * n_columns;
        TP_TRY(find_run(ctx, mask != NULL ? mask + at : NULL, r, n_columns, &run));
        TP_TRY(fill_row(ctx, ids + at, r, run, vocab_size, host + at, host + batch->n + at));
        int64_t length = run.end - run.begin;
        if (length == 0) continue;
        owned->segments[batch->n_segments++] = (tp_segment){at + run.begin, length, at + run.begin, length};
        batch->n_tokens += length;
        if (n_columns - run.begin > batch->max_position) batch->max_position = n_columns - run.begin;
    }
    return TP_OK;
}

static tp_status upload(tp_ctx *ctx, tp_owned_batch *owned, const int32_t *host)
{
    const tp_backend *backend = ctx->device->backend;
    owned->device = ctx->device;
    owned->memory = backend->alloc(ctx, ctx->device, owned->bytes);
    if (owned->memory == NULL) return TP_NOMEM;
    owned->batch.ids = owned->memory;
    owned->batch.positions = owned->batch.ids + owned->batch.n;
    owned->batch.segments = owned->segments;
    return backend->copy_in(ctx, owned->memory, host, owned->bytes);
}

tp_status tp_batch_from_rows(tp_ctx *ctx, const int64_t *ids, const int64_t *mask, int64_t n_rows, int64_t n_columns,
                             int64_t vocab_size, tp_owned_batch *owned)
{
    int64_t n;
    *owned = (tp_owned_batch){0};
    if (n_rows < 0 || n_columns < 0 || !tp_mul_i64(n_rows, n_columns, &n) || n > INT32_MAX)
        return tp_fail(ctx, TP_INVALID, "a batch of %lld rows and %lld columns", (long long)n_rows, (long long)n_columns);
    owned->batch.n = n;
    owned->bytes = 2 * (size_t)n * sizeof(int32_t);
    owned->segments = tp_alloc(ctx, (size_t)n_rows, sizeof *owned->segments);
    int32_t *host = tp_alloc(ctx, 2 * (size_t)n, sizeof *host);
    tp_status status = owned->segments != NULL && host != NULL ? TP_OK : TP_NOMEM;
    if (status == TP_OK) status = fill(ctx, ids, mask, n_rows, n_columns, vocab_size, owned, host);
    if (status == TP_OK) status = upload(ctx, owned, host);
    tp_free(host);
    if (status != TP_OK) tp_owned_batch_free(owned);
    return status;
}

void tp_owned_batch_free(tp_owned_batch *owned)
{
    if (owned->memory != NULL) owned->device->backend->free(owned->device, owned->memory, owned->bytes);
    tp_free(owned->segments);
    *owned = (tp_owned_batch){0};
}
