/* Data sets of text: rows are rendered, encoded and masked when a micro-batch asks for them, from the place where the index
 * says they are; or their tokens come from a cache. */
#include "data/dataset_text.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/mem.h"
#include "data/token_cache.h"

/* ---- one row's tokens ---- */

static tp_status read_sample(tp_ctx *ctx, const struct text_dataset *base, const struct text_row *row)
{
    struct text_dataset *d;
    memcpy(&d, &base, sizeof d); /* only the scratch behind it changes */
    const struct text_file *file = &d->files[row->file];
    struct text_scratch *s = d->scratch;
    tp_json_doc *doc = NULL;
    TP_TRY(tp_grow(ctx, &s->line, &s->line_capacity, (size_t)row->bytes + 1, 1));
    TP_TRY(tp_row_file_read(ctx, file->rows, row->offset, s->line, row->bytes));
    if (!tp_row_file_is_plain(file->rows)) TP_TRY(tp_row_file_parse(ctx, file->rows, row->line, s->line, row->bytes, &doc));
    tp_status status = tp_text_sample(ctx, d, file, doc, (tp_span){s->line, row->bytes});
    tp_json_free(doc);
    if (status != TP_OK) return status;
    const tp_buf *text = &s->sample.text;
    if (row->block > text->len) return tp_fail(ctx, TP_CHECKPOINT, "the row is shorter");
    size_t end = tp_text_splits(d) ? tp_text_block_end(d, (tp_span){tp_buf_cstr(text), text->len}, row->block) : text->len;
    return tp_sample_encode(ctx, d->tokenizer, &s->sample, row->block, end, true, &s->encoded);
}

/* Tokens [row->first, + row->tokens) of the scratch are the row's. They were there at open: whatever fails now comes from a
 * file that is not what it was. */
static tp_status load_row(tp_ctx *ctx, const struct text_dataset *d, const struct text_row *row)
{
    tp_status status = read_sample(ctx, d, row);
    const tp_encoded *e = &d->scratch->encoded;
    if (status == TP_OK && (size_t)row->first + row->tokens > e->tokens.count)
        status = tp_fail(ctx, TP_CHECKPOINT, "the row has %zu tokens", e->tokens.count);
    if (status == TP_OK) {
        if (row->tokens > 0) e->labels[row->first] = TP_NO_LABEL;
        return TP_OK;
    }
    if (status == TP_NOMEM) return status;
    (void)tp_fail_in(ctx, "%s:%lu: the file changed since it was opened", tp_row_file_path(d->files[row->file].rows),
                     (unsigned long)row->line);
    return ctx->status = TP_CHECKPOINT;
}

/* ---- micro-batches ---- */

static tp_status append_draw(tp_ctx *ctx, const struct text_dataset *d, uint32_t draw, tp_host_batch *batch)
{
    const struct text_row *row = &d->rows[d->draws[draw]];
    const tp_encoded *e = &d->scratch->encoded;
    const int32_t *ids, *labels;
    TP_TRY(tp_token_cache_read(ctx, d->cache, d, d->draws[draw], &ids, &labels));
    if (ids == NULL) {
        TP_TRY(load_row(ctx, d, row));
        ids = e->ids + row->first;
        labels = e->labels + row->first;
    }
    TP_TRY(tp_host_batch_reserve(ctx, batch, row->tokens));
    tp_host_batch_append(batch, ids, labels, row->tokens);
    return TP_OK;
}

/* A row, or all rows of a pack. */
static tp_status append_unit(tp_ctx *ctx, const struct text_dataset *d, uint32_t unit, tp_host_batch *batch)
{
    if (d->packs.items == NULL) return append_draw(ctx, d, unit, batch);
    for (uint32_t i = d->packs.starts[unit]; i < d->packs.starts[unit + 1]; i++)
        TP_TRY(append_draw(ctx, d, d->packs.items[i], batch));
    return TP_OK;
}

static tp_status get(tp_ctx *ctx, const tp_dataset *base, int64_t epoch, int64_t i, tp_host_batch *batch)
{
    const struct text_dataset *d = (const struct text_dataset *)base;
    size_t n, most = (size_t)(d->order.n < d->batch_size ? d->order.n : d->batch_size);
    uint32_t *units = tp_alloc_raw(ctx, most, sizeof *units);
    if (units == NULL) return TP_NOMEM;
    tp_host_batch_clear(batch);
    tp_status status = tp_order_batch(ctx, &d->order, (uint64_t)epoch, (uint64_t)i, units, &n);
    for (size_t k = 0; status == TP_OK && k < n; k++) status = append_unit(ctx, d, units[k], batch);
    tp_free(units);
    return status;
}

