/* The methods of str that make new text; those that answer questions are in template_search.c. Results are slices of the text
 * where they can be and written through a sink where they cannot, so that origin survives both. Positions in arguments and
 * results count characters, as in Python. */
#include "data/template_object.h"
#include "data/template_text.h"
#include "data/template_unicode.h"

tp_status tp_jarg_int(tp_jinja *j, const tp_jvalue *v, tp_jint otherwise, tp_jint *out)
{
    *out = otherwise;
    if (v->type == TP_J_MISSING) return TP_OK;
    if (v->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, v);
    if (!tp_jis_int(v))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'%s' object cannot be interpreted as an integer", tp_jtype_name(v));
    *out = tp_jint_of(v);
    return TP_OK;
}

tp_status tp_jarg_string(tp_jinja *j, const char *what, const tp_jvalue *v)
{
    if (tp_jis_string(v)) return TP_OK;
    return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%s: a string is needed, not %s", what, tp_jtype_name(v));
}

/* ---- strip ---- */

static bool in_set(tp_span set, const char *c, size_t n)
{
    return memmem(set.data, set.len, c, n) != NULL; /* a whole character is found only at a character's start */
}

tp_status tp_jstring_trim(tp_jinja *j, const tp_jvalue *s, const tp_jvalue *chars, bool left, bool right, tp_jvalue *out)
{
    size_t from = 0, to = s->len;
    TP_TRY(tp_jinja_charge_bytes(j, s->len));
    if (!tp_jgiven(chars)) {
        if (left) from = tp_jlstrip_len(s->text, s->len);
        if (right) to = from + tp_jrstrip_len(s->text + from, s->len - from);
        *out = tp_jslice(s, from, to - from);
        return TP_OK;
    }
    TP_TRY(tp_jarg_string(j, "strip", chars));
    while (left && from < to) {
        size_t n = tp_jchars_bytes(s->text + from, to - from, 1);
        if (!in_set(tp_jspan(chars), s->text + from, n)) break;
        from += n;
    }
    while (right && to > from) {
        size_t start = to - 1;
        while (start > from && ((unsigned char)s->text[start] & 0xC0) == 0x80) start--;
        if (!in_set(tp_jspan(chars), s->text + start, to - start)) break;
        to = start;
    }
    *out = tp_jslice(s, from, to - from);
    return TP_OK;
}

static tp_status strip_method(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool left, bool right, tp_jvalue *out)
{
    tp_jvalue chars;
    TP_TRY(tp_jbind(j, "strip", args, "chars /", 0, &chars));
    return tp_jstring_trim(j, self, &chars, left, right, out);
}
static tp_status str_strip(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return strip_method(j, self, args, true, true, out);
}
static tp_status str_lstrip(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return strip_method(j, self, args, true, false, out);
}
static tp_status str_rstrip(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return strip_method(j, self, args, false, true, out);
}

/* ---- case ---- */

/* Maps the characters of s; `choose` picks the mapping from the character and whether a cased one stands before it. */
typedef tp_jcase case_chooser(uint32_t c, size_t index, bool after_cased);

static tp_status map_case(tp_jinja *j, const tp_jvalue *s, case_chooser *choose, tp_jvalue *out)
{
    tp_jsink sink = {0};
    bool after_cased = false;
    size_t index = 0;
    TP_TRY(tp_jinja_charge_bytes(j, 4 * s->len));
    for (size_t at = 0; at < s->len; index++) {
        uint32_t c = 0;
        char mapped[TP_J_CASE_BYTES];
        int n = tp_utf8_decode(s->text + at, s->len - at, &c);
        if (n <= 0) n = 1;
        tp_jcase to = choose(c, index, after_cased);
        size_t len = tp_jmap_case(c, to, mapped);
        if (c == 0x3A3 && to == TP_J_LOWER) len = (size_t)tp_utf8_encode(tp_jfinal_sigma(s->text, s->len, at), mapped);
        TP_TRY(tp_jsink_for(j, &sink, mapped, len, s, at));
        after_cased = tp_jis_upper_char(c) || tp_jis_lower_char(c) || tp_jis_title_char(c);
        at += (size_t)n;
    }
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = s->flags;
    return TP_OK;
}

