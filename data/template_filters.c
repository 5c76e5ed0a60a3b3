/* Filters over single values: text, numbers, defaults, JSON. Those over sequences are in template_sequence.c. */
#include "base/mem.h"
#include "data/template_object.h"
#include "data/template_text.h"
#include "data/template_unicode.h"

#include <math.h>
#include <stdio.h>

/* ---- text ---- */

static tp_status filter_string(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "string", args, "", 0, NULL));
    return tp_jstr(j, self, out);
}

static tp_status case_filter(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jcall *method, tp_jvalue *out)
{
    tp_jvalue text;
    TP_TRY(tp_jstr(j, self, &text));
    return method(j, &text, args, out);
}
static tp_status filter_upper(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_filter(j, self, args, tp_jmethod_upper, out);
}
static tp_status filter_lower(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_filter(j, self, args, tp_jmethod_lower, out);
}
static tp_status filter_capitalize(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_filter(j, self, args, tp_jmethod_capitalize, out);
}

static tp_status filter_center(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue text, width;
    TP_TRY(tp_jbind(j, "center", args, "width", 0, &width));
    if (width.type == TP_J_MISSING) width = tp_jinteger(80);
    const tp_jargs bound = {&width, 1, NULL, 0};
    TP_TRY(tp_jstr(j, self, &text));
    return tp_jmethod_center(j, &text, &bound, out);
}

/* Words begin behind blanks and ( { [ < -; str.title() would also break at apostrophes. */
static tp_status filter_title(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue text, part, mapped;
    tp_jsink sink = {0};
    TP_TRY(tp_jbind(j, "title", args, "", 0, NULL));
    TP_TRY(tp_jstr(j, self, &text));
    for (size_t at = 0; at < text.len;) {
        size_t first = tp_jchars_bytes(text.text + at, text.len - at, 1), end = at + first;
        part = tp_jslice(&text, at, first);
        TP_TRY(tp_jstring_case(j, &part, tp_jmethod_upper, &mapped));
        TP_TRY(tp_jsink_string(j, &sink, &mapped));
        bool separator = tp_jspace_at(part.text, part.len) > 0 || memchr("-({[<", *part.text, 5) != NULL;
        while (!separator && end < text.len && tp_jspace_at(text.text + end, text.len - end) == 0 &&
               memchr("-({[<", text.text[end], 5) == NULL)
            end += tp_jchars_bytes(text.text + end, text.len - end, 1);
        part = tp_jslice(&text, at + first, end - at - first);
        TP_TRY(tp_jstring_case(j, &part, tp_jmethod_lower, &mapped));
        TP_TRY(tp_jsink_string(j, &sink, &mapped));
        at = end;
    }
    return tp_jsink_value(j, &sink, out);
}

static tp_status filter_trim(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue text, chars;
    TP_TRY(tp_jbind(j, "trim", args, "chars", 0, &chars));
    TP_TRY(tp_jstr(j, self, &text));
    return tp_jstring_trim(j, &text, &chars, true, true, out);
}

static tp_status filter_replace(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3], text, old, new_text;
    tp_jint count;
    TP_TRY(tp_jbind(j, "replace", args, "old new count", 2, bound));
    TP_TRY(tp_jstr(j, self, &text));
    TP_TRY(tp_jstr(j, &bound[0], &old));
    TP_TRY(tp_jstr(j, &bound[1], &new_text));
    if (bound[2].type == TP_J_NONE) bound[2].type = TP_J_MISSING;
    TP_TRY(tp_jarg_int(j, &bound[2], -1, &count));
    if (!j->autoescape)
        text.flags = 0;
    else if (((old.flags | new_text.flags) & TP_J_MARKUP) != 0)
        TP_TRY(tp_jescape(j, &text, &text));
    return tp_jstring_replace(j, &text, &old, &new_text, count, out);
}

