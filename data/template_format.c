/* text % values, text.format(...) and strftime. Both formatters fill one struct, so that numbers are written in one place. */
#include <math.h>
#include <stdio.h>

#include "data/template_object.h"
#include "data/template_text.h"

typedef struct format_spec {
    tp_span fill; /* one character */
    char align;   /* < > ^ =, or 0: as the type wants it */
    char sign;    /* '+', ' ' or 0 */
    bool alternate, zero;
    tp_jint width, precision; /* precision -1: not given */
    char group;               /* ',' or '_' between thousands, or 0 */
    char type;                /* conversion letter, or 0 */
    bool escape;              /* the text around is marked safe: what is put in is escaped */
} format_spec;

static const format_spec plain_spec = {.fill = {" ", 1}, .precision = -1};

/* Writes `text`, whose first `sign` bytes stay in front of '=' padding, in a field of the given width. */
static tp_status pad(tp_jinja *j, tp_jsink *sink, const tp_jvalue *text, const format_spec *spec, char align, size_t sign)
{
    size_t n = tp_jchars(text->text, text->len);
    tp_jint missing = spec->width > (tp_jint)n ? spec->width - (tp_jint)n : 0;
    if (missing > (tp_jint)j->max_output) return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "a field is too wide");
    tp_jint before = align == '<' ? 0 : align == '^' ? missing / 2 : missing;
    tp_jvalue head = tp_jslice(text, 0, align == '=' ? sign : 0), rest = tp_jslice(text, head.len, text->len - head.len);
    TP_TRY(tp_jsink_string(j, sink, &head));
    for (tp_jint i = 0; i < before; i++) TP_TRY(tp_jsink_bytes(j, sink, spec->fill.data, spec->fill.len));
    TP_TRY(tp_jsink_string(j, sink, &rest));
    for (tp_jint i = before; i < missing; i++) TP_TRY(tp_jsink_bytes(j, sink, spec->fill.data, spec->fill.len));
    return TP_OK;
}

static tp_status write_text(tp_jinja *j, tp_jsink *sink, const tp_jvalue *text, const format_spec *spec)
{
    tp_jvalue cut = *text;
    if (spec->escape) TP_TRY(tp_jescape(j, text, &cut));
    if (spec->precision >= 0 && spec->precision < (tp_jint)cut.len)
        cut.len = tp_jchars_bytes(cut.text, cut.len, (size_t)spec->precision);
    return pad(j, sink, &cut, spec, spec->align == 0 || spec->align == '=' ? '<' : spec->align, 0);
}

/* Digits of |i| in a base. */
static size_t digits_of(tp_jint i, int base, bool upper, char out[136])
{
    char reversed[136];
    size_t n = 0;
    do {
        int d = (int)(i % base);
        reversed[n++] = (upper ? "0123456789ABCDEF" : "0123456789abcdef")[d < 0 ? -d : d];
        i /= base;
    } while (i != 0);
    for (size_t k = 0; k < n; k++) out[k] = reversed[n - 1 - k];
    return n;
}

/* Puts separators between groups of three digits of the integer part. */
static size_t group_digits(char *text, size_t n, char separator)
{
    size_t whole = strcspn(text, ".e");
    if (whole > n) whole = n;
    for (size_t at = whole; at > 3; at -= 3) {
        memmove(text + at - 2, text + at - 3, n - (at - 3) + 1);
        text[at - 3] = separator;
        n++;
    }
    return n;
}

static tp_status write_number(tp_jinja *j, tp_jsink *sink, bool negative, const char *prefix, char *digits, size_t n,
                              const format_spec *spec)
{
    char text[1024];
    digits[n] = '\0';
    if (spec->group != 0) n = group_digits(digits, n, spec->group);
    const char *sign = negative ? "-" : spec->sign == '+' ? "+" : spec->sign == ' ' ? " " : "";
    int len = snprintf(text, sizeof text, "%s%s%s", sign, prefix, digits);
    tp_jvalue value = tp_jtext(text, (size_t)len);
    format_spec padded = *spec;
    if (spec->zero && spec->align == 0) padded.fill = (tp_span){"0", 1};
    char align = spec->align != 0 ? spec->align : spec->zero ? '=' : '>';
    return pad(j, sink, &value, &padded, align, strlen(sign) + strlen(prefix));
}

