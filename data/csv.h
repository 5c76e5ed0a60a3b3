/* CSV as RFC 4180 has it: a header that names the columns, then records of as many fields, every value a string.
 *
 * Fields are divided by commas, records end in LF or CR LF. A field that begins with a quote ends at the next single one; in
 * between commas and line ends are text, and two quotes are one. Elsewhere a quote is refused, as is a CR that ends no line.
 * Blanks belong to their field, and an empty field is the empty string, quoted or not. A line without a byte is no record.
 * Messages say name:line:column of the text, and number and name of the column of the table. */
#ifndef TP_DATA_CSV_H
#define TP_DATA_CSV_H

#include "base/json.h"

#define TP_CSV_MAX_COLUMNS ((size_t)4096)

typedef struct tp_csv_header {
    char *memory; /* the names lie in it */
    tp_span *names;
    size_t n;
} tp_csv_header;

/* A record without the end of its line, and what messages say of it. The text must outlive what is made of it. */
typedef struct tp_csv_record {
    const char *name; /* of the file */
    size_t line;      /* that the record begins in, from 1 */
    const char *text;
    size_t n;
} tp_csv_record;

/* Names of columns. FORMAT for an empty name, one that is there twice, more than TP_CSV_MAX_COLUMNS. */
TP_API tp_status tp_csv_read_header(tp_ctx *ctx, const tp_csv_record *record, tp_csv_header *header) TP_MUST_CHECK;
TP_API void tp_csv_free_header(tp_csv_header *header);
/* A record as an object of strings, one for each name of the header, which must outlive it. FORMAT. */
TP_API tp_status tp_csv_parse(tp_ctx *ctx, const tp_csv_header *header, const tp_csv_record *record,
                              tp_json_doc **doc) TP_MUST_CHECK;

/* Where records end, in text that comes in pieces: between them it is kept what the piece before ended in. */
typedef enum tp_csv_state {
    TP_CSV_FIELD_BEGINS,
    TP_CSV_PLAIN,     /* in a field without quotes, or behind the closing quote of one */
    TP_CSV_QUOTED,    /* behind an opening quote */
    TP_CSV_QUOTE_SEEN /* in quotes, behind a quote: the closing one, or the first of two */
} tp_csv_state;

/* The newline in text[0..n) that ends the record, or NULL. *state: FIELD_BEGINS at a record's first byte. */
TP_API const char *tp_csv_record_end(const char *text, size_t n, tp_csv_state *state);

#endif
