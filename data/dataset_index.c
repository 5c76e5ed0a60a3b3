/* The one pass over the files in which a data set learns where its rows are and how long they get; or, in its place, what a
 * token cache remembers of it. */
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/mem.h"
#include "data/dataset_text.h"
#include "data/token_cache.h"

#define PLACE_BYTES 1024

/* A block of a split text holds about 16 parts. */
#define BLOCK_BYTES_PER_TOKEN 64
#define BLOCK_MIN_BYTES       4096

struct indexing {
    tp_ctx *ctx;
    struct text_dataset *d;
    const tp_dataset_options *options;
    struct text_file *file;
    tp_row_place place;
    uint32_t file_number;
    uint64_t held_out_below; /* hashes up to this one are held out, if holds_out */
    bool holds_out;
    uint32_t copies; /* draws of this row */
    bool fatal;      /* the failure is not of the kind that on_bad_row skips */
};

static const char *where(const tp_dataset_options *options, const char *key)
{
    return options->where != NULL ? options->where(options->where_state, key) : "recipe";
}

static tp_status fatal(struct indexing *x, tp_status status)
{
    if (status != TP_OK) x->fatal = true;
    return status;
}

/* ---- blocks of split texts ---- */

bool tp_text_splits(const struct text_dataset *d)
{
    return d->config->excess_length == TP_EXCESS_SPLIT;
}

size_t tp_text_block_end(const struct text_dataset *d, tp_span text, size_t begin)
{
    size_t bytes = (size_t)d->max_length * BLOCK_BYTES_PER_TOKEN;
    if (bytes < BLOCK_MIN_BYTES) bytes = BLOCK_MIN_BYTES;
    if (text.len - begin <= bytes) return text.len;
    size_t end = begin + bytes, half = begin + bytes / 2, at;
    for (at = end; at > half; at--)
        if (text.data[at - 1] == '\n' && text.data[at] != '\n') return at;
    for (at = end; at > half; at--)
        if (text.data[at] == ' ' && text.data[at - 1] != ' ') return at;
    while (end > half && ((unsigned char)text.data[end] & 0xC0) == 0x80) end--;
    return end;
}

/* ---- checks of a row's tokens ---- */

static tp_status row_fail(struct indexing *x, const char *what)
{
    return fatal(
        x, tp_fail(x->ctx, TP_FORMAT, "%s:%llu: %s", tp_row_file_path(x->file->rows), (unsigned long long)x->place.line, what));
}

static tp_status preflight(struct indexing *x)
{
    const struct text_dataset *d = x->d;
    const tp_encoded *e = &d->scratch->encoded;
    int32_t bos = tp_tokenizer_role(d->tokenizer, TP_TOKEN_BOS), eos = tp_tokenizer_role(d->tokenizer, TP_TOKEN_EOS);
    char text[256];
    if (e->learns_end) x->d->findings.learns_end = true;
    if (bos >= 0 && bos != eos && e->tokens.count > 1 && e->ids[0] == bos && e->ids[1] == bos)
        return row_fail(x, "the row begins with bos twice: the text has it already, and the tokenizer or the template adds it");
    for (size_t i = 0; i < e->tokens.count; i++) {
        if (e->ids[i] >= 0 && e->ids[i] < d->vocab_size) continue;
        tp_span token = tp_tokenizer_token(d->tokenizer, e->ids[i]);
        snprintf(text, sizeof text,
                 "token %d (\"%.*s\") lies beyond the model's embedding of %lld rows: the tokenizer belongs to another model",
                 (int)e->ids[i], (int)(token.len < 64 ? token.len : 64), token.data != NULL ? token.data : "",
                 (long long)d->vocab_size);
        return row_fail(x, text);
    }
    return TP_OK;
}

/* ---- rows ---- */

/* Labels of tokens [first, first + n) when they are a sequence of their own. */
static uint32_t count_labels(const tp_encoded *e, size_t first, size_t n)
{
    uint32_t labels = 0;
    for (size_t i = first + 1; i < first + n; i++) labels += e->labels[i] != TP_NO_LABEL;
    return labels;
}

