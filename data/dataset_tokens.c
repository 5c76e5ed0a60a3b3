/* Ready tokens: every micro-batch as a table [B, T] in a safetensors file.
 *
 *   <i>.input_ids, <i>.labels, <i>.attention_mask?  [B, T], i = 0, 1, ...      or
 *   input_ids, labels, attention_mask?              [n, B, T]
 * labels[t] is what the output at t - 1 must predict; -100 is none. The mask of a row is one run of ones; what lies outside is
 * padding and never reaches the network. */
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/safetensors.h"
#include "data/dataset_kind.h"

/* Where one micro-batch lies. */
struct table {
    const tp_safetensors *file;
    const tp_entry *ids, *labels, *mask; /* mask may be NULL */
    uint64_t first;                      /* element of each tensor where the table begins */
    int64_t rows, columns;
};

struct token_dataset {
    tp_dataset base;
    tp_safetensors **files;
    size_t n_files;
    struct table *tables;
    size_t n_tables, capacity;
    bool shuffle;
    uint64_t seed;
    int64_t vocab_size, max_positions;
};

static bool is_integer(tp_dtype dtype)
{
    return dtype == TP_I32 || dtype == TP_I64;
}

/* All three tensors of one micro-batch, or of n stacked ones, agree. */
static tp_status check_entries(tp_ctx *ctx, const tp_safetensors *file, const tp_entry *ids, const tp_entry *labels,
                               const tp_entry *mask, int rank)
{
    const tp_entry *all[] = {ids, labels, mask};
    for (int i = 0; i < 3; i++) {
        const tp_entry *e = all[i];
        if (e == NULL) continue;
        bool type = is_integer(e->dtype) || (e == mask && (e->dtype == TP_U8 || e->dtype == TP_BOOL));
        if (!type)
            return tp_fail(ctx, TP_FORMAT, "%s: %s: dtype %s, expected I32 or I64", tp_safetensors_path(file), e->name,
                           tp_dtype_name(e->dtype));
        if (e->rank != rank)
            return tp_fail(ctx, TP_SHAPE, "%s: %s: %d dimensions, expected %d", tp_safetensors_path(file), e->name, e->rank,
                           rank);
        for (int d = 0; d < rank; d++)
            if (e->shape[d] != ids->shape[d] || e->shape[d] < 1)
                return tp_fail(ctx, TP_SHAPE, "%s: %s: dimension %d is %lld, input_ids has %lld", tp_safetensors_path(file),
                               e->name, d, (long long)e->shape[d], (long long)ids->shape[d]);
    }
    return TP_OK;
}

static tp_status add_tables(tp_ctx *ctx, struct token_dataset *d, const tp_safetensors *file, const tp_entry *ids,
                            const tp_entry *labels, const tp_entry *mask, int rank, int64_t limit)
{
    if (labels == NULL) return tp_fail(ctx, TP_FORMAT, "%s: %s has no labels beside it", tp_safetensors_path(file), ids->name);
    TP_TRY(check_entries(ctx, file, ids, labels, mask, rank));
    int64_t n = rank == 3 ? ids->shape[0] : 1, rows = ids->shape[rank - 2], columns = ids->shape[rank - 1];
    for (int64_t i = 0; i < n && i < limit; i++) {
        TP_TRY(tp_grow(ctx, &d->tables, &d->capacity, d->n_tables + 1, sizeof *d->tables));
        d->tables[d->n_tables++] = (struct table){file, ids, labels, mask, (uint64_t)(i * rows * columns), rows, columns};
    }
    return TP_OK;
}