static tp_jcase choose_upper(uint32_t c, size_t index, bool after_cased)
{
    (void)c, (void)index, (void)after_cased;
    return TP_J_UPPER;
}
static tp_jcase choose_lower(uint32_t c, size_t index, bool after_cased)
{
    (void)c, (void)index, (void)after_cased;
    return TP_J_LOWER;
}
static tp_jcase choose_fold(uint32_t c, size_t index, bool after_cased)
{
    (void)c, (void)index, (void)after_cased;
    return TP_J_FOLD;
}
static tp_jcase choose_capital(uint32_t c, size_t index, bool after_cased)
{
    (void)c, (void)after_cased;
    return index == 0 ? TP_J_TITLE : TP_J_LOWER;
}
static tp_jcase choose_title(uint32_t c, size_t index, bool after_cased)
{
    (void)c, (void)index;
    return after_cased ? TP_J_LOWER : TP_J_TITLE;
}
static tp_jcase choose_swapped(uint32_t c, size_t index, bool after_cased)
{
    (void)index, (void)after_cased;
    return tp_jis_upper_char(c) ? TP_J_LOWER : TP_J_UPPER;
}

static tp_status case_method(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, case_chooser *choose, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "a case method", args, "", 0, NULL));
    return map_case(j, self, choose, out);
}
tp_status tp_jmethod_upper(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_method(j, self, args, choose_upper, out);
}
tp_status tp_jmethod_lower(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_method(j, self, args, choose_lower, out);
}
tp_status tp_jmethod_capitalize(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_method(j, self, args, choose_capital, out);
}
tp_status tp_jmethod_title(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_method(j, self, args, choose_title, out);
}
static tp_status str_casefold(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_method(j, self, args, choose_fold, out);
}
static tp_status str_swapcase(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_method(j, self, args, choose_swapped, out);
}

tp_status tp_jstring_case(tp_jinja *j, const tp_jvalue *s, tp_jcall *method, tp_jvalue *out)
{
    const tp_jargs none = {0};
    return method(j, s, &none, out);
}

tp_status tp_jstring_reverse(tp_jinja *j, const tp_jvalue *s, tp_jvalue *out)
{
    tp_jsink sink = {0};
    for (size_t end = s->len; end > 0;) {
        size_t start = end - 1;
        while (start > 0 && ((unsigned char)s->text[start] & 0xC0) == 0x80) start--;
        tp_jvalue c = tp_jslice(s, start, end - start);
        TP_TRY(tp_jinja_charge(j, 1));
        TP_TRY(tp_jsink_string(j, &sink, &c));
        end = start;
    }
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = s->flags;
    return TP_OK;
}

/* ---- splitting and joining ---- */

static tp_status push_slice(tp_jinja *j, tp_jvector *parts, const tp_jvalue *s, size_t from, size_t to)
{
    tp_jvalue part = tp_jslice(s, from, to - from);
    return tp_jpush(j, parts, &part);
}

static tp_status split_space(tp_jinja *j, const tp_jvalue *s, tp_jint max, tp_jvector *parts)
{
    size_t at = tp_jlstrip_len(s->text, s->len);
    while (at < s->len) {
        if (max >= 0 && (tp_jint)parts->n >= max)
            return push_slice(j, parts, s, at, at + tp_jrstrip_len(s->text + at, s->len - at));
        size_t end = at;
        while (end < s->len && tp_jspace_at(s->text + end, s->len - end) == 0)
            end += tp_jchars_bytes(s->text + end, s->len - end, 1);
        TP_TRY(push_slice(j, parts, s, at, end));
        at = end + tp_jlstrip_len(s->text + end, s->len - end);
    }
    return TP_OK;
}

