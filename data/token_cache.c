/* Making, checking and reading the folder of a token cache. */
#include "data/token_cache.h"

#include <stdio.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/version.h"

#define FORMAT 1
#ifndef TP_TEXT_CODE /* digest of the sources that make tokens, by the Makefile */
#define TP_TEXT_CODE ""
#endif
#define ROWS      "rows.bin"
#define TOKENS    "tokens.bin"
#define LABEL_BIT 0x80000000u

/* rows.bin and the words of tokens.bin are written as they lie in memory. */
_Static_assert(sizeof(struct text_row) == 40, "a row has no padding: bump FORMAT when it changes");
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define BYTE_ORDER_NAME "little"
#else
#define BYTE_ORDER_NAME "big"
#endif

/* Where the rules of a file came from; zeros: no row was looked at. */
struct source {
    uint64_t offset;
    uint32_t bytes, line;
};

struct tp_token_cache {
    char *folder, key[65];
    tp_publish *publish; /* collecting: the folder under way */
    tp_writer *tokens;
    uint32_t *row; /* what the row under way added so far */
    size_t row_n, row_capacity;
    tp_file *file;    /* reading: tokens.bin */
    uint64_t *starts; /* word where each row begins */
    int32_t *cells;   /* ids and labels of one row */
    size_t cells_capacity;
};

/* ---- the key ---- */

static void put_string(tp_buf *out, const char *name, const char *value)
{
    tp_buf_printf(out, " %s=", name);
    tp_json_write_string(out, value != NULL ? value : "", value != NULL ? strlen(value) : 0);
}

static tp_status put_template(tp_ctx *ctx, const char *choice, tp_buf *out)
{
    char hex[65];
    put_string(out, "template", choice);
    if (tp_chat_builtin(choice) != NULL || strcmp(choice, "none") == 0 || strcmp(choice, "tokenizer_default") == 0)
        return TP_OK;
    TP_TRY(tp_sha256_file(ctx, choice, hex));
    put_string(out, "template_file", hex);
    return TP_OK;
}

static tp_status put_file(tp_ctx *ctx, const struct text_file *f, tp_buf *out)
{
    const tp_dataset_config *b = f->block;
    char hex[65];
    TP_TRY(tp_row_file_sha256(ctx, f->rows, hex));
    tp_buf_printf(out, "\n%s plain=%d side=%d type=%d weight=%.17g limit=%lld", hex, tp_row_file_is_plain(f->rows),
                  (int)f->side, b->type, b->weight, (long long)b->limit);
    put_string(out, "system", b->system);
    for (size_t i = 0; i < b->columns.n; i++) put_string(out, b->columns.items[i].name, b->columns.items[i].value);
    return TP_OK;
}

static tp_status make_key(tp_ctx *ctx, const struct text_dataset *d, char key[65])
{
    const tp_data_config *c = d->config;
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_buf_printf(&text,
                  "tokens %d " BYTE_ORDER_NAME " %s " TP_TEXT_CODE
                  " tokenizer=%s vocabulary=%lld length=%lld excess=%d bad=%d inputs=%d turns=%d "
                  "held_out=%d share=%.17g,%lld",
                  FORMAT, TP_VERSION, tp_tokenizer_identity(d->tokenizer), (long long)d->vocab_size, (long long)d->max_length,
                  c->excess_length, c->on_bad_row, c->train_on_inputs, c->train_on_turns, d->held_out, c->val_set_size.fraction,
                  (long long)c->val_set_size.rows);
    tp_status status = put_template(ctx, c->chat_template, &text);
    for (size_t i = 0; status == TP_OK && i < d->n_files; i++) status = put_file(ctx, &d->files[i], &text);
    if (status == TP_OK) status = tp_buf_status(ctx, &text, "key of the token cache");
    if (status == TP_OK) tp_sha256_hex(text.data, text.len, key);
    tp_buf_free(&text);
    return status;
}

/* ---- reading the folder ---- */

static tp_status open_part(tp_ctx *ctx, const tp_token_cache *cache, const char *name, tp_file **file)
{
    char *path;
    TP_TRY(tp_path_beneath(ctx, cache->folder, name, &path));
    tp_status status = tp_file_open(ctx, path, file);
    tp_free(path);
    return status;
}

