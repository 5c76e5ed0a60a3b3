/* Opening a data set of either kind, and the batches both fill. */
#include "data/dataset.h"

#include <string.h>

#include "base/mem.h"
#include "data/dataset_kind.h"

/* ---- batches ---- */

void tp_host_batch_clear(tp_host_batch *batch)
{
    batch->n = batch->n_segments = batch->n_labels = batch->n_tokens = batch->max_position = 0;
    batch->any_segments = false;
}

tp_status tp_host_batch_reserve(tp_ctx *ctx, tp_host_batch *b, int64_t rows)
{
    size_t need = (size_t)(b->n + rows), capacity = b->capacity, each;
    if (need < (size_t)b->n_segments + 1) need = (size_t)b->n_segments + 1;
    if (need <= b->capacity) return TP_OK;
    void *arrays[] = {&b->ids, &b->positions, &b->label_rows, &b->labels};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        each = b->capacity;
        TP_TRY(tp_grow(ctx, arrays[i], &each, need, sizeof *b->ids));
        capacity = each;
    }
    each = b->capacity;
    TP_TRY(tp_grow(ctx, &b->segments, &each, need, sizeof *b->segments));
    b->capacity = capacity;
    return TP_OK;
}

void tp_host_batch_append(tp_host_batch *b, const int32_t *ids, const int32_t *labels, int64_t n)
{
    for (int64_t t = 0; t < n; t++) {
        b->ids[b->n + t] = ids[t];
        b->positions[b->n + t] = (int32_t)t;
        if (t == 0 || labels == NULL || labels[t] < 0) continue;
        b->label_rows[b->n_labels] = (int32_t)(b->n + t - 1);
        b->labels[b->n_labels++] = labels[t];
    }
    b->segments[b->n_segments++] = (tp_segment){b->n, n, b->n, n};
    if (n > b->max_position) b->max_position = n;
    b->n += n;
    b->n_tokens += n;
}

tp_status tp_host_batch_fill(tp_ctx *ctx, tp_host_batch *b, int64_t rows, int64_t labels)
{
    if (rows < labels) rows = labels; /* a label has a row */
    TP_TRY(tp_host_batch_reserve(ctx, b, rows > b->n ? rows - b->n : 0));
    for (; b->n < rows; b->n++) {
        b->ids[b->n] = -1;
        b->positions[b->n] = 0;
    }
    for (; b->n_labels < labels; b->n_labels++) b->label_rows[b->n_labels] = b->labels[b->n_labels] = -1;
    return TP_OK;
}

void tp_host_batch_free(tp_host_batch *b)
{
    tp_free(b->ids);
    tp_free(b->positions);
    tp_free(b->segments);
    tp_free(b->label_rows);
    tp_free(b->labels);
    *b = (tp_host_batch){0};
}

tp_batch tp_host_batch_view(const tp_host_batch *b)
{
    return (tp_batch){.n = b->n,
                      .ids = b->ids,
                      .positions = b->positions,
                      .max_position = b->max_position,
                      .segments = b->segments,
                      .n_segments = b->n_segments,
                      .label_rows = b->label_rows,
                      .labels = b->labels,
                      .n_labels = b->n_labels,
                      .n_tokens = b->n_tokens};
}

/* ---- opening ---- */

static bool is_tokens(const tp_dataset_config *block)
{
    return block->type == TP_DATASET_TOKENS || (block->type == TP_DATASET_AUTO && tp_ends_with(block->path, ".safetensors"));
}

tp_status tp_dataset_open(tp_ctx *ctx, const tp_dataset_options *options, tp_dataset **dataset)
{
    const tp_data_config *config = options->config;
    const tp_datasets *blocks = options->held_out && config->test_datasets.n > 0 ? &config->test_datasets : &config->datasets;
    size_t n_tokens = 0;
    *dataset = NULL;
    if (options->held_out && config->test_datasets.n == 0 && !(config->val_set_size.fraction > 0) &&
        config->val_set_size.rows == 0)
        return TP_OK;
    for (size_t i = 0; i < blocks->n; i++) n_tokens += is_tokens(&blocks->items[i]);
    if (n_tokens == 0) return tp_text_dataset_open(ctx, options, blocks, dataset);
    if (options->held_out && blocks == &config->datasets)
        return tp_fail(ctx, TP_INVALID,
                       "%s: val_set_size: ready tokens cannot be split by row; name held-out tokens in test_datasets",
                       options->where != NULL ? options->where(options->where_state, "val_set_size") : "recipe");
    if (n_tokens == blocks->n) return tp_token_dataset_open(ctx, options, blocks, dataset);
    return tp_fail(ctx, TP_INVALID, "%s: ready tokens (%s) and text do not mix in one run",
                   options->where != NULL ? options->where(options->where_state, "datasets") : "datasets",
                   blocks->items[0].path);
}

void tp_dataset_close(tp_dataset *dataset)
{
    if (dataset != NULL) dataset->kind->close(dataset);
}

void tp_dataset_count(const tp_dataset *dataset, tp_dataset_counts *counts)
{
    *counts = dataset->counts;
}
int64_t tp_dataset_micro_batches(const tp_dataset *dataset)
{
    return dataset->micro_batches;
}

void tp_dataset_largest(const tp_dataset *dataset, int64_t *rows, int64_t *labels, int64_t *segments, int64_t *longest_segment)
{
    *rows = dataset->largest.rows;
    *labels = dataset->largest.labels;
    *segments = dataset->largest.segments;
    *longest_segment = dataset->largest.longest_segment;
}

tp_status tp_dataset_get(tp_ctx *ctx, const tp_dataset *dataset, int64_t epoch, int64_t i, tp_host_batch *batch)
{
    return dataset->kind->get(ctx, dataset, epoch, i, batch);
}

const char *tp_dataset_fingerprint(const tp_dataset *dataset)
{
    return dataset->fingerprint;
}
const tp_prompt *tp_dataset_prompt(const tp_dataset *dataset)
{
    return dataset->prompt;
}
tp_status tp_dataset_check(tp_ctx *ctx, const tp_dataset *dataset)
{
    return dataset->kind->check(ctx, dataset);
}

tp_status tp_dataset_preview(tp_ctx *ctx, const tp_dataset *dataset, int64_t row, tp_preview *preview)
{
    return dataset->kind->preview(ctx, dataset, row, preview);
}

void tp_preview_free(tp_preview *preview)
{
    tp_buf_free(&preview->text);
    tp_tokens_free(&preview->tokens);
    tp_free(preview->labels);
    *preview = (tp_preview){0};
}
