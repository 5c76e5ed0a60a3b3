/* Attributes, items and calls: what a template can reach from a value, and the global functions.
 *
 * There is no host object behind a value, so the sandbox is what this file lists. Methods that would change a list or dict
 * exist in Python and are forbidden there; here they are undefined values that complain when used. */
#include "data/template_object.h"

#include "data/template_text.h"

const tp_jbuiltin *tp_jfind_builtin(const tp_jbuiltin *table, tp_span name)
{
    for (; table->name != NULL; table++)
        if (tp_span_is(name, table->name)) return table;
    return NULL;
}

/* ---- undefined members ---- */

static tp_jvalue undefined_member(const tp_jvalue *object, tp_span name, bool unsafe)
{
    return (tp_jvalue){.type = TP_J_UNDEFINED,
                       .flags = (uint8_t)(TP_J_MEMBER | (unsafe ? TP_J_UNSAFE : 0)),
                       .owner = object->type,
                       .len = name.len,
                       .text = name.data};
}

static tp_status undefined_item(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *key, tp_jvalue *out)
{
    tp_jvalue text;
    if (tp_jis_string(key)) {
        *out = undefined_member(object, tp_jspan(key), false);
        return TP_OK;
    }
    TP_TRY(tp_jstr(j, key, &text));
    *out = undefined_member(object, tp_jspan(&text), false);
    return TP_OK;
}

/* Python gives every object attributes like __class__, which no template may touch. */
static bool is_dunder(tp_span name)
{
    return name.len > 4 && memcmp(name.data, "__", 2) == 0 && memcmp(name.data + name.len - 2, "__", 2) == 0;
}

static bool is_one_of(tp_span name, const char *const *names)
{
    for (; *names != NULL; names++)
        if (tp_span_is(name, *names)) return true;
    return false;
}

static bool is_mutator(const tp_jvalue *object, tp_span name)
{
    static const char *const list[] = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort", NULL};
    static const char *const dict[] = {"clear", "pop", "popitem", "setdefault", "update", NULL};
    return (object->type == TP_J_LIST && is_one_of(name, list)) || (object->type == TP_J_DICT && is_one_of(name, dict));
}

/* ---- methods of containers ---- */

static tp_status view(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, uint8_t kind, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "a dict view", args, "", 0, NULL));
    *out = *self;
    out->type = TP_J_VIEW;
    out->flags = kind;
    return TP_OK;
}
static tp_status dict_keys(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return view(j, self, args, TP_J_KEYS, out);
}
static tp_status dict_values(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return view(j, self, args, TP_J_VALUES, out);
}
static tp_status dict_items(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return view(j, self, args, TP_J_ITEMS, out);
}

static tp_status dict_get(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *found;
    TP_TRY(tp_jbind(j, "get", args, "key default /", 1, bound));
    if (!tp_jhashable(&bound[0])) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unhashable type: '%s'", tp_jtype_name(&bound[0]));
    TP_TRY(tp_jdict_get(j, self->dict, &bound[0], &found));
    *out = found != NULL ? *found : bound[1].type == TP_J_MISSING ? tp_jnone() : bound[1];
    return TP_OK;
}

static tp_status copy(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "copy", args, "", 0, NULL));
    *out = *self; /* nothing can change either of the two */
    return TP_OK;
}

static tp_status sequence_index(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3], *items;
    tp_jint start, stop;
    size_t n;
    TP_TRY(tp_jbind(j, "index", args, "value start stop /", 1, bound));
    TP_TRY(tp_jitems(j, self, &items, &n));
    TP_TRY(tp_jarg_int(j, &bound[1], 0, &start));
    TP_TRY(tp_jarg_int(j, &bound[2], (tp_jint)n, &stop));
    if (start < 0) start = start + (tp_jint)n < 0 ? 0 : start + (tp_jint)n;
    if (stop < 0) stop += (tp_jint)n;
    for (tp_jint i = start; i < stop && i < (tp_jint)n; i++) {
        bool equal;
        TP_TRY(tp_jequal(j, &items[i], &bound[0], &equal));
        *out = tp_jinteger(i);
        if (equal) return TP_OK;
    }
    return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "value is not in the %s", tp_jtype_name(self));
}