static tp_status split_text(tp_jinja *j, const tp_jvalue *s, const tp_jvalue *sep, tp_jint max, tp_jvector *parts)
{
    size_t at = 0;
    while (max < 0 || (tp_jint)parts->n < max) {
        const char *hit = memmem(s->text + at, s->len - at, sep->text, sep->len);
        if (hit == NULL) break;
        size_t end = (size_t)(hit - s->text);
        TP_TRY(push_slice(j, parts, s, at, end));
        at = end + sep->len;
    }
    return push_slice(j, parts, s, at, s->len);
}

/* The parts come out last first. */
static tp_status rsplit_text(tp_jinja *j, const tp_jvalue *s, const tp_jvalue *sep, tp_jint max, tp_jvector *parts)
{
    size_t end = s->len;
    while (max < 0 || (tp_jint)parts->n < max) {
        const char *hit = tp_jfind_last(s->text, end, sep);
        if (hit == NULL) break;
        size_t at = (size_t)(hit - s->text);
        TP_TRY(push_slice(j, parts, s, at + sep->len, end));
        end = at;
    }
    return push_slice(j, parts, s, 0, end);
}

static tp_status rsplit_space(tp_jinja *j, const tp_jvalue *s, tp_jint max, tp_jvector *parts)
{
    size_t end = tp_jrstrip_len(s->text, s->len);
    while (end > 0) {
        size_t at = end;
        if (max >= 0 && (tp_jint)parts->n >= max) return push_slice(j, parts, s, tp_jlstrip_len(s->text, end), end);
        while (at > 0) {
            size_t start = at - 1;
            while (start > 0 && ((unsigned char)s->text[start] & 0xC0) == 0x80) start--;
            if (tp_jspace_at(s->text + start, s->len - start) > 0) break;
            at = start;
        }
        TP_TRY(push_slice(j, parts, s, at, end));
        end = tp_jrstrip_len(s->text, at);
    }
    return TP_OK;
}

static tp_status split_method(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool right, tp_jvalue *out)
{
    tp_jvalue bound[2];
    tp_jint max;
    tp_jvector parts = {0};
    TP_TRY(tp_jbind(j, "split", args, "sep maxsplit", 0, bound));
    TP_TRY(tp_jarg_int(j, &bound[1], -1, &max));
    TP_TRY(tp_jinja_charge_bytes(j, self->len));
    if (!tp_jgiven(&bound[0])) {
        TP_TRY(right ? rsplit_space(j, self, max, &parts) : split_space(j, self, max, &parts));
    } else {
        TP_TRY(tp_jarg_string(j, "split", &bound[0]));
        if (bound[0].len == 0) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "empty separator");
        if (right) TP_TRY(tp_jcharge_backwards(j, self->len, bound[0].len));
        TP_TRY(right ? rsplit_text(j, self, &bound[0], max, &parts) : split_text(j, self, &bound[0], max, &parts));
    }
    for (size_t i = 0; right && i < parts.n / 2; i++) {
        tp_jvalue swap = parts.items[i];
        parts.items[i] = parts.items[parts.n - 1 - i];
        parts.items[parts.n - 1 - i] = swap;
    }
    return tp_jlist_new(j, TP_J_LIST, parts.items, parts.n, out);
}
static tp_status str_split(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return split_method(j, self, args, false, out);
}
tp_status tp_jmethod_rsplit(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return split_method(j, self, args, true, out);
}

static bool is_line_end(uint32_t c)
{
    return (c >= 10 && c <= 13) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
}

tp_status tp_jstring_lines(tp_jinja *j, const tp_jvalue *s, bool keep_ends, tp_jvalue *out)
{
    tp_jvector lines = {0};
    size_t begin = 0;
    TP_TRY(tp_jinja_charge_bytes(j, s->len));
    for (size_t at = 0; at < s->len;) {
        uint32_t c = 0;
        int n = tp_utf8_decode(s->text + at, s->len - at, &c);
        size_t next = at + (size_t)(n > 0 ? n : 1);
        if (is_line_end(c)) {
            if (c == '\r' && next < s->len && s->text[next] == '\n') next++;
            TP_TRY(push_slice(j, &lines, s, begin, keep_ends ? next : at));
            begin = next;
        }
        at = next;
    }
    if (begin < s->len) TP_TRY(push_slice(j, &lines, s, begin, s->len));
    return tp_jlist_new(j, TP_J_LIST, lines.items, lines.n, out);
}