static tp_status push_row(struct indexing *x, size_t block, size_t first, size_t tokens, uint32_t labels)
{
    struct text_dataset *d = x->d;
    const tp_row_place *p = &x->place;
    TP_TRY(tp_grow(x->ctx, &d->rows, &d->rows_capacity, d->n_rows + 1, sizeof *d->rows));
    TP_TRY(tp_grow(x->ctx, &d->draws, &d->draws_capacity, d->n_draws + x->copies, sizeof *d->draws));
    d->rows[d->n_rows] = (struct text_row){p->offset,       (uint32_t)p->bytes, (uint32_t)p->line, x->file_number,
                                           (uint32_t)block, (uint32_t)first,    (uint32_t)tokens,  labels};
    for (uint32_t i = 0; labels > 0 && i < x->copies; i++) d->draws[d->n_draws++] = (uint32_t)d->n_rows;
    d->n_rows++;
    if (labels > 0) TP_TRY(tp_token_cache_add(x->ctx, d->cache, &d->scratch->encoded, first, tokens));
    if (labels > 0 && (int64_t)tokens > d->base.counts.longest_row) d->base.counts.longest_row = (int64_t)tokens;
    return TP_OK;
}

static tp_status drop(struct indexing *x, size_t tokens, int64_t *reason)
{
    ++*reason;
    x->d->base.counts.rows_dropped++;
    return push_row(x, 0, 0, tokens, 0);
}

static tp_status index_whole(struct indexing *x)
{
    struct text_dataset *d = x->d;
    tp_encoded *e = &d->scratch->encoded;
    char text[128];
    TP_TRY(tp_sample_encode(x->ctx, d->tokenizer, &d->scratch->sample, 0, d->scratch->sample.text.len, true, e));
    TP_TRY(preflight(x));
    size_t n = e->tokens.count;
    if ((int64_t)n > d->max_length) {
        snprintf(text, sizeof text, "the row has %zu tokens, max_seq_length is %lld", n, (long long)d->max_length);
        if (d->config->excess_length == TP_EXCESS_RAISE) return row_fail(x, text);
        if (d->config->excess_length != TP_EXCESS_TRUNCATE) return drop(x, n, &d->findings.too_long);
        n = (size_t)d->max_length;
    }
    uint32_t labels = count_labels(e, 0, n);
    if (labels == 0) return drop(x, n, &d->findings.masked);
    d->base.counts.rows_used++;
    return push_row(x, 0, 0, n, labels);
}

/* Parts of max_length tokens, the last one shorter; no part is a single token, of which nothing could be learned. */
static tp_status index_block(struct indexing *x, size_t block, bool *used)
{
    const tp_encoded *e = &x->d->scratch->encoded;
    size_t n = e->tokens.count, most = (size_t)x->d->max_length;
    for (size_t first = 0, take; first < n; first += take) {
        take = n - first < most ? n - first : most;
        if (n - first == most + 1) take = most - 1;
        uint32_t labels = count_labels(e, first, take);
        if (labels == 0) continue;
        *used = true;
        TP_TRY(push_row(x, block, first, take, labels));
    }
    return TP_OK;
}

static tp_status index_split(struct indexing *x)
{
    struct text_dataset *d = x->d;
    const tp_buf *text = &d->scratch->sample.text;
    bool used = false;
    size_t begin = 0;
    do {
        size_t end = tp_text_block_end(d, (tp_span){tp_buf_cstr(text), text->len}, begin);
        TP_TRY(tp_sample_encode(x->ctx, d->tokenizer, &d->scratch->sample, begin, end, true, &d->scratch->encoded));
        TP_TRY(preflight(x));
        TP_TRY(index_block(x, begin, &used));
        begin = end;
    } while (begin < text->len);
    if (!used) return drop(x, 0, &d->findings.masked);
    d->base.counts.rows_used++;
    return TP_OK;
}

/* ---- choosing the format ---- */