/* Numbers of the manifest; what they say is compared with the files afterwards. */
struct sizes {
    int64_t rows, draws, sources;
};

static tp_status read_manifest(tp_ctx *ctx, const tp_token_cache *cache, const tp_json_doc *doc, struct text_dataset *d,
                               struct sizes *sizes)
{
    const tp_json *root = tp_json_root(doc), *files = tp_json_get(root, "files");
    tp_dataset_counts *c = &d->base.counts;
    tp_span key;
    TP_TRY(tp_json_need_string(ctx, doc, root, "key", true, &key));
    if (!tp_span_is(key, cache->key) || tp_json_get(files, ROWS) == NULL || tp_json_get(files, TOKENS) == NULL)
        return tp_fail(ctx, TP_FORMAT, "%s: made from something else", cache->folder);
    TP_TRY(tp_json_need_i64(ctx, doc, root, "rows", true, 1, UINT32_MAX - 1, &sizes->rows));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "draws", true, 1, UINT32_MAX - 1, &sizes->draws));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "sources", true, (int64_t)d->n_files, (int64_t)d->n_files, &sizes->sources));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "rows_read", true, 0, INT64_MAX, &c->rows_read));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "rows_used", true, 0, INT64_MAX, &c->rows_used));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "rows_dropped", true, 0, INT64_MAX, &c->rows_dropped));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "rows_bad", true, 0, INT64_MAX, &c->rows_bad));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "too_long", true, 0, INT64_MAX, &d->findings.too_long));
    TP_TRY(tp_json_need_i64(ctx, doc, root, "masked", true, 0, INT64_MAX, &d->findings.masked));
    return tp_json_need_bool(ctx, doc, root, "learns_end", true, &d->findings.learns_end);
}

static tp_status read_sources(tp_ctx *ctx, struct text_dataset *d, tp_file *file)
{
    for (size_t i = 0; i < d->n_files; i++) {
        struct source s;
        TP_TRY(tp_file_pread(ctx, file, i * sizeof s, &s, sizeof s));
        if (s.bytes > TP_ROW_MAX_BYTES) return tp_fail(ctx, TP_FORMAT, "%s: a row of %u bytes", tp_file_path(file), s.bytes);
        d->files[i].chose_by = (tp_row_place){.offset = s.offset, .line = s.line, .bytes = s.bytes};
    }
    return TP_OK;
}

/* Sources, rows and draws one behind the other. */
static tp_status read_rows(tp_ctx *ctx, struct text_dataset *d, const struct sizes *sizes, tp_file *file)
{
    uint64_t rows_at = d->n_files * sizeof(struct source), draws_at = rows_at + (uint64_t)sizes->rows * sizeof *d->rows,
             end = draws_at + (uint64_t)sizes->draws * sizeof *d->draws;
    if (tp_file_size(file) != end)
        return tp_fail(ctx, TP_FORMAT, "%s: %llu bytes, expected %llu", tp_file_path(file),
                       (unsigned long long)tp_file_size(file), (unsigned long long)end);
    TP_TRY(read_sources(ctx, d, file));
    TP_TRY(tp_grow(ctx, &d->rows, &d->rows_capacity, (size_t)sizes->rows, sizeof *d->rows));
    TP_TRY(tp_grow(ctx, &d->draws, &d->draws_capacity, (size_t)sizes->draws, sizeof *d->draws));
    TP_TRY(tp_file_pread(ctx, file, rows_at, d->rows, (size_t)(draws_at - rows_at)));
    TP_TRY(tp_file_pread(ctx, file, draws_at, d->draws, (size_t)(end - draws_at)));
    d->n_rows = (size_t)sizes->rows;
    d->n_draws = (size_t)sizes->draws;
    return TP_OK;
}

static bool row_is_possible(const struct text_dataset *d, const struct text_row *row)
{
    if (row->file >= d->n_files) return false;
    const struct text_file *f = &d->files[row->file];
    if (!tp_row_file_is_plain(f->rows) && f->chose_by.bytes == 0) return false;
    return row->labels == 0 || (row->labels < row->tokens && (int64_t)row->tokens <= d->max_length);
}