static tp_status str_splitlines(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound;
    tp_jint keep;
    TP_TRY(tp_jbind(j, "splitlines", args, "keepends", 0, &bound));
    TP_TRY(tp_jarg_int(j, &bound, 0, &keep));
    return tp_jstring_lines(j, self, keep != 0, out);
}

static tp_status partition_method(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool right, tp_jvalue *out)
{
    tp_jvalue sep, *items = tp_jinja_alloc(j, 3, sizeof *items);
    if (items == NULL) return j->status;
    TP_TRY(tp_jbind(j, "partition", args, "sep /", 1, &sep));
    TP_TRY(tp_jarg_string(j, "partition", &sep));
    if (sep.len == 0) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "empty separator");
    TP_TRY(tp_jcharge_backwards(j, self->len, right ? sep.len : 0));
    const char *hit = right ? tp_jfind_last(self->text, self->len, &sep) : memmem(self->text, self->len, sep.text, sep.len);
    size_t at = hit != NULL ? (size_t)(hit - self->text) : right ? 0 : self->len, n = hit != NULL ? sep.len : 0;
    items[0] = tp_jslice(self, 0, at);
    items[1] = tp_jslice(self, at, n);
    items[2] = tp_jslice(self, at + n, self->len - at - n);
    return tp_jlist_new(j, TP_J_TUPLE, items, 3, out);
}
static tp_status str_partition(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return partition_method(j, self, args, false, out);
}
static tp_status str_rpartition(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return partition_method(j, self, args, true, out);
}

tp_status tp_jstring_join(tp_jinja *j, const tp_jvalue *separator, const tp_jvalue *items, size_t n, tp_jvalue *out)
{
    tp_jsink sink = {0};
    for (size_t i = 0; i < n; i++) {
        TP_TRY(tp_jinja_charge(j, 1));
        if (i > 0) TP_TRY(tp_jsink_string(j, &sink, separator));
        TP_TRY(tp_jsink_string(j, &sink, &items[i]));
    }
    return tp_jsink_value(j, &sink, out);
}

static tp_status str_join(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue iterable, *items, *texts;
    size_t n;
    TP_TRY(tp_jbind(j, "join", args, "iterable /", 1, &iterable));
    TP_TRY(tp_jitems(j, &iterable, &items, &n));
    texts = tp_jinja_alloc(j, n, sizeof *texts);
    if (texts == NULL) return j->status;
    for (size_t i = 0; i < n; i++) {
        texts[i] = items[i];
        if (!tp_jis_string(&items[i]))
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "sequence item %zu: expected str instance, %s found", i,
                                 tp_jtype_name(&items[i]));
        if ((self->flags & TP_J_MARKUP) != 0) TP_TRY(tp_jescape(j, &items[i], &texts[i]));
    }
    TP_TRY(tp_jstring_join(j, self, texts, n, out));
    out->flags = self->flags;
    return TP_OK;
}

/* ---- replacing ---- */

tp_status tp_jstring_replace(tp_jinja *j, const tp_jvalue *s, const tp_jvalue *old, const tp_jvalue *new_text, tp_jint count,
                             tp_jvalue *out)
{
    tp_jsink sink = {0};
    size_t at = 0;
    TP_TRY(tp_jinja_charge_bytes(j, s->len));
    for (tp_jint done = 0; count < 0 || done < count; done++) {
        const char *hit = at <= s->len ? memmem(s->text + at, s->len - at, old->text, old->len) : NULL;
        if (hit == NULL) break;
        size_t end = (size_t)(hit - s->text);
        TP_TRY(tp_jinja_charge(j, 1));
        tp_jvalue part = tp_jslice(s, at, end - at);
        TP_TRY(tp_jsink_string(j, &sink, &part));
        TP_TRY(tp_jsink_string(j, &sink, new_text));
        at = end + old->len;
        if (old->len > 0) continue;
        if (at == s->len) { /* an empty text is found before every character and at the end */
            at = s->len;
            break;
        }
        size_t n = tp_jchars_bytes(s->text + at, s->len - at, 1);
        part = tp_jslice(s, at, n);
        TP_TRY(tp_jsink_string(j, &sink, &part));
        at += n;
    }
    tp_jvalue rest = tp_jslice(s, at, s->len - at);
    TP_TRY(tp_jsink_string(j, &sink, &rest));
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = s->flags;
    return TP_OK;
}