static tp_status sequence_count(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue value, *items;
    tp_jint count = 0;
    size_t n;
    TP_TRY(tp_jbind(j, "count", args, "value /", 1, &value));
    TP_TRY(tp_jitems(j, self, &items, &n));
    for (size_t i = 0; i < n; i++) {
        bool equal;
        TP_TRY(tp_jequal(j, &items[i], &value, &equal));
        count += equal;
    }
    *out = tp_jinteger(count);
    return TP_OK;
}

static tp_status bytes_decode(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2];
    TP_TRY(tp_jbind(j, "decode", args, "encoding errors", 0, bound));
    *out = tp_jtext(self->text, self->len); /* bytes come from encode() alone, and are UTF-8 */
    return TP_OK;
}

static tp_status float_is_integer(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "is_integer", args, "", 0, NULL));
    double d = tp_jdouble_of(self);
    *out = tp_jbool(d - d == 0 && (d >= 0x1p53 || d <= -0x1p53 || d == (double)(int64_t)d));
    return TP_OK;
}

static tp_status cycler_next(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "next", args, "", 0, NULL));
    *out = self->cycler->items[self->cycler->at];
    self->cycler->at = (self->cycler->at + 1) % self->cycler->n;
    return TP_OK;
}

static tp_status cycler_reset(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "reset", args, "", 0, NULL));
    self->cycler->at = 0;
    *out = tp_jnone();
    return TP_OK;
}

static tp_status dict_fromkeys(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *items;
    size_t n;
    (void)self;
    TP_TRY(tp_jbind(j, "fromkeys", args, "iterable value /", 1, bound));
    if (bound[1].type == TP_J_MISSING) bound[1] = tp_jnone();
    TP_TRY(tp_jitems(j, &bound[0], &items, &n));
    TP_TRY(tp_jdict_new(j, TP_J_DICT, n, out));
    for (size_t i = 0; i < n; i++) TP_TRY(tp_jdict_set(j, out->dict, &items[i], &bound[1]));
    return TP_OK;
}

static const tp_jbuiltin *find_method(const tp_jvalue *object, tp_span name)
{
    static const tp_jbuiltin dict[] = {
        {"get", dict_get}, {"items", dict_items},       {"keys", dict_keys}, {"values", dict_values},
        {"copy", copy},    {"fromkeys", dict_fromkeys}, {NULL, NULL}};
    static const tp_jbuiltin list[] = {{"index", sequence_index}, {"count", sequence_count}, {"copy", copy}, {NULL, NULL}};
    static const tp_jbuiltin tuple[] = {{"index", sequence_index}, {"count", sequence_count}, {NULL, NULL}};
    static const tp_jbuiltin bytes[] = {{"decode", bytes_decode}, {NULL, NULL}};
    static const tp_jbuiltin number[] = {{"is_integer", float_is_integer}, {NULL, NULL}};
    static const tp_jbuiltin cycler[] = {{"next", cycler_next}, {"reset", cycler_reset}, {NULL, NULL}};
    static const tp_jbuiltin dict_type[] = {{"fromkeys", dict_fromkeys}, {NULL, NULL}};
    switch (object->type) {
    case TP_J_STRING: return tp_jfind_string_method(name);
    case TP_J_BYTES: return tp_jfind_builtin(bytes, name);
    case TP_J_DICT: return tp_jfind_builtin(dict, name);
    case TP_J_LIST: return tp_jfind_builtin(list, name);
    case TP_J_TUPLE:
    case TP_J_RANGE: return tp_jfind_builtin(tuple, name);
    case TP_J_FLOAT: return tp_jfind_builtin(number, name);
    case TP_J_CYCLER: return tp_jfind_builtin(cycler, name);
    case TP_J_FUNCTION: return strcmp(object->function->name, "dict") == 0 ? tp_jfind_builtin(dict_type, name) : NULL;
    default: return NULL;
    }
}

/* ---- attributes ---- */

