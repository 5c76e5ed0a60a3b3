/* The methods of str that answer questions: where something stands, how it begins, what kind of characters it has. Positions
 * count characters, as in Python. */
#include "data/template_object.h"
#include "data/template_text.h"
#include "data/template_unicode.h"

/* Searching from the right compares at every place. */
tp_status tp_jcharge_backwards(tp_jinja *j, size_t n, size_t m)
{
    return tp_jinja_charge(j, n / 64 * (m / 64 + 1));
}

/* Where `sep` stands last in s[0..n), or NULL. */
const char *tp_jfind_last(const char *s, size_t n, const tp_jvalue *sep)
{
    for (size_t at = n >= sep->len ? n - sep->len + 1 : 0; at > 0; at--)
        if (memcmp(s + at - 1, sep->text, sep->len) == 0) return s + at - 1;
    return NULL;
}

/* ---- searching ---- */

/* The part of self that optional start and end arguments select, and the byte where it begins; false if start lies behind the
 * end. */
static tp_status window(tp_jinja *j, const tp_jvalue *self, const tp_jvalue *start, const tp_jvalue *end, tp_jvalue *part,
                        bool *valid)
{
    tp_jint n = (tp_jint)tp_jchars(self->text, self->len), from, to;
    TP_TRY(tp_jinja_charge_bytes(j, self->len));
    TP_TRY(tp_jarg_int(j, start->type == TP_J_NONE ? &(tp_jvalue){0} : start, 0, &from));
    TP_TRY(tp_jarg_int(j, end->type == TP_J_NONE ? &(tp_jvalue){0} : end, n, &to));
    if (from < 0) from = from + n < 0 ? 0 : from + n;
    if (to < 0) to = to + n < 0 ? 0 : to + n;
    if (to > n) to = n;
    *valid = from <= to;
    if (!*valid) return TP_OK;
    size_t first = tp_jchars_bytes(self->text, self->len, (size_t)from);
    *part = tp_jslice(self, first, tp_jchars_bytes(self->text + first, self->len - first, (size_t)(to - from)));
    return TP_OK;
}

static bool has_affix(const tp_jvalue *s, const tp_jvalue *affix, bool suffix)
{
    return affix->len <= s->len &&
           (affix->len == 0 || memcmp(s->text + (suffix ? s->len - affix->len : 0), affix->text, affix->len) == 0);
}

static tp_status affix_test(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool suffix, tp_jvalue *out)
{
    tp_jvalue bound[3], part;
    bool valid;
    TP_TRY(tp_jbind(j, "startswith", args, "affix start end /", 1, bound));
    TP_TRY(window(j, self, &bound[1], &bound[2], &part, &valid));
    *out = tp_jbool(false);
    const tp_jvalue *options = bound[0].type == TP_J_TUPLE ? bound[0].list->items : &bound[0];
    size_t n = bound[0].type == TP_J_TUPLE ? bound[0].list->n : 1;
    for (size_t i = 0; i < n; i++) {
        if (!tp_jis_string(&options[i]))
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "startswith first arg must be str or a tuple of str, not %s",
                                 tp_jtype_name(&options[i]));
        if (valid && has_affix(&part, &options[i], suffix)) *out = tp_jbool(true);
    }
    return TP_OK;
}
static tp_status str_startswith(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return affix_test(j, self, args, false, out);
}
static tp_status str_endswith(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return affix_test(j, self, args, true, out);
}

static tp_status find_method(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool right, bool must, tp_jvalue *out)
{
    tp_jvalue bound[3], part = *self;
    bool valid;
    TP_TRY(tp_jbind(j, "find", args, "sub start end /", 1, bound));
    TP_TRY(tp_jarg_string(j, "find", &bound[0]));
    TP_TRY(window(j, self, &bound[1], &bound[2], &part, &valid));
    const char *hit = NULL;
    if (right) TP_TRY(tp_jcharge_backwards(j, self->len, bound[0].len));
    if (valid && right) hit = tp_jfind_last(part.text, part.len, &bound[0]);
    if (valid && !right) hit = bound[0].len == 0 ? part.text : memmem(part.text, part.len, bound[0].text, bound[0].len);
    if (hit == NULL && must) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "substring not found");
    *out = tp_jinteger(hit == NULL ? -1 : (tp_jint)tp_jchars(self->text, (size_t)(hit - self->text)));
    return TP_OK;
}
static tp_status str_find(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return find_method(j, self, args, false, false, out);
}
static tp_status str_rfind(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return find_method(j, self, args, true, false, out);
}
static tp_status str_index(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return find_method(j, self, args, false, true, out);
}
static tp_status str_rindex(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return find_method(j, self, args, true, true, out);
}

static tp_status str_count(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3], part = *self;
    bool valid;
    tp_jint n = 0;
    TP_TRY(tp_jbind(j, "count", args, "sub start end /", 1, bound));
    TP_TRY(tp_jarg_string(j, "count", &bound[0]));
    TP_TRY(window(j, self, &bound[1], &bound[2], &part, &valid));
    if (valid && bound[0].len == 0) n = (tp_jint)tp_jchars(part.text, part.len) + 1;
    while (valid && bound[0].len > 0) {
        const char *hit = memmem(part.text, part.len, bound[0].text, bound[0].len);
        if (hit == NULL) break;
        n++;
        size_t skip = (size_t)(hit - part.text) + bound[0].len;
        part = tp_jslice(&part, skip, part.len - skip);
    }
    *out = tp_jinteger(n);
    return TP_OK;
}

