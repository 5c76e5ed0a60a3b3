/* str(), repr(), json.dumps and HTML escapes. Each writes into a sink, so that the origin of strings is kept inside lists,
 * JSON and escapes alike. Recursion over values is bounded by the evaluation depth. */
#include "data/template_text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "data/template_object.h"
#include "data/template_unicode.h"

/* ---- numbers ---- */

size_t tp_jint_text(tp_jint i, char out[TP_J_NUMBER_BYTES])
{
    char digits[48];
    size_t n = 0, len = 0;
    if (i < 0) out[len++] = '-';
    do {
        int digit = (int)(i % 10);
        digits[n++] = (char)('0' + (digit < 0 ? -digit : digit));
        i /= 10;
    } while (i != 0);
    while (n > 0) out[len++] = digits[--n];
    out[len] = '\0';
    return len;
}

/* The fewest significant digits that read back as d, and the decimal exponent of the first. */
static int shortest_digits(double d, char digits[20], int *exponent)
{
    char text[40];
    for (int n = 1; n <= 17; n++) {
        snprintf(text, sizeof text, "%.*e", n - 1, d);
        double back = 0;
        char *e = strchr(text, 'e');
        if (n > 1) text[1] = '.'; /* whatever the locale thinks */
        if (n < 17 && (!tp_parse_f64(text, &back) || back != d)) continue;
        digits[0] = text[0];
        for (int i = 1; i < n; i++) digits[i] = text[i + 1];
        int64_t exp10 = 0;
        bool ok = tp_parse_i64(e[1] == '+' ? e + 2 : e + 1, &exp10);
        *exponent = ok ? (int)exp10 : 0;
        while (n > 1 && digits[n - 1] == '0') n--;
        return n;
    }
    return 0;
}

size_t tp_jfloat_text(double d, char out[TP_J_NUMBER_BYTES])
{
    char digits[20];
    int exponent = 0;
    size_t len = 0;
    if (isnan(d)) return (size_t)snprintf(out, TP_J_NUMBER_BYTES, "nan");
    if (isinf(d)) return (size_t)snprintf(out, TP_J_NUMBER_BYTES, d < 0 ? "-inf" : "inf");
    if (signbit(d)) out[len++] = '-';
    d = fabs(d);
    if (d == 0) return len + (size_t)snprintf(out + len, TP_J_NUMBER_BYTES - len, "0.0");
    int n = shortest_digits(d, digits, &exponent);
    if (exponent < -4 || exponent >= 16) {
        out[len++] = digits[0];
        if (n > 1) out[len++] = '.';
        for (int i = 1; i < n; i++) out[len++] = digits[i];
        return len + (size_t)snprintf(out + len, TP_J_NUMBER_BYTES - len, "e%c%02d", exponent < 0 ? '-' : '+', abs(exponent));
    }
    if (exponent < 0) {
        memcpy(out + len, "0.0000", 6);
        len += (size_t)(1 - exponent);
    }
    for (int i = 0; i < n || i <= exponent; i++) {
        if (i == exponent + 1 && exponent >= 0) out[len++] = '.';
        out[len++] = i < n ? digits[i] : '0';
    }
    if (exponent >= 0 && n <= exponent + 1) {
        out[len++] = '.';
        out[len++] = '0';
    }
    out[len] = '\0';
    return len;
}

static tp_status write_number(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v)
{
    char text[TP_J_NUMBER_BYTES];
    size_t n = v->type == TP_J_FLOAT ? tp_jfloat_text(v->real, text) : tp_jint_text(tp_jint_of(v), text);
    return tp_jsink_bytes(j, sink, text, n);
}

/* ---- repr ---- */