/* Attributes that are values of their own. */
static tp_status plain_attribute(tp_jinja *j, const tp_jvalue *object, tp_span name, tp_jvalue *out, bool *found)
{
    *found = true;
    switch (object->type) {
    case TP_J_BOOL:
    case TP_J_INT:
    case TP_J_FLOAT:
        *out = object->type == TP_J_FLOAT ? *object : tp_jinteger(tp_jint_of(object));
        if (tp_span_is(name, "real") || (object->type != TP_J_FLOAT && tp_span_is(name, "numerator"))) return TP_OK;
        if (object->type != TP_J_FLOAT) *out = tp_jinteger(tp_span_is(name, "denominator"));
        if (object->type == TP_J_FLOAT) *out = tp_jfloat(0);
        if (tp_span_is(name, "imag") || (object->type != TP_J_FLOAT && tp_span_is(name, "denominator"))) return TP_OK;
        break;
    case TP_J_RANGE:
        *out = tp_jinteger(tp_span_is(name, "start")  ? object->range->start
                           : tp_span_is(name, "stop") ? object->range->stop
                                                      : object->range->step);
        if (tp_span_is(name, "start") || tp_span_is(name, "stop") || tp_span_is(name, "step")) return TP_OK;
        break;
    case TP_J_TUPLE:
        if ((object->flags & TP_J_GROUP) == 0 || !(tp_span_is(name, "grouper") || tp_span_is(name, "list"))) break;
        *out = object->list->items[tp_span_is(name, "list")];
        return TP_OK;
    case TP_J_CYCLER:
        *out = object->cycler->items[object->cycler->at];
        if (tp_span_is(name, "current")) return TP_OK;
        break;
    case TP_J_LOOP: return tp_jloop_getattr(j, object, name, out, found);
    case TP_J_MACRO: return tp_jmacro_getattr(j, object->macro, name, out, found);
    case TP_J_NAMESPACE: {
        tp_jvalue key = tp_jtext(name.data, name.len), *value;
        TP_TRY(tp_jdict_get(j, object->dict, &key, &value));
        *found = value != NULL;
        if (*found) *out = *value;
        return TP_OK;
    }
    default: break;
    }
    *found = false;
    return TP_OK;
}

/* getattr(object, name), sandboxed: *found tells whether Python would find it, safe or not. */
static tp_status attribute(tp_jinja *j, const tp_jvalue *object, tp_span name, tp_jvalue *out, bool *found)
{
    TP_TRY(plain_attribute(j, object, name, out, found));
    if (*found) return TP_OK;
    const tp_jbuiltin *def = find_method(object, name);
    if (def == NULL) {
        *found = is_dunder(name) || is_mutator(object, name);
        if (*found) *out = undefined_member(object, name, true);
        return TP_OK;
    }
    tp_jmethod *method = tp_jinja_alloc(j, 1, sizeof *method);
    if (method == NULL) return j->status;
    *method = (tp_jmethod){def, *object};
    *out = tp_jvalue_of(TP_J_METHOD);
    out->method = method;
    *found = true;
    return TP_OK;
}

/* ---- items ---- */

/* object[index] of a sequence; *found is false if there is none. */
static tp_status item_at(tp_jinja *j, const tp_jvalue *object, tp_jint i, tp_jvalue *out, bool *found)
{
    size_t n;
    TP_TRY(tp_jlength(j, object, &n));
    if (i < 0) i += (tp_jint)n;
    *found = i >= 0 && i < (tp_jint)n;
    if (!*found) return TP_OK;
    if (tp_jis_list(object)) *out = object->list->items[i];
    if (object->type == TP_J_RANGE) *out = tp_jinteger(object->range->start + i * object->range->step);
    if (object->type == TP_J_BYTES) *out = tp_jinteger((unsigned char)object->text[i]);
    if (object->type != TP_J_STRING) return TP_OK;
    size_t at = tp_jchars_bytes(object->text, object->len, (size_t)i);
    *out = tp_jslice(object, at, tp_jchars_bytes(object->text + at, object->len - at, 1));
    return TP_OK;
}

static bool is_indexable(const tp_jvalue *v)
{
    return tp_jis_list(v) || v->type == TP_J_STRING || v->type == TP_J_RANGE || v->type == TP_J_BYTES;
}

/* object[key] without attributes. */
static tp_status item(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *key, tp_jvalue *out, bool *found)
{
    *found = false;
    if (object->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, object);
    if (object->type == TP_J_DICT) {
        tp_jvalue *value;
        TP_TRY(tp_jdict_get(j, object->dict, key, &value));
        *found = value != NULL;
        if (*found) *out = *value;
        return TP_OK;
    }
    return is_indexable(object) && tp_jis_int(key) ? item_at(j, object, tp_jint_of(key), out, found) : TP_OK;
}

