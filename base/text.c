/* Growing buffers, UTF-8, nearest names, exact numbers. */
#include "base/text.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/mem.h"

bool tp_starts_with(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

bool tp_ends_with(const char *text, const char *suffix)
{
    size_t n = strlen(text), m = strlen(suffix);
    return n >= m && memcmp(text + n - m, suffix, m) == 0;
}

void tp_buf_init(tp_buf *buf, size_t max)
{
    *buf = (tp_buf){.max = max};
}

void tp_buf_free(tp_buf *buf)
{
    tp_free(buf->data);
    *buf = (tp_buf){.max = buf->max};
}

void tp_buf_clear(tp_buf *buf)
{
    buf->len = 0;
    buf->failed = false;
    if (buf->data != NULL) buf->data[0] = '\0';
}

/* Room for n more bytes and the NUL. */
static bool reserve(tp_buf *buf, size_t n)
{
    size_t need;
    if (buf->failed) return false;
    if (!tp_add_size(buf->len, n, &need) || (buf->max > 0 && need > buf->max) || !tp_add_size(need, 1, &need) ||
        tp_grow(NULL, &buf->data, &buf->capacity, need, 1) != TP_OK)
        buf->failed = true;
    return !buf->failed;
}

void tp_buf_append(tp_buf *buf, const void *bytes, size_t n)
{
    if (!reserve(buf, n)) return;
    if (n > 0) memcpy(buf->data + buf->len, bytes, n);
    buf->len += n;
    buf->data[buf->len] = '\0';
}

void tp_buf_text(tp_buf *buf, const char *text)
{
    tp_buf_append(buf, text, strlen(text));
}
void tp_buf_char(tp_buf *buf, char c)
{
    tp_buf_append(buf, &c, 1);
}

void tp_buf_codepoint(tp_buf *buf, uint32_t codepoint)
{
    char bytes[4];
    if (codepoint > 0x10ffff || (codepoint >= 0xd800 && codepoint < 0xe000)) codepoint = 0xfffd;
    tp_buf_append(buf, bytes, (size_t)tp_utf8_encode(codepoint, bytes));
}

void tp_buf_vprintf(tp_buf *buf, const char *format, va_list args)
{
    va_list again;
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    if (n < 0) {
        buf->failed = true;
    } else if (reserve(buf, (size_t)n)) {
        vsnprintf(buf->data + buf->len, (size_t)n + 1, format, again);
        buf->len += (size_t)n;
    }
    va_end(again);
}

void tp_buf_printf(tp_buf *buf, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    tp_buf_vprintf(buf, format, args);
    va_end(args);
}

const char *tp_buf_cstr(const tp_buf *buf)
{
    return buf->data != NULL ? buf->data : "";
}

tp_status tp_buf_status(tp_ctx *ctx, const tp_buf *buf, const char *what)
{
    if (!buf->failed) return TP_OK;
    if (buf->max > 0) return tp_fail(ctx, TP_NOMEM, "%s: out of memory, or longer than %zu bytes", what, buf->max);
    return tp_fail(ctx, TP_NOMEM, "%s: out of memory", what);
}

int tp_utf8_decode(const char *text, size_t n, uint32_t *codepoint)
{
    const unsigned char *s = (const unsigned char *)text;
    if (n == 0) return 0;
    if (s[0] < 0x80) {
        *codepoint = s[0];
        return 1;
    }
    int length = s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : s[0] >= 0xe0 && s[0] < 0xf0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
    if (length == 0 || n < (size_t)length) return 0;
    uint32_t c = s[0] & (0x7fu >> length);
    for (int i = 1; i < length; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0;
        c = c << 6 | (s[i] & 0x3f);
    }
    if ((length == 3 && c < 0x800) || (length == 4 && (c < 0x10000 || c > 0x10ffff)) || (c >= 0xd800 && c < 0xe000)) return 0;
    *codepoint = c;
    return length;
}

int tp_utf8_encode(uint32_t c, char out[4])
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3f));
        out[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3f));
    out[2] = (char)(0x80 | (c >> 6 & 0x3f));
    out[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

size_t tp_utf8_valid_prefix(const char *text, size_t n)
{
    size_t i = 0;
    while (i < n) {
        uint32_t codepoint;
        int length = tp_utf8_decode(text + i, n - i, &codepoint);
        if (length == 0) return i;
        i += (size_t)length;
    }
    return n;
}

#define NAME_MAX_BYTES 63

static int min3(int a, int b, int c)
{
    return a < b ? (a < c ? a : c) : (b < c ? b : c);
}

/* Optimal string alignment distance (Damerau-Levenshtein with adjacent swaps only), or some number above `limit` if it is more:
 * once no way of two rows in turn is short enough, none that goes on from them is. */
static int edit_distance(const char *a, int n, const char *b, int m, int limit)
{
    int rows[3][NAME_MAX_BYTES + 1], least_before = 0;
    for (int j = 0; j <= m; j++) rows[0][j] = j;
    for (int i = 1; i <= n; i++) {
        int *now = rows[i % 3], *before = rows[(i + 2) % 3], *two_before = rows[(i + 1) % 3];
        int least = now[0] = i;
        for (int j = 1; j <= m; j++) {
            now[j] = min3(before[j] + 1, now[j - 1] + 1, before[j - 1] + (a[i - 1] != b[j - 1]));
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && two_before[j - 2] + 1 < now[j])
                now[j] = two_before[j - 2] + 1;
            if (now[j] < least) least = now[j];
        }
        if (least > limit && least_before > limit) return least;
        least_before = least;
    }
    return rows[n % 3][m];
}