static tp_status write_repr_char(tp_jinja *j, tp_jsink *sink, const tp_jvalue *s, size_t at, int n, uint32_t c, char quote)
{
    char text[16];
    if (c == '\\' || c == (unsigned char)quote)
        snprintf(text, sizeof text, "\\%c", (char)c);
    else if (c == '\n' || c == '\r' || c == '\t')
        snprintf(text, sizeof text, "\\%c", c == '\n' ? 'n' : c == '\r' ? 'r' : 't');
    else if (c == ' ' || tp_jis_printable(c))
        return tp_jsink_for(j, sink, s->text + at, (size_t)n, s, at);
    else if (c < 0x100)
        snprintf(text, sizeof text, "\\x%02x", c);
    else
        snprintf(text, sizeof text, c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
    return tp_jsink_for(j, sink, text, strlen(text), s, at);
}

static tp_status write_repr_string(tp_jinja *j, tp_jsink *sink, const tp_jvalue *s)
{
    bool single = memchr(s->text, '\'', s->len) != NULL, twice = memchr(s->text, '"', s->len) != NULL;
    char quote = single && !twice ? '"' : '\'';
    bool markup = s->type == TP_J_STRING && (s->flags & TP_J_MARKUP) != 0;
    if (markup) TP_TRY(tp_jsink_text(j, sink, "Markup("));
    if (s->type == TP_J_BYTES) TP_TRY(tp_jsink_text(j, sink, "b"));
    TP_TRY(tp_jsink_bytes(j, sink, &quote, 1));
    for (size_t at = 0; at < s->len;) {
        uint32_t c = (unsigned char)s->text[at];
        int n = 1;
        if (s->type == TP_J_STRING) n = tp_utf8_decode(s->text + at, s->len - at, &c);
        if (n <= 0) n = 1;
        if (s->type == TP_J_BYTES && c >= 0x7F) {
            char hex[16];
            snprintf(hex, sizeof hex, "\\x%02x", c);
            TP_TRY(tp_jsink_text(j, sink, hex));
        } else {
            TP_TRY(write_repr_char(j, sink, s, at, n, c, quote));
        }
        at += (size_t)n;
    }
    TP_TRY(tp_jsink_bytes(j, sink, &quote, 1));
    return markup ? tp_jsink_text(j, sink, ")") : TP_OK;
}

static tp_status write_repr_items(tp_jinja *j, tp_jsink *sink, const tp_jvalue *items, size_t n, const char *open,
                                  const char *close)
{
    TP_TRY(tp_jsink_text(j, sink, open));
    for (size_t i = 0; i < n; i++) {
        if (i > 0) TP_TRY(tp_jsink_text(j, sink, ", "));
        TP_TRY(tp_jwrite_repr(j, sink, &items[i]));
    }
    return tp_jsink_text(j, sink, close);
}

static tp_status write_repr_dict(tp_jinja *j, tp_jsink *sink, const tp_jdict *dict)
{
    TP_TRY(tp_jsink_text(j, sink, "{"));
    for (size_t i = 0; i < dict->n; i++) {
        if (i > 0) TP_TRY(tp_jsink_text(j, sink, ", "));
        TP_TRY(tp_jwrite_repr(j, sink, &dict->pairs[i].key));
        TP_TRY(tp_jsink_text(j, sink, ": "));
        TP_TRY(tp_jwrite_repr(j, sink, &dict->pairs[i].value));
    }
    return tp_jsink_text(j, sink, "}");
}

static tp_status write_repr_view(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v)
{
    tp_jvalue *items;
    size_t n;
    TP_TRY(tp_jitems(j, v, &items, &n));
    TP_TRY(tp_jsink_text(j, sink, tp_jtype_name(v)));
    return write_repr_items(j, sink, items, n, "([", "])");
}

static tp_status write_repr_range(tp_jinja *j, tp_jsink *sink, const tp_jrange *r)
{
    char text[3][TP_J_NUMBER_BYTES], all[4 * TP_J_NUMBER_BYTES];
    tp_jint_text(r->start, text[0]);
    tp_jint_text(r->stop, text[1]);
    tp_jint_text(r->step, text[2]);
    if (r->step == 1)
        snprintf(all, sizeof all, "range(%s, %s)", text[0], text[1]);
    else
        snprintf(all, sizeof all, "range(%s, %s, %s)", text[0], text[1], text[2]);
    return tp_jsink_text(j, sink, all);
}

static tp_status write_repr_container(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v)
{
    size_t begin = sink->len;
    uint32_t source = v->type == TP_J_DICT ? v->dict->source : v->list->source;
    tp_status st;
    TP_TRY(tp_jinja_enter(j));
    if (source != 0) sink->muted++;
    if (v->type == TP_J_DICT)
        st = write_repr_dict(j, sink, v->dict);
    else if (v->type == TP_J_LIST)
        st = write_repr_items(j, sink, v->list->items, v->list->n, "[", "]");
    else
        st = write_repr_items(j, sink, v->list->items, v->list->n, "(", v->list->n == 1 ? ",)" : ")");
    if (source != 0) sink->muted--;
    tp_jinja_leave(j);
    return st == TP_OK ? tp_jsink_mark(j, sink, begin, source) : st;
}

static tp_status write_repr_namespace(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v)
{
    TP_TRY(tp_jinja_enter(j));
    TP_TRY(tp_jsink_text(j, sink, "<Namespace "));
    TP_TRY(write_repr_dict(j, sink, v->dict));
    tp_jinja_leave(j);
    return tp_jsink_text(j, sink, ">");
}

static tp_status write_repr_loop(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v)
{
    tp_jvalue index, length;
    bool found;
    TP_TRY(tp_jloop_getattr(j, v, tp_span_of("index"), &index, &found));
    TP_TRY(tp_jloop_getattr(j, v, tp_span_of("length"), &length, &found));
    TP_TRY(tp_jsink_text(j, sink, "<LoopContext "));
    TP_TRY(write_number(j, sink, &index));
    TP_TRY(tp_jsink_text(j, sink, "/"));
    TP_TRY(write_number(j, sink, &length));
    return tp_jsink_text(j, sink, ">");
}

tp_status tp_jwrite_repr(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v)
{
    TP_TRY(tp_jinja_charge(j, 1));
    switch (v->type) {
    case TP_J_MISSING:
    case TP_J_UNDEFINED: return tp_jsink_text(j, sink, "Undefined");
    case TP_J_NONE: return tp_jsink_text(j, sink, "None");
    case TP_J_BOOL: return tp_jsink_text(j, sink, v->truth ? "True" : "False");
    case TP_J_INT:
    case TP_J_FLOAT: return write_number(j, sink, v);
    case TP_J_STRING:
    case TP_J_BYTES: return write_repr_string(j, sink, v);
    case TP_J_LIST:
    case TP_J_TUPLE:
    case TP_J_DICT: return write_repr_container(j, sink, v);
    case TP_J_VIEW: return write_repr_view(j, sink, v);
    case TP_J_RANGE: return write_repr_range(j, sink, v->range);
    case TP_J_NAMESPACE: return write_repr_namespace(j, sink, v);
    case TP_J_MACRO: return tp_jwrite_macro(j, sink, v->macro);
    case TP_J_LOOP: return write_repr_loop(j, sink, v);
    default: /* objects without a text of their own */
        TP_TRY(tp_jsink_text(j, sink, "<"));
        TP_TRY(tp_jsink_text(j, sink, tp_jtype_name(v)));
        return tp_jsink_text(j, sink, ">");
    }
}

tp_status tp_jwrite_str(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v)
{
    if (v->type == TP_J_STRING) return tp_jsink_string(j, sink, v);
    return v->type == TP_J_UNDEFINED ? TP_OK : tp_jwrite_repr(j, sink, v);
}

tp_status tp_jstr(tp_jinja *j, const tp_jvalue *v, tp_jvalue *out)
{
    tp_jsink sink = {0};
    *out = *v;
    if (v->type == TP_J_STRING) return TP_OK;
    TP_TRY(tp_jwrite_str(j, &sink, v));
    return tp_jsink_value(j, &sink, out);
}

/* ---- HTML ---- */

tp_status tp_jescape(tp_jinja *j, const tp_jvalue *v, tp_jvalue *out)
{
    tp_jvalue text;
    tp_jsink sink = {0};
    TP_TRY(tp_jstr(j, v, &text));
    *out = text;
    if ((text.flags & TP_J_MARKUP) != 0) return TP_OK;
    for (size_t at = 0; at < text.len;) {
        size_t plain = at;
        while (plain < text.len && strchr("&<>\"'", text.text[plain]) == NULL) plain++;
        while (plain < text.len && text.text[plain] == '\0') plain++; /* strchr finds NUL, which is plain */
        if (plain > at) {
            tp_jvalue part = tp_jslice(&text, at, plain - at);
            TP_TRY(tp_jsink_string(j, &sink, &part));
            at = plain;
            continue;
        }
        char c = text.text[at];
        const char *entity = c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '"' ? "&#34;" : "&#39;";
        TP_TRY(tp_jsink_for(j, &sink, entity, strlen(entity), &text, at));
        at++;
    }
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = TP_J_MARKUP;
    return TP_OK;
}

/* ---- JSON ---- */

/* The escape of character c in a JSON string, or false if it stands for itself. */
static bool json_escape(uint32_t c, bool ensure_ascii, char out[16])
{
    const char *named = c == '"'    ? "\\\""
                        : c == '\\' ? "\\\\"
                        : c == '\n' ? "\\n"
                        : c == '\r' ? "\\r"
                        : c == '\t' ? "\\t"
                        : c == '\b' ? "\\b"
                        : c == '\f' ? "\\f"
                                    : NULL;
    if (named != NULL) {
        memcpy(out, named, 3);
        return true;
    }
    if (c >= 0x20 && (c < 0x7F || !ensure_ascii)) return false;
    if (c == 0x7F) return false;
    if (c < 0x10000)
        snprintf(out, 16, "\\u%04x", c);
    else
        snprintf(out, 16, "\\u%04x\\u%04x", 0xD800 + ((c - 0x10000) >> 10), 0xDC00 + ((c - 0x10000) & 0x3FF));
    return true;
}

static tp_status write_json_string(tp_jinja *j, tp_jsink *sink, const tp_jvalue *s, bool ensure_ascii)
{
    char escape[16];
    size_t plain = 0;
    TP_TRY(tp_jsink_text(j, sink, "\""));
    for (size_t at = 0; at < s->len;) {
        uint32_t c = 0;
        int n = tp_utf8_decode(s->text + at, s->len - at, &c);
        if (n <= 0) n = 1;
        if (json_escape(c, ensure_ascii, escape)) {
            tp_jvalue part = tp_jslice(s, plain, at - plain);
            TP_TRY(tp_jsink_string(j, sink, &part));
            TP_TRY(tp_jsink_for(j, sink, escape, strlen(escape), s, at));
            plain = at + (size_t)n;
        }
        at += (size_t)n;
    }
    tp_jvalue part = tp_jslice(s, plain, s->len - plain);
    TP_TRY(tp_jsink_string(j, sink, &part));
    return tp_jsink_text(j, sink, "\"");
}

static tp_status write_json_float(tp_jinja *j, tp_jsink *sink, double d)
{
    if (isnan(d)) return tp_jsink_text(j, sink, "NaN");
    if (isinf(d)) return tp_jsink_text(j, sink, d < 0 ? "-Infinity" : "Infinity");
    tp_jvalue v = tp_jfloat(d);
    return write_number(j, sink, &v);
}

static tp_status json_newline(tp_jinja *j, tp_jsink *sink, const tp_jjson_style *style, int level)
{
    if (!style->indented) return TP_OK;
    TP_TRY(tp_jsink_text(j, sink, "\n"));
    for (int i = 0; i < level; i++) TP_TRY(tp_jsink_bytes(j, sink, style->indent.data, style->indent.len));
    return TP_OK;
}

static tp_status write_json(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v, const tp_jjson_style *style, int level);

static tp_status write_json_list(tp_jinja *j, tp_jsink *sink, const tp_jlist *list, const tp_jjson_style *style, int level)
{
    if (list->n == 0) return tp_jsink_text(j, sink, "[]");
    TP_TRY(tp_jsink_text(j, sink, "["));
    for (size_t i = 0; i < list->n; i++) {
        if (i > 0) TP_TRY(tp_jsink_bytes(j, sink, style->comma.data, style->comma.len));
        TP_TRY(json_newline(j, sink, style, level + 1));
        TP_TRY(write_json(j, sink, &list->items[i], style, level + 1));
    }
    TP_TRY(json_newline(j, sink, style, level));
    return tp_jsink_text(j, sink, "]");
}

static tp_status write_json_key(tp_jinja *j, tp_jsink *sink, const tp_jvalue *key, const tp_jjson_style *style)
{
    if (key->type == TP_J_STRING) return write_json_string(j, sink, key, style->ensure_ascii);
    if (key->type != TP_J_NONE && !tp_jis_number(key))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "keys must be str, int, float, bool or None, not %s", tp_jtype_name(key));
    TP_TRY(tp_jsink_text(j, sink, "\""));
    TP_TRY(write_json(j, sink, key, style, 0));
    return tp_jsink_text(j, sink, "\"");
}