static tp_status filter_indent(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3], blanks = tp_jliteral(" "), width, indention, text, newline = tp_jliteral("\n"), lines;
    tp_jsink sink = {0};
    TP_TRY(tp_jbind(j, "indent", args, "width first blank", 0, bound));
    if (self->type == TP_J_LIST) return tp_jinja_fail(j, TP_TEMPLATE_ATTRIBUTE, "indent: a string is needed, not list");
    width = bound[0].type == TP_J_MISSING ? tp_jinteger(4) : bound[0];
    if (tp_jis_string(&width))
        indention = width;
    else
        TP_TRY(tp_jarithmetic(j, TP_T_MUL, &blanks, &width, &indention));
    TP_TRY(tp_jarithmetic(j, TP_T_ADD, self, &newline, &text)); /* a line end that splitting removes again */
    TP_TRY(tp_jstring_lines(j, &text, false, &lines));
    for (size_t i = 0; i < lines.list->n; i++) {
        const tp_jvalue *line = &lines.list->items[i];
        bool indented = i == 0 ? tp_jtruth(&bound[1]) : tp_jtruth(&bound[2]) || line->len > 0;
        if (i > 0) TP_TRY(tp_jsink_bytes(j, &sink, "\n", 1));
        if (indented) TP_TRY(tp_jsink_string(j, &sink, &indention));
        TP_TRY(tp_jsink_string(j, &sink, line));
    }
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = text.flags;
    return TP_OK;
}

static tp_status filter_truncate(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[4], end = tp_jliteral("..."), cut, parts;
    tp_jint length, leeway;
    TP_TRY(tp_jbind(j, "truncate", args, "length killwords end leeway", 0, bound));
    size_t size;
    TP_TRY(tp_jlength(j, self, &size));
    TP_TRY(tp_jarg_int(j, &bound[0], 255, &length));
    TP_TRY(tp_jarg_int(j, bound[3].type == TP_J_NONE ? &(tp_jvalue){0} : &bound[3], 5, &leeway));
    if (bound[2].type != TP_J_MISSING) end = bound[2];
    TP_TRY(tp_jarg_string(j, "truncate", &end));
    tp_jint n = (tp_jint)size, room = length - (tp_jint)tp_jchars(end.text, end.len);
    if (room < 0 || leeway < 0)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE,
                             "truncate: the length must reach for the end text, and the leeway must not be negative");
    *out = *self;
    if (n <= length || n - length <= leeway) return TP_OK;
    TP_TRY(tp_jarg_string(j, "truncate", self));
    cut = tp_jslice(self, 0, tp_jchars_bytes(self->text, self->len, (size_t)room));
    if (!tp_jtruth(&bound[1])) {
        const tp_jvalue by[2] = {tp_jliteral(" "), tp_jinteger(1)};
        const tp_jargs split = {by, 2, NULL, 0};
        TP_TRY(tp_jmethod_rsplit(j, &cut, &split, &parts));
        cut = parts.list->items[0];
    }
    return tp_jconcat(j, &cut, &end, out);
}

static tp_status filter_wordcount(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue text;
    tp_jint words = 0;
    bool inside = false;
    TP_TRY(tp_jbind(j, "wordcount", args, "", 0, NULL));
    TP_TRY(tp_jstr(j, self, &text));
    TP_TRY(tp_jinja_charge_bytes(j, 16 * text.len));
    for (size_t at = 0; at < text.len;) {
        bool word = tp_jword_at(text.text + at, text.len - at) > 0;
        words += word && !inside;
        inside = word;
        at += tp_jchars_bytes(text.text + at, text.len - at, 1);
    }
    *out = tp_jinteger(words);
    return TP_OK;
}

/* One line broken at blanks so that no piece is longer than `width` characters; longer words are cut if `cut`. Blanks at
 * breaks disappear, those inside a line stay. */
