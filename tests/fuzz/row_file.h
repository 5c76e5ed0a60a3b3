/* For the fuzz targets of files with rows: the input as a file, and its rows, which are the same wherever reads are split. */
#ifndef TP_TESTS_FUZZ_ROW_FILE_H
#define TP_TESTS_FUZZ_ROW_FILE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/rows.h"

typedef struct fuzz_row {
    uint64_t offset, line;
    size_t bytes;
} fuzz_row;

/* The input as a file, written anew for each run; the name is gone once it is open. NULL if it is refused. */
static inline tp_row_file *fuzz_open(tp_ctx *ctx, const uint8_t *data, size_t n, const char *ending)
{
    char path[64];
    tp_row_file *file = NULL;
    snprintf(path, sizeof path, "%s/tapeft-fuzz-%ld%s", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", (long)getpid(),
             ending);
    FILE *out = fopen(path, "wb");
    if (out == NULL || fwrite(data, 1, n, out) != n || fclose(out) != 0) abort();
    if (tp_row_file_open(ctx, path, "train", &file) != TP_OK && ctx->message[0] == '\0') abort();
    unlink(path);
    return file;
}

/* Reads all rows in blocks of block_bytes up to an error, and fills in rows[0..n), or compares them if there are some. */
static inline tp_status fuzz_read(tp_ctx *ctx, tp_row_file *file, size_t block_bytes, fuzz_row *rows, size_t *n, bool compare)
{
    tp_row_reader reader;
    tp_row_place row;
    tp_status status;
    bool found = true;
    size_t i = 0;
    tp_row_reader_begin(&reader, file, block_bytes);
    for (;; i++) {
        status = tp_row_reader_next(ctx, &reader, &row, &found);
        if (status != TP_OK || !found) break;
        fuzz_row now = {row.offset, row.line, row.bytes};
        if (!compare)
            rows[i] = now;
        else if (i >= *n || rows[i].offset != now.offset || rows[i].line != now.line || rows[i].bytes != now.bytes)
            abort();
        char *again = malloc(row.bytes + 1);
        if (again == NULL || tp_row_file_read(ctx, file, row.offset, again, row.bytes) != TP_OK ||
            memcmp(again, row.text, row.bytes) != 0)
            abort();
        free(again);
    }
    if (compare && i != *n) abort();
    *n = i;
    tp_row_reader_end(&reader);
    return status;
}

/* Rows of a file whose input has n_bytes; free them. *status: that of the reading, the same for all splits. */
static inline fuzz_row *fuzz_rows(tp_ctx *ctx, tp_row_file *file, size_t n_bytes, size_t *n, tp_status *status)
{
    static const size_t splits[] = {1, 2, 3, 7, 64};
    fuzz_row *rows = malloc((n_bytes + 1) * sizeof *rows);
    if (rows == NULL) abort();
    *status = fuzz_read(ctx, file, 0, rows, n, false);
    tp_ctx_clear(ctx);
    for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) {
        if (fuzz_read(ctx, file, splits[i], rows, n, true) != *status) abort();
        tp_ctx_clear(ctx);
    }
    return rows;
}

#endif