static tp_status sorted_pairs(tp_jinja *j, const tp_jdict *dict, const tp_jpair **pairs)
{
    tp_jvalue *keys = tp_jinja_alloc(j, dict->n, sizeof *keys), *positions = tp_jinja_alloc(j, dict->n, sizeof *positions);
    tp_jpair *sorted = tp_jinja_alloc(j, dict->n, sizeof *sorted);
    if (keys == NULL || positions == NULL || sorted == NULL) return j->status;
    for (size_t i = 0; i < dict->n; i++) {
        keys[i] = dict->pairs[i].key;
        positions[i] = tp_jinteger((tp_jint)i);
    }
    TP_TRY(tp_jsort(j, keys, positions, dict->n, false));
    for (size_t i = 0; i < dict->n; i++) sorted[i] = dict->pairs[(size_t)positions[i].integer];
    *pairs = sorted;
    return TP_OK;
}

static tp_status write_json_dict(tp_jinja *j, tp_jsink *sink, const tp_jdict *dict, const tp_jjson_style *style, int level)
{
    const tp_jpair *pairs = dict->pairs;
    if (dict->n == 0) return tp_jsink_text(j, sink, "{}");
    if (style->sort_keys) TP_TRY(sorted_pairs(j, dict, &pairs));
    TP_TRY(tp_jsink_text(j, sink, "{"));
    for (size_t i = 0; i < dict->n; i++) {
        if (i > 0) TP_TRY(tp_jsink_bytes(j, sink, style->comma.data, style->comma.len));
        TP_TRY(json_newline(j, sink, style, level + 1));
        TP_TRY(write_json_key(j, sink, &pairs[i].key, style));
        TP_TRY(tp_jsink_bytes(j, sink, style->colon.data, style->colon.len));
        TP_TRY(write_json(j, sink, &pairs[i].value, style, level + 1));
    }
    TP_TRY(json_newline(j, sink, style, level));
    return tp_jsink_text(j, sink, "}");
}