static tp_status write_int(tp_jinja *j, tp_jsink *sink, tp_jint i, const format_spec *spec)
{
    char digits[512];
    int base = spec->type == 'x' || spec->type == 'X' ? 16 : spec->type == 'o' ? 8 : spec->type == 'b' ? 2 : 10;
    size_t n = digits_of(i, base, spec->type == 'X', digits);
    const char *prefix = !spec->alternate ? ""
                         : base == 16     ? (spec->type == 'X' ? "0X" : "0x")
                         : base == 8      ? "0o"
                         : base == 2      ? "0b"
                                          : "";
    return write_number(j, sink, i < 0, prefix, digits, n, spec);
}

static tp_status write_float(tp_jinja *j, tp_jsink *sink, double d, const format_spec *spec)
{
    char digits[1000], format[16];
    char type = spec->type == 0 || spec->type == '%' ? 'f' : spec->type;
    int precision = spec->precision < 0 ? 6 : spec->precision > 300 ? 300 : (int)spec->precision;
    if (spec->type == '%') d *= 100;
    size_t n;
    if (spec->type == 0 && spec->precision < 0) {
        n = tp_jfloat_text(fabs(d), digits);
    } else {
        bool general = spec->type == 0;
        snprintf(format, sizeof format, "%%%s.*%c", spec->alternate ? "#" : "", general ? 'g' : type);
        _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wformat-nonliteral\"") n =
            (size_t)snprintf(digits, sizeof digits, format, general && precision == 0 ? 1 : precision, fabs(d));
        _Pragma("GCC diagnostic pop")
    }
    if (spec->type == '%') digits[n++] = '%';
    return write_number(j, sink, signbit(d) != 0 && !isnan(d), "", digits, n, spec);
}

static tp_status write_formatted(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v, const format_spec *spec)
{
    char t = spec->type;
    bool float_type = t == 'f' || t == 'F' || t == 'e' || t == 'E' || t == 'g' || t == 'G' || t == '%';
    if (tp_jis_number(v) && (float_type || (v->type == TP_J_FLOAT && t == 0)))
        return write_float(j, sink, tp_jdouble_of(v), spec);
    if (v->type == TP_J_INT || (v->type == TP_J_BOOL && t != 0 && t != 's')) {
        if (t != 's') return write_int(j, sink, tp_jint_of(v), spec);
    }
    if (t != 0 && t != 's')
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "unknown format code '%c' for object of type '%s'", t, tp_jtype_name(v));
    tp_jvalue text;
    TP_TRY(tp_jstr(j, v, &text));
    return write_text(j, sink, &text, spec);
}

static tp_status repr_of(tp_jinja *j, const tp_jvalue *v, tp_jvalue *out)
{
    tp_jsink sink = {0};
    TP_TRY(tp_jwrite_repr(j, &sink, v));
    return tp_jsink_value(j, &sink, out);
}

/* Reads digits at *at as a number. */
static tp_jint read_number(tp_span text, size_t *at)
{
    tp_jint n = 0;
    for (; *at < text.len && text.data[*at] >= '0' && text.data[*at] <= '9'; ++*at)
        if (n < 1000000000) n = n * 10 + (text.data[*at] - '0');
    return n;
}

/* ---- % ---- */

typedef struct percent {
    const tp_jvalue *text, *values;
    size_t used; /* of a tuple's values */
} percent;

static tp_status next_value(tp_jinja *j, percent *p, const tp_jvalue **value)
{
    bool tuple = p->values->type == TP_J_TUPLE;
    if (p->used >= (tuple ? p->values->list->n : 1))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "not enough arguments for format string");
    *value = tuple ? &p->values->list->items[p->used] : p->values;
    p->used++;
    return TP_OK;
}

/* %(name)s: looks the name up and moves behind it. */
static tp_status named_value(tp_jinja *j, percent *p, size_t *at, const tp_jvalue **value)
{
    size_t end = *at + 1;
    while (end < p->text->len && p->text->text[end] != ')') end++;
    if (p->values->type != TP_J_DICT) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "format requires a mapping");
    tp_jvalue name = tp_jtext(p->text->text + *at + 1, end - *at - 1), *found;
    TP_TRY(tp_jdict_get(j, p->values->dict, &name, &found));
    if (found == NULL) return tp_jinja_fail(j, TP_TEMPLATE_LOOKUP, "no value for '%.*s' in a format", (int)name.len, name.text);
    *value = found;
    *at = end < p->text->len ? end + 1 : end;
    return TP_OK;
}