static tp_status add_file(tp_ctx *ctx, struct token_dataset *d, const tp_safetensors *file, int64_t limit)
{
    const tp_entry *stacked = tp_safetensors_find(file, "input_ids");
    char name[64];
    if (stacked != NULL)
        return add_tables(ctx, d, file, stacked, tp_safetensors_find(file, "labels"),
                          tp_safetensors_find(file, "attention_mask"), 3, limit);
    for (int64_t i = 0; i < limit; i++) {
        snprintf(name, sizeof name, "%lld.input_ids", (long long)i);
        const tp_entry *ids = tp_safetensors_find(file, name);
        if (ids == NULL && i == 0)
            return tp_fail(ctx, TP_FORMAT, "%s: neither input_ids nor 0.input_ids is there", tp_safetensors_path(file));
        if (ids == NULL) return TP_OK;
        snprintf(name, sizeof name, "%lld.labels", (long long)i);
        const tp_entry *labels = tp_safetensors_find(file, name);
        snprintf(name, sizeof name, "%lld.attention_mask", (long long)i);
        TP_TRY(add_tables(ctx, d, file, ids, labels, tp_safetensors_find(file, name), 2, 1));
    }
    return TP_OK;
}

/* ---- reading a micro-batch ---- */

static tp_status bad_cell(tp_ctx *ctx, const struct table *t, const tp_entry *e, int64_t row, int64_t column, const char *what,
                          int64_t value)
{
    return tp_fail(ctx, TP_FORMAT, "%s: %s: row %lld, column %lld: %s %lld", tp_safetensors_path(t->file), e->name,
                   (long long)row, (long long)column, what, (long long)value);
}

/* The run of ones in a row of the mask. */
static tp_status find_run(tp_ctx *ctx, const struct table *t, const int64_t *mask, int64_t row, int64_t *begin, int64_t *end)
{
    *begin = 0;
    *end = t->columns;
    if (mask == NULL) return TP_OK;
    while (*begin < t->columns && mask[*begin] == 0) ++*begin;
    *end = *begin;
    while (*end < t->columns && mask[*end] == 1) ++*end;
    for (int64_t c = *end; c < t->columns; c++)
        if (mask[c] != 0) return bad_cell(ctx, t, t->mask, row, c, "the ones of a row must be one run, found", mask[c]);
    return TP_OK;
}

static tp_status append_row(tp_ctx *ctx, const struct token_dataset *d, const struct table *t, const int64_t *ids,
                            const int64_t *labels, const int64_t *mask, int64_t row, int32_t *narrow, tp_host_batch *batch)
{
    int64_t begin, end;
    TP_TRY(find_run(ctx, t, mask, row, &begin, &end));
    for (int64_t c = begin; c < end; c++) {
        if (ids[c] < 0 || ids[c] >= d->vocab_size)
            return bad_cell(ctx, t, t->ids, row, c, "token id outside the vocabulary:", ids[c]);
        if (labels[c] != -100 && (labels[c] < 0 || labels[c] >= d->vocab_size))
            return bad_cell(ctx, t, t->labels, row, c, "label outside the vocabulary:", labels[c]);
        narrow[c - begin] = (int32_t)ids[c];
        narrow[t->columns + c - begin] = (int32_t)labels[c];
    }
    if (end - begin > d->max_positions)
        return bad_cell(ctx, t, t->ids, row, begin, "more tokens than the model has positions:", end - begin);
    if (end > begin) tp_host_batch_append(batch, narrow, narrow + t->columns, end - begin);
    return TP_OK;
}

static tp_status read_table(tp_ctx *ctx, const struct token_dataset *d, const struct table *t, tp_host_batch *batch)
{
    size_t cells = (size_t)(t->rows * t->columns);
    int64_t *values = tp_alloc_raw(ctx, 3 * cells, sizeof *values);
    int32_t *narrow = tp_alloc_raw(ctx, 2 * (size_t)t->columns, sizeof *narrow);
    tp_host_batch_clear(batch);
    tp_status status = values != NULL && narrow != NULL ? tp_host_batch_reserve(ctx, batch, (int64_t)cells) : TP_NOMEM;
    if (status == TP_OK) status = tp_safetensors_read_i64(ctx, t->file, t->ids, t->first, cells, values);
    if (status == TP_OK) status = tp_safetensors_read_i64(ctx, t->file, t->labels, t->first, cells, values + cells);
    if (status == TP_OK && t->mask != NULL)
        status = tp_safetensors_read_i64(ctx, t->file, t->mask, t->first, cells, values + 2 * cells);
    for (int64_t r = 0; status == TP_OK && r < t->rows; r++) {
        size_t at = (size_t)(r * t->columns);
        status = append_row(ctx, d, t, values + at, values + cells + at, t->mask != NULL ? values + 2 * cells + at : NULL, r,
                            narrow, batch);
    }
    tp_free(narrow);
    tp_free(values);
    return status;
}

