/* Reading CSV. It is a parser of our own because rows are looked up by their place in the file: libcsv hands out fields without
 * saying where they, or the records, begin, and its errors without line and column. */
#include "data/csv.h"

#include <stdio.h>

#include "base/map.h"
#include "base/mem.h"

#define NAME_SHOWN 64 /* bytes of a column's name in messages */

/* ---- where a record ends ---- */

const char *tp_csv_record_end(const char *text, size_t n, tp_csv_state *state)
{
    const char *end = text + n;
    tp_csv_state s = *state;
    for (const char *p = text; p < end; p++) {
        if (s == TP_CSV_QUOTED) { /* the long stretches are here */
            p = memchr(p, '"', (size_t)(end - p));
            if (p == NULL) break;
            s = TP_CSV_QUOTE_SEEN;
        } else if (*p == '\n') {
            *state = TP_CSV_FIELD_BEGINS;
            return p;
        } else if (*p == ',') {
            s = TP_CSV_FIELD_BEGINS;
        } else {
            s = *p == '"' && s != TP_CSV_PLAIN ? TP_CSV_QUOTED : TP_CSV_PLAIN;
        }
    }
    *state = s;
    return NULL;
}

/* ---- messages ---- */

/* A record while it is read field by field. */
struct reading {
    tp_ctx *ctx;
    const tp_csv_record *record;
    const tp_csv_header *header; /* NULL: the record is the header */
    size_t at;                   /* next byte */
    size_t column;               /* of the table, from 0 */
    char *decoded;               /* [record->n] for fields in quotes */
    size_t n_decoded;
};

/* "rows.csv:3:14: column 2 ("output"): <what>": lines and columns of the text from 1, in characters. */
static tp_status fail_at(const struct reading *r, size_t offset, const char *what)
{
    const tp_csv_record *c = r->record;
    size_t line = c->line, column = 1;
    tp_span name = {"", 0};
    if (r->header != NULL && r->column < r->header->n) name = r->header->names[r->column];
    for (size_t i = 0; i < offset; i++) {
        bool newline = c->text[i] == '\n';
        line += newline;
        column = newline ? 1 : column + (((unsigned char)c->text[i] & 0xC0) != 0x80);
    }
    size_t shown = name.len < NAME_SHOWN ? name.len : NAME_SHOWN;
    while (shown < name.len && shown > 0 && ((unsigned char)name.data[shown] & 0xC0) == 0x80) shown--;
    return tp_fail(r->ctx, TP_FORMAT, "%s:%zu:%zu: column %zu%s%.*s%s: %s", c->name, line, column, r->column + 1,
                   name.len > 0 ? " (\"" : "", (int)shown, name.data, name.len > 0 ? "\")" : "", what);
}

/* ---- fields ---- */

/* r->at is behind the opening quote. */
static tp_status read_quoted(struct reading *r, tp_span *value)
{
    const char *text = r->record->text;
    size_t n = r->record->n, opening = r->at - 1;
    *value = (tp_span){r->decoded + r->n_decoded, 0};
    for (;;) {
        const char *quote = r->at < n ? memchr(text + r->at, '"', n - r->at) : NULL;
        if (quote == NULL) return fail_at(r, opening, "no quote closes the field that this one opens");
        bool doubled = quote + 1 < text + n && quote[1] == '"';
        size_t take = (size_t)(quote - (text + r->at)) + doubled;
        memcpy(r->decoded + r->n_decoded, text + r->at, take);
        r->n_decoded += take;
        value->len += take;
        r->at += take + 1;
        if (!doubled) break;
    }
    if (r->at == n || text[r->at] == ',') return TP_OK;
    return fail_at(r, r->at, "text behind the quote that closes the field; quotes inside of a field are doubled");
}

static tp_status read_plain(struct reading *r, tp_span *value)
{
    const char *text = r->record->text;
    size_t begin = r->at;
    for (; r->at < r->record->n && text[r->at] != ','; r->at++) {
        if (text[r->at] == '"')
            return fail_at(r, r->at, "a quote in a field without quotes around it; put them there, and double this one");
        if (text[r->at] == '\r')
            return fail_at(r, r->at, "a carriage return that ends no line, in a field without quotes around it");
    }
    *value = (tp_span){text + begin, r->at - begin};
    return TP_OK;
}

/* What no text holds, in the bytes that a field was written with. */
static tp_status check_text(const struct reading *r, size_t begin)
{
    const char *text = r->record->text + begin;
    size_t n = r->at - begin, valid = tp_utf8_valid_prefix(text, n);
    const char *zero = n > 0 ? memchr(text, '\0', n) : NULL;
    if (zero != NULL && (size_t)(zero - text) < valid) return fail_at(r, begin + (size_t)(zero - text), "a NUL byte");
    return valid == n ? TP_OK : fail_at(r, begin + valid, "bytes that are not UTF-8");
}