static tp_status write_conversion(tp_jinja *j, tp_jsink *sink, char c, const tp_jvalue *v, format_spec *spec)
{
    tp_jvalue value = *v;
    if (c == 'r' || c == 'a') TP_TRY(repr_of(j, v, &value));
    if (c == 's' || c == 'r' || c == 'a') {
        if (c == 's') TP_TRY(tp_jstr(j, v, &value));
        if (spec->align == 0) spec->align = '>';
        return write_text(j, sink, &value, spec);
    }
    if (c == 'c' && tp_jis_string(v)) return tp_jsink_string(j, sink, v);
    if (v->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, v);
    if (!tp_jis_number(v))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%%%c format: a number is required, not %s", c, tp_jtype_name(v));
    if (c == 'd' || c == 'i' || c == 'u') {
        c = 'd';
        if (v->type == TP_J_FLOAT) {
            if (!(fabs(v->real) < 0x1p127))
                return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "cannot convert float infinity or NaN to integer");
            value = tp_jinteger((tp_jint)v->real);
        }
    } else if (c == 'x' || c == 'X' || c == 'o') {
        if (v->type == TP_J_FLOAT)
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%%%c format: an integer is required, not float", c);
    } else if (strchr("eEfFgG", c) == NULL) {
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "unsupported format character '%c'", c);
    }
    spec->type = c;
    if (spec->align == 0 && !spec->zero) spec->align = '>';
    return write_formatted(j, sink, &value, spec);
}

/* The conversion behind the '%' at *at. */
static tp_status one_percent(tp_jinja *j, tp_jsink *sink, percent *p, size_t *at)
{
    format_spec spec = plain_spec;
    spec.escape = (p->text->flags & TP_J_MARKUP) != 0;
    const tp_jvalue *value = NULL, *star;
    tp_span text = tp_jspan(p->text);
    if (*at < text.len && text.data[*at] == '(') TP_TRY(named_value(j, p, at, &value));
    for (; *at < text.len && strchr("-+ 0#", text.data[*at]) != NULL && text.data[*at] != '\0'; ++*at) {
        char f = text.data[*at];
        if (f == '-') spec.align = '<';
        if (f == '+' || (f == ' ' && spec.sign == 0)) spec.sign = f;
        if (f == '0') spec.zero = true;
        if (f == '#') spec.alternate = true;
    }
    if (*at < text.len && text.data[*at] == '*') {
        ++*at;
        TP_TRY(next_value(j, p, &star));
        TP_TRY(tp_jarg_int(j, star, 0, &spec.width));
    } else {
        spec.width = read_number(text, at);
    }
    if (*at < text.len && text.data[*at] == '.') {
        ++*at;
        spec.precision = read_number(text, at);
    }
    if (*at >= text.len) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "incomplete format");
    char c = text.data[(*at)++];
    if (c == '%') return tp_jsink_bytes(j, sink, "%", 1);
    if (value == NULL) TP_TRY(next_value(j, p, &value));
    return write_conversion(j, sink, c, value, &spec);
}

tp_status tp_jpercent(tp_jinja *j, const tp_jvalue *text, const tp_jvalue *values, tp_jvalue *out)
{
    percent p = {.text = text, .values = values};
    tp_jsink sink = {0};
    for (size_t at = 0; at < text->len;) {
        size_t plain = at;
        while (plain < text->len && text->text[plain] != '%') plain++;
        tp_jvalue part = tp_jslice(text, at, plain - at);
        TP_TRY(tp_jsink_string(j, &sink, &part));
        at = plain;
        if (at >= text->len) break;
        at++;
        TP_TRY(tp_jinja_charge(j, 1));
        TP_TRY(one_percent(j, &sink, &p, &at));
    }
    size_t given = values->type == TP_J_TUPLE                               ? values->list->n
                   : values->type == TP_J_DICT || values->type == TP_J_LIST ? p.used
                                                                            : 1;
    if (p.used < given && !(values->type == TP_J_UNDEFINED))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "not all arguments converted during string formatting");
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = text->flags;
    return TP_OK;
}

/* ---- format() ---- */

static bool is_align(char c)
{
    return c == '<' || c == '>' || c == '^' || c == '=';
}