static tp_status str_replace(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3];
    tp_jint count;
    TP_TRY(tp_jbind(j, "replace", args, "old new / count", 2, bound));
    TP_TRY(tp_jarg_string(j, "replace", &bound[0]));
    TP_TRY(tp_jarg_string(j, "replace", &bound[1]));
    TP_TRY(tp_jarg_int(j, &bound[2], -1, &count));
    if ((self->flags & TP_J_MARKUP) != 0) {
        tp_jvalue unsafe = bound[1];
        TP_TRY(tp_jescape(j, &unsafe, &bound[1]));
    }
    return tp_jstring_replace(j, self, &bound[0], &bound[1], count, out);
}

static tp_status affix_method(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool suffix, tp_jvalue *out)
{
    tp_jvalue affix;
    TP_TRY(tp_jbind(j, "removeprefix", args, "affix /", 1, &affix));
    TP_TRY(tp_jarg_string(j, "removeprefix", &affix));
    size_t at = suffix ? self->len - affix.len : 0;
    *out = *self;
    if (affix.len > self->len || affix.len == 0 || memcmp(self->text + at, affix.text, affix.len) != 0) return TP_OK;
    *out = tp_jslice(self, suffix ? 0 : affix.len, self->len - affix.len);
    return TP_OK;
}
static tp_status str_removeprefix(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return affix_method(j, self, args, false, out);
}
static tp_status str_removesuffix(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return affix_method(j, self, args, true, out);
}

/* ---- filling up ---- */

static tp_status fill(tp_jinja *j, const tp_jvalue *self, tp_jint before, tp_jint after, tp_span with, tp_jvalue *out)
{
    tp_jsink sink = {0};
    if (before > (tp_jint)j->max_output || after > (tp_jint)j->max_output)
        return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "a field is too wide");
    for (tp_jint i = 0; i < before; i++) TP_TRY(tp_jsink_bytes(j, &sink, with.data, with.len));
    TP_TRY(tp_jsink_string(j, &sink, self));
    for (tp_jint i = 0; i < after; i++) TP_TRY(tp_jsink_bytes(j, &sink, with.data, with.len));
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = self->flags;
    return TP_OK;
}

/* mode: '<' text first, '>' text last, '^' centred. */
static tp_status justify(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, char mode, tp_jvalue *out)
{
    tp_jvalue bound[2];
    tp_jint width, n = (tp_jint)tp_jchars(self->text, self->len);
    tp_span with = {" ", 1};
    TP_TRY(tp_jbind(j, "ljust", args, "width fillchar /", 1, bound));
    TP_TRY(tp_jarg_int(j, &bound[0], 0, &width));
    if (bound[1].type != TP_J_MISSING) {
        TP_TRY(tp_jarg_string(j, "ljust", &bound[1]));
        if (tp_jchars(bound[1].text, bound[1].len) != 1)
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "the fill character must be exactly one character long");
        with = tp_jspan(&bound[1]);
    }
    tp_jint missing = width > n ? width - n : 0;
    tp_jint left = mode == '<' ? 0 : mode == '>' ? missing : missing / 2 + (missing & width & 1); /* Python's way to centre */
    return fill(j, self, left, missing - left, with, out);
}
static tp_status str_ljust(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return justify(j, self, args, '<', out);
}
static tp_status str_rjust(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return justify(j, self, args, '>', out);
}
tp_status tp_jmethod_center(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return justify(j, self, args, '^', out);
}