static tp_status check(tp_ctx *ctx, const tp_dataset *base)
{
    const struct text_dataset *d = (const struct text_dataset *)base;
    for (size_t i = 0; i < d->n_files; i++) {
        if (tp_row_file_check(ctx, d->files[i].rows) == TP_OK) continue;
        return ctx->status = TP_CHECKPOINT;
    }
    return TP_OK;
}

/* ---- preview ---- */

static tp_status copy_row(tp_ctx *ctx, const struct text_dataset *d, const struct text_row *row, tp_preview *out)
{
    const tp_encoded *e = &d->scratch->encoded;
    const tp_token *first = e->tokens.items + row->first;
    size_t n = row->tokens, all = e->tokens.count, begin = 0, end = d->scratch->sample.text.len;
    if (row->first > 0 || row->block > 0) begin = n > 0 ? first->begin : row->block;
    if (n > 0 && row->first + n < all)
        end = first[n - 1].end;
    else if (n > 0 && tp_text_splits(d))
        end = first[n - 1].end;
    tp_buf_append(&out->text, tp_buf_cstr(&d->scratch->sample.text) + begin, end - begin);
    out->labels = tp_alloc(ctx, n, sizeof *out->labels);
    if (out->labels == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++) {
        tp_token token = first[i];
        token.begin -= begin;
        token.end -= begin;
        out->labels[i] = e->labels[row->first + i];
        TP_TRY(tp_tokens_push(ctx, &out->tokens, token));
    }
    return tp_buf_status(ctx, &out->text, "preview");
}

static tp_status preview(tp_ctx *ctx, const tp_dataset *base, int64_t number, tp_preview *out)
{
    const struct text_dataset *d = (const struct text_dataset *)base;
    *out = (tp_preview){0};
    tp_buf_init(&out->text, 0);
    if (number < 0 || (uint64_t)number >= d->n_rows)
        return tp_fail(ctx, TP_INVALID, "preview: row %lld of %zu", (long long)number, d->n_rows);
    const struct text_row *row = &d->rows[number];
    TP_TRY(load_row(ctx, d, row));
    out->file = tp_row_file_path(d->files[row->file].rows);
    out->line = row->line;
    out->dropped = row->labels == 0;
    tp_status status = copy_row(ctx, d, row, out);
    if (status != TP_OK) tp_preview_free(out);
    return status;
}

/* ---- closing ---- */

static void close_text(tp_dataset *base)
{
    struct text_dataset *d = (struct text_dataset *)base;
    for (size_t i = 0; i < d->n_files; i++) tp_row_file_close(d->files[i].rows);
    tp_free(d->files);
    if (d->prompt_open) tp_prompt_close(&d->prompt);
    tp_free(d->rows);
    tp_free(d->draws);
    tp_free(d->lengths);
    tp_packs_free(&d->packs);
    tp_token_cache_close(d->cache);
    if (d->scratch != NULL) {
        tp_free(d->scratch->line);
        tp_sample_free(&d->scratch->sample);
        tp_encoded_free(&d->scratch->encoded);
        tp_free(d->scratch);
    }
    tp_free(d);
}

static const tp_dataset_kind text_kind = {close_text, get, check, preview};

/* ---- opening ---- */

static tp_status add_files(tp_ctx *ctx, struct text_dataset *d, const tp_dataset_options *options, const tp_datasets *blocks,
                           const char *list, enum side side)
{
    for (size_t i = 0; i < blocks->n; i++) {
        const tp_dataset_config *block = &blocks->items[i];
        struct text_file *f = &d->files[d->n_files];
        *f = (struct text_file){.block = block, .list = list, .side = side};
        f->rules = (tp_row_rules){.block = block,
                                  .prompt = &d->prompt,
                                  .train_on_inputs = d->config->train_on_inputs,
                                  .train_on_turns = d->config->train_on_turns};
        TP_TRY(tp_row_file_open(ctx, block->path, block->split != NULL ? block->split : "train", &f->rows));
        d->n_files++;
        if (tp_row_file_is_plain(f->rows) && block->type != TP_DATASET_AUTO && block->type != TP_DATASET_COMPLETION)
            return tp_fail(ctx, TP_INVALID, "%s: %s: a .txt file is plain text: its type is completion, not %s",
                           options->where != NULL ? options->where(options->where_state, list) : "recipe", block->path,
                           tp_config_word("datasets[].type", block->type));
    }
    return TP_OK;
}

