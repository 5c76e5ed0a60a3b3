/* Finding rows: a sliding buffer over the file, cut at newlines. */
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
    bool plain;
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
    static const char *const endings[] = {".jsonl", ".jsonl.gz", ".jsonl"}; /* if neither is there, the first is missed */
    for (size_t i = 0; i < 3; i++) {
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

static tp_status check_kind(tp_ctx *ctx, const char *path)
{
    if (tp_ends_with(path, ".jsonl") || tp_ends_with(path, ".jsonl.gz") || tp_ends_with(path, ".txt")) return TP_OK;
    const char *hint = tp_ends_with(path, ".csv")    ? " (.csv is not read: convert it to .jsonl)"
                       : tp_ends_with(path, ".json") ? " (one JSON object per line, in a file called .jsonl)"
                                                     : "";
    return tp_fail(ctx, TP_UNSUPPORTED, "%s: expected a .jsonl, .jsonl.gz or .txt file, or a folder with <split>.jsonl%s", path,
                   hint);
}

static tp_status open_resolved(tp_ctx *ctx, const char *path, tp_row_file *f)
{
    if (tp_path_exists(path)) TP_TRY(check_kind(ctx, path)); /* a missing file is missing, whatever its name */
    TP_TRY(tp_file_open(ctx, path, &f->file));
    f->plain = tp_ends_with(path, ".txt");
    f->size = tp_file_size(f->file);
    return tp_ends_with(path, ".gz") ? tp_unpack_gzip(ctx, f->file, &f->unpacked, &f->size) : TP_OK;
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
    *r = (tp_row_reader){.file = file, .block_bytes = block_bytes != 0 ? block_bytes : READ_BYTES};
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

/* [next, *end) is the next line without its newline, *after where the one behind it begins. */
static tp_status find_line(tp_ctx *ctx, tp_row_reader *r, size_t *end, size_t *after, bool *found)
{
    bool more = true;
    *found = true;
    for (;;) {
        const char *newline =
            r->file->plain || r->seen == r->filled ? NULL : memchr(r->buffer + r->seen, '\n', r->filled - r->seen);
        *end = newline != NULL ? (size_t)(newline - r->buffer) : r->filled;
        *after = newline != NULL ? *end + 1 : *end;
        if (*end - r->next > TP_ROW_MAX_BYTES)
            return tp_fail(ctx, TP_FORMAT, "%s:%llu: the row is longer than %zu MiB", tp_row_file_path(r->file),
                           (unsigned long long)r->line, TP_ROW_MAX_BYTES >> 20);
        if (newline != NULL) return TP_OK;
        r->seen = r->filled;
        TP_TRY(read_more(ctx, r, &more));
        if (!more) {
            *found = r->next < r->filled;
            return TP_OK;
        }
    }
}

static bool is_blank(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (text[i] != ' ' && text[i] != '\t' && text[i] != '\r' && text[i] != '\n') return false;
    return true;
}

tp_status tp_row_reader_next(tp_ctx *ctx, tp_row_reader *r, tp_row_place *row, bool *found)
{
    for (;;) {
        size_t end, after;
        r->line++;
        TP_TRY(find_line(ctx, r, &end, &after, found));
        if (!*found) return TP_OK;
        size_t begin = r->next;
        if (r->start + begin == 0 && end >= 3 && memcmp(r->buffer, "\xEF\xBB\xBF", 3) == 0) begin = 3;
        if (!r->file->plain && end > begin && r->buffer[end - 1] == '\r') end--;
        *row = (tp_row_place){r->start + begin, r->line, end - begin, r->buffer + begin};
        r->next = r->seen = after;
        if (!is_blank(row->text, row->bytes)) return TP_OK;
    }
}