static tp_status open_prompt(struct indexing *x)
{
    struct text_dataset *d = x->d;
    const char *choice = d->config->chat_template;
    if (d->prompt_open) return TP_OK;
    if (strcmp(choice, "none") == 0)
        return tp_fail(x->ctx, TP_INVALID, "%s: chat_template: none, but the rows of %s are rendered by one",
                       where(x->options, "chat_template"), tp_row_file_path(x->file->rows));
    if (tp_prompt_open(x->ctx, d->tokenizer, choice, &d->prompt) != TP_OK)
        return tp_fail_in(x->ctx, "%s", where(x->options, "chat_template"));
    /* Tokens must not depend on the day: templates that ask for the date are told the one that Llama's fall back to. */
    d->prompt.now = (tp_template_time){2024, 7, 26, 0, 0, 0};
    d->prompt_open = true;
    d->base.prompt = &d->prompt;
    return TP_OK;
}

static tp_status choose(struct indexing *x, const tp_json_doc *doc)
{
    struct text_file *f = x->file;
    TP_TRY(tp_rules_choose(x->ctx, &f->rules, doc));
    if (f->rules.format->needs_template) TP_TRY(open_prompt(x));
    if (tp_text_splits(x->d) && (f->rules.format->needs_template || f->rules.pairs))
        return tp_fail(x->ctx, TP_INVALID, "%s: excess_length_strategy: split is for plain text; the rows of %s are %s",
                       where(x->options, "excess_length_strategy"), tp_row_file_path(f->rows),
                       f->rules.pairs ? "prompts and completions" : f->rules.format->name);
    f->chosen = true;
    f->chose_by = x->place;
    f->chose_by.text = NULL;
    return TP_OK;
}

/* ---- one row ---- */

tp_status tp_text_sample(tp_ctx *ctx, struct text_dataset *d, const struct text_file *file, tp_json_doc *doc, tp_span bytes)
{
    if (doc == NULL) return tp_sample_from_text(ctx, bytes, &d->scratch->sample);
    return tp_rules_apply(ctx, &file->rules, doc, &d->scratch->sample);
}

static tp_status index_sample(struct indexing *x)
{
    tp_status status = tp_text_splits(x->d) ? index_split(x) : index_whole(x);
    if (status != TP_INVALID && status != TP_UNSUPPORTED) return status;
    /* The tokenizer says what is wrong, not where. */
    (void)tp_fail_in(x->ctx, "%s:%llu", tp_row_file_path(x->file->rows), (unsigned long long)x->place.line);
    return x->ctx->status = TP_FORMAT;
}

static tp_status index_object(struct indexing *x, tp_span bytes)
{
    tp_json_doc *doc;
    TP_TRY(tp_row_file_parse(x->ctx, x->file->rows, x->place.line, bytes.data, bytes.len, &doc));
    tp_status status = x->file->chosen ? TP_OK : fatal(x, choose(x, doc));
    if (status == TP_OK) status = tp_text_sample(x->ctx, x->d, x->file, doc, bytes);
    tp_json_free(doc);
    return status == TP_OK ? index_sample(x) : status;
}

static tp_status index_row(struct indexing *x)
{
    tp_span bytes = {x->place.text, x->place.bytes};
    if (!tp_row_file_is_plain(x->file->rows)) return index_object(x, bytes);
    TP_TRY(tp_text_sample(x->ctx, x->d, x->file, NULL, bytes));
    return index_sample(x);
}

/* ---- which rows, and how often ---- */

struct row_hash {
    uint64_t side, weight;
};

static struct row_hash hash_row(const tp_row_place *place)
{
    uint8_t digest[32];
    struct row_hash hash = {0, 0};
    tp_sha256(place->text, place->bytes, digest);
    for (int i = 0; i < 8; i++) {
        hash.side = hash.side << 8 | digest[i];
        hash.weight = hash.weight << 8 | digest[8 + i];
    }
    return hash;
}

/* weight 2.25: every row twice, a quarter of them, by hash, once more. */
static tp_status count_copies(struct indexing *x, const struct row_hash *hash)
{
    double weight = x->d->held_out ? 1 : x->file->block->weight;
    double whole = (double)(uint64_t)(weight < 1e9 ? weight : 1e9);
    x->copies = (uint32_t)whole;
    if ((double)hash->weight * 0x1p-64 < weight - whole) x->copies++;
    if (x->d->n_draws + (uint64_t)x->copies < UINT32_MAX && x->d->n_rows < UINT32_MAX - 1) return TP_OK;
    return tp_fail(x->ctx, TP_INVALID, "%s: %s: more than 4 billion rows an epoch", where(x->options, x->file->list),
                   x->file->block->path);
}