tp_status tp_jgetattr(tp_jinja *j, const tp_jvalue *object, tp_span name, tp_jvalue *out)
{
    bool found;
    tp_jvalue key = tp_jtext(name.data, name.len);
    if (object->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, object);
    TP_TRY(attribute(j, object, name, out, &found));
    if (found) return TP_OK;
    TP_TRY(item(j, object, &key, out, &found));
    if (!found) *out = undefined_member(object, name, false);
    return TP_OK;
}

tp_status tp_jgetitem(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *key, tp_jvalue *out)
{
    bool found;
    TP_TRY(item(j, object, key, out, &found));
    if (found) return TP_OK;
    if (tp_jis_string(key)) TP_TRY(attribute(j, object, tp_jspan(key), out, &found));
    return found ? TP_OK : undefined_item(j, object, key, out);
}

/* One bound of a slice: counted from the end if negative, then clamped. */
static tp_status slice_bound(tp_jinja *j, const tp_jvalue *v, tp_jint n, bool backwards, tp_jint otherwise, tp_jint *out)
{
    tp_jint low = backwards ? -1 : 0, high = backwards ? n - 1 : n;
    if (v->type == TP_J_NONE) {
        *out = otherwise;
        return TP_OK;
    }
    if (!tp_jis_int(v))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "slice indices must be integers or None, not %s", tp_jtype_name(v));
    tp_jint i = tp_jint_of(v);
    if (i < 0) i = i < -n ? low : i + n;
    *out = i > high ? high : i;
    return TP_OK;
}

static tp_status slice_string(tp_jinja *j, const tp_jvalue *s, tp_jint first, tp_jint step, size_t count, tp_jvalue *out)
{
    tp_jsink sink = {0};
    if (step == 1) {
        size_t at = tp_jchars_bytes(s->text, s->len, (size_t)first);
        *out = tp_jslice(s, at, tp_jchars_bytes(s->text + at, s->len - at, count));
        return TP_OK;
    }
    tp_jvalue *chars;
    size_t n;
    TP_TRY(tp_jitems(j, s, &chars, &n));
    for (size_t i = 0; i < count; i++) TP_TRY(tp_jsink_string(j, &sink, &chars[first + (tp_jint)i * step]));
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = s->flags;
    return TP_OK;
}

static tp_status slice_list(tp_jinja *j, const tp_jvalue *list, tp_jint first, tp_jint step, size_t count, tp_jvalue *out)
{
    tp_jvalue *items = list->list->items;
    if (step == 1) return tp_jlist_new(j, list->type, count > 0 ? items + first : NULL, count, out);
    tp_jvalue *picked = tp_jinja_alloc(j, count, sizeof *picked);
    if (picked == NULL) return j->status;
    for (size_t i = 0; i < count; i++) picked[i] = items[first + (tp_jint)i * step];
    return tp_jlist_new(j, list->type, picked, count, out);
}

static tp_status make_range(tp_jinja *j, tp_jint start, tp_jint stop, tp_jint step, tp_jvalue *out);

tp_status tp_jgetslice(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *start, const tp_jvalue *stop,
                       const tp_jvalue *step, tp_jvalue *out)
{
    size_t length;
    tp_jint by, first, last;
    if (object->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, object);
    if (!is_indexable(object)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'%s' object cannot be sliced", tp_jtype_name(object));
    TP_TRY(tp_jarg_int(j, step->type == TP_J_NONE ? &(tp_jvalue){0} : step, 1, &by));
    if (by == 0) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "slice step cannot be zero");
    TP_TRY(tp_jlength(j, object, &length));
    tp_jint n = (tp_jint)length;
    TP_TRY(slice_bound(j, start, n, by < 0, by < 0 ? n - 1 : 0, &first));
    TP_TRY(slice_bound(j, stop, n, by < 0, by < 0 ? -1 : n, &last));
    if (by > n) by = n + 1; /* no difference, and nothing overflows */
    if (by < -n) by = -n - 1;
    size_t count = by > 0 ? (last > first ? (size_t)((last - first - 1) / by + 1) : 0)
                          : (first > last ? (size_t)((first - last - 1) / -by + 1) : 0);
    TP_TRY(tp_jinja_charge(j, count / 16));
    const tp_jrange *r = object->range;
    if (object->type == TP_J_RANGE)
        return make_range(j, r->start + first * r->step, r->start + last * r->step, by * r->step, out);
    if (tp_jis_list(object)) return slice_list(j, object, first, by, count, out);
    if (object->type == TP_J_STRING) return slice_string(j, object, first, by, count, out);
    return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "slices of bytes are not supported");
}