static tp_status str_zfill(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound, digits, sign, filled;
    tp_jint width, n = (tp_jint)tp_jchars(self->text, self->len);
    TP_TRY(tp_jbind(j, "zfill", args, "width /", 1, &bound));
    TP_TRY(tp_jarg_int(j, &bound, 0, &width));
    bool has_sign = self->len > 0 && (self->text[0] == '-' || self->text[0] == '+');
    sign = tp_jslice(self, 0, has_sign);
    digits = tp_jslice(self, has_sign, self->len - has_sign);
    TP_TRY(fill(j, &digits, width > n ? width - n : 0, 0, tp_span_of("0"), &filled));
    return tp_jconcat(j, &sign, &filled, out);
}

static tp_status str_expandtabs(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound;
    tp_jint size, column = 0;
    tp_jsink sink = {0};
    TP_TRY(tp_jbind(j, "expandtabs", args, "tabsize", 0, &bound));
    TP_TRY(tp_jarg_int(j, &bound, 8, &size));
    for (size_t at = 0; at < self->len;) {
        size_t n = tp_jchars_bytes(self->text + at, self->len - at, 1);
        tp_jvalue c = tp_jslice(self, at, n);
        if (*c.text != '\t') TP_TRY(tp_jsink_string(j, &sink, &c));
        for (tp_jint i = *c.text == '\t' && size > 0 ? size - column % size : 0; i > 0; i--, column++)
            TP_TRY(tp_jsink_bytes(j, &sink, " ", 1));
        if (*c.text != '\t') column = *c.text == '\n' || *c.text == '\r' ? 0 : column + 1;
        at += n;
    }
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = self->flags;
    return TP_OK;
}

/* ---- the rest ---- */

static tp_status str_encode(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2];
    TP_TRY(tp_jbind(j, "encode", args, "encoding errors", 0, bound));
    if (bound[0].type != TP_J_MISSING) {
        TP_TRY(tp_jarg_string(j, "encode", &bound[0]));
        tp_span name = tp_jspan(&bound[0]);
        if (!tp_span_is(name, "utf-8") && !tp_span_is(name, "utf8") && !tp_span_is(name, "UTF-8"))
            return tp_jinja_fail(j, TP_TEMPLATE_LOOKUP, "unknown encoding: %.*s (only utf-8 is there)", (int)name.len,
                                 name.data);
    }
    *out = tp_jtext(self->text, self->len);
    out->type = TP_J_BYTES;
    return TP_OK;
}

static tp_status str_format(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return tp_jformat(j, self, args, out);
}

const tp_jbuiltin *tp_jfind_string_method(tp_span name)
{
    static const tp_jbuiltin methods[] = {
        {"capitalize", tp_jmethod_capitalize},
        {"casefold", str_casefold},
        {"center", tp_jmethod_center},
        {"encode", str_encode},
        {"expandtabs", str_expandtabs},
        {"format", str_format},
        {"join", str_join},
        {"ljust", str_ljust},
        {"lower", tp_jmethod_lower},
        {"lstrip", str_lstrip},
        {"partition", str_partition},
        {"removeprefix", str_removeprefix},
        {"removesuffix", str_removesuffix},
        {"replace", str_replace},
        {"rjust", str_rjust},
        {"rpartition", str_rpartition},
        {"rsplit", tp_jmethod_rsplit},
        {"rstrip", str_rstrip},
        {"split", str_split},
        {"splitlines", str_splitlines},
        {"strip", str_strip},
        {"swapcase", str_swapcase},
        {"title", tp_jmethod_title},
        {"upper", tp_jmethod_upper},
        {"zfill", str_zfill},
        {NULL, NULL},
    };
    const tp_jbuiltin *found = tp_jfind_builtin(methods, name);
    return found != NULL ? found : tp_jfind_builtin(tp_jstring_questions, name);
}