static tp_status wrap_line(tp_jinja *j, const tp_jvalue *line, size_t width, bool cut, const tp_jvalue *newline, tp_jsink *sink)
{
    size_t at = 0, pieces = 0;
    while (at < line->len) {
        size_t rest = line->len - at, end = tp_jchars_bytes(line->text + at, rest, width), next = at + end;
        if (end < rest && line->text[at + end] != ' ') {
            size_t blank = end;
            while (blank > 0 && line->text[at + blank - 1] != ' ') blank--;
            if (blank > 0)
                end = blank;
            else if (!cut)
                while (end < rest && line->text[at + end] != ' ') end++;
        }
        next = at + end;
        while (next < line->len && line->text[next] == ' ') next++;
        while (end > 0 && line->text[at + end - 1] == ' ' && next < line->len) end--;
        tp_jvalue piece = tp_jslice(line, at, end);
        if (pieces++ > 0) TP_TRY(tp_jsink_string(j, sink, newline));
        TP_TRY(tp_jsink_string(j, sink, &piece));
        at = next > at ? next : line->len;
    }
    return TP_OK;
}

static tp_status filter_wordwrap(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[4], newline = tp_jliteral("\n"), lines;
    tp_jint width;
    tp_jsink sink = {0};
    TP_TRY(tp_jbind(j, "wordwrap", args, "width break_long_words wrapstring break_on_hyphens", 0, bound));
    if (self->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, self);
    if (!tp_jis_string(self))
        return tp_jinja_fail(j, TP_TEMPLATE_ATTRIBUTE, "wordwrap: a string is needed, not %s", tp_jtype_name(self));
    TP_TRY(tp_jarg_int(j, &bound[0], 79, &width));
    if (width < 1 || width > 1000000)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "wordwrap: the width must lie between 1 and 1000000");
    if (tp_jgiven(&bound[2])) newline = bound[2];
    TP_TRY(tp_jarg_string(j, "wordwrap", &newline));
    TP_TRY(tp_jstring_lines(j, self, false, &lines));
    for (size_t i = 0; i < lines.list->n; i++) {
        if (i > 0) TP_TRY(tp_jsink_string(j, &sink, &newline));
        TP_TRY(wrap_line(j, &lines.list->items[i], (size_t)width, bound[1].type == TP_J_MISSING || tp_jtruth(&bound[1]),
                         &newline, &sink));
    }
    return tp_jsink_value(j, &sink, out);
}

static tp_status filter_format(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue text, values;
    TP_TRY(tp_jstr(j, self, &text));
    if (args->n_keywords == 0) {
        tp_jvector items = {0};
        for (size_t i = 0; i < args->n; i++) TP_TRY(tp_jpush(j, &items, &args->items[i]));
        TP_TRY(tp_jlist_new(j, TP_J_TUPLE, items.items, items.n, &values));
        return tp_jpercent(j, &text, &values, out);
    }
    if (args->n > 0)
        return tp_jinja_fail(j, TP_TEMPLATE_ARGUMENT, "can't handle positional and keyword arguments at the same time");
    TP_TRY(tp_jdict_new(j, TP_J_DICT, args->n_keywords, &values));
    for (size_t i = 0; i < args->n_keywords; i++) {
        tp_jvalue key = tp_jtext(args->keywords[i].name.data, args->keywords[i].name.len);
        TP_TRY(tp_jdict_set(j, values.dict, &key, &args->keywords[i].value));
    }
    return tp_jpercent(j, &text, &values, out);
}

/* ---- HTML and URLs ---- */

static tp_status filter_safe(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "safe", args, "", 0, NULL));
    TP_TRY(tp_jstr(j, self, out));
    out->flags = TP_J_MARKUP;
    return TP_OK;
}

static tp_status filter_escape(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "escape", args, "", 0, NULL));
    return tp_jescape(j, self, out);
}

static tp_status filter_forceescape(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue text;
    TP_TRY(tp_jbind(j, "forceescape", args, "", 0, NULL));
    TP_TRY(tp_jstr(j, self, &text));
    text.flags = 0;
    return tp_jescape(j, &text, out);
}