tp_status tp_jgetpath(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *path, tp_jvalue *out)
{
    *out = *object;
    if (path->type == TP_J_NONE || path->type == TP_J_MISSING) return TP_OK;
    if (!tp_jis_string(path)) return tp_jgetitem(j, object, path, out);
    for (size_t at = 0; at <= path->len;) {
        const char *dot = memchr(path->text + at, '.', path->len - at);
        size_t end = dot != NULL ? (size_t)(dot - path->text) : path->len;
        tp_span part = {path->text + at, end - at};
        tp_jvalue from = *out, key = tp_jtext(part.data, part.len);
        tp_jint index;
        if (part.len > 0 && part.data[0] >= '0' && part.data[0] <= '9' && tp_jparse_int(part, 10, &index))
            key = tp_jinteger(index);
        TP_TRY(tp_jgetitem(j, &from, &key, out));
        at = end + 1;
    }
    return TP_OK;
}

/* ---- calls ---- */

tp_status tp_jcall_value(tp_jinja *j, const tp_jvalue *callee, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jinja_charge(j, 1));
    switch (callee->type) {
    case TP_J_FUNCTION: return callee->function->call(j, NULL, args, out);
    case TP_J_METHOD: return callee->method->def->call(j, &callee->method->self, args, out);
    case TP_J_MACRO: return tp_jcall_macro(j, callee->macro, args, out);
    case TP_J_LOOP: return tp_jcall_loop(j, callee->loop, args, out);
    case TP_J_JOINER:
        TP_TRY(tp_jbind(j, "joiner", args, "", 0, NULL));
        *out = callee->joiner->used ? *callee->joiner->separator : tp_jliteral("");
        callee->joiner->used = true;
        return TP_OK;
    case TP_J_UNDEFINED: return tp_jfail_undefined(j, callee);
    default: return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'%s' object is not callable", tp_jtype_name(callee));
    }
}

/* ---- global functions ---- */

static tp_status make_range(tp_jinja *j, tp_jint start, tp_jint stop, tp_jint step, tp_jvalue *out)
{
    enum { MAX_RANGE = 100000 };
    const tp_jint limit = (tp_jint)1 << 100; /* so that no sum of these overflows */
    if (start > limit || start < -limit || stop > limit || stop < -limit || step > limit || step < -limit)
        return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "range too big");
    tp_jint span = stop - start;
    tp_jint n = step > 0 ? (span > 0 ? (span - 1) / step + 1 : 0) : (span < 0 ? (span + 1) / step + 1 : 0);
    if (n > MAX_RANGE)
        return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "range too big: the sandbox blocks ranges larger than %d", MAX_RANGE);
    tp_jrange *range = tp_jinja_alloc(j, 1, sizeof *range);
    if (range == NULL) return j->status;
    *range = (tp_jrange){start, stop, step};
    *out = tp_jvalue_of(TP_J_RANGE);
    out->len = (size_t)n;
    out->range = range;
    return TP_OK;
}

static tp_status global_range(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3];
    tp_jint start, stop, step;
    (void)self;
    TP_TRY(tp_jbind(j, "range", args, "start stop step /", 1, bound));
    TP_TRY(tp_jarg_int(j, &bound[0], 0, &start));
    TP_TRY(tp_jarg_int(j, &bound[1], 0, &stop));
    TP_TRY(tp_jarg_int(j, &bound[2], 1, &step));
    if (step == 0) return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "range() arg 3 must not be zero");
    if (bound[1].type == TP_J_MISSING) return make_range(j, 0, start, 1, out);
    return make_range(j, start, stop, step, out);
}

