/* JSON out: strings, numbers, whole values. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/json_node.h"
#include "base/mem.h"

/* Terminals obey the controls from U+007F to U+009F, too; JSON would let them pass. */
static bool is_control(uint32_t c)
{
    return c < 0x20 || (c >= 0x7f && c < 0xa0);
}

static void write_escape(tp_buf *out, uint32_t c)
{
    static const char letters[32] = {['\b'] = 'b', ['\f'] = 'f', ['\n'] = 'n', ['\r'] = 'r', ['\t'] = 't'};
    if (!is_control(c)) {
        tp_buf_char(out, '\\');
        tp_buf_char(out, (char)c);
    } else if (c < 0x20 && letters[c] != 0) {
        tp_buf_char(out, '\\');
        tp_buf_char(out, letters[c]);
    } else {
        tp_buf_printf(out, "\\u%04x", (unsigned)c);
    }
}

void tp_json_write_string(tp_buf *out, const char *text, size_t n)
{
    tp_buf_char(out, '"');
    size_t done = 0, i = 0; /* text[done..i) is copied as it is */
    while (i < n) {
        uint32_t c;
        int bytes = tp_utf8_decode(text + i, n - i, &c);
        if (bytes > 0 && !is_control(c) && c != '"' && c != '\\') {
            i += (size_t)bytes;
            continue;
        }
        tp_buf_append(out, text + done, i - done);
        if (bytes == 0)
            tp_buf_codepoint(out, 0xfffd);
        else
            write_escape(out, c);
        i += bytes > 0 ? (size_t)bytes : 1;
        done = i;
    }
    tp_buf_append(out, text + done, n - done);
    tp_buf_char(out, '"');
}

/* Any decimal of up to 15 digits survives the way through a normal double, so 15 digits show the shortest form if it is
 * that short (%g drops the zeros behind it); 16 or 17 are tried otherwise. Subnormals have fewer digits: all are tried. */
void tp_json_write_f64(tp_buf *out, double value, int digits)
{
    char text[40];
    if (!isfinite(value)) {
        tp_buf_text(out, "null");
        return;
    }
    digits = digits < 1 ? 1 : digits > 17 ? 17 : digits;
    int tried = fabs(value) < DBL_MIN ? 1 : digits < 15 ? digits : 15;
    do snprintf(text, sizeof text, "%.*g", tried, value);
    while (tried++ < digits && strtod(text, NULL) != value);
    /* 100000 reads better than 1e+05 */
    if (strchr(text, 'e') != NULL && fabs(value) < 1e15 && value == trunc(value) && strtod(text, NULL) == value)
        snprintf(text, sizeof text, "%.0f", value);
    tp_buf_text(out, text);
}

/* ---- whole values ---- */

typedef struct level { /* an open container */
    const tp_json *container;
    size_t next; /* child to be written */
} level;

static void write_scalar(tp_buf *out, const tp_json *value)
{
    tp_span text = tp_json_number_text(value);
    switch (tp_json_type_of(value)) {
    case TP_JSON_STRING: tp_json_write_string(out, value->at.text, value->len); break;
    case TP_JSON_NUMBER: tp_buf_append(out, text.data, text.len); break;
    case TP_JSON_BOOL: tp_buf_text(out, value->flag ? "true" : "false"); break;
    case TP_JSON_ARRAY: tp_buf_text(out, "[]"); break; /* empty ones come here */
    case TP_JSON_OBJECT: tp_buf_text(out, "{}"); break;
    default: tp_buf_text(out, "null"); break;
    }
}

static void new_line(tp_buf *out, int indent, size_t depth)
{
    if (indent <= 0) return;
    tp_buf_char(out, '\n');
    for (size_t i = 0; i < depth * (size_t)indent; i++) tp_buf_char(out, ' ');
}

/* What stands before child number l->next: the separator, the line break, the key. */
static void write_lead(tp_buf *out, const level *l, int indent, size_t depth)
{
    if (l->next > 0) tp_buf_text(out, indent == 0 ? ", " : ",");
    new_line(out, indent, depth);
    if (l->container->type != TP_JSON_OBJECT) return;
    tp_span key = tp_json_key_at(l->container, l->next);
    tp_json_write_string(out, key.data, key.len);
    tp_buf_text(out, indent < 0 ? ":" : ": ");
}

void tp_json_write(tp_buf *out, const tp_json *value, int indent)
{
    level *levels = NULL;
    size_t depth = 0, capacity = 0;
    do {
        if (tp_json_count(value) == 0) {
            write_scalar(out, value);
        } else {
            if (tp_grow(NULL, &levels, &capacity, depth + 1, sizeof *levels) != TP_OK) {
                out->failed = true;
                break;
            }
            tp_buf_char(out, value->type == TP_JSON_OBJECT ? '{' : '[');
            levels[depth++] = (level){.container = value};
        }
        while (depth > 0 && levels[depth - 1].next == tp_json_count(levels[depth - 1].container)) {
            depth--;
            new_line(out, indent, depth);
            tp_buf_char(out, levels[depth].container->type == TP_JSON_OBJECT ? '}' : ']');
        }
        if (depth > 0) {
            level *l = &levels[depth - 1];
            write_lead(out, l, indent, depth);
            value = tp_json_at(l->container, l->next++);
        }
    } while (depth > 0 && !out->failed);
    tp_free(levels);
}