static bool holds_out(const tp_data_config *config)
{
    return config->val_set_size.rows > 0 || config->val_set_size.fraction > 0;
}

/* Training: `datasets` less the share. Held out: `test_datasets`, and the share. */
static tp_status open_files(tp_ctx *ctx, struct text_dataset *d, const tp_dataset_options *options)
{
    const tp_data_config *c = d->config;
    d->files = tp_alloc(ctx, c->datasets.n + c->test_datasets.n, sizeof *d->files);
    if (d->files == NULL) return TP_NOMEM;
    if (d->held_out) TP_TRY(add_files(ctx, d, options, &c->test_datasets, "test_datasets", SIDE_ALL));
    if (d->held_out && !holds_out(c)) return TP_OK;
    return add_files(ctx, d, options, &c->datasets, "datasets",
                     d->held_out    ? SIDE_HELD_OUT
                     : holds_out(c) ? SIDE_TRAINING
                                    : SIDE_ALL);
}

static tp_status collect_lengths(tp_ctx *ctx, const struct text_dataset *d, bool labels, uint32_t **values)
{
    *values = tp_alloc_raw(ctx, d->n_draws, sizeof **values);
    if (*values == NULL) return TP_NOMEM;
    for (size_t i = 0; i < d->n_draws; i++) {
        const struct text_row *row = &d->rows[d->draws[i]];
        (*values)[i] = labels ? row->labels : row->tokens;
    }
    return TP_OK;
}

/* Sums over the packs, in place of the values of their rows. */
static tp_status sum_packs(tp_ctx *ctx, const tp_packs *packs, uint32_t **values)
{
    uint32_t *sums = tp_alloc(ctx, packs->n, sizeof *sums);
    if (sums == NULL) return TP_NOMEM;
    for (size_t p = 0; p < packs->n; p++)
        for (uint32_t i = packs->starts[p]; i < packs->starts[p + 1]; i++) sums[p] += (*values)[packs->items[i]];
    tp_free(*values);
    *values = sums;
    return TP_OK;
}

static tp_status make_order(tp_ctx *ctx, struct text_dataset *d)
{
    bool shuffle = d->config->shuffle && !d->held_out;
    TP_TRY(collect_lengths(ctx, d, false, &d->lengths));
    if (d->config->packing) {
        TP_TRY(tp_pack(ctx, d->lengths, d->n_draws, d->max_length, shuffle, d->seed, &d->packs));
        TP_TRY(sum_packs(ctx, &d->packs, &d->lengths));
    }
    d->order = (tp_order){.seed = d->seed,
                          .shuffle = shuffle,
                          .group = d->config->group_by_length && !d->held_out,
                          .n = d->config->packing ? d->packs.n : d->n_draws,
                          .batch_size = d->batch_size,
                          .lengths = d->lengths};
    d->base.micro_batches = (int64_t)tp_order_batches(&d->order);
    return TP_OK;
}

static int largest_first(const void *left, const void *right)
{
    const uint32_t *a = left, *b = right;
    return (*a < *b) - (*a > *b);
}

/* Sum of the batch_size largest values: no batch can have more. */
static int64_t most_of_a_batch(const struct text_dataset *d, uint32_t *values)
{
    int64_t sum = 0;
    qsort(values, d->order.n, sizeof *values, largest_first);
    for (uint64_t i = 0; i < d->order.n && i < d->batch_size; i++) sum += values[i];
    return sum;
}

static tp_status measure_labels(tp_ctx *ctx, struct text_dataset *d)
{
    uint32_t *labels;
    TP_TRY(collect_lengths(ctx, d, true, &labels));
    tp_status status = d->config->packing ? sum_packs(ctx, &d->packs, &labels) : TP_OK;
    for (uint64_t i = 0; status == TP_OK && i < d->order.n; i++) d->base.counts.labels += labels[i];
    if (status == TP_OK) d->base.largest.labels = most_of_a_batch(d, labels);
    tp_free(labels);
    return status;
}

