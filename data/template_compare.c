/* What operators and filters ask of values: type, truth, equality, order, membership, items, sorting.
 *
 * Everything that walks into containers counts its depth, since a template can nest lists without bound and namespaces into
 * themselves; everything that compares is charged. */
#include <math.h>

#include "data/template_parser.h"
#include "data/template_text.h"

/* ---- types ---- */

const char *tp_jtype_name(const tp_jvalue *v)
{
    static const char *const names[TP_J_TYPE_COUNT] = {[TP_J_MISSING] = "Undefined",
                                                       [TP_J_UNDEFINED] = "Undefined",
                                                       [TP_J_NONE] = "NoneType",
                                                       [TP_J_BOOL] = "bool",
                                                       [TP_J_INT] = "int",
                                                       [TP_J_FLOAT] = "float",
                                                       [TP_J_STRING] = "str",
                                                       [TP_J_BYTES] = "bytes",
                                                       [TP_J_LIST] = "list",
                                                       [TP_J_TUPLE] = "tuple",
                                                       [TP_J_DICT] = "dict",
                                                       [TP_J_RANGE] = "range",
                                                       [TP_J_VIEW] = "dict view",
                                                       [TP_J_ITERATOR] = "generator",
                                                       [TP_J_NAMESPACE] = "Namespace",
                                                       [TP_J_MACRO] = "Macro",
                                                       [TP_J_LOOP] = "LoopContext",
                                                       [TP_J_CYCLER] = "Cycler",
                                                       [TP_J_JOINER] = "Joiner",
                                                       [TP_J_FUNCTION] = "function",
                                                       [TP_J_METHOD] = "builtin_function_or_method"};
    if (v->type == TP_J_VIEW)
        return v->flags == TP_J_KEYS ? "dict_keys" : v->flags == TP_J_VALUES ? "dict_values" : "dict_items";
    return v->type == TP_J_STRING && (v->flags & TP_J_MARKUP) != 0 ? "Markup" : names[v->type];
}

bool tp_jtruth(const tp_jvalue *v)
{
    switch (v->type) {
    case TP_J_MISSING:
    case TP_J_UNDEFINED:
    case TP_J_NONE: return false;
    case TP_J_BOOL: return v->truth;
    case TP_J_INT: return v->integer != 0;
    case TP_J_FLOAT: return v->real != 0;
    case TP_J_STRING:
    case TP_J_BYTES:
    case TP_J_RANGE: return v->len > 0;
    case TP_J_LIST:
    case TP_J_TUPLE: return v->list->n > 0;
    case TP_J_DICT:
    case TP_J_VIEW: return v->dict->n > 0;
    default: return true;
    }
}

/* Tuples ask their items, as deep as anyone nests them. */
static bool hashable(const tp_jvalue *v, int depth)
{
    if (v->type == TP_J_TUPLE) {
        bool all = depth < 100;
        for (size_t i = 0; all && i < v->list->n; i++) all = hashable(&v->list->items[i], depth + 1);
        return all;
    }
    return v->type != TP_J_LIST && v->type != TP_J_DICT && !(v->type == TP_J_VIEW && v->flags != TP_J_VALUES);
}

bool tp_jhashable(const tp_jvalue *v)
{
    return hashable(v, 0);
}

bool tp_jiterable(const tp_jvalue *v)
{
    switch (v->type) {
    case TP_J_UNDEFINED:
    case TP_J_STRING:
    case TP_J_BYTES:
    case TP_J_LIST:
    case TP_J_TUPLE:
    case TP_J_DICT:
    case TP_J_RANGE:
    case TP_J_VIEW:
    case TP_J_LOOP:
    case TP_J_ITERATOR: return true;
    default: return false;
    }
}

bool tp_jcallable(const tp_jvalue *v)
{
    return v->type == TP_J_MACRO || v->type == TP_J_LOOP || v->type == TP_J_JOINER || v->type == TP_J_FUNCTION ||
           v->type == TP_J_METHOD || v->type == TP_J_UNDEFINED;
}

