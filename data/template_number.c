/* Arithmetic with Python's rules: integers of 128 bits that never wrap, floor division, bools as integers, and the operators
 * that sequences share with numbers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/mem.h"
#include "data/template_parser.h"
#include "data/template_text.h"
#include "data/template_unicode.h"

/* ---- reading ---- */

static int digit_value(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    c |= 32;
    return c >= 'a' && c <= 'z' ? c - 'a' + 10 : 99;
}

/* Text without the whitespace around it. */
static tp_span strip(tp_span text)
{
    size_t from = tp_jlstrip_len(text.data, text.len);
    return (tp_span){text.data + from, tp_jrstrip_len(text.data + from, text.len - from)};
}

/* Skips "0x", "0o" or "0b" if it fits the base; base 0 takes what it says. */
static int skip_prefix(tp_span *s, int base)
{
    int prefix = 10;
    if (s->len > 2 && s->data[0] == '0') {
        char c = s->data[1] | 32;
        prefix = c == 'x' ? 16 : c == 'o' ? 8 : c == 'b' ? 2 : 10;
    }
    if (prefix != 10 && (base == 0 || base == prefix)) {
        s->data += 2;
        s->len -= 2;
        if (s->data[0] == '_') { /* 0x_ff */
            s->data++;
            s->len--;
        }
        return prefix;
    }
    return base == 0 ? 10 : base;
}

bool tp_jparse_int(tp_span text, int base, tp_jint *out)
{
    tp_span s = strip(text);
    bool negative = s.len > 0 && s.data[0] == '-', digit_before = false;
    if (s.len > 0 && (s.data[0] == '-' || s.data[0] == '+')) {
        s.data++;
        s.len--;
    }
    base = skip_prefix(&s, base);
    tp_jint value = 0;
    for (size_t i = 0; i < s.len; i++) {
        int d = digit_value(s.data[i]);
        if (s.data[i] == '_' && digit_before && i + 1 < s.len) {
            digit_before = false;
            continue;
        }
        if (d >= base) return false;
        digit_before = true;
        if (__builtin_mul_overflow(value, (tp_jint)base, &value) || __builtin_sub_overflow(value, (tp_jint)d, &value))
            return false;
    }
    if (!digit_before) return false;
    return !__builtin_mul_overflow(value, (tp_jint)(negative ? 1 : -1),
                                   out); /* summed up below zero, where there is room for one more */
}

bool tp_jparse_float(tp_span text, double *out)
{
    char copy[512];
    size_t n = 0;
    tp_span s = strip(text);
    for (size_t i = 0; i < s.len; i++) {
        bool between = i > 0 && i + 1 < s.len && digit_value(s.data[i - 1]) < 10 && digit_value(s.data[i + 1]) < 10;
        if (s.data[i] == '_' && between) continue;
        if (n + 1 >= sizeof copy) return false;
        copy[n++] = s.data[i];
    }
    copy[n] = '\0';
    const char *p = copy + (copy[0] == '+' || copy[0] == '-');
    double sign = copy[0] == '-' ? -1 : 1;
    if (strcasecmp(p, "inf") == 0 || strcasecmp(p, "infinity") == 0) {
        *out = sign * HUGE_VAL;
        return true;
    }
    if (strcasecmp(p, "nan") == 0) {
        *out = NAN;
        return true;
    }
    if (*p == '\0' || strspn(p, "0123456789.eE+-") != strlen(p)) return false;
    char *end;
    *out = strtod(copy, &end);
    return *end == '\0' && end != copy;
}

/* ---- numbers ---- */

static tp_status overflow(tp_jinja *j)
{
    return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "an integer needs more than 128 bits");
}

static tp_status division_by_zero(tp_jinja *j)
{
    return tp_jinja_fail(j, TP_TEMPLATE_ZERO_DIVISION, "division by zero");
}

static tp_status int_divide(tp_jinja *j, tp_jint a, tp_jint b, bool remainder, tp_jvalue *out)
{
    if (b == 0) return division_by_zero(j);
    if (b == -1) { /* the one quotient that may not fit */
        tp_jint negated;
        if (__builtin_sub_overflow((tp_jint)0, a, &negated)) return overflow(j);
        *out = tp_jinteger(remainder ? 0 : negated);
        return TP_OK;
    }
    tp_jint q = a / b, r = a % b;
    if (r != 0 && (r < 0) != (b < 0)) {
        q--;
        r += b;
    }
    *out = tp_jinteger(remainder ? r : q);
    return TP_OK;
}

static tp_status float_divide(tp_jinja *j, double a, double b, bool remainder, tp_jvalue *out)
{
    if (b == 0) return division_by_zero(j);
    double r = fmod(a, b), q = (a - r) / b;
    if (r != 0 && (r < 0) != (b < 0)) {
        r += b;
        q -= 1;
    } else if (r == 0) {
        r = copysign(0, b);
    }
    double floored = q != 0 ? floor(q) : copysign(0, a / b);
    if (q - floored > 0.5) floored += 1;
    *out = tp_jfloat(remainder ? r : floored);
    return TP_OK;
}

