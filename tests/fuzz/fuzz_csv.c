/* CSV: rows are the same wherever reads are split, all of them have the header's columns, and what they hold, written as a
 * table with quotes around everything, reads as the same. Nothing of the input is lost: a row refused or read begins where the
 * one before it ended, but for lines without a byte. */
#include "base/text.h"
#include "tests/fuzz/row_file.h"

static void append_field(tp_buf *out, tp_span text, bool last)
{
    tp_buf_char(out, '"');
    for (size_t i = 0; i < text.len; i++) {
        if (text.data[i] == '"') tp_buf_char(out, '"');
        tp_buf_char(out, text.data[i]);
    }
    tp_buf_text(out, last ? "\"\n" : "\",");
}

static void append_record(tp_buf *out, const tp_json *row, bool names)
{
    size_t n = tp_json_count(row);
    for (size_t i = 0; i < n; i++)
        append_field(out, names ? tp_json_key_at(row, i) : tp_json_string(tp_json_at(row, i)), i + 1 == n);
}

/* Writes every row that is one to `table`, with quotes around everything; returns how many there are. */
static size_t each_row(tp_ctx *ctx, tp_row_file *file, tp_buf *table)
{
    tp_row_reader reader;
    tp_row_place row;
    tp_json_doc *doc;
    bool found = true;
    size_t n = 0;
    tp_row_reader_begin(&reader, file, 0);
    while (tp_row_reader_next(ctx, &reader, &row, &found) == TP_OK && found) {
        tp_status status = tp_row_file_parse(ctx, file, row.line, row.text, row.bytes, &doc);
        if (status != TP_OK && (status != TP_FORMAT || ctx->message[0] == '\0')) abort();
        tp_ctx_clear(ctx);
        if (status != TP_OK) continue;
        if (n == 0) append_record(table, tp_json_root(doc), true);
        append_record(table, tp_json_root(doc), false);
        tp_json_free(doc);
        n++;
    }
    tp_ctx_clear(ctx);
    tp_row_reader_end(&reader);
    return n;
}

static void check_gaps(tp_ctx *ctx, tp_row_file *file, const fuzz_row *rows, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        uint64_t end = rows[i - 1].offset + rows[i - 1].bytes;
        char c;
        if (rows[i].offset <= end || rows[i].line <= rows[i - 1].line) abort();
        for (; end < rows[i].offset; end++)
            if (tp_row_file_read(ctx, file, end, &c, 1) != TP_OK || (c != '\n' && c != '\r')) abort();
    }
}

static void check_file(tp_ctx *ctx, tp_row_file *file, size_t n_bytes)
{
    tp_buf table, again;
    tp_status status;
    size_t n, read;
    fuzz_row *rows = fuzz_rows(ctx, file, n_bytes, &n, &status);
    if (status != TP_OK && status != TP_FORMAT) abort();
    check_gaps(ctx, file, rows, n);
    free(rows);
    tp_buf_init(&table, 0);
    tp_buf_init(&again, 0);
    read = each_row(ctx, file, &table);
    if (read > n) abort();
    if (read > 0) {
        tp_row_file *written = fuzz_open(ctx, (const uint8_t *)table.data, table.len, ".csv");
        if (written == NULL || each_row(ctx, written, &again) != read) abort();
        if (table.len != again.len || memcmp(table.data, again.data, table.len) != 0) abort();
        tp_row_file_close(written);
    }
    tp_buf_free(&table);
    tp_buf_free(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_row_file *file = fuzz_open(&ctx, data, n, ".csv");
    tp_ctx_clear(&ctx);
    if (file != NULL) check_file(&ctx, file, n);
    tp_row_file_close(file);
    return 0;
}
