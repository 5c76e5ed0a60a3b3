/* Finding rows: a sliding buffer over the file, cut at newlines, in .csv files at those outside of quotes. */
#include "data/rows.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "data/unpack.h"

#define READ_BYTES  ((size_t)1 << 20)
#define HASH_BYTES  ((size_t)64 << 10)
#define HASH_BLOCKS 256

struct tp_row_file {
    tp_file *file;
    int unpacked;  /* descriptor of the unpacked bytes, or -1 */
    uint64_t size; /* of what rows are read from */
    bool plain, csv;
    tp_csv_header header;
    uint64_t first, first_line; /* where rows begin */
};

/* ---- opening ---- */

/* The file itself, or the one of a folder. */
static tp_status resolve(tp_ctx *ctx, const char *path, const char *split, char **resolved)
{
    char name[256];
    *resolved = NULL;
    if (!tp_path_is_folder(path)) {
        *resolved = tp_strdup(ctx, path);
        return *resolved != NULL ? TP_OK : TP_NOMEM;
    }
    static const char *const endings[] = {".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".jsonl"}; /* the last: what is missed */
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        int n = snprintf(name, sizeof name, "%s%s", split, endings[i]);
        if (n < 0 || (size_t)n >= sizeof name) return tp_fail(ctx, TP_INVALID, "%s: split: the name is too long", path);
        if (strchr(name, '/') != NULL) break; /* refused below, by name */
        char *candidate = tp_path_join(ctx, path, name);
        if (candidate == NULL) return TP_NOMEM;
        bool there = tp_path_exists(candidate);
        tp_free(candidate);
        if (there) break;
    }
    return tp_path_beneath(ctx, path, name, resolved);
}

static bool is_csv(const char *path)
{
    return tp_ends_with(path, ".csv") || tp_ends_with(path, ".csv.gz");
}

bool tp_row_path_holds_objects(const char *path)
{
    return tp_ends_with(path, ".jsonl") || tp_ends_with(path, ".jsonl.gz") || is_csv(path);
}

static tp_status check_kind(tp_ctx *ctx, const char *path)
{
    if (tp_row_path_holds_objects(path) || tp_ends_with(path, ".txt")) return TP_OK;
    return tp_fail(ctx, TP_UNSUPPORTED,
                   "%s: expected a .jsonl or .csv file, packed or not (.jsonl.gz, .csv.gz), a .txt file, or a folder with "
                   "<split>.jsonl or <split>.csv%s",
                   path, tp_ends_with(path, ".json") ? " (one JSON object per line, in a file called .jsonl)" : "");
}

/* The first record that is not blank. */
static tp_status read_header(tp_ctx *ctx, tp_row_file *f)
{
    tp_row_reader reader;
    tp_row_place row;
    bool found;
    tp_row_reader_begin(&reader, f, 0);
    tp_status status = tp_row_reader_next(ctx, &reader, &row, &found);
    if (status == TP_OK && !found)
        status =
            tp_fail(ctx, TP_FORMAT, "%s: the file is empty; expected a header that names the columns", tp_row_file_path(f));
    if (status == TP_OK) {
        tp_csv_record record = {tp_row_file_path(f), (size_t)row.line, row.text, row.bytes};
        status = tp_csv_read_header(ctx, &record, &f->header);
        f->first = reader.start + reader.next;
        f->first_line = reader.line;
    }
    tp_row_reader_end(&reader);
    return status;
}

static tp_status skip_mark(tp_ctx *ctx, tp_row_file *f)
{
    char mark[3];
    if (f->size < sizeof mark) return TP_OK;
    TP_TRY(tp_row_file_read(ctx, f, 0, mark, sizeof mark));
    if (memcmp(mark, "\xEF\xBB\xBF", sizeof mark) == 0) f->first = sizeof mark;
    return TP_OK;
}

static tp_status open_resolved(tp_ctx *ctx, const char *path, tp_row_file *f)
{
    if (tp_path_exists(path)) TP_TRY(check_kind(ctx, path)); /* a missing file is missing, whatever its name */
    TP_TRY(tp_file_open(ctx, path, &f->file));
    f->plain = tp_ends_with(path, ".txt");
    f->csv = is_csv(path);
    f->size = tp_file_size(f->file);
    f->first_line = 1;
    if (tp_ends_with(path, ".gz")) TP_TRY(tp_unpack_gzip(ctx, f->file, &f->unpacked, &f->size));
    TP_TRY(skip_mark(ctx, f));
    return f->csv ? read_header(ctx, f) : TP_OK;
}