/* The next field, and the comma behind it; *more says whether there was one. */
static tp_status read_field(struct reading *r, tp_span *value, size_t *offset, bool *more)
{
    bool quoted = r->at < r->record->n && r->record->text[r->at] == '"';
    *offset = r->at;
    r->at += quoted;
    TP_TRY(quoted ? read_quoted(r, value) : read_plain(r, value));
    TP_TRY(check_text(r, *offset));
    *more = r->at < r->record->n;
    r->at += *more;
    return TP_OK;
}

/* ---- the header ---- */

static tp_status add_name(struct reading *r, tp_csv_header *header, size_t *capacity, tp_map *seen, tp_span name, size_t offset)
{
    char what[96];
    int64_t first;
    if (name.len == 0) return fail_at(r, offset, "the header names no column here");
    if (tp_map_get(seen, name, &first)) {
        snprintf(what, sizeof what, "the header gives it the name of column %lld again", (long long)first + 1);
        return fail_at(r, offset, what);
    }
    if (header->n == TP_CSV_MAX_COLUMNS) {
        snprintf(what, sizeof what, "more than %zu columns", TP_CSV_MAX_COLUMNS);
        return fail_at(r, offset, what);
    }
    TP_TRY(tp_map_put(r->ctx, seen, name, (int64_t)header->n, NULL));
    TP_TRY(tp_grow(r->ctx, &header->names, capacity, header->n + 1, sizeof *header->names));
    header->names[header->n++] = name;
    return TP_OK;
}

static tp_status read_names(struct reading *r, tp_csv_header *header, tp_map *seen)
{
    size_t capacity = 0;
    bool more = true;
    for (r->column = 0; more; r->column++) {
        tp_span name;
        size_t offset;
        TP_TRY(read_field(r, &name, &offset, &more));
        TP_TRY(add_name(r, header, &capacity, seen, name, offset));
    }
    return TP_OK;
}

tp_status tp_csv_read_header(tp_ctx *ctx, const tp_csv_record *record, tp_csv_header *header)
{
    *header = (tp_csv_header){.memory = tp_alloc_raw(ctx, record->n, 2)}; /* the text, and what its quotes hold */
    if (header->memory == NULL) return TP_NOMEM;
    memcpy(header->memory, record->text, record->n);
    tp_csv_record kept = {record->name, record->line, header->memory, record->n};
    struct reading r = {.ctx = ctx, .record = &kept, .decoded = header->memory + record->n};
    tp_map *seen = tp_map_new(ctx, true);
    tp_status status = seen != NULL ? read_names(&r, header, seen) : TP_NOMEM;
    tp_map_free(seen);
    if (status != TP_OK) tp_csv_free_header(header);
    return status;
}

void tp_csv_free_header(tp_csv_header *header)
{
    tp_free(header->names);
    tp_free(header->memory);
    *header = (tp_csv_header){0};
}

/* ---- records ---- */

static tp_status read_members(struct reading *r, tp_json_member *members)
{
    const tp_csv_header *h = r->header;
    char what[96];
    bool more = true;
    for (r->column = 0; more && r->column < h->n; r->column++) {
        tp_json_member *m = &members[r->column];
        m->key = h->names[r->column];
        TP_TRY(read_field(r, &m->value, &m->offset, &more));
    }
    if (!more && r->column == h->n) return TP_OK;
    snprintf(what, sizeof what, more ? "a field more than the header's %zu columns" : "no field; the header names %zu columns",
             h->n);
    return fail_at(r, r->at, what);
}

tp_status tp_csv_parse(tp_ctx *ctx, const tp_csv_header *header, const tp_csv_record *record, tp_json_doc **doc)
{
    struct reading r = {.ctx = ctx, .record = record, .header = header};
    tp_json_options options = {.name = record->name, .first_line = record->line};
    *doc = NULL;
    tp_json_member *members = tp_alloc_raw(ctx, header->n, sizeof *members);
    r.decoded = members != NULL ? tp_alloc_raw(ctx, record->n, 1) : NULL;
    tp_status status = r.decoded != NULL ? read_members(&r, members) : TP_NOMEM;
    if (status == TP_OK) status = tp_json_of_strings(ctx, record->text, record->n, &options, members, header->n, doc);
    tp_free(members);
    if (status == TP_OK)
        tp_json_adopt(*doc, r.decoded);
    else
        tp_free(r.decoded);
    return status;
}