/* The character that an entity at s stands for, numeric or one of the five of XML; returns its length, 0 if it is none. */
static size_t read_entity(const char *s, size_t n, uint32_t *c)
{
    static const struct {
        const char *text;
        char c;
    } named[] = {{"&amp;", '&'}, {"&lt;", '<'}, {"&gt;", '>'}, {"&quot;", '"'}, {"&apos;", '\''}};
    for (size_t i = 0; i < sizeof named / sizeof named[0]; i++) {
        size_t len = strlen(named[i].text);
        *c = (unsigned char)named[i].c;
        if (n >= len && memcmp(s, named[i].text, len) == 0) return len;
    }
    const char *end = n > 3 && s[1] == '#' ? memchr(s, ';', n < 12 ? n : 12) : NULL;
    tp_jint code;
    if (end == NULL) return 0;
    bool hex = (s[2] | 32) == 'x';
    tp_span digits = {s + 2 + hex, (size_t)(end - s) - 2 - hex};
    if (!tp_jparse_int(digits, hex ? 16 : 10, &code) || code <= 0 || code > 0x10FFFF) return 0;
    *c = (uint32_t)code;
    return (size_t)(end - s) + 1;
}

/* Comments and tags removed, runs of whitespace made one blank, entities resolved. */
static tp_status filter_striptags(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue text, part;
    tp_jsink sink = {0};
    bool blank = false;
    TP_TRY(tp_jbind(j, "striptags", args, "", 0, NULL));
    TP_TRY(tp_jstr(j, self, &text));
    for (size_t at = 0; at < text.len;) {
        size_t rest = text.len - at;
        bool comment = rest >= 4 && memcmp(text.text + at, "<!--", 4) == 0;
        const char *close = text.text[at] != '<' ? NULL
                            : comment            ? memmem(text.text + at, rest, "-->", 3)
                                                 : memchr(text.text + at, '>', rest);
        int space = tp_jspace_at(text.text + at, rest);
        TP_TRY(tp_jinja_charge(j, close == NULL && text.text[at] == '<' ? rest / 64 + 1 : 1));
        if (close != NULL) {
            at = (size_t)(close - text.text) + (comment ? 3 : 1);
        } else if (space > 0) {
            blank = true;
            at += (size_t)space;
        } else {
            char resolved[4];
            uint32_t c;
            size_t n = *(text.text + at) == '&' ? read_entity(text.text + at, rest, &c) : 0;
            if (blank && sink.len > 0) TP_TRY(tp_jsink_bytes(j, &sink, " ", 1));
            blank = false;
            part = tp_jslice(&text, at, n > 0 ? n : tp_jchars_bytes(text.text + at, rest, 1));
            if (n > 0)
                TP_TRY(tp_jsink_for(j, &sink, resolved, (size_t)tp_utf8_encode(c, resolved), &text, at));
            else
                TP_TRY(tp_jsink_string(j, &sink, &part));
            at += part.len;
        }
    }
    return tp_jsink_value(j, &sink, out);
}

static tp_status quote_url(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v, bool query)
{
    tp_jvalue text;
    TP_TRY(tp_jstr(j, v, &text));
    for (size_t i = 0; i < text.len; i++) {
        unsigned char c = (unsigned char)text.text[i];
        char escape[8] = {(char)c, '\0'};
        bool plain = (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') ||
                     (c != '\0' && strchr("_.-~", c) != NULL) || (c == '/' && !query);
        if (query && c == ' ')
            escape[0] = '+';
        else if (!plain)
            snprintf(escape, sizeof escape, "%%%02X", c);
        TP_TRY(tp_jsink_for(j, sink, escape, strlen(escape), &text, i));
    }
    return TP_OK;
}

static tp_status filter_urlencode(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue view = *self, *pairs, *pair;
    tp_jsink sink = {0};
    size_t n, m;
    TP_TRY(tp_jbind(j, "urlencode", args, "", 0, NULL));
    if (tp_jis_string(self) || !tp_jiterable(self)) {
        TP_TRY(quote_url(j, &sink, self, false));
        return tp_jsink_value(j, &sink, out);
    }
    if (self->type == TP_J_DICT) {
        view.type = TP_J_VIEW;
        view.flags = TP_J_ITEMS;
    }
    TP_TRY(tp_jitems(j, &view, &pairs, &n));
    for (size_t i = 0; i < n; i++) {
        TP_TRY(tp_jitems(j, &pairs[i], &pair, &m));
        if (m != 2) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "urlencode: pairs are needed");
        if (i > 0) TP_TRY(tp_jsink_bytes(j, &sink, "&", 1));
        TP_TRY(quote_url(j, &sink, &pair[0], true));
        TP_TRY(tp_jsink_bytes(j, &sink, "=", 1));
        TP_TRY(quote_url(j, &sink, &pair[1], true));
    }
    return tp_jsink_value(j, &sink, out);
}