tp_status tp_jfail_undefined(tp_jinja *j, const tp_jvalue *v)
{
    int n = v->len > 200 ? 200 : (int)v->len;
    if ((v->flags & TP_J_HINT) != 0) return tp_jinja_fail(j, TP_TEMPLATE_UNDEFINED, "%.*s", n, v->text);
    if ((v->flags & TP_J_MEMBER) == 0) return tp_jinja_fail(j, TP_TEMPLATE_UNDEFINED, "'%.*s' is undefined", n, v->text);
    tp_jvalue owner = {.type = v->owner};
    if ((v->flags & TP_J_UNSAFE) != 0)
        return tp_jinja_fail(j, TP_TEMPLATE_SECURITY, "access to attribute '%.*s' of '%s' object is unsafe", n, v->text,
                             tp_jtype_name(&owner));
    return tp_jinja_fail(j, TP_TEMPLATE_UNDEFINED, "'%s object' has no attribute '%.*s'", tp_jtype_name(&owner), n, v->text);
}

/* ---- equality and order ---- */

/* Exact order of an integer and a float; 2 for NaN. */
static int compare_int_float(tp_jint i, double d)
{
    if (isnan(d)) return 2;
    if (d >= 0x1p127) return -1;
    if (d < -0x1p127) return 1;
    tp_jint whole = (tp_jint)d;
    if (i != whole) return i < whole ? -1 : 1;
    double rest = d - (double)whole;
    return rest > 0 ? -1 : rest < 0 ? 1 : 0;
}

static int compare_numbers(const tp_jvalue *a, const tp_jvalue *b)
{
    if (tp_jis_int(a) && tp_jis_int(b)) return (tp_jint_of(a) > tp_jint_of(b)) - (tp_jint_of(a) < tp_jint_of(b));
    if (tp_jis_int(a)) return compare_int_float(tp_jint_of(a), b->real);
    if (tp_jis_int(b)) {
        int order = compare_int_float(tp_jint_of(b), a->real);
        return order == 2 ? 2 : -order;
    }
    if (isnan(a->real) || isnan(b->real)) return 2;
    return (a->real > b->real) - (a->real < b->real);
}

static int compare_bytes(const tp_jvalue *a, const tp_jvalue *b)
{
    size_t n = a->len < b->len ? a->len : b->len;
    int order = n > 0 ? memcmp(a->text, b->text, n) : 0;
    if (order != 0) return order < 0 ? -1 : 1;
    return (a->len > b->len) - (a->len < b->len);
}

static tp_status lists_equal(tp_jinja *j, const tp_jlist *a, const tp_jlist *b, bool *equal)
{
    *equal = a->n == b->n;
    for (size_t i = 0; *equal && i < a->n; i++) TP_TRY(tp_jequal(j, &a->items[i], &b->items[i], equal));
    return TP_OK;
}

static tp_status dicts_equal(tp_jinja *j, const tp_jdict *a, const tp_jdict *b, bool *equal)
{
    *equal = a->n == b->n;
    for (size_t i = 0; *equal && i < a->n; i++) {
        tp_jvalue *other;
        TP_TRY(tp_jdict_get(j, b, &a->pairs[i].key, &other));
        *equal = other != NULL;
        if (*equal) TP_TRY(tp_jequal(j, &a->pairs[i].value, other, equal));
    }
    return TP_OK;
}

static tp_status equal_of_one_type(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, bool *equal)
{
    switch (a->type) {
    case TP_J_MISSING:
    case TP_J_UNDEFINED:
    case TP_J_NONE: *equal = true; return TP_OK;
    case TP_J_STRING:
    case TP_J_BYTES:
        *equal = tp_span_equal(tp_jspan(a), tp_jspan(b));
        return a->len == b->len ? tp_jinja_charge_bytes(j, a->len) : TP_OK;
    case TP_J_LIST:
    case TP_J_TUPLE: return lists_equal(j, a->list, b->list, equal);
    case TP_J_DICT: return dicts_equal(j, a->dict, b->dict, equal);
    case TP_J_VIEW:
        *equal = a->dict == b->dict && a->flags == b->flags;
        return *equal || a->flags != b->flags || a->flags == TP_J_VALUES ? TP_OK : dicts_equal(j, a->dict, b->dict, equal);
    case TP_J_RANGE:
        *equal = a->len == b->len &&
                 (a->len == 0 || (a->range->start == b->range->start && (a->len == 1 || a->range->step == b->range->step)));
        return TP_OK;
    default: *equal = a->range == b->range; return TP_OK; /* identity of what they point to */
    }
}