static tp_status write_json_container(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v, const tp_jjson_style *style, int level)
{
    size_t begin = sink->len;
    uint32_t source = v->type == TP_J_DICT ? v->dict->source : v->list->source;
    TP_TRY(tp_jinja_enter(j));
    if (source != 0) sink->muted++;
    tp_status st = v->type == TP_J_DICT ? write_json_dict(j, sink, v->dict, style, level)
                                        : write_json_list(j, sink, v->list, style, level);
    if (source != 0) sink->muted--;
    tp_jinja_leave(j);
    return st == TP_OK ? tp_jsink_mark(j, sink, begin, source) : st;
}

static tp_status write_json(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v, const tp_jjson_style *style, int level)
{
    TP_TRY(tp_jinja_charge(j, 1));
    switch (v->type) {
    case TP_J_NONE: return tp_jsink_text(j, sink, "null");
    case TP_J_BOOL: return tp_jsink_text(j, sink, v->truth ? "true" : "false");
    case TP_J_INT: return write_number(j, sink, v);
    case TP_J_FLOAT: return write_json_float(j, sink, v->real);
    case TP_J_STRING: return write_json_string(j, sink, v, style->ensure_ascii);
    case TP_J_LIST:
    case TP_J_TUPLE:
    case TP_J_DICT: return write_json_container(j, sink, v, style, level);
    default: return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "Object of type %s is not JSON serializable", tp_jtype_name(v));
    }
}

tp_status tp_jwrite_json(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v, const tp_jjson_style *style)
{
    return write_json(j, sink, v, style, 0);
}
