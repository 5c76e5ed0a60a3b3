/* JSON in and out (RFC 8259), for files from strangers.
 *
 * Parsing is iterative, so depth costs no stack: depth is limited to TP_JSON_DEPTH, duplicate keys,
 * surrogates written as bytes, invalid UTF-8 and bytes after the value are refused, and every
 * message says name:line:column. A "\ud800" escape without its partner becomes U+FFFD; "\u0000" is text.
 * A document of n bytes takes O(n) time and memory (a node is 24 bytes); the large vocabularies of
 * tokenizer.json files (10 MB, 200,000 keys) parse in well under 0.2 s. Objects with more than 16 members get a
 * hash index while they are parsed; a document never changes afterwards, so threads may read it together. */
#ifndef TP_BASE_JSON_H
#define TP_BASE_JSON_H

#include "base/status.h"
#include "base/text.h"

#define TP_JSON_DEPTH 128

typedef enum tp_json_type {
    TP_JSON_NULL,
    TP_JSON_BOOL,
    TP_JSON_NUMBER,
    TP_JSON_STRING,
    TP_JSON_ARRAY,
    TP_JSON_OBJECT
} tp_json_type;

typedef struct tp_json_doc tp_json_doc; /* owns the nodes and the decoded strings */
typedef struct tp_json tp_json;         /* a value inside a document; borrowed */

typedef struct tp_json_options {
    const char *name;       /* file name for messages */
    size_t first_line;      /* line number of the first byte; 0 means 1 (JSONL rows) */
    bool allow_duplicates;  /* keep the last of repeated keys instead of refusing */
    size_t max_depth;       /* 0: TP_JSON_DEPTH */
    size_t max_nodes;       /* values and keys together; 0: as many as the text has */
    bool strict_surrogates; /* refuse a "\ud800" escape without its partner instead of reading U+FFFD */
} tp_json_options;

/* Parses text[0..n). The text must stay alive as long as the document. A leading UTF-8 BOM is not accepted here. */
TP_API tp_status tp_json_parse(tp_ctx *ctx, const char *text, size_t n, const tp_json_options *options,
                               tp_json_doc **doc) TP_MUST_CHECK;
/* Calls member(user, doc, key, value) for each member of the object that text[0..n) must be, in order, and forgets the member
 * afterwards, so that memory stays with the largest one: max_nodes counts for each member alone. Repeated keys at
 * the top are the caller's to find; key, value and doc live until member returns. Stops at the first status other than TP_OK.
 */
typedef tp_status (*tp_json_member_fn)(void *user, tp_ctx *ctx, const tp_json_doc *doc, const tp_json *key,
                                       const tp_json *value);
TP_API tp_status tp_json_each(tp_ctx *ctx, const char *text, size_t n, const tp_json_options *options, tp_json_member_fn member,
                              void *user) TP_MUST_CHECK;
/* Reads and parses a whole file of at most max_bytes; the document owns the text. */
TP_API tp_status tp_json_read(tp_ctx *ctx, const char *path, size_t max_bytes, tp_json_doc **doc) TP_MUST_CHECK;
/* A document that was read from another format: an object whose values are strings, each of which began at `offset` of
 * text[0..n), for tp_json_where. Keys and values stay the caller's and must outlive the document, as the text must; equal keys
 * are refused. */
typedef struct tp_json_member {
    tp_span key, value;
    size_t offset;
} tp_json_member;
TP_API tp_status tp_json_of_strings(tp_ctx *ctx, const char *text, size_t n, const tp_json_options *options,
                                    const tp_json_member *members, size_t n_members, tp_json_doc **doc) TP_MUST_CHECK;
/* The document frees `memory`, which its values lie in, when it is freed itself. */
TP_API void tp_json_adopt(tp_json_doc *doc, char *memory);
TP_API void tp_json_free(tp_json_doc *doc);
TP_API const tp_json *tp_json_root(const tp_json_doc *doc);

TP_API tp_json_type tp_json_type_of(const tp_json *value);        /* NULL value: TP_JSON_NULL */
TP_API const char *tp_json_type_name(tp_json_type type);          /* "a string", "an object", ... */
TP_API size_t tp_json_count(const tp_json *value);                /* members or elements; 0 for the rest */
TP_API const tp_json *tp_json_at(const tp_json *array, size_t i); /* element, or value of member i; O(1) */
TP_API tp_span tp_json_key_at(const tp_json *object, size_t i);
TP_API const tp_json *tp_json_get(const tp_json *object, const char *key); /* NULL if absent or not an object */
TP_API const tp_json *tp_json_get_span(const tp_json *object, tp_span key);
TP_API tp_span tp_json_string(const tp_json *value); /* decoded; may hold NUL; empty for other types */
TP_API bool tp_json_bool(const tp_json *value, bool otherwise);
TP_API tp_span tp_json_number_text(const tp_json *value); /* as written */
/* Numbers: exact. i64 fails for fractions and exponents unless the value is an integer written with ".0"
 * is refused too (4096.0 is not an integer here). f64 fails for values that overflow. */
TP_API bool tp_json_i64(const tp_json *value, int64_t *out);
TP_API bool tp_json_f64(const tp_json *value, double *out);
/* name:line:column of a value, for messages. Returns `out`. */
TP_API const char *tp_json_where(const tp_json_doc *doc, const tp_json *value, char *out, size_t size);

/* Typed access with messages: "config.json:3:12: hidden_size: expected an integer from 1 to 1048576, got \"64\"".
 * An absent key leaves *out alone if `required` is false, else it is an error; null counts as absent. */
TP_API tp_status tp_json_need_i64(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                                  int64_t min, int64_t max, int64_t *out) TP_MUST_CHECK;
TP_API tp_status tp_json_need_f64(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                                  double min, double max, double *out) TP_MUST_CHECK;
TP_API tp_status tp_json_need_bool(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                                   bool *out) TP_MUST_CHECK;
TP_API tp_status tp_json_need_string(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                                     tp_span *out) TP_MUST_CHECK;

/* ---- out ---- */
/* Appends a quoted string; UTF-8 stays as it is, control characters are escaped, invalid bytes become U+FFFD. */
TP_API void tp_json_write_string(tp_buf *out, const char *text, size_t n);
/* Shortest decimal that reads back to the same double with at most `digits` significant digits (17: exact); NaN and
 * infinities become null. An integer-valued double prints without a fraction. */
TP_API void tp_json_write_f64(tp_buf *out, double value, int digits);
/* Appends the value; indent < 0: compact ("," and ":"), 0: Python's ", " and ": ", else pretty with that many blanks. */
TP_API void tp_json_write(tp_buf *out, const tp_json *value, int indent);

#endif