/* ---- the kind ---- */

static tp_status get(tp_ctx *ctx, const tp_dataset *base, int64_t epoch, int64_t i, tp_host_batch *batch)
{
    const struct token_dataset *d = (const struct token_dataset *)base;
    tp_rng_key key = {d->seed, TP_STREAM_SHUFFLE, (uint64_t)epoch};
    uint64_t index = d->shuffle ? tp_rng_permute(key, d->n_tables, (uint64_t)i) : (uint64_t)i;
    return read_table(ctx, d, &d->tables[index], batch);
}

static tp_status check(tp_ctx *ctx, const tp_dataset *base)
{
    const struct token_dataset *d = (const struct token_dataset *)base;
    for (size_t i = 0; i < d->n_files; i++) {
        if (tp_file_check(ctx, tp_safetensors_file(d->files[i])) == TP_OK) continue;
        ctx->status = TP_CHECKPOINT;
        return TP_CHECKPOINT;
    }
    return TP_OK;
}

/* Row r of the preview is row r of all tables in file order. */
static tp_status preview(tp_ctx *ctx, const tp_dataset *base, int64_t row, tp_preview *out)
{
    const struct token_dataset *d = (const struct token_dataset *)base;
    size_t i = 0;
    *out = (tp_preview){0};
    tp_buf_init(&out->text, 0);
    while (i < d->n_tables && row >= d->tables[i].rows) row -= d->tables[i++].rows;
    if (i == d->n_tables) return tp_fail(ctx, TP_INVALID, "preview: there are fewer rows");
    tp_host_batch batch = {0};
    tp_status status = read_table(ctx, d, &d->tables[i], &batch);
    int64_t segment = row < batch.n_segments ? row : batch.n_segments - 1; /* rows without a token make no segment */
    int64_t start = status == TP_OK && segment >= 0 ? batch.segments[segment].q_start : 0,
            n = status == TP_OK && segment >= 0 ? batch.segments[segment].q_len : 0;
    if (status == TP_OK) out->labels = tp_alloc(ctx, (size_t)n, sizeof *out->labels);
    if (status == TP_OK && out->labels == NULL) status = TP_NOMEM;
    for (int64_t t = 0; status == TP_OK && t < n; t++) {
        out->labels[t] = -100;
        status = tp_tokens_push(ctx, &out->tokens, (tp_token){.id = batch.ids[start + t]});
    }
    for (int64_t l = 0; status == TP_OK && l < batch.n_labels; l++) {
        int64_t t = batch.label_rows[l] + 1 - start;
        if (t > 0 && t < n) out->labels[t] = batch.labels[l];
    }
    out->file = tp_safetensors_path(d->tables[i].file);
    tp_host_batch_free(&batch);
    return status;
}

static void close_tokens(tp_dataset *base)
{
    struct token_dataset *d = (struct token_dataset *)base;
    for (size_t i = 0; i < d->n_files; i++) tp_safetensors_close(d->files[i]);
    tp_free(d->files);
    tp_free(d->tables);
    tp_free(d);
}

static const tp_dataset_kind token_kind = {close_tokens, get, check, preview};