static bool needs_hash(const struct text_file *f)
{
    return f->side != SIDE_ALL || !(f->block->weight < 1e9 && f->block->weight == (double)(int64_t)f->block->weight);
}

/* A malformed row leaves nothing behind when it is skipped. */
static tp_status take_row(struct indexing *x)
{
    struct text_dataset *d = x->d;
    tp_dataset_counts *counts = &d->base.counts, before;
    size_t n_rows = d->n_rows, n_draws = d->n_draws;
    struct row_hash hash = {0, 0};
    if (needs_hash(x->file)) hash = hash_row(&x->place);
    bool held_out = x->holds_out && hash.side <= x->held_out_below;
    if (x->file->side != SIDE_ALL && held_out != (x->file->side == SIDE_HELD_OUT)) return TP_OK;
    if (x->place.line > UINT32_MAX)
        return tp_fail(x->ctx, TP_FORMAT, "%s: more than 4 billion lines", tp_row_file_path(x->file->rows));
    TP_TRY(count_copies(x, &hash));
    counts->rows_read++;
    before = *counts;
    tp_status status = index_row(x);
    if (status == TP_OK) tp_token_cache_accept(x->ctx, d->cache);
    if (status != TP_FORMAT || x->fatal || d->config->on_bad_row != TP_BAD_ROW_SKIP) return status;
    tp_ctx_clear(x->ctx);
    tp_token_cache_reject(d->cache);
    *counts = before;
    counts->rows_bad++;
    d->n_rows = n_rows;
    d->n_draws = n_draws;
    return TP_OK;
}

/* Calls `take` for the first `limit` rows of a file. */
static tp_status each_row(struct indexing *x, tp_status (*take)(struct indexing *))
{
    int64_t limit = x->file->block->limit != TP_UNSET ? x->file->block->limit : INT64_MAX, n = 0;
    tp_row_reader reader;
    bool found = true;
    tp_status status = TP_OK;
    tp_row_reader_begin(&reader, x->file->rows, 0);
    while (status == TP_OK && n < limit) {
        status = tp_row_reader_next(x->ctx, &reader, &x->place, &found);
        if (status != TP_OK || !found) break;
        status = take(x);
        n++;
    }
    tp_row_reader_end(&reader);
    if (status == TP_OK && n == 0)
        return tp_fail(x->ctx, TP_FORMAT, "%s: the file holds no row", tp_row_file_path(x->file->rows));
    return status;
}

static tp_status each_file(struct indexing *x, tp_status (*take)(struct indexing *))
{
    for (size_t i = 0; i < x->d->n_files; i++) {
        x->file = &x->d->files[i];
        x->file_number = (uint32_t)i;
        TP_TRY(each_row(x, take));
    }
    return TP_OK;
}

/* ---- the held-out share ---- */

struct hashes {
    struct indexing x; /* first: what each_file sees */
    uint64_t *items;
    size_t n, capacity;
};

static tp_status take_hash(struct indexing *x)
{
    struct hashes *h = (struct hashes *)x;
    if (x->file->side == SIDE_ALL) return TP_OK;
    TP_TRY(tp_grow(x->ctx, &h->items, &h->capacity, h->n + 1, sizeof *h->items));
    h->items[h->n++] = hash_row(&x->place).side;
    return TP_OK;
}

static int by_value(const void *left, const void *right)
{
    const uint64_t *a = left, *b = right;
    return (*a > *b) - (*a < *b);
}

/* The share is what hashes at or below a bound: a fraction of their range, or the hash of the n-th row in order of hashes.
 * Equal rows are thereby never on both sides. */