tp_status tp_row_file_open(tp_ctx *ctx, const char *path, const char *split, tp_row_file **file)
{
    char *resolved;
    *file = NULL;
    TP_TRY(resolve(ctx, path, split, &resolved));
    tp_row_file *f = tp_alloc(ctx, 1, sizeof *f);
    if (f != NULL) f->unpacked = -1;
    tp_status status = f != NULL ? open_resolved(ctx, resolved, f) : TP_NOMEM;
    tp_free(resolved);
    if (status != TP_OK) {
        tp_row_file_close(f);
        return status;
    }
    *file = f;
    return TP_OK;
}

void tp_row_file_close(tp_row_file *f)
{
    if (f == NULL) return;
    if (f->unpacked >= 0) close(f->unpacked);
    tp_csv_free_header(&f->header);
    tp_file_close(f->file);
    tp_free(f);
}

const char *tp_row_file_path(const tp_row_file *f)
{
    return tp_file_path(f->file);
}
bool tp_row_file_is_plain(const tp_row_file *f)
{
    return f->plain;
}
tp_status tp_row_file_check(tp_ctx *ctx, const tp_row_file *f)
{
    return tp_file_check(ctx, f->file);
}

/* ---- bytes ---- */

tp_status tp_row_file_read(tp_ctx *ctx, tp_row_file *f, uint64_t offset, void *bytes, size_t n)
{
    char *to = bytes;
    if (f->unpacked < 0) return tp_file_pread(ctx, f->file, offset, bytes, n);
    while (n > 0) {
        ssize_t got = pread(f->unpacked, to, n, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0)
            return tp_fail(ctx, TP_IO_READ, "%s: unpacked, at byte %llu: %s", tp_row_file_path(f), (unsigned long long)offset,
                           got < 0 ? strerror(errno) : "the end");
        to += got;
        offset += (uint64_t)got;
        n -= (size_t)got;
    }
    return TP_OK;
}

tp_status tp_row_file_parse(tp_ctx *ctx, const tp_row_file *f, uint64_t line, const char *text, size_t n, tp_json_doc **doc)
{
    const char *name = tp_row_file_path(f);
    if (f->csv) return tp_csv_parse(ctx, &f->header, &(tp_csv_record){name, (size_t)line, text, n}, doc);
    tp_json_options options = {.name = name, .first_line = (size_t)line, .max_nodes = TP_ROW_MAX_VALUES};
    return tp_json_parse(ctx, text, n, &options, doc);
}

tp_status tp_row_file_hash(tp_ctx *ctx, tp_row_file *f, tp_buf *out)
{
    uint64_t size = tp_file_size(f->file), blocks = (size + HASH_BYTES - 1) / HASH_BYTES;
    uint64_t stride = (blocks + HASH_BLOCKS - 1) / HASH_BLOCKS;
    char hex[65], *block = tp_alloc_raw(ctx, HASH_BYTES, 1);
    tp_status status = block != NULL ? TP_OK : TP_NOMEM;
    tp_buf_printf(out, "%llu bytes", (unsigned long long)size);
    for (uint64_t i = 0; status == TP_OK && i < blocks; i++) {
        if (i % stride != 0 && i != blocks - 1) continue;
        uint64_t left = size - i * HASH_BYTES;
        size_t n = left < HASH_BYTES ? (size_t)left : HASH_BYTES;
        status = tp_file_pread(ctx, f->file, i * HASH_BYTES, block, n);
        if (status != TP_OK) break;
        tp_sha256_hex(block, n, hex);
        tp_buf_printf(out, " %s", hex);
    }
    tp_free(block);
    return status;
}

tp_status tp_row_file_sha256(tp_ctx *ctx, const tp_row_file *f, char hex[65])
{
    return tp_file_sha256(ctx, f->file, hex);
}

/* ---- rows ---- */

void tp_row_reader_begin(tp_row_reader *r, tp_row_file *file, size_t block_bytes)
{
    *r = (tp_row_reader){.file = file,
                         .start = file->first,
                         .line = file->first_line,
                         .block_bytes = block_bytes != 0 ? block_bytes : READ_BYTES};
}

void tp_row_reader_end(tp_row_reader *r)
{
    tp_free(r->buffer);
    *r = (tp_row_reader){0};
}