/* [[fill]align][sign][#][0][width][grouping][.precision][type] */
static tp_status read_spec(tp_jinja *j, tp_span text, format_spec *spec)
{
    size_t at = 0, first = tp_jchars_bytes(text.data, text.len, 1);
    if (first > 0 && first < text.len && is_align(text.data[first])) {
        spec->fill = (tp_span){text.data, first};
        spec->align = text.data[first];
        at = first + 1;
    } else if (text.len > 0 && is_align(text.data[0])) {
        spec->align = text.data[at++];
    }
    if (at < text.len && strchr("+- ", text.data[at]) != NULL) spec->sign = text.data[at++];
    if (at < text.len && text.data[at] == '#') spec->alternate = text.data[at++] == '#';
    if (at < text.len && text.data[at] == '0') spec->zero = text.data[at++] == '0';
    spec->width = read_number(text, &at);
    if (at < text.len && (text.data[at] == ',' || text.data[at] == '_')) spec->group = text.data[at++];
    if (at < text.len && text.data[at] == '.') {
        at++;
        spec->precision = read_number(text, &at);
    }
    if (at < text.len) spec->type = text.data[at++];
    if (at < text.len || (spec->type != 0 && strchr("sdxXobeEfFgGn%", spec->type) == NULL))
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "invalid format specifier '%.*s'", (int)text.len, text.data);
    return TP_OK;
}

/* Fields without a number count up; the two ways do not mix. */
typedef struct numbering {
    size_t next;
    bool manual;
} numbering;

/* The argument that a field names: by number, by name, or the next one. */
static tp_status field_root(tp_jinja *j, tp_span name, const tp_jargs *args, numbering *fields, tp_jvalue *out)
{
    size_t at = 0;
    tp_jint index = read_number(name, &at);
    if (at == name.len) {
        if (name.len == 0 ? fields->manual : fields->next > 0)
            return tp_jinja_fail(j, TP_TEMPLATE_VALUE,
                                 "cannot switch between manual field specification and automatic field numbering");
        fields->manual = name.len > 0;
        size_t i = name.len == 0 ? fields->next++ : (size_t)index;
        if (i >= args->n) return tp_jinja_fail(j, TP_TEMPLATE_LOOKUP, "replacement index %zu out of range", i);
        *out = args->items[i];
        return TP_OK;
    }
    for (size_t i = 0; i < args->n_keywords; i++) {
        if (!tp_span_equal(args->keywords[i].name, name)) continue;
        *out = args->keywords[i].value;
        return TP_OK;
    }
    return tp_jinja_fail(j, TP_TEMPLATE_LOOKUP, "no argument '%.*s' in a format", (int)name.len, name.data);
}

/* name(.attribute | [item])* */
static tp_status field_value(tp_jinja *j, tp_span field, const tp_jargs *args, numbering *fields, tp_jvalue *out)
{
    size_t at = 0;
    while (at < field.len && field.data[at] != '.' && field.data[at] != '[') at++;
    TP_TRY(field_root(j, (tp_span){field.data, at}, args, fields, out));
    while (at < field.len) {
        tp_jvalue object = *out;
        char kind = field.data[at++];
        size_t begin = at;
        while (at < field.len && (kind == '[' ? field.data[at] != ']' : field.data[at] != '.' && field.data[at] != '[')) at++;
        tp_span part = {field.data + begin, at - begin};
        tp_jint index;
        tp_jvalue key = tp_jtext(part.data, part.len);
        if (kind == '[' && tp_jparse_int(part, 10, &index)) key = tp_jinteger(index);
        if (kind == '.')
            TP_TRY(tp_jgetattr(j, &object, part, out));
        else
            TP_TRY(tp_jgetitem(j, &object, &key, out));
        if (kind == '[' && at < field.len) at++;
    }
    return TP_OK;
}