static tp_status find_share(struct indexing *x)
{
    const tp_share *share = &x->d->config->val_set_size;
    x->holds_out = share->rows > 0 || share->fraction > 0;
    if (share->rows == 0) {
        x->held_out_below = (uint64_t)(share->fraction * 0x1p64);
        return TP_OK;
    }
    struct hashes h = {.x = *x};
    tp_status status = each_file(&h.x, take_hash);
    if (status == TP_OK && h.n <= (size_t)share->rows)
        status = tp_fail(x->ctx, TP_INVALID, "%s: val_set_size: %lld rows are to be held out, there are %zu",
                         where(x->options, "val_set_size"), (long long)share->rows, h.n);
    if (status == TP_OK) {
        qsort(h.items, h.n, sizeof *h.items, by_value);
        x->held_out_below = h.items[share->rows - 1];
    }
    tp_free(h.items);
    return status;
}

/* ---- the verdict ---- */

static tp_status check_counts(struct indexing *x)
{
    const struct text_dataset *d = x->d;
    const tp_dataset_counts *c = &d->base.counts;
    char counts[256];
    snprintf(counts, sizeof counts,
             "of %lld rows %lld are malformed, %lld longer than %lld tokens, %lld without a token to learn",
             (long long)c->rows_read, (long long)c->rows_bad, (long long)d->findings.too_long, (long long)d->max_length,
             (long long)d->findings.masked);
    if (!((double)c->rows_dropped <= d->config->max_dropped * (double)c->rows_read))
        return tp_fail(x->ctx, TP_FORMAT, "%s: %lld rows would be dropped, max_dropped allows %g of %lld: %s%s",
                       x->d->files[0].block->path, (long long)c->rows_dropped, d->config->max_dropped, (long long)c->rows_read,
                       counts, d->findings.too_long > 0 ? "; see max_seq_length and excess_length_strategy" : "");
    if (d->n_draws == 0)
        return tp_fail(x->ctx, TP_FORMAT, "%s: no row is left to %s: %s", d->files[0].block->path,
                       d->held_out ? "hold out" : "learn from", counts);
    if (c->rows_dropped + c->rows_bad > 0) tp_note(x->ctx, "%s: %s; the rest is used", d->files[0].block->path, counts);
    if (d->findings.learns_end || d->held_out) return TP_OK;
    tp_span eos = tp_tokenizer_role_text(d->tokenizer, TP_TOKEN_EOS);
    return tp_fail(
        x->ctx, TP_FORMAT,
        "%s: no row trains an end token (eos is \"%.*s\"), so the model would never stop; see what `tapeft preview` colours",
        d->files[0].block->path, (int)(eos.len < 64 ? eos.len : 64), eos.data != NULL ? eos.data : "");
}

static tp_status judge(struct indexing *x)
{
    tp_status status = check_counts(x);
    if (status != TP_FORMAT || !x->options->shows) return status;
    tp_warn(x->ctx, "%s", x->ctx->message);
    tp_ctx_clear(x->ctx);
    return TP_OK;
}

/* ---- the pass, or what is remembered of it ---- */

static tp_status choose_again(struct indexing *x)
{
    tp_json_doc *doc;
    struct text_file *f = x->file;
    size_t n = f->chose_by.bytes;
    char *line = tp_alloc_raw(x->ctx, n, 1);
    if (line == NULL) return TP_NOMEM;
    x->place = f->chose_by;
    tp_status status = tp_row_file_read(x->ctx, f->rows, x->place.offset, line, n);
    if (status == TP_OK) status = tp_row_file_parse(x->ctx, f->rows, x->place.line, line, n, &doc);
    if (status == TP_OK) {
        status = choose(x, doc);
        tp_json_free(doc);
    }
    tp_free(line);
    return status;
}

/* Previews and samples render by the rules, too. */
static tp_status remember(struct indexing *x)
{
    for (size_t i = 0; i < x->d->n_files; i++) {
        x->file = &x->d->files[i];
        if (x->file->chose_by.bytes > 0) TP_TRY(choose_again(x));
    }
    return judge(x);
}

tp_status tp_text_index(tp_ctx *ctx, struct text_dataset *d, const tp_dataset_options *options)
{
    struct indexing x = {.ctx = ctx, .d = d, .options = options};
    bool remembered;
    TP_TRY(tp_token_cache_open(ctx, d, options->keeps_tokens, &remembered));
    if (remembered) return remember(&x);
    TP_TRY(find_share(&x));
    TP_TRY(each_file(&x, take_row));
    TP_TRY(judge(&x));
    return tp_token_cache_publish(ctx, d);
}