tp_status tp_jequal(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, bool *equal)
{
    *equal = false;
    TP_TRY(tp_jinja_charge(j, 1));
    if (tp_jis_number(a) && tp_jis_number(b)) {
        *equal = compare_numbers(a, b) == 0;
        return TP_OK;
    }
    if (a->type != b->type) return TP_OK;
    TP_TRY(tp_jinja_enter(j));
    tp_status st = equal_of_one_type(j, a, b, equal);
    tp_jinja_leave(j);
    return st;
}

static tp_status compare_lists(tp_jinja *j, const char *op, const tp_jlist *a, const tp_jlist *b, int *order)
{
    for (size_t i = 0; i < a->n && i < b->n; i++) {
        bool equal;
        TP_TRY(tp_jequal(j, &a->items[i], &b->items[i], &equal));
        if (equal) continue;
        TP_TRY(tp_jinja_enter(j));
        tp_status st = tp_jcompare(j, op, &a->items[i], &b->items[i], order);
        tp_jinja_leave(j);
        return st;
    }
    *order = (a->n > b->n) - (a->n < b->n);
    return TP_OK;
}

tp_status tp_jcompare(tp_jinja *j, const char *op, const tp_jvalue *a, const tp_jvalue *b, int *order)
{
    TP_TRY(tp_jinja_charge(j, 1));
    if (a->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, a);
    if (b->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, b);
    if (tp_jis_number(a) && tp_jis_number(b)) {
        *order = compare_numbers(a, b);
        return TP_OK;
    }
    if (a->type == b->type && (a->type == TP_J_STRING || a->type == TP_J_BYTES)) {
        *order = compare_bytes(a, b); /* the order of UTF-8 bytes is that of code points */
        return tp_jinja_charge_bytes(j, a->len < b->len ? a->len : b->len);
    }
    if (a->type == b->type && tp_jis_list(a)) return compare_lists(j, op, a->list, b->list, order);
    return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'%s' not supported between instances of '%s' and '%s'", op, tp_jtype_name(a),
                         tp_jtype_name(b));
}

tp_status tp_jcontains(tp_jinja *j, const tp_jvalue *container, const tp_jvalue *item, bool *found)
{
    *found = false;
    if (container->type == TP_J_STRING) {
        if (!tp_jis_string(item))
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'in <string>' requires string as left operand, not %s",
                                 tp_jtype_name(item));
        *found = item->len == 0 || memmem(container->text, container->len, item->text, item->len) != NULL;
        return tp_jinja_charge_bytes(j, container->len);
    }
    if (container->type == TP_J_DICT || (container->type == TP_J_VIEW && container->flags == TP_J_KEYS)) {
        tp_jvalue *value;
        if (!tp_jhashable(item)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unhashable type: '%s'", tp_jtype_name(item));
        TP_TRY(tp_jdict_get(j, container->dict, item, &value));
        *found = value != NULL;
        return TP_OK;
    }
    if (!tp_jiterable(container))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "argument of type '%s' is not iterable", tp_jtype_name(container));
    tp_jvalue *items;
    size_t n;
    TP_TRY(tp_jitems(j, container, &items, &n));
    for (size_t i = 0; !*found && i < n; i++) TP_TRY(tp_jequal(j, &items[i], item, found));
    return TP_OK;
}

/* ---- iteration ---- */

size_t tp_jchars(const char *s, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++) n += ((unsigned char)s[i] & 0xC0) != 0x80;
    return n;
}

size_t tp_jchars_bytes(const char *s, size_t len, size_t n)
{
    size_t i = 0;
    for (; i < len && n > 0; n--) {
        i++;
        while (i < len && ((unsigned char)s[i] & 0xC0) == 0x80) i++;
    }
    return i;
}

tp_status tp_jlength(tp_jinja *j, const tp_jvalue *v, size_t *n)
{
    switch (v->type) {
    case TP_J_UNDEFINED: *n = 0; return TP_OK;
    case TP_J_STRING: *n = tp_jchars(v->text, v->len); return tp_jinja_charge_bytes(j, v->len);
    case TP_J_BYTES:
    case TP_J_RANGE: *n = v->len; return TP_OK;
    case TP_J_LIST:
    case TP_J_TUPLE: *n = v->list->n; return TP_OK;
    case TP_J_DICT:
    case TP_J_VIEW: *n = v->dict->n; return TP_OK;
    default: return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "object of type '%s' has no len()", tp_jtype_name(v));
    }
}