/* What stands between the braces: field[!conversion][:spec] */
static tp_status write_field(tp_jinja *j, tp_jsink *sink, tp_span field, const tp_jargs *args, bool escape, numbering *fields)
{
    size_t name = 0;
    while (name < field.len && field.data[name] != '!' && field.data[name] != ':') name++;
    size_t at = name;
    char conversion = 0;
    if (at + 1 < field.len && field.data[at] == '!') {
        conversion = field.data[at + 1];
        at += 2;
    }
    format_spec spec = plain_spec;
    spec.escape = escape;
    tp_jvalue value;
    TP_TRY(field_value(j, (tp_span){field.data, name}, args, fields, &value));
    if (conversion == 's') TP_TRY(tp_jstr(j, &value, &value));
    if (conversion == 'r') {
        tp_jvalue object = value;
        TP_TRY(repr_of(j, &object, &value));
    }
    tp_span rest = {field.data + at + (at < field.len), field.len - at - (at < field.len)};
    if (rest.len > 0 && !tp_jis_string(&value) && !tp_jis_number(&value))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unsupported format string passed to %s.__format__", tp_jtype_name(&value));
    TP_TRY(read_spec(j, rest, &spec));
    return write_formatted(j, sink, &value, &spec);
}

tp_status tp_jformat(tp_jinja *j, const tp_jvalue *text, const tp_jargs *args, tp_jvalue *out)
{
    tp_jsink sink = {0};
    numbering fields = {0};
    for (size_t at = 0; at < text->len;) {
        size_t plain = at;
        while (plain < text->len && text->text[plain] != '{' && text->text[plain] != '}') plain++;
        tp_jvalue part = tp_jslice(text, at, plain - at);
        TP_TRY(tp_jsink_string(j, &sink, &part));
        at = plain;
        if (at >= text->len) break;
        TP_TRY(tp_jinja_charge(j, 1));
        char c = text->text[at];
        if (at + 1 < text->len && text->text[at + 1] == c) { /* doubled braces stand for one */
            TP_TRY(tp_jsink_bytes(j, &sink, &c, 1));
            at += 2;
            continue;
        }
        const char *close = c == '{' ? memchr(text->text + at, '}', text->len - at) : NULL;
        if (close == NULL) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "single '%c' encountered in format string", c);
        tp_span field = {text->text + at + 1, (size_t)(close - (text->text + at + 1))};
        TP_TRY(write_field(j, &sink, field, args, (text->flags & TP_J_MARKUP) != 0, &fields));
        at = (size_t)(close - text->text) + 1;
    }
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = text->flags;
    return TP_OK;
}

/* ---- time ---- */

static const char *const month_names[] = {"January", "February", "March",     "April",   "May",      "June",
                                          "July",    "August",   "September", "October", "November", "December"};
static const char *const day_names[] = {"Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"};