const char *tp_nearest_name(const char *name, const char *const *names)
{
    const char *best = NULL;
    int best_distance = NAME_MAX_BYTES;
    size_t bytes = strlen(name);
    if (bytes > NAME_MAX_BYTES) return NULL;
    for (int n = (int)bytes; *names != NULL; names++) {
        if (strlen(*names) > NAME_MAX_BYTES) continue;
        int m = (int)strlen(*names), longer = n > m ? n : m, shorter = n > m ? m : n;
        int limit = longer / 3 < best_distance - 1 ? longer / 3 : best_distance - 1;
        if (longer - shorter > limit) continue; /* so many letters at least would have to be put in */
        int distance = edit_distance(name, n, *names, m, limit);
        if (distance > limit) continue;
        best = *names;
        best_distance = distance;
    }
    return best;
}

const char *tp_format_bytes(uint64_t bytes, char out[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    int unit = 0;
    while (value >= 1024 && unit < 6) {
        value /= 1024;
        unit++;
    }
    if (unit == 0)
        snprintf(out, 32, "%llu B", (unsigned long long)bytes);
    else
        snprintf(out, 32, "%.*f %s", value < 10 ? 2 : 1, value, units[unit]);
    return out;
}

bool tp_parse_i64(const char *text, int64_t *value)
{
    const char *digits = *text == '-' || *text == '+' ? text + 1 : text;
    if (*digits < '0' || *digits > '9') return false;
    char *end;
    errno = 0;
    long long parsed = strtoll(text, &end, 10);
    if (*end != '\0' || errno != 0) return false;
    *value = parsed;
    return true;
}

bool tp_parse_u64(const char *text, uint64_t *value)
{
    if (*text < '0' || *text > '9') return false;
    char *end;
    errno = 0;
    unsigned long long parsed = strtoull(text, &end, 10);
    if (*end != '\0' || errno != 0) return false;
    *value = parsed;
    return true;
}

bool tp_parse_f64(const char *text, double *value)
{
    for (const char *p = text; *p != '\0'; p++)
        if (strchr("0123456789+-.eE", *p) == NULL) return false;
    char *end;
    double parsed = strtod(text, &end); /* the C locale: nothing in tapeft calls setlocale */
    if (end == text || *end != '\0' || !isfinite(parsed)) return false;
    *value = parsed;
    return true;
}

bool tp_parse_size(const char *text, uint64_t *bytes)
{
    static const struct {
        const char *unit;
        double factor;
    } units[] = {{"", 1},         {"B", 1},    {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30},
                 {"TiB", 0x1p40}, {"KB", 1e3}, {"MB", 1e6},     {"GB", 1e9},     {"TB", 1e12}};
    size_t n = strspn(text, "0123456789.");
    char number[32];
    if (n == 0 || n >= sizeof number) return false;
    memcpy(number, text, n);
    number[n] = '\0';
    double value;
    uint64_t whole;
    if (!tp_parse_f64(number, &value)) return false;
    text += n;
    if (*text == ' ') text++;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        if (strcmp(text, units[i].unit) != 0) continue;
        if (!(value * units[i].factor >= 1) || !(value * units[i].factor < 0x1p63)) return false;
        if (!tp_parse_u64(number, &whole))
            *bytes = (uint64_t)(value * units[i].factor);
        else if (__builtin_mul_overflow(whole, (uint64_t)units[i].factor, bytes))
            return false;
        return true;
    }
    return false;
}
