/* Text: spans, growing buffers with a stated maximum, UTF-8, nearest names. */
#ifndef TP_BASE_TEXT_H
#define TP_BASE_TEXT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- spans: borrowed bytes, not NUL-terminated ---- */
typedef struct tp_span {
    const char *data;
    size_t len;
} tp_span;

static inline tp_span tp_span_of(const char *text)
{
    return (tp_span){text, strlen(text)};
}
static inline bool tp_span_is(tp_span s, const char *text)
{
    size_t n = strlen(text);
    return s.len == n && (n == 0 || memcmp(s.data, text, n) == 0);
}
static inline bool tp_span_equal(tp_span a, tp_span b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}
TP_API bool tp_starts_with(const char *text, const char *prefix);
TP_API bool tp_ends_with(const char *text, const char *suffix);

/* ---- growing buffer ---- */
/* Bytes with a NUL kept behind them. Once an append fails (memory, or past `max`) the buffer is
 * failed: later appends do nothing, and tp_buf_status says so once at the end. */
typedef struct tp_buf {
    char *data; /* NULL until the first append */
    size_t len;
    size_t capacity;
    size_t max; /* longest content allowed; 0: no limit */
    bool failed;
} tp_buf;

TP_API void tp_buf_init(tp_buf *buf, size_t max);
TP_API void tp_buf_free(tp_buf *buf);
TP_API void tp_buf_clear(tp_buf *buf); /* keeps the memory and the failed flag off */
TP_API void tp_buf_append(tp_buf *buf, const void *bytes, size_t n);
TP_API void tp_buf_text(tp_buf *buf, const char *text);
TP_API void tp_buf_char(tp_buf *buf, char c);
TP_API void tp_buf_codepoint(tp_buf *buf, uint32_t codepoint); /* as UTF-8; surrogates and above 0x10FFFF become U+FFFD */
TP_API void tp_buf_printf(tp_buf *buf, const char *format, ...) TP_PRINTF(2, 3);
TP_API void tp_buf_vprintf(tp_buf *buf, const char *format, va_list args) TP_PRINTF(2, 0);
/* The text so far, never NULL. */
TP_API const char *tp_buf_cstr(const tp_buf *buf);
/* TP_OK, or NOMEM recorded in ctx ("<what>: out of memory or longer than N bytes"). */
TP_API tp_status tp_buf_status(tp_ctx *ctx, const tp_buf *buf, const char *what) TP_MUST_CHECK;

/* ---- UTF-8 ---- */
/* Decodes the character at text[0..n): returns its length 1-4 and sets *codepoint, or returns 0
 * for anything RFC 3629 forbids (overlong, surrogate, > 0x10FFFF, cut short) or n == 0. */
TP_API int tp_utf8_decode(const char *text, size_t n, uint32_t *codepoint);
/* Writes 1-4 bytes, returns how many. */
TP_API int tp_utf8_encode(uint32_t codepoint, char out[4]);
/* Offset of the first byte that is not valid UTF-8, or n. */
TP_API size_t tp_utf8_valid_prefix(const char *text, size_t n);

/* ---- names ---- */
/* The name in the NULL-terminated list that is nearest to `name` by edit distance (insert, delete,
 * replace, swap of neighbours) if the distance is at most a third of the longer name; else NULL. */
TP_API const char *tp_nearest_name(const char *name, const char *const *names);

/* "1.5 GiB", "512 B": for messages. Returns `out`. */
TP_API const char *tp_format_bytes(uint64_t bytes, char out[32]);

/* ---- numbers, exact and without locale ---- */
/* The whole of text must be the number. */
TP_API bool tp_parse_i64(const char *text, int64_t *value);
TP_API bool tp_parse_u64(const char *text, uint64_t *value);
TP_API bool tp_parse_f64(const char *text, double *value);    /* finite decimal; no hex, inf, nan */
TP_API bool tp_parse_size(const char *text, uint64_t *bytes); /* "8GiB", "1.5 GB", or bytes */

#ifdef __cplusplus
}
#endif
#endif