static tp_status string_items(tp_jinja *j, const tp_jvalue *v, tp_jvalue *items)
{
    for (size_t at = 0, i = 0; at < v->len; i++) {
        size_t n = tp_jchars_bytes(v->text + at, v->len - at, 1);
        items[i] = tp_jslice(v, at, n);
        items[i].flags = 0;
        at += n;
    }
    return tp_jinja_charge(j, v->len / 16);
}

static tp_status dict_items(tp_jinja *j, const tp_jvalue *v, tp_jvalue *items)
{
    int what = v->type == TP_J_VIEW ? v->flags : TP_J_KEYS;
    for (size_t i = 0; i < v->dict->n; i++) {
        const tp_jpair *pair = &v->dict->pairs[i];
        if (what == TP_J_ITEMS)
            TP_TRY(tp_jtuple2(j, &pair->key, &pair->value, &items[i]));
        else
            items[i] = what == TP_J_KEYS ? pair->key : pair->value;
    }
    return TP_OK;
}

tp_status tp_jitems(tp_jinja *j, const tp_jvalue *v, tp_jvalue **items, size_t *n)
{
    *items = NULL;
    *n = 0;
    if (!tp_jiterable(v)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'%s' object is not iterable", tp_jtype_name(v));
    if (v->type == TP_J_UNDEFINED || v->type == TP_J_LOOP) return TP_OK;
    if (v->type == TP_J_ITERATOR) {
        *n = v->iter->n - v->iter->at;
        *items = *n > 0 ? v->iter->items + v->iter->at : NULL;
        v->iter->at = v->iter->n;
        return TP_OK;
    }
    TP_TRY(tp_jlength(j, v, n));
    TP_TRY(tp_jinja_charge(j, *n / 16));
    if (tp_jis_list(v)) {
        *items = v->list->items;
        return TP_OK;
    }
    *items = tp_jinja_alloc(j, *n, sizeof **items);
    if (*items == NULL) return j->status;
    if (v->type == TP_J_STRING) return string_items(j, v, *items);
    for (size_t i = 0; i < *n && v->type == TP_J_RANGE; i++)
        (*items)[i] = tp_jinteger(v->range->start + (tp_jint)i * v->range->step);
    for (size_t i = 0; i < *n && v->type == TP_J_BYTES; i++) (*items)[i] = tp_jinteger((unsigned char)v->text[i]);
    return v->type == TP_J_RANGE || v->type == TP_J_BYTES ? TP_OK : dict_items(j, v, *items);
}

/* Merges the sorted halves [low, mid) and [mid, high) of order, an array of positions, into `to`. */
static tp_status merge(tp_jinja *j, const tp_jvalue *keys, const size_t *order, size_t low, size_t mid, size_t high,
                       bool reverse, size_t *to)
{
    size_t a = low, b = mid;
    for (size_t i = low; i < high; i++) {
        bool take_b = a == mid;
        if (a < mid && b < high) {
            int c;
            /* Python asks only "is the later one smaller?", and keeps equals in order in both directions. */
            if (reverse)
                TP_TRY(tp_jcompare(j, "<", &keys[order[a]], &keys[order[b]], &c));
            else
                TP_TRY(tp_jcompare(j, "<", &keys[order[b]], &keys[order[a]], &c));
            take_b = c == -1;
        }
        to[i] = take_b ? order[b++] : order[a++];
    }
    return TP_OK;
}

tp_status tp_jsort(tp_jinja *j, tp_jvalue *keys, tp_jvalue *items, size_t n, bool reverse)
{
    size_t *order = tp_jinja_alloc(j, n, sizeof *order), *other = tp_jinja_alloc(j, n, sizeof *other);
    tp_jvalue *sorted = tp_jinja_alloc(j, n, sizeof *sorted);
    if (order == NULL || other == NULL || sorted == NULL) return j->status;
    for (size_t i = 0; i < n; i++) order[i] = i;
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t low = 0; low < n; low += 2 * width) {
            size_t mid = low + width < n ? low + width : n, high = low + 2 * width < n ? low + 2 * width : n;
            TP_TRY(merge(j, keys, order, low, mid, high, reverse, other));
        }
        size_t *swap = order;
        order = other;
        other = swap;
    }
    for (size_t i = 0; i < n; i++) sorted[i] = items[order[i]];
    if (n > 0) memcpy(items, sorted, n * sizeof *items);
    return TP_OK;
}