static tp_status filter_xmlattr(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue autospace, text;
    tp_jsink sink = {0};
    TP_TRY(tp_jbind(j, "xmlattr", args, "autospace", 0, &autospace));
    if (self->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, self);
    if (self->type != TP_J_DICT)
        return tp_jinja_fail(j, TP_TEMPLATE_ATTRIBUTE, "xmlattr: a mapping is needed, not %s", tp_jtype_name(self));
    for (size_t i = 0; i < self->dict->n; i++) {
        const tp_jpair *pair = &self->dict->pairs[i];
        if (pair->value.type == TP_J_NONE || pair->value.type == TP_J_UNDEFINED) continue;
        TP_TRY(tp_jarg_string(j, "xmlattr", &pair->key));
        for (size_t k = 0; k < pair->key.len; k++)
            if (memchr(" \t\n\r\f\v/>=", pair->key.text[k], 9) != NULL)
                return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "invalid character in attribute name");
        if (sink.len > 0 || autospace.type == TP_J_MISSING || tp_jtruth(&autospace)) TP_TRY(tp_jsink_bytes(j, &sink, " ", 1));
        TP_TRY(tp_jescape(j, &pair->key, &text));
        TP_TRY(tp_jsink_string(j, &sink, &text));
        TP_TRY(tp_jsink_text(j, &sink, "=\""));
        TP_TRY(tp_jescape(j, &pair->value, &text));
        TP_TRY(tp_jsink_string(j, &sink, &text));
        TP_TRY(tp_jsink_text(j, &sink, "\""));
    }
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = j->autoescape ? TP_J_MARKUP : 0;
    return TP_OK;
}

/* ---- numbers ---- */

static tp_status filter_abs(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "abs", args, "", 0, NULL));
    if (self->type == TP_J_UNDEFINED || !tp_jis_number(self))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "bad operand type for abs(): '%s'", tp_jtype_name(self));
    return tp_jnegate(j, self, self->type == TP_J_FLOAT ? signbit(self->real) != 0 : tp_jint_of(self) < 0, out);
}

/* int(float(v)), or false where Python raises. */
static bool float_to_int(double d, tp_jint *out)
{
    if (!(fabs(d) < 0x1p126)) return false;
    *out = (tp_jint)d;
    return true;
}

static bool has_only_digits(tp_span s)
{
    for (size_t i = 0; i < s.len; i++)
        if (s.data[i] < '0' || s.data[i] > '9') return false;
    return s.len > 30;
}

static tp_status filter_int(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2];
    tp_jint base, value = 0;
    double d;
    TP_TRY(tp_jbind(j, "int", args, "default base", 0, bound));
    TP_TRY(tp_jarg_int(j, &bound[1], 10, &base));
    if (self->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, self);
    bool good = false;
    if (tp_jis_int(self)) {
        value = tp_jint_of(self);
        good = true;
    } else if (self->type == TP_J_FLOAT) {
        good = float_to_int(self->real, &value);
    } else if (tp_jis_string(self)) {
        bool legal = base == 0 || (base >= 2 && base <= 36);
        good = legal && tp_jparse_int(tp_jspan(self), (int)base, &value);
        if (!good && legal && has_only_digits(tp_jspan(self)))
            return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "an integer needs more than 128 bits");
        if (!good) good = tp_jparse_float(tp_jspan(self), &d) && float_to_int(d, &value);
    }
    *out = good ? tp_jinteger(value) : bound[0].type == TP_J_MISSING ? tp_jinteger(0) : bound[0];
    return TP_OK;
}