/* Fills starts; FORMAT unless `words`, the size of tokens.bin, is what rows that are possible need. */
static tp_status check_rows(tp_ctx *ctx, tp_token_cache *cache, struct text_dataset *d, uint64_t bytes)
{
    uint64_t words = 0;
    bool possible = true;
    cache->starts = tp_alloc_raw(ctx, d->n_rows, sizeof *cache->starts);
    if (cache->starts == NULL) return TP_NOMEM;
    for (size_t i = 0; i < d->n_rows && possible; i++) {
        const struct text_row *row = &d->rows[i];
        possible = row_is_possible(d, row);
        cache->starts[i] = words;
        if (row->labels == 0) continue;
        words += row->tokens;
        if ((int64_t)row->tokens > d->base.counts.longest_row) d->base.counts.longest_row = row->tokens;
    }
    for (size_t i = 0; i < d->n_draws && possible; i++) possible = d->draws[i] < d->n_rows && d->rows[d->draws[i]].labels > 0;
    if (possible && words * sizeof(uint32_t) == bytes) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: rows that cannot be", cache->folder);
}

static tp_status load_parts(tp_ctx *ctx, tp_token_cache *cache, struct text_dataset *d, const char *manifest)
{
    tp_json_doc *doc;
    struct sizes sizes;
    tp_file *rows;
    TP_TRY(tp_json_parse(ctx, manifest, strlen(manifest), &(tp_json_options){.name = "manifest.json"}, &doc));
    tp_status status = read_manifest(ctx, cache, doc, d, &sizes);
    tp_json_free(doc);
    TP_TRY(status);
    TP_TRY(open_part(ctx, cache, ROWS, &rows));
    status = read_rows(ctx, d, &sizes, rows);
    tp_file_close(rows);
    TP_TRY(status);
    return check_rows(ctx, cache, d, tp_file_size(cache->file));
}

/* As if nothing had been read. */
static void forget(tp_token_cache *cache, struct text_dataset *d)
{
    tp_file_close(cache->file);
    tp_free(cache->starts);
    cache->file = NULL;
    cache->starts = NULL;
    d->n_rows = d->n_draws = 0;
    d->base.counts = (tp_dataset_counts){0};
    d->findings = (struct text_findings){0};
    for (size_t i = 0; i < d->n_files; i++) d->files[i].chose_by = (tp_row_place){0};
}

static tp_status load(tp_ctx *ctx, tp_token_cache *cache, struct text_dataset *d)
{
    char *manifest;
    TP_TRY(open_part(ctx, cache, TOKENS, &cache->file));
    TP_TRY(tp_publish_verify(ctx, cache->folder, &manifest));
    tp_status status = load_parts(ctx, cache, d, manifest);
    tp_free(manifest);
    return status;
}

/* ---- collecting ---- */

static void stop_collecting(tp_token_cache *cache)
{
    tp_writer_discard(cache->tokens);
    tp_publish_discard(cache->publish);
    cache->tokens = NULL;
    cache->publish = NULL;
}

/* A failure that only costs the cache. */
static tp_status give_up(tp_ctx *ctx, tp_token_cache *cache, tp_status status)
{
    if (cache != NULL) stop_collecting(cache);
    if (status == TP_OK || status == TP_NOMEM) return status;
    tp_warn(ctx, "cache_dir: %s; the run goes on without a token cache", ctx->message);
    tp_ctx_clear(ctx);
    return TP_OK;
}

static tp_status open_writer(tp_ctx *ctx, const tp_token_cache *cache, const char *name, tp_writer **writer)
{
    char *path = tp_path_join(ctx, tp_publish_staging(cache->publish), name);
    tp_status status = path != NULL ? tp_writer_open(ctx, path, writer) : TP_NOMEM;
    tp_free(path);
    return status;
}

static tp_status begin(tp_ctx *ctx, tp_token_cache *cache, const char *cache_dir)
{
    TP_TRY(tp_folder_make(ctx, cache_dir));
    TP_TRY(tp_publish_sweep(ctx, cache_dir, "tokens-"));
    TP_TRY(tp_publish_begin(ctx, cache->folder, &cache->publish));
    return open_writer(ctx, cache, TOKENS, &cache->tokens);
}