/* Drops what was read already and appends a block. *more is false at the end of the file. */
static tp_status read_more(tp_ctx *ctx, tp_row_reader *r, bool *more)
{
    uint64_t left = r->file->size - r->start - r->filled;
    size_t n = left < r->block_bytes ? (size_t)left : r->block_bytes;
    *more = n > 0;
    if (n == 0) return TP_OK;
    if (r->next > 0) {
        memmove(r->buffer, r->buffer + r->next, r->filled - r->next);
        r->start += r->next;
        r->filled -= r->next;
        r->seen -= r->next;
        r->next = 0;
    }
    TP_TRY(tp_grow(ctx, &r->buffer, &r->capacity, r->filled + n, 1));
    TP_TRY(tp_row_file_read(ctx, r->file, r->start + r->filled, r->buffer + r->filled, n));
    r->filled += n;
    return TP_OK;
}

/* Where in [seen, filled) the next row's line ends, or NULL. */
static const char *find_newline(tp_row_reader *r)
{
    if (r->file->plain || r->seen == r->filled) return NULL;
    const char *from = r->buffer + r->seen;
    return r->file->csv ? tp_csv_record_end(from, r->filled - r->seen, &r->csv) : memchr(from, '\n', r->filled - r->seen);
}

static tp_status too_long(tp_ctx *ctx, const tp_row_reader *r)
{
    return tp_fail(ctx, TP_FORMAT, "%s:%llu: the row is longer than %zu MiB%s", tp_row_file_path(r->file),
                   (unsigned long long)r->line, TP_ROW_MAX_BYTES >> 20,
                   r->csv == TP_CSV_QUOTED ? ", or a quote in it is not closed" : "");
}

/* A record that the file ends in the quotes of: nothing says how many rows it swallowed, so it is no row to be skipped. Reading
 * it says where the quote is. */
static tp_status unclosed(tp_ctx *ctx, tp_row_reader *r, size_t end)
{
    tp_row_file *f = r->file;
    tp_csv_record record = {tp_row_file_path(f), (size_t)r->line, r->buffer + r->next, end - r->next};
    tp_json_doc *doc = NULL;
    tp_status status =
        f->header.n > 0 ? tp_csv_parse(ctx, &f->header, &record, &doc) : tp_csv_read_header(ctx, &record, &f->header);
    tp_json_free(doc);
    return status != TP_OK ? status : tp_fail(ctx, TP_INTERNAL, "%s: a quote that is and is not closed", record.name);
}

/* [next, *end) is the next row with its inner newlines and without its last, *after where the one behind it begins. */
static tp_status find_row(tp_ctx *ctx, tp_row_reader *r, size_t *end, size_t *after, bool *found)
{
    bool more = true;
    *found = true;
    r->csv = TP_CSV_FIELD_BEGINS;
    for (;;) {
        const char *newline = find_newline(r);
        *end = newline != NULL ? (size_t)(newline - r->buffer) : r->filled;
        *after = newline != NULL ? *end + 1 : *end;
        if (*end - r->next > TP_ROW_MAX_BYTES) return too_long(ctx, r);
        if (newline != NULL) return TP_OK;
        r->seen = r->filled;
        TP_TRY(read_more(ctx, r, &more));
        if (!more) {
            *found = r->next < r->filled;
            return r->csv == TP_CSV_QUOTED ? unclosed(ctx, r, *end) : TP_OK;
        }
    }
}

/* Of a .csv file a line with blanks is a record: they are the value of its column. */
static bool is_blank(const tp_row_reader *r, const char *text, size_t n)
{
    if (r->file->csv) return n == 0;
    for (size_t i = 0; i < n; i++)
        if (text[i] != ' ' && text[i] != '\t' && text[i] != '\r' && text[i] != '\n') return false;
    return true;
}

static uint64_t count_newlines(const char *text, size_t n)
{
    uint64_t newlines = 0;
    for (size_t i = 0; i < n; i++) newlines += text[i] == '\n';
    return newlines;
}

tp_status tp_row_reader_next(tp_ctx *ctx, tp_row_reader *r, tp_row_place *row, bool *found)
{
    for (;;) {
        size_t begin, end, after;
        TP_TRY(find_row(ctx, r, &end, &after, found));
        if (!*found) return TP_OK;
        begin = r->next;
        if (!r->file->plain && end > begin && r->buffer[end - 1] == '\r') end--;
        *row = (tp_row_place){r->start + begin, r->line, end - begin, r->buffer + begin};
        r->line += r->file->csv ? 1 + count_newlines(row->text, row->bytes) : 1;
        r->next = r->seen = after;
        if (!is_blank(r, row->text, row->bytes)) return TP_OK;
    }
}