static tp_status int_power(tp_jinja *j, tp_jint a, tp_jint b, tp_jvalue *out)
{
    if (b < 0) {
        if (a == 0) return tp_jinja_fail(j, TP_TEMPLATE_ZERO_DIVISION, "0.0 cannot be raised to a negative power");
        *out = tp_jfloat(pow((double)a, (double)b));
        return TP_OK;
    }
    tp_jint result = 1, square = a;
    while (b > 0) {
        if ((b & 1) != 0 && __builtin_mul_overflow(result, square, &result)) return overflow(j);
        b >>= 1;
        if (b > 0 && __builtin_mul_overflow(square, square, &square)) return overflow(j);
    }
    *out = tp_jinteger(result);
    return TP_OK;
}

static tp_status float_power(tp_jinja *j, double a, double b, tp_jvalue *out)
{
    if (a == 0 && b < 0) return tp_jinja_fail(j, TP_TEMPLATE_ZERO_DIVISION, "0.0 cannot be raised to a negative power");
    double result = pow(a, b);
    if (isnan(result) && !isnan(a) && !isnan(b))
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "complex numbers are not supported");
    if (isinf(result) && isfinite(a) && isfinite(b)) return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "result too large");
    *out = tp_jfloat(result);
    return TP_OK;
}

static tp_status int_arithmetic(tp_jinja *j, int op, tp_jint a, tp_jint b, tp_jvalue *out)
{
    tp_jint result = 0;
    bool over = false;
    switch (op) {
    case TP_T_ADD: over = __builtin_add_overflow(a, b, &result); break;
    case TP_T_SUB: over = __builtin_sub_overflow(a, b, &result); break;
    case TP_T_MUL: over = __builtin_mul_overflow(a, b, &result); break;
    case TP_T_FLOORDIV: return int_divide(j, a, b, false, out);
    case TP_T_MOD: return int_divide(j, a, b, true, out);
    case TP_T_POW: return int_power(j, a, b, out);
    default:
        if (b == 0) return division_by_zero(j);
        *out = tp_jfloat((double)a / (double)b);
        return TP_OK;
    }
    if (over) return overflow(j);
    *out = tp_jinteger(result);
    return TP_OK;
}

static tp_status float_arithmetic(tp_jinja *j, int op, double a, double b, tp_jvalue *out)
{
    switch (op) {
    case TP_T_ADD: *out = tp_jfloat(a + b); return TP_OK;
    case TP_T_SUB: *out = tp_jfloat(a - b); return TP_OK;
    case TP_T_MUL: *out = tp_jfloat(a * b); return TP_OK;
    case TP_T_FLOORDIV: return float_divide(j, a, b, false, out);
    case TP_T_MOD: return float_divide(j, a, b, true, out);
    case TP_T_POW: return float_power(j, a, b, out);
    default:
        if (b == 0) return division_by_zero(j);
        *out = tp_jfloat(a / b);
        return TP_OK;
    }
}

/* ---- sequences ---- */

tp_status tp_jconcat(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, tp_jvalue *out)
{
    bool markup = ((a->flags | b->flags) & TP_J_MARKUP) != 0;
    tp_jvalue left = *a, right = *b;
    if (markup) TP_TRY(tp_jescape(j, a, &left));
    if (markup) TP_TRY(tp_jescape(j, b, &right));
    tp_jsink sink = {0};
    size_t capacity = left.len + right.len;
    if (capacity > 0 && capacity <= j->max_output) { /* exactly what is needed, at once */
        sink.data = tp_jinja_alloc(j, capacity, 1);
        if (sink.data == NULL) return j->status;
        sink.capacity = capacity;
    }
    TP_TRY(tp_jsink_string(j, &sink, &left));
    TP_TRY(tp_jsink_string(j, &sink, &right));
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = markup ? TP_J_MARKUP : 0;
    return TP_OK;
}

static tp_status concat_lists(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, tp_jvalue *out)
{
    size_t n = a->list->n, m = b->list->n;
    tp_jvalue *items = tp_jinja_alloc(j, n + m, sizeof *items);
    if (items == NULL) return j->status;
    if (n > 0) memcpy(items, a->list->items, n * sizeof *items);
    if (m > 0) memcpy(items + n, b->list->items, m * sizeof *items);
    return tp_jlist_new(j, a->type, items, n + m, out);
}

static tp_status repeat(tp_jinja *j, const tp_jvalue *sequence, tp_jint times, tp_jvalue *out)
{
    size_t n = tp_jis_list(sequence) ? sequence->list->n : sequence->len;
    if (times < 0 || n == 0) times = 0;
    if (times > INT64_MAX) return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "cannot fit 'int' into an index-sized integer");
    if (times > (tp_jint)j->max_output) return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "a sequence repeated too often");
    if (!tp_jis_list(sequence)) {
        tp_jsink sink = {0};
        for (tp_jint i = 0; i < times; i++) {
            TP_TRY(tp_jinja_charge(j, 1));
            TP_TRY(tp_jsink_string(j, &sink, sequence));
        }
        TP_TRY(tp_jsink_value(j, &sink, out));
        out->flags = sequence->flags;
        return TP_OK;
    }
    size_t total;
    if (!tp_mul_size(n, (size_t)times, &total)) return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "a list becomes too long");
    TP_TRY(tp_jinja_charge(j, total));
    tp_jvalue *items = tp_jinja_alloc(j, total, sizeof *items);
    if (items == NULL) return j->status;
    for (size_t i = 0; i < (size_t)times; i++) memcpy(items + i * n, sequence->list->items, n * sizeof *items);
    return tp_jlist_new(j, sequence->type, items, total, out);
}