/* ---- questions ---- */

/* True if the text is not empty and every character passes. */
static tp_status all_chars(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool (*passes)(uint32_t), bool when_empty,
                           tp_jvalue *out)
{
    bool all = self->len > 0 || when_empty;
    TP_TRY(tp_jbind(j, "a str test", args, "", 0, NULL));
    TP_TRY(tp_jinja_charge_bytes(j, 16 * self->len));
    for (size_t at = 0; all && at < self->len;) {
        uint32_t c = 0;
        int n = tp_utf8_decode(self->text + at, self->len - at, &c);
        all = passes(c);
        at += (size_t)(n > 0 ? n : 1);
    }
    *out = tp_jbool(all);
    return TP_OK;
}

static bool is_alnum(uint32_t c)
{
    return tp_jis_alpha(c) || tp_jis_numeric(c);
}
static bool is_ascii(uint32_t c)
{
    return c < 0x80;
}
static bool is_printable(uint32_t c)
{
    return c == ' ' || tp_jis_printable(c);
}

#define CHARACTER_TEST(method, passes, when_empty)                                                                             \
    static tp_status method(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)                          \
    {                                                                                                                          \
        return all_chars(j, self, args, passes, when_empty, out);                                                              \
    }
CHARACTER_TEST(str_isalpha, tp_jis_alpha, false)
CHARACTER_TEST(str_isdigit, tp_jis_digit, false)
CHARACTER_TEST(str_isdecimal, tp_jis_decimal, false)
CHARACTER_TEST(str_isnumeric, tp_jis_numeric, false)
CHARACTER_TEST(str_isalnum, is_alnum, false)
CHARACTER_TEST(str_isspace, tp_jis_space, false)
CHARACTER_TEST(str_isascii, is_ascii, true)
CHARACTER_TEST(str_isprintable, is_printable, true)

/* All cased characters are of the wanted case, and there is one. */
static tp_status case_test(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool upper, tp_jvalue *out)
{
    bool any = false;
    TP_TRY(tp_jbind(j, "a str test", args, "", 0, NULL));
    TP_TRY(tp_jinja_charge_bytes(j, 16 * self->len));
    *out = tp_jbool(false);
    for (size_t at = 0; at < self->len;) {
        uint32_t c = 0;
        int n = tp_utf8_decode(self->text + at, self->len - at, &c);
        bool is_upper = tp_jis_upper_char(c), is_lower = tp_jis_lower_char(c);
        if ((upper ? is_lower : is_upper) || tp_jis_title_char(c)) return TP_OK;
        any = any || is_upper || is_lower;
        at += (size_t)(n > 0 ? n : 1);
    }
    *out = tp_jbool(any);
    return TP_OK;
}
static tp_status str_isupper(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_test(j, self, args, true, out);
}
static tp_status str_islower(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return case_test(j, self, args, false, out);
}

static tp_status str_istitle(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue titled, lowered;
    bool same, uncased;
    TP_TRY(tp_jbind(j, "istitle", args, "", 0, NULL));
    TP_TRY(tp_jstring_case(j, self, tp_jmethod_title, &titled));
    TP_TRY(tp_jstring_case(j, self, tp_jmethod_lower, &lowered));
    TP_TRY(tp_jequal(j, self, &titled, &same));
    TP_TRY(tp_jequal(j, self, &lowered, &uncased));
    *out = tp_jbool(same && !uncased);
    return TP_OK;
}

static tp_status str_isidentifier(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    bool good = self->len > 0 && !(self->text[0] >= '0' && self->text[0] <= '9');
    TP_TRY(tp_jbind(j, "isidentifier", args, "", 0, NULL));
    TP_TRY(tp_jinja_charge_bytes(j, 16 * self->len));
    for (size_t at = 0; good && at < self->len;) {
        int n = tp_jword_at(self->text + at, self->len - at);
        good = n > 0;
        at += (size_t)n;
    }
    *out = tp_jbool(good);
    return TP_OK;
}

/* ---- the table ---- */

const tp_jbuiltin tp_jstring_questions[] = {
    {"count", str_count},
    {"endswith", str_endswith},
    {"find", str_find},
    {"index", str_index},
    {"isalnum", str_isalnum},
    {"isalpha", str_isalpha},
    {"isascii", str_isascii},
    {"isdecimal", str_isdecimal},
    {"isdigit", str_isdigit},
    {"isidentifier", str_isidentifier},
    {"islower", str_islower},
    {"isnumeric", str_isnumeric},
    {"isprintable", str_isprintable},
    {"isspace", str_isspace},
    {"istitle", str_istitle},
    {"isupper", str_isupper},
    {"rfind", str_rfind},
    {"rindex", str_rindex},
    {"startswith", str_startswith},
    {NULL, NULL},
};
