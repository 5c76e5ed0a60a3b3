/* Rows in files of text: found in one pass, read again by their place.
 *
 * A .jsonl file holds a row per line; blank lines, a byte order mark, CR LF and a missing last newline are fine. A .csv file
 * holds a header and a row per record, which may have several lines (data/csv.h). Files that end in .gz are unpacked first
 * (data/unpack.h). A .txt file is one row. Files may be larger than memory, rows not: TP_ROW_MAX_BYTES. */
#ifndef TP_DATA_ROWS_H
#define TP_DATA_ROWS_H

#include "base/file.h"
#include "base/json.h"
#include "base/status.h"
#include "data/csv.h"

#define TP_ROW_MAX_BYTES  ((size_t)64 << 20)
#define TP_ROW_MAX_VALUES ((size_t)1 << 22) /* of its JSON, keys included: 100 MB once they are parsed */

typedef struct tp_row_file tp_row_file;

/* Whether the name is that of a file with an object per row: .jsonl or .csv, or one of them packed. */
TP_API bool tp_row_path_holds_objects(const char *path);
/* path: such a file or a .txt file, or a folder with <split>.jsonl, .jsonl.gz, .csv or .csv.gz, the first of them that is
 * there. UNSUPPORTED for other kinds of files, by name; FORMAT for what is no regular file, and for the header of a .csv file;
 * IO_READ.
 */
TP_API tp_status tp_row_file_open(tp_ctx *ctx, const char *path, const char *split, tp_row_file **file) TP_MUST_CHECK;
TP_API void tp_row_file_close(tp_row_file *file); /* accepts NULL */
TP_API const char *tp_row_file_path(const tp_row_file *file);
TP_API bool tp_row_file_is_plain(const tp_row_file *file); /* .txt: a row is text, not an object */
/* IO_READ if size or time of the file are not what they were at open. */
TP_API tp_status tp_row_file_check(tp_ctx *ctx, const tp_row_file *file) TP_MUST_CHECK;
/* Appends size and hashes of up to 257 blocks, evenly spread, first and last among them. */
TP_API tp_status tp_row_file_hash(tp_ctx *ctx, tp_row_file *file, tp_buf *out) TP_MUST_CHECK;
/* SHA-256 of the whole file as it lies on disk, in hexadecimal. */
TP_API tp_status tp_row_file_sha256(tp_ctx *ctx, const tp_row_file *file, char hex[65]) TP_MUST_CHECK;
/* Bytes of a row that a reader found. */
TP_API tp_status tp_row_file_read(tp_ctx *ctx, tp_row_file *file, uint64_t offset, void *bytes, size_t n) TP_MUST_CHECK;

/* A row that a reader found, as an object; of a .csv file all values are strings. Not for .txt files. The document refers to
 * the file and to the text. FORMAT with file:line:column. */
TP_API tp_status tp_row_file_parse(tp_ctx *ctx, const tp_row_file *file, uint64_t line, const char *text, size_t n,
                                   tp_json_doc **doc) TP_MUST_CHECK;

typedef struct tp_row_place {
    uint64_t offset;  /* in the (unpacked) file */
    uint64_t line;    /* that it begins in, from 1; blank lines count */
    size_t bytes;     /* without the line end */
    const char *text; /* until the next call */
} tp_row_place;

typedef struct tp_row_reader {
    tp_row_file *file;                   /* borrowed */
    char *buffer;                        /* bytes [start, start + filled) of the file */
    size_t capacity, filled, next, seen; /* next row begins at buffer + next; its end is not before buffer + seen */
    uint64_t start, line;                /* that the next row begins in */
    tp_csv_state csv;                    /* at buffer + seen */
    size_t block_bytes;                  /* read at once */
} tp_row_reader;

/* block_bytes 0: a megabyte. */
TP_API void tp_row_reader_begin(tp_row_reader *reader, tp_row_file *file, size_t block_bytes);
/* The next row that is not blank; *found is false behind the last. FORMAT for rows above TP_ROW_MAX_BYTES, and for a record
 * that the file ends in the quotes of. */
TP_API tp_status tp_row_reader_next(tp_ctx *ctx, tp_row_reader *reader, tp_row_place *row, bool *found) TP_MUST_CHECK;
TP_API void tp_row_reader_end(tp_row_reader *reader);

#endif