tp_status tp_token_cache_add(tp_ctx *ctx, tp_token_cache *cache, const tp_encoded *encoded, size_t first, size_t n)
{
    if (cache == NULL || cache->publish == NULL) return TP_OK;
    TP_TRY(tp_grow(ctx, &cache->row, &cache->row_capacity, cache->row_n + n, sizeof *cache->row));
    for (size_t i = 0; i < n; i++) {
        bool learned = i > 0 && encoded->labels[first + i] != TP_NO_LABEL;
        cache->row[cache->row_n + i] = (uint32_t)encoded->ids[first + i] | (learned ? LABEL_BIT : 0);
    }
    cache->row_n += n;
    return TP_OK;
}

void tp_token_cache_reject(tp_token_cache *cache)
{
    if (cache != NULL) cache->row_n = 0;
}

void tp_token_cache_accept(tp_ctx *ctx, tp_token_cache *cache)
{
    if (cache == NULL || cache->publish == NULL) return;
    tp_status status = tp_writer_write(ctx, cache->tokens, cache->row, cache->row_n * sizeof *cache->row);
    cache->row_n = 0;
    if (status != TP_OK) (void)give_up(ctx, cache, status); /* writing allocates nothing: it is never out of memory */
}

static tp_status write_rows(tp_ctx *ctx, const struct text_dataset *d, tp_writer *writer)
{
    for (size_t i = 0; i < d->n_files; i++) {
        const tp_row_place *p = &d->files[i].chose_by;
        struct source source = {p->offset, (uint32_t)p->bytes, (uint32_t)p->line};
        TP_TRY(tp_writer_write(ctx, writer, &source, sizeof source));
    }
    TP_TRY(tp_writer_write(ctx, writer, d->rows, d->n_rows * sizeof *d->rows));
    return tp_writer_write(ctx, writer, d->draws, d->n_draws * sizeof *d->draws);
}

static tp_status write_parts(tp_ctx *ctx, tp_token_cache *cache, const struct text_dataset *d)
{
    tp_writer *writer = cache->tokens;
    cache->tokens = NULL;
    TP_TRY(tp_writer_finish(ctx, writer));
    TP_TRY(tp_publish_adopt(ctx, cache->publish, TOKENS));
    TP_TRY(open_writer(ctx, cache, ROWS, &writer));
    tp_status status = write_rows(ctx, d, writer);
    if (status != TP_OK) {
        tp_writer_discard(writer);
        return status;
    }
    TP_TRY(tp_writer_finish(ctx, writer));
    return tp_publish_adopt(ctx, cache->publish, ROWS);
}

static tp_status commit(tp_ctx *ctx, tp_token_cache *cache, const struct text_dataset *d)
{
    const tp_dataset_counts *c = &d->base.counts;
    char manifest[512];
    snprintf(manifest, sizeof manifest,
             "{\"format\": %d, \"key\": \"%s\", \"sources\": %zu, \"rows\": %zu, \"draws\": %zu, \"rows_read\": %lld, "
             "\"rows_used\": %lld, \"rows_dropped\": %lld, \"rows_bad\": %lld, \"too_long\": %lld, \"masked\": %lld, "
             "\"learns_end\": %s}",
             FORMAT, cache->key, d->n_files, d->n_rows, d->n_draws, (long long)c->rows_read, (long long)c->rows_used,
             (long long)c->rows_dropped, (long long)c->rows_bad, (long long)d->findings.too_long, (long long)d->findings.masked,
             d->findings.learns_end ? "true" : "false");
    tp_publish *publish = cache->publish;
    cache->publish = NULL;
    return tp_publish_commit(ctx, publish, manifest, true);
}

tp_status tp_token_cache_publish(tp_ctx *ctx, struct text_dataset *d)
{
    tp_token_cache *cache = d->cache;
    if (cache == NULL || cache->publish == NULL) return TP_OK;
    tp_status status = write_parts(ctx, cache, d);
    if (status == TP_OK) status = commit(ctx, cache, d);
    if (status == TP_OK) status = open_part(ctx, cache, TOKENS, &cache->file);
    if (status == TP_OK) status = check_rows(ctx, cache, d, tp_file_size(cache->file));
    if (status != TP_OK) {
        tp_file_close(cache->file);
        cache->file = NULL;
        return give_up(ctx, cache, status);
    }
    tp_note(ctx, "cache_dir: tokens of %zu rows are kept in %s", d->n_rows, cache->folder);
    return TP_OK;
}