static tp_status measure(tp_ctx *ctx, struct text_dataset *d)
{
    tp_dataset_largest_batch *most = &d->base.largest;
    uint32_t *copy = tp_alloc_raw(ctx, d->order.n, sizeof *copy);
    if (copy == NULL) return TP_NOMEM;
    memcpy(copy, d->lengths, d->order.n * sizeof *copy);
    for (uint64_t i = 0; i < d->order.n; i++) d->base.counts.tokens += copy[i];
    most->rows = most_of_a_batch(d, copy);
    for (uint64_t i = 0; i < d->order.n; i++) copy[i] = d->config->packing ? d->packs.starts[i + 1] - d->packs.starts[i] : 1;
    most->segments = most_of_a_batch(d, copy);
    most->longest_segment = d->base.counts.longest_row;
    tp_free(copy);
    return measure_labels(ctx, d);
}

/* ---- fingerprint ---- */

static void describe_file(const struct text_file *f, tp_buf *out)
{
    const tp_dataset_config *b = f->block;
    tp_buf_printf(out, "\n%s side=%d weight=%.17g limit=%lld system=%s",
                  tp_row_file_is_plain(f->rows) ? "text"
                  : f->chosen                   ? f->rules.format->name
                                                : "no row",
                  (int)f->side, b->weight, (long long)b->limit, b->system != NULL ? b->system : "");
    for (size_t i = 0; i < b->columns.n; i++) tp_buf_printf(out, " %s=%s", b->columns.items[i].name, b->columns.items[i].value);
    tp_buf_char(out, ' ');
}

static tp_status fingerprint(tp_ctx *ctx, struct text_dataset *d)
{
    const tp_data_config *c = d->config;
    tp_status status = TP_OK;
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_printf(&text,
                  "text 2 seed=%llu length=%lld batch=%llu shuffle=%d group=%d packing=%d excess=%d bad=%d inputs=%d turns=%d "
                  "share=%.17g,%lld tokenizer=%s",
                  (unsigned long long)d->seed, (long long)d->max_length, (unsigned long long)d->batch_size, c->shuffle,
                  c->group_by_length, c->packing, c->excess_length, c->on_bad_row, c->train_on_inputs, c->train_on_turns,
                  c->val_set_size.fraction, (long long)c->val_set_size.rows, tp_tokenizer_identity(d->tokenizer));
    for (size_t i = 0; i < d->n_files && status == TP_OK; i++) {
        describe_file(&d->files[i], &text);
        status = tp_row_file_hash(ctx, d->files[i].rows, &text);
    }
    if (d->prompt_open) {
        tp_span source = tp_template_source(d->prompt.tmpl);
        tp_buf_append(&text, source.data, source.len);
    }
    if (status == TP_OK) status = tp_buf_status(ctx, &text, "fingerprint");
    if (status == TP_OK) tp_sha256_hex(text.data, text.len, d->base.fingerprint);
    tp_buf_free(&text);
    return status;
}

static tp_status open_text(tp_ctx *ctx, struct text_dataset *d, const tp_dataset_options *options)
{
    d->scratch = tp_alloc(ctx, 1, sizeof *d->scratch);
    if (d->scratch == NULL) return TP_NOMEM;
    TP_TRY(open_files(ctx, d, options));
    TP_TRY(tp_text_index(ctx, d, options));
    if (options->shows) return TP_OK;
    TP_TRY(make_order(ctx, d));
    TP_TRY(measure(ctx, d));
    return fingerprint(ctx, d);
}

tp_status tp_text_dataset_open(tp_ctx *ctx, const tp_dataset_options *options, const tp_datasets *blocks, tp_dataset **dataset)
{
    (void)blocks; /* both lists count: a share of `datasets` may be held out beside `test_datasets` */
    struct text_dataset *d = tp_alloc(ctx, 1, sizeof *d);
    if (d == NULL) return TP_NOMEM;
    d->base.kind = &text_kind;
    d->config = options->config;
    d->tokenizer = options->tokenizer;
    d->max_length = options->max_length < options->max_positions || options->max_positions <= 0 ? options->max_length
                                                                                                : options->max_positions;
    d->vocab_size = options->vocab_size;
    d->seed = options->seed;
    d->batch_size = options->micro_batch_size > 0 ? (uint64_t)options->micro_batch_size : 1;
    d->held_out = options->held_out;
    tp_status status = open_text(ctx, d, options);
    if (status != TP_OK) {
        close_text(&d->base);
        return status;
    }
    *dataset = &d->base;
    return TP_OK;
}