static tp_status filter_float(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue otherwise;
    double d;
    TP_TRY(tp_jbind(j, "float", args, "default", 0, &otherwise));
    if (self->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, self);
    *out = otherwise.type == TP_J_MISSING ? tp_jfloat(0) : otherwise;
    if (tp_jis_number(self)) *out = tp_jfloat(tp_jdouble_of(self));
    if (tp_jis_string(self) && tp_jparse_float(tp_jspan(self), &d)) *out = tp_jfloat(d);
    return TP_OK;
}

static tp_status filter_round(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], ten = tp_jinteger(10), digits, power, scaled, whole;
    tp_jint precision;
    TP_TRY(tp_jbind(j, "round", args, "precision method", 0, bound));
    TP_TRY(tp_jarg_int(j, &bound[0], 0, &precision));
    tp_span method =
        tp_jis_string(&bound[1]) ? tp_jspan(&bound[1]) : tp_span_of(bound[1].type == TP_J_MISSING ? "common" : "?");
    if (tp_span_is(method, "common")) return tp_jround(j, self, &precision, out);
    bool up = tp_span_is(method, "ceil");
    if (!up && !tp_span_is(method, "floor"))
        return tp_jinja_fail(j, TP_TEMPLATE_ARGUMENT, "method must be common, ceil or floor");
    digits = tp_jinteger(precision);
    TP_TRY(tp_jarithmetic(j, TP_T_POW, &ten, &digits, &power));
    TP_TRY(tp_jarithmetic(j, TP_T_MUL, self, &power, &scaled));
    whole = scaled;
    if (scaled.type == TP_J_FLOAT) {
        double rounded = up ? ceil(scaled.real) : floor(scaled.real);
        if (!(fabs(rounded) < 0x1p126))
            return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "cannot convert float infinity or NaN to integer");
        whole = tp_jinteger((tp_jint)rounded);
    }
    if (!tp_jis_number(&whole)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "must be real number, not %s", tp_jtype_name(self));
    return tp_jarithmetic(j, TP_T_DIV, &whole, &power, out);
}

static tp_status filter_filesizeformat(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    static const char prefixes[] = "kMGTPEZY";
    tp_jvalue binary;
    char text[64];
    double bytes;
    TP_TRY(tp_jbind(j, "filesizeformat", args, "binary", 0, &binary));
    if (self->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, self);
    if (tp_jis_number(self))
        bytes = tp_jdouble_of(self);
    else if (!tp_jis_string(self))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "filesizeformat: a number is needed, not %s", tp_jtype_name(self));
    else if (!tp_jparse_float(tp_jspan(self), &bytes))
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "filesizeformat: a number is needed");
    double base = tp_jtruth(&binary) ? 1024 : 1000, unit = base;
    if (bytes < base) {
        snprintf(text, sizeof text, bytes == 1 ? "%.0f Byte" : "%.0f Bytes", trunc(bytes));
        return tp_jstring_copy(j, text, strlen(text), out);
    }
    int i = 0;
    for (; i < 7 && bytes >= unit * base; i++) unit *= base;
    char prefix = tp_jtruth(&binary) && i == 0 ? 'K' : prefixes[i];
    snprintf(text, sizeof text, "%.1f %c%sB", bytes / unit, prefix, tp_jtruth(&binary) ? "i" : "");
    return tp_jstring_copy(j, text, strlen(text), out);
}

/* ---- values ---- */

static tp_status filter_default(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2];
    TP_TRY(tp_jbind(j, "default", args, "default_value boolean", 0, bound));
    bool missing = self->type == TP_J_UNDEFINED || (tp_jtruth(&bound[1]) && !tp_jtruth(self));
    *out = !missing ? *self : bound[0].type == TP_J_MISSING ? tp_jliteral("") : bound[0];
    return TP_OK;
}