/* Sizes of the largest batch by its table, tokens and labels by reading everything once. */
static tp_status survey(tp_ctx *ctx, struct token_dataset *d)
{
    tp_host_batch batch = {0};
    tp_status status = TP_OK;
    for (size_t i = 0; i < d->n_tables && status == TP_OK; i++) {
        status = read_table(ctx, d, &d->tables[i], &batch);
        if (status != TP_OK) break;
        tp_dataset_largest_batch *most = &d->base.largest;
        if (batch.n > most->rows) most->rows = batch.n;
        if (batch.n_labels > most->labels) most->labels = batch.n_labels;
        if (batch.n_segments > most->segments) most->segments = batch.n_segments;
        if (batch.max_position > most->longest_segment) most->longest_segment = batch.max_position;
        d->base.counts.rows_read += d->tables[i].rows;
        d->base.counts.rows_used += batch.n_segments;
        d->base.counts.tokens += batch.n;
        d->base.counts.labels += batch.n_labels;
    }
    d->base.counts.longest_row = d->base.largest.longest_segment;
    tp_host_batch_free(&batch);
    return status;
}

static tp_status fingerprint(tp_ctx *ctx, struct token_dataset *d)
{
    tp_buf text;
    uint8_t digest[32];
    char hex[65];
    tp_buf_init(&text, 0);
    tp_buf_printf(&text, "tokens shuffle=%d seed=%llu\n", d->shuffle, (unsigned long long)d->seed);
    tp_status status = TP_OK;
    for (size_t i = 0; i < d->n_files && status == TP_OK; i++) {
        status = tp_sha256_file(ctx, tp_safetensors_path(d->files[i]), hex);
        if (status == TP_OK) tp_buf_printf(&text, "%s\n", hex);
    }
    if (status == TP_OK) status = tp_buf_status(ctx, &text, "fingerprint");
    if (status == TP_OK) tp_sha256(text.data, text.len, digest);
    for (int i = 0; i < 32 && status == TP_OK; i++) snprintf(d->base.fingerprint + 2 * i, 3, "%02x", digest[i]);
    tp_buf_free(&text);
    return status;
}

static tp_status open_files(tp_ctx *ctx, struct token_dataset *d, const tp_dataset_options *options, const tp_datasets *blocks)
{
    d->files = tp_alloc(ctx, blocks->n, sizeof *d->files);
    if (d->files == NULL) return TP_NOMEM;
    for (size_t i = 0; i < blocks->n; i++) {
        TP_TRY(tp_safetensors_open(ctx, blocks->items[i].path, &d->files[i]));
        d->n_files++;
        TP_TRY(add_file(ctx, d, d->files[i], blocks->items[i].limit != TP_UNSET ? blocks->items[i].limit : INT64_MAX));
    }
    for (size_t i = 0; options->micro_batch_size_given && i < d->n_tables; i++)
        if (d->tables[i].rows != options->micro_batch_size)
            return tp_fail(ctx, TP_INVALID, "%s: micro_batch_size: %lld, the ready batches of %s have %lld rows",
                           options->where != NULL ? options->where(options->where_state, "micro_batch_size") : "recipe",
                           (long long)options->micro_batch_size, tp_safetensors_path(d->tables[i].file),
                           (long long)d->tables[i].rows);
    TP_TRY(survey(ctx, d));
    return fingerprint(ctx, d);
}

tp_status tp_token_dataset_open(tp_ctx *ctx, const tp_dataset_options *options, const tp_datasets *blocks, tp_dataset **dataset)
{
    struct token_dataset *d = tp_alloc(ctx, 1, sizeof *d);
    if (d == NULL) return TP_NOMEM;
    d->base.kind = &token_kind;
    if (options->keeps_tokens && !options->held_out && options->config->cache_dir != NULL)
        tp_note(ctx, "cache_dir: without effect, these are tokens already");
    d->shuffle = options->config->shuffle && !options->held_out;
    d->seed = options->seed;
    d->vocab_size = options->vocab_size;
    d->max_positions = options->max_positions;
    tp_status status = open_files(ctx, d, options, blocks);
    if (status != TP_OK) {
        close_tokens(&d->base);
        return status;
    }
    d->base.micro_batches = (int64_t)d->n_tables;
    *dataset = &d->base;
    return TP_OK;
}