static bool is_sequence(const tp_jvalue *v)
{
    return tp_jis_list(v) || v->type == TP_J_STRING || v->type == TP_J_BYTES;
}

static const char *operator_text(int op)
{
    switch (op) {
    case TP_T_ADD: return "+";
    case TP_T_SUB: return "-";
    case TP_T_MUL: return "*";
    case TP_T_DIV: return "/";
    case TP_T_FLOORDIV: return "//";
    case TP_T_MOD: return "%";
    default: return "**";
    }
}

tp_status tp_jarithmetic(tp_jinja *j, int op, const tp_jvalue *a, const tp_jvalue *b, tp_jvalue *out)
{
    if (op == TP_T_MOD && tp_jis_string(a)) return tp_jpercent(j, a, b, out);
    if (a->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, a);
    if (b->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, b);
    if (tp_jis_int(a) && tp_jis_int(b)) return int_arithmetic(j, op, tp_jint_of(a), tp_jint_of(b), out);
    if (tp_jis_number(a) && tp_jis_number(b)) return float_arithmetic(j, op, tp_jdouble_of(a), tp_jdouble_of(b), out);
    if (op == TP_T_ADD && tp_jis_string(a) && tp_jis_string(b)) return tp_jconcat(j, a, b, out);
    if (op == TP_T_ADD && tp_jis_list(a) && a->type == b->type) return concat_lists(j, a, b, out);
    if (op == TP_T_MUL && is_sequence(a) && tp_jis_int(b)) return repeat(j, a, tp_jint_of(b), out);
    if (op == TP_T_MUL && is_sequence(b) && tp_jis_int(a)) return repeat(j, b, tp_jint_of(a), out);
    return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unsupported operand type(s) for %s: '%s' and '%s'", operator_text(op),
                         tp_jtype_name(a), tp_jtype_name(b));
}

tp_status tp_jnegate(tp_jinja *j, const tp_jvalue *a, bool minus, tp_jvalue *out)
{
    if (a->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, a);
    if (!tp_jis_number(a))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "bad operand type for unary %c: '%s'", minus ? '-' : '+', tp_jtype_name(a));
    if (a->type == TP_J_FLOAT) {
        *out = tp_jfloat(minus ? -a->real : a->real);
        return TP_OK;
    }
    tp_jint result = tp_jint_of(a);
    if (minus && __builtin_sub_overflow((tp_jint)0, result, &result)) return overflow(j);
    *out = tp_jinteger(result);
    return TP_OK;
}

/* ---- rounding ---- */

/* Half to even at 10^digits for digits < 0. */
static tp_status round_int(tp_jinja *j, tp_jint value, tp_jint digits, tp_jvalue *out)
{
    *out = tp_jinteger(value);
    if (digits >= 0) return TP_OK;
    tp_jvalue power;
    if (digits < -37) {
        *out = tp_jinteger(0);
        return TP_OK;
    }
    TP_TRY(int_power(j, 10, -digits, &power));
    tp_jint unit = power.integer, rest = value % unit, low = value - rest;
    if (rest < 0) {
        rest += unit;
        low -= unit;
    }
    bool odd = low / unit % 2 != 0;
    if (rest > unit / 2 || (rest == unit / 2 && odd)) low += unit;
    *out = tp_jinteger(low);
    return TP_OK;
}

tp_status tp_jround(tp_jinja *j, const tp_jvalue *number, const tp_jint *digits, tp_jvalue *out)
{
    if (!tp_jis_number(number))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "type %s doesn't define __round__ method", tp_jtype_name(number));
    if (tp_jis_int(number)) return round_int(j, tp_jint_of(number), digits == NULL ? 0 : *digits, out);
    double d = number->real;
    if (digits == NULL) {
        if (!(fabs(d) < 0x1p127))
            return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "cannot convert float infinity or NaN to integer");
        *out = tp_jinteger((tp_jint)nearbyint(d));
        return TP_OK;
    }
    *out = *number;
    if (!isfinite(d) || *digits > 323) return TP_OK;
    if (*digits < -308) {
        *out = tp_jfloat(copysign(0, d));
        return TP_OK;
    }
    if (*digits >= 0) { /* printf rounds the exact binary value to the nearest, ties to even, which is what Python does */
        char text[400 + 330];
        snprintf(text, sizeof text, "%.*f", (int)*digits, d);
        *out = tp_jfloat(strtod(text, NULL));
        return TP_OK;
    }
    double unit = pow(10, -(double)*digits);
    *out = tp_jfloat(nearbyint(d / unit) * unit);
    return TP_OK;
}