/* dict(mapping or pairs, **more), for dict and namespace. */
static tp_status fill_dict(tp_jinja *j, const tp_jargs *args, tp_jtype type, tp_jvalue *out)
{
    tp_jvalue *pairs, *items;
    size_t n, m;
    if (args->n > 1) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "dict expected at most 1 argument, got %zu", args->n);
    TP_TRY(tp_jdict_new(j, type, 0, out));
    if (args->n == 1 && args->items[0].type == TP_J_DICT) {
        const tp_jdict *from = args->items[0].dict;
        for (size_t i = 0; i < from->n; i++) TP_TRY(tp_jdict_set(j, out->dict, &from->pairs[i].key, &from->pairs[i].value));
    } else if (args->n == 1) {
        TP_TRY(tp_jitems(j, &args->items[0], &pairs, &n));
        for (size_t i = 0; i < n; i++) {
            TP_TRY(tp_jitems(j, &pairs[i], &items, &m));
            if (m != 2)
                return tp_jinja_fail(j, TP_TEMPLATE_VALUE,
                                     "dictionary update sequence element #%zu has length %zu; 2 is required", i, m);
            TP_TRY(tp_jdict_set(j, out->dict, &items[0], &items[1]));
        }
    }
    for (size_t i = 0; i < args->n_keywords; i++) {
        tp_jvalue key = tp_jtext(args->keywords[i].name.data, args->keywords[i].name.len);
        TP_TRY(tp_jdict_set(j, out->dict, &key, &args->keywords[i].value));
    }
    return TP_OK;
}

static tp_status global_dict(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    (void)self;
    return fill_dict(j, args, TP_J_DICT, out);
}

static tp_status global_namespace(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    (void)self;
    TP_TRY(fill_dict(j, args, TP_J_NAMESPACE, out));
    for (size_t i = 0; i < out->dict->n; i++) {
        const tp_jvalue *key = &out->dict->pairs[i].key;
        if (tp_jis_string(key) && key->len > 0 && key->text[0] == '_')
            return tp_jinja_fail(j, TP_TEMPLATE_SECURITY,
                                 "a namespace cannot hold '%.*s': names with an underscore in front are private", (int)key->len,
                                 key->text);
    }
    return TP_OK;
}

static tp_status global_raise(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue message;
    (void)self, (void)out;
    TP_TRY(tp_jbind(j, "raise_exception", args, "message", 1, &message));
    TP_TRY(tp_jstr(j, &message, &j->raised));
    int n = j->raised.len > 1000 ? 1000 : (int)j->raised.len;
    return tp_jinja_fail(j, TP_TEMPLATE_RAISED, "%.*s", n, j->raised.text);
}

static tp_status global_strftime(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue format;
    (void)self;
    TP_TRY(tp_jbind(j, "strftime_now", args, "format", 1, &format));
    TP_TRY(tp_jarg_string(j, "strftime_now", &format));
    if (j->now == NULL) return tp_jinja_fail(j, TP_TEMPLATE_RUNTIME, "strftime_now: no time was given to this render");
    return tp_jstrftime(j, tp_jspan(&format), j->now, out);
}

static tp_status global_joiner(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue *separator = tp_jinja_alloc(j, 1, sizeof *separator);
    tp_jjoiner *joiner = tp_jinja_alloc(j, 1, sizeof *joiner);
    (void)self;
    if (separator == NULL || joiner == NULL) return j->status;
    TP_TRY(tp_jbind(j, "joiner", args, "sep", 0, separator));
    if (separator->type == TP_J_MISSING) *separator = tp_jliteral(", ");
    *joiner = (tp_jjoiner){separator, false};
    *out = tp_jvalue_of(TP_J_JOINER);
    out->joiner = joiner;
    return TP_OK;
}

static tp_status global_cycler(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    (void)self;
    if (args->n == 0) return tp_jinja_fail(j, TP_TEMPLATE_RUNTIME, "at least one item has to be provided");
    tp_jvalue *items = tp_jinja_alloc(j, args->n, sizeof *items);
    tp_jcycler *cycler = tp_jinja_alloc(j, 1, sizeof *cycler);
    if (items == NULL || cycler == NULL) return j->status;
    memcpy(items, args->items, args->n * sizeof *items);
    *cycler = (tp_jcycler){items, args->n, 0};
    *out = tp_jvalue_of(TP_J_CYCLER);
    out->cycler = cycler;
    return TP_OK;
}

const tp_jbuiltin *tp_jfind_global(tp_span name)
{
    static const tp_jbuiltin globals[] = {{"range", global_range},           {"dict", global_dict},
                                          {"namespace", global_namespace},   {"raise_exception", global_raise},
                                          {"strftime_now", global_strftime}, {"joiner", global_joiner},
                                          {"cycler", global_cycler},         {NULL, NULL}};
    return tp_jfind_builtin(globals, name);
}