static bool is_leap(int year)
{
    return (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
}

static int days_in_month(int year, int month)
{
    static const int days[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    return month == 2 && is_leap(year) ? 29 : days[month - 1];
}

static int day_of_year(const tp_template_time *t)
{
    int day = t->day;
    for (int m = 1; m < t->month; m++) day += days_in_month(t->year, m);
    return day;
}

/* 0: Sunday. */
static int day_of_week(const tp_template_time *t)
{
    int y = t->year - 1;
    return (y + y / 4 - y / 100 + y / 400 + day_of_year(t)) % 7;
}

/* ISO week and the year it belongs to. */
static int iso_week(const tp_template_time *t, int *year)
{
    int weekday = (day_of_week(t) + 6) % 7, week = (day_of_year(t) - 1 - weekday + 10) / 7;
    *year = t->year;
    tp_template_time january = {t->year, 1, 1, 0, 0, 0};
    if (week < 1) {
        tp_template_time last = {t->year - 1, 12, 31, 0, 0, 0};
        return iso_week(&last, year);
    }
    int first = (day_of_week(&january) + 6) % 7, days = 365 + is_leap(t->year);
    bool has_53 = first == 3 || (days == 366 && first == 2);
    if (week == 53 && !has_53) {
        *year = t->year + 1;
        return 1;
    }
    return week;
}

/* One conversion without its flag: a number with its width and padding, or text. Returns false if the letter is unknown. */
static bool time_number(const tp_template_time *t, char c, int *value, int *width, char *fill)
{
    int hour12 = t->hour % 12 == 0 ? 12 : t->hour % 12, year;
    *fill = c == 'e' || c == 'k' || c == 'l' ? ' ' : '0';
    *width = c == 'j' ? 3 : c == 'Y' || c == 'G' || c == 'u' || c == 'w' ? 1 : c == 'f' ? 6 : 2;
    switch (c) {
    case 'd':
    case 'e': *value = t->day; return true;
    case 'm': *value = t->month; return true;
    case 'Y': *value = t->year; return true;
    case 'y': *value = t->year % 100; return true;
    case 'C': *value = t->year / 100; return true;
    case 'H':
    case 'k': *value = t->hour; return true;
    case 'I':
    case 'l': *value = hour12; return true;
    case 'M': *value = t->minute; return true;
    case 'S': *value = t->second; return true;
    case 'f': *value = 0; return true;
    case 'j': *value = day_of_year(t); return true;
    case 'u': *value = day_of_week(t) == 0 ? 7 : day_of_week(t); return true;
    case 'w': *value = day_of_week(t); return true;
    case 'U': *value = (day_of_year(t) + 6 - day_of_week(t)) / 7; return true;
    case 'W': *value = (day_of_year(t) + 6 - (day_of_week(t) + 6) % 7) / 7; return true;
    case 'V': *value = iso_week(t, &year); return true;
    case 'G': iso_week(t, value); return true;
    default: return false;
    }
}

/* Conversions that stand for several others, and those that are text. */
static const char *time_text(const tp_template_time *t, char c, char out[32])
{
    switch (c) {
    case 'a':
    case 'A': snprintf(out, 32, c == 'a' ? "%.3s" : "%s", day_names[day_of_week(t)]); return out;
    case 'b':
    case 'h':
    case 'B': snprintf(out, 32, c == 'B' ? "%s" : "%.3s", month_names[t->month - 1]); return out;
    case 'p': return t->hour < 12 ? "AM" : "PM";
    case 'P': return t->hour < 12 ? "am" : "pm";
    case 'n': return "\n";
    case 't': return "\t";
    case '%': return "%";
    case 'z':
    case 'Z': return "";
    default: return NULL;
    }
}

static const char *time_composite(char c)
{
    switch (c) {
    case 'F': return "%Y-%m-%d";
    case 'T':
    case 'X': return "%H:%M:%S";
    case 'R': return "%H:%M";
    case 'D':
    case 'x': return "%m/%d/%y";
    case 'r': return "%I:%M:%S %p";
    case 'c': return "%a %b %e %H:%M:%S %Y";
    default: return NULL;
    }
}

static tp_status write_time(tp_jinja *j, tp_jsink *sink, tp_span format, const tp_template_time *t)
{
    for (size_t at = 0; at < format.len; at++) {
        char buffer[32], flag = 0, fill;
        int value, width;
        if (format.data[at] != '%' || at + 1 >= format.len) {
            TP_TRY(tp_jsink_bytes(j, sink, format.data + at, 1));
            continue;
        }
        size_t start = at++;
        if (at + 1 < format.len && strchr("-_0^#", format.data[at]) != NULL) flag = format.data[at++];
        char c = format.data[at];
        const char *composite = time_composite(c), *text = time_text(t, c, buffer);
        if (composite != NULL) {
            TP_TRY(write_time(j, sink, tp_span_of(composite), t));
        } else if (text != NULL) {
            TP_TRY(tp_jsink_text(j, sink, text));
        } else if (time_number(t, c, &value, &width, &fill)) {
            if (flag == '-') width = 1;
            if (flag == '_') fill = ' ';
            if (flag == '0') fill = '0';
            snprintf(buffer, sizeof buffer, fill == '0' ? "%0*d" : "%*d", width, value);
            TP_TRY(tp_jsink_text(j, sink, buffer));
        } else {
            TP_TRY(tp_jsink_bytes(j, sink, format.data + start, at + 1 - start));
        }
    }
    return TP_OK;
}

tp_status tp_jstrftime(tp_jinja *j, tp_span format, const tp_template_time *time, tp_jvalue *out)
{
    tp_jsink sink = {0};
    TP_TRY(write_time(j, &sink, format, time));
    return tp_jsink_value(j, &sink, out);
}

bool tp_template_time_parse(const char *text, tp_template_time *time)
{
    char rest;
    tp_template_time t;
    if (sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d%c", &t.year, &t.month, &t.day, &t.hour, &t.minute, &t.second, &rest) != 6)
        return false;
    if (t.year < 1 || t.month < 1 || t.month > 12 || t.day < 1 || t.day > days_in_month(t.year, t.month)) return false;
    if (t.hour < 0 || t.hour > 23 || t.minute < 0 || t.minute > 59 || t.second < 0 || t.second > 60) return false;
    *time = t;
    return true;
}