/* ---- opening ---- */

static tp_status name_folder(tp_ctx *ctx, tp_token_cache *cache, const struct text_dataset *d)
{
    char name[sizeof "tokens-" + 64];
    TP_TRY(make_key(ctx, d, cache->key));
    snprintf(name, sizeof name, "tokens-%s", cache->key);
    cache->folder = tp_path_join(ctx, d->config->cache_dir, name);
    return cache->folder != NULL ? TP_OK : TP_NOMEM;
}

static tp_status open_or_begin(tp_ctx *ctx, tp_token_cache *cache, struct text_dataset *d, bool keep, bool *remembered)
{
    TP_TRY(name_folder(ctx, cache, d));
    bool exists = tp_path_exists(cache->folder);
    tp_status status = exists ? load(ctx, cache, d) : TP_OK;
    *remembered = exists && status == TP_OK;
    if (*remembered && keep) tp_note(ctx, "cache_dir: tokens of %zu rows come from %s", d->n_rows, cache->folder);
    if (*remembered || status == TP_NOMEM) return status;
    if (status != TP_OK) tp_note(ctx, "cache_dir: %s; the token cache is %s", ctx->message, keep ? "made again" : "not used");
    tp_ctx_clear(ctx);
    forget(cache, d);
    return keep ? begin(ctx, cache, d->config->cache_dir) : TP_OK;
}

tp_status tp_token_cache_open(tp_ctx *ctx, struct text_dataset *d, bool keep, bool *remembered)
{
    *remembered = false;
    if (d->config->cache_dir == NULL) return TP_OK;
    d->cache = tp_alloc(ctx, 1, sizeof *d->cache);
    if (d->cache == NULL) return TP_NOMEM;
    tp_status status = open_or_begin(ctx, d->cache, d, keep, remembered);
    return status == TP_OK ? TP_OK : give_up(ctx, d->cache, status);
}

/* ---- reading ---- */

static tp_status read_cells(tp_ctx *ctx, tp_token_cache *cache, const struct text_dataset *d, uint32_t number)
{
    const struct text_row *row = &d->rows[number];
    size_t n = row->tokens;
    uint32_t labels = 0;
    int32_t *ids = cache->cells, *words = cache->cells + n;
    TP_TRY(tp_file_pread(ctx, cache->file, cache->starts[number] * sizeof *words, words, n * sizeof *words));
    for (size_t i = 0; i < n; i++) {
        bool learned = words[i] < 0;
        ids[i] = (int32_t)((uint32_t)words[i] & ~LABEL_BIT);
        words[i] = learned ? ids[i] : TP_NO_LABEL;
        labels += learned;
        if (ids[i] >= d->vocab_size) return tp_fail(ctx, TP_FORMAT, "%s: a token beyond the vocabulary", cache->folder);
    }
    if (labels != row->labels) return tp_fail(ctx, TP_FORMAT, "%s: a row with other labels than at first", cache->folder);
    return TP_OK;
}

tp_status tp_token_cache_read(tp_ctx *ctx, tp_token_cache *cache, const struct text_dataset *d, uint32_t row,
                              const int32_t **ids, const int32_t **labels)
{
    *ids = *labels = NULL;
    if (cache == NULL || cache->file == NULL) return TP_OK;
    size_t n = d->rows[row].tokens;
    TP_TRY(tp_grow(ctx, &cache->cells, &cache->cells_capacity, 2 * n, sizeof *cache->cells));
    if (read_cells(ctx, cache, d, row) != TP_OK) { /* somebody changed the file while it is in use */
        tp_warn(ctx, "cache_dir: %s; the run goes on without the token cache", ctx->message);
        tp_ctx_clear(ctx);
        tp_file_close(cache->file);
        cache->file = NULL;
        return TP_OK;
    }
    *ids = cache->cells;
    *labels = cache->cells + n;
    return TP_OK;
}

void tp_token_cache_close(tp_token_cache *cache)
{
    if (cache == NULL) return;
    stop_collecting(cache);
    tp_file_close(cache->file);
    tp_free(cache->starts);
    tp_free(cache->row);
    tp_free(cache->cells);
    tp_free(cache->folder);
    tp_free(cache);
}