/* Only what is an attribute in Python: items of a dict are not reached by it. */
static tp_status filter_attr(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue name, bare = *self;
    tp_jdict empty = {0};
    TP_TRY(tp_jbind(j, "attr", args, "name", 1, &name));
    TP_TRY(tp_jarg_string(j, "attr", &name));
    TP_TRY(tp_jgetattr(j, self, tp_jspan(&name), out));
    if (self->type != TP_J_DICT) return TP_OK;
    bare.dict = &empty; /* what an empty dict has too is an attribute */
    tp_jvalue attribute;
    TP_TRY(tp_jgetattr(j, &bare, tp_jspan(&name), &attribute));
    if (attribute.type == TP_J_UNDEFINED) *out = attribute;
    return TP_OK;
}

static tp_status filter_pprint(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jsink sink = {0};
    TP_TRY(tp_jbind(j, "pprint", args, "", 0, NULL));
    TP_TRY(tp_jwrite_repr(j, &sink, self));
    return tp_jsink_value(j, &sink, out);
}

/* One level of indentation: a string, or a number of blanks. */
static tp_status json_indent(tp_jinja *j, const tp_jvalue *indent, tp_jjson_style *style)
{
    tp_jvalue blank = tp_jliteral(" "), text = *indent;
    if (!tp_jgiven(indent)) return TP_OK;
    if (!tp_jis_string(indent)) TP_TRY(tp_jarithmetic(j, TP_T_MUL, &blank, indent, &text));
    style->indented = true;
    style->indent = tp_jspan(&text);
    style->comma = tp_span_of(",");
    return TP_OK;
}

static tp_status filter_tojson(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[4], *parts;
    tp_jsink sink = {0};
    size_t n;
    tp_jjson_style style = {.comma = tp_span_of(", "), .colon = tp_span_of(": ")};
    TP_TRY(tp_jbind(j, "tojson", args, "ensure_ascii indent separators sort_keys", 0, bound));
    style.ensure_ascii = tp_jtruth(&bound[0]);
    style.sort_keys = tp_jtruth(&bound[3]);
    TP_TRY(json_indent(j, &bound[1], &style));
    if (tp_jgiven(&bound[2])) {
        TP_TRY(tp_jitems(j, &bound[2], &parts, &n));
        if (n != 2 || !tp_jis_string(&parts[0]) || !tp_jis_string(&parts[1]))
            return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "tojson: separators are a pair of strings");
        style.comma = tp_jspan(&parts[0]);
        style.colon = tp_jspan(&parts[1]);
    }
    TP_TRY(tp_jwrite_json(j, &sink, self, &style));
    return tp_jsink_value(j, &sink, out);
}

const tp_jbuiltin *tp_jfind_filter(tp_span name)
{
    static const tp_jbuiltin filters[] = {
        {"abs", filter_abs},
        {"attr", filter_attr},
        {"capitalize", filter_capitalize},
        {"center", filter_center},
        {"d", filter_default},
        {"default", filter_default},
        {"e", filter_escape},
        {"escape", filter_escape},
        {"filesizeformat", filter_filesizeformat},
        {"float", filter_float},
        {"forceescape", filter_forceescape},
        {"format", filter_format},
        {"indent", filter_indent},
        {"int", filter_int},
        {"lower", filter_lower},
        {"pprint", filter_pprint},
        {"replace", filter_replace},
        {"round", filter_round},
        {"safe", filter_safe},
        {"string", filter_string},
        {"striptags", filter_striptags},
        {"title", filter_title},
        {"tojson", filter_tojson},
        {"trim", filter_trim},
        {"truncate", filter_truncate},
        {"upper", filter_upper},
        {"urlencode", filter_urlencode},
        {"wordcount", filter_wordcount},
        {"wordwrap", filter_wordwrap},
        {"xmlattr", filter_xmlattr},
        {NULL, NULL},
    };
    const tp_jbuiltin *found = tp_jfind_builtin(filters, name);
    return found != NULL ? found : tp_jfind_builtin(tp_jsequence_filters, name);
}
