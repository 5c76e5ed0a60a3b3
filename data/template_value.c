/* Values: limits, sinks, construction, conversion from JSON, and what Python's operators ask of every type. */
#include "data/template_value.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "base/mem.h"
#include "data/template_parser.h"
#include "data/template_text.h"

/* ---- failure, limits ---- */

tp_status tp_jinja_fail(tp_jinja *j, tp_template_error error, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    j->error = error;
    j->status = tp_fail(j->ctx, TP_INVALID, "%s:%u: %s: %s", j->tmpl->name.data, j->line, tp_template_error_name(error), text);
    return j->status;
}

void *tp_jinja_alloc(tp_jinja *j, size_t count, size_t size)
{
    size_t bytes;
    if (!tp_mul_size(count, size, &bytes) || bytes > j->memory_left) {
        (void)tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "the values of the template need too much memory");
        return NULL;
    }
    void *memory = tp_arena_alloc(j->ctx, &j->arena, count, size);
    if (memory == NULL)
        j->status = TP_NOMEM;
    else
        j->memory_left -= bytes;
    return memory;
}

tp_status tp_jinja_charge(tp_jinja *j, size_t steps)
{
    if (steps <= (size_t)j->steps) {
        j->steps -= (int64_t)steps;
        return TP_OK;
    }
    return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "the template needs too many steps");
}

tp_status tp_jinja_enter(tp_jinja *j)
{
    if (j->depth >= TP_J_DEPTH) return tp_jinja_fail(j, TP_TEMPLATE_RECURSION, "nested too deep");
    j->depth++;
    return TP_OK;
}

/* ---- sinks ---- */

static tp_status sink_reserve(tp_jinja *j, tp_jsink *sink, size_t more)
{
    size_t need;
    if (!tp_add_size(sink->len, more, &need) || need > j->max_output) {
        char limit[32];
        return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "a text grows longer than %s", tp_format_bytes(j->max_output, limit));
    }
    if (need <= sink->capacity) return TP_OK;
    size_t capacity = need < 64 ? 64 : need + need / 2;
    char *data = tp_jinja_alloc(j, capacity, 1);
    if (data == NULL) return j->status;
    if (sink->len > 0) memcpy(data, sink->data, sink->len);
    sink->data = data;
    sink->capacity = capacity;
    return tp_jinja_charge_bytes(j, need);
}

tp_status tp_jsink_bytes(tp_jinja *j, tp_jsink *sink, const char *bytes, size_t n)
{
    if (n == 0) return TP_OK;
    TP_TRY(sink_reserve(j, sink, n));
    memcpy(sink->data + sink->len, bytes, n);
    sink->len += n;
    return tp_jinja_charge_bytes(j, n);
}

tp_status tp_jsink_text(tp_jinja *j, tp_jsink *sink, const char *text) { return tp_jsink_bytes(j, sink, text, strlen(text)); }

static tp_status add_mark(tp_jinja *j, tp_jsink *sink, size_t begin, size_t end, uint32_t source)
{
    if (sink->n_marks > 0) {
        tp_jmark *last = &sink->marks[sink->n_marks - 1];
        if (last->source == source && last->end == begin && source < TP_J_GENERATION) {
            last->end = end;
            return TP_OK;
        }
    }
    if (sink->n_marks == sink->capacity_marks) {
        size_t capacity = sink->capacity_marks == 0 ? 4 : 2 * sink->capacity_marks;
        tp_jmark *marks = tp_jinja_alloc(j, capacity, sizeof *marks);
        if (marks == NULL) return j->status;
        if (sink->n_marks > 0) memcpy(marks, sink->marks, sink->n_marks * sizeof *marks);
        sink->marks = marks;
        sink->capacity_marks = capacity;
    }
    sink->marks[sink->n_marks++] = (tp_jmark){begin, end, source};
    return tp_jinja_charge(j, 1);
}

tp_status tp_jsink_mark(tp_jinja *j, tp_jsink *sink, size_t begin, uint32_t source)
{
    bool empty = begin == sink->len && source < TP_J_GENERATION;
    return source == 0 || empty || sink->muted > 0 ? TP_OK : add_mark(j, sink, begin, sink->len, source);
}

tp_status tp_jsink_string(tp_jinja *j, tp_jsink *sink, const tp_jvalue *string)
{
    size_t base = sink->len;
    TP_TRY(tp_jsink_bytes(j, sink, string->text, string->len));
    if (string->map == NULL || sink->muted > 0) return TP_OK;
    const char *first = string->text, *last = first + string->len;
    TP_TRY(tp_jinja_charge(j, string->map->n / 4));
    for (size_t i = 0; i < string->map->n; i++) {
        const tp_jrun *r = &string->map->runs[i];
        const char *begin = r->begin < first ? first : r->begin, *end = r->end > last ? last : r->end;
        if (begin < end) TP_TRY(add_mark(j, sink, base + (size_t)(begin - first), base + (size_t)(end - first), r->source));
    }
    return TP_OK;
}

tp_status tp_jsink_for(tp_jinja *j, tp_jsink *sink, const char *bytes, size_t n, const tp_jvalue *string, size_t offset)
{
    size_t begin = sink->len;
    TP_TRY(tp_jsink_bytes(j, sink, bytes, n));
    if (string->map == NULL || sink->muted > 0) return TP_OK;
    const char *at = string->text + offset;
    TP_TRY(tp_jinja_charge(j, string->map->n / 4));
    for (size_t i = 0; i < string->map->n; i++) {
        const tp_jrun *r = &string->map->runs[i];
        if (r->begin <= at && at < r->end) TP_TRY(add_mark(j, sink, begin, sink->len, r->source));
    }
    return TP_OK;
}

tp_status tp_jsink_value(tp_jinja *j, const tp_jsink *sink, tp_jvalue *out)
{
    *out = tp_jtext(sink->len > 0 ? sink->data : "", sink->len);
    if (sink->n_marks == 0) return TP_OK;
    tp_jmap *map = tp_jinja_alloc(j, 1, sizeof *map + sink->n_marks * sizeof map->runs[0]);
    if (map == NULL) return j->status;
    map->n = sink->n_marks;
    for (size_t i = 0; i < map->n; i++) {
        const tp_jmark *m = &sink->marks[i];
        map->runs[i] = (tp_jrun){out->text + m->begin, out->text + m->end, m->source};
    }
    out->map = map;
    return TP_OK;
}

/* ---- construction ---- */

tp_status tp_jstring_copy(tp_jinja *j, const char *bytes, size_t n, tp_jvalue *out)
{
    char *copy = tp_jinja_alloc(j, n + 1, 1);
    if (copy == NULL) return j->status;
    if (n > 0) memcpy(copy, bytes, n);
    copy[n] = '\0';
    *out = tp_jtext(copy, n);
    return tp_jinja_charge_bytes(j, n);
}

tp_status tp_jsourced(tp_jinja *j, const char *text, size_t n, uint32_t source, tp_jvalue *out)
{
    *out = tp_jtext(text, n);
    if (source == 0 || n == 0) return TP_OK;
    tp_jmap *map = tp_jinja_alloc(j, 1, sizeof *map + sizeof map->runs[0]);
    if (map == NULL) return j->status;
    map->n = 1;
    map->runs[0] = (tp_jrun){text, text + n, source};
    out->map = map;
    return TP_OK;
}

tp_status tp_jlist_new(tp_jinja *j, tp_jtype type, tp_jvalue *items, size_t n, tp_jvalue *out)
{
    tp_jlist *list = tp_jinja_alloc(j, 1, sizeof *list);
    if (list == NULL) return j->status;
    *list = (tp_jlist){n, items, 0};
    *out = tp_jvalue_of(type);
    out->list = list;
    return tp_jinja_charge(j, n / 16);
}

tp_status tp_jtuple2(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, tp_jvalue *out)
{
    tp_jvalue *items = tp_jinja_alloc(j, 2, sizeof *items);
    if (items == NULL) return j->status;
    items[0] = *a;
    items[1] = *b;
    return tp_jlist_new(j, TP_J_TUPLE, items, 2, out);
}

tp_status tp_jiter_new(tp_jinja *j, tp_jvalue *items, size_t n, tp_jvalue *out)
{
    tp_jiter *iter = tp_jinja_alloc(j, 1, sizeof *iter);
    if (iter == NULL) return j->status;
    *iter = (tp_jiter){items, n, 0};
    *out = tp_jvalue_of(TP_J_ITERATOR);
    out->iter = iter;
    return TP_OK;
}

tp_status tp_jdict_new(tp_jinja *j, tp_jtype type, size_t n, tp_jvalue *out)
{
    tp_jdict *dict = tp_jinja_alloc(j, 1, sizeof *dict);
    if (dict == NULL) return j->status;
    *dict = (tp_jdict){0};
    if (n > 0) {
        dict->pairs = tp_jinja_alloc(j, n, sizeof *dict->pairs);
        if (dict->pairs == NULL) return j->status;
        dict->capacity = n;
    }
    *out = tp_jvalue_of(type);
    out->dict = dict;
    return TP_OK;
}

tp_status tp_jdict_get(tp_jinja *j, const tp_jdict *dict, const tp_jvalue *key, tp_jvalue **found)
{
    *found = NULL;
    if (!tp_jhashable(key)) return TP_OK;
    TP_TRY(tp_jinja_charge(j, dict->n / 16));
    for (size_t i = 0; i < dict->n; i++) {
        tp_jpair *pair = &dict->pairs[i];
        bool equal;
        if (key->type == TP_J_STRING && pair->key.type == TP_J_STRING)
            equal = tp_span_equal(tp_jspan(key), tp_jspan(&pair->key));
        else
            TP_TRY(tp_jequal(j, key, &pair->key, &equal));
        if (!equal) continue;
        *found = &pair->value;
        return TP_OK;
    }
    return TP_OK;
}

tp_status tp_jdict_set(tp_jinja *j, tp_jdict *dict, const tp_jvalue *key, const tp_jvalue *value)
{
    tp_jvalue *found;
    if (!tp_jhashable(key)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unhashable type: '%s'", tp_jtype_name(key));
    TP_TRY(tp_jdict_get(j, dict, key, &found));
    if (found != NULL) {
        *found = *value;
        return TP_OK;
    }
    if (dict->n == dict->capacity) {
        size_t capacity = dict->capacity == 0 ? 4 : 2 * dict->capacity;
        tp_jpair *pairs = tp_jinja_alloc(j, capacity, sizeof *pairs);
        if (pairs == NULL) return j->status;
        if (dict->n > 0) memcpy(pairs, dict->pairs, dict->n * sizeof *pairs);
        dict->pairs = pairs;
        dict->capacity = capacity;
    }
    dict->pairs[dict->n++] = (tp_jpair){*key, *value};
    return TP_OK;
}

tp_status tp_jpush(tp_jinja *j, tp_jvector *vector, const tp_jvalue *value)
{
    if (vector->n == vector->capacity) {
        size_t capacity = vector->capacity == 0 ? 8 : 2 * vector->capacity;
        tp_jvalue *items = tp_jinja_alloc(j, capacity, sizeof *items);
        if (items == NULL) return j->status;
        if (vector->n > 0) memcpy(items, vector->items, vector->n * sizeof *items);
        vector->items = items;
        vector->capacity = capacity;
    }
    vector->items[vector->n++] = *value;
    return tp_jinja_charge(j, 1);
}

/* ---- from JSON ---- */

static tp_status list_from_json(tp_jinja *j, const tp_json *json, uint32_t source, tp_jvalue *out)
{
    size_t n = tp_json_count(json);
    tp_jvalue *items = tp_jinja_alloc(j, n, sizeof *items);
    if (items == NULL) return j->status;
    for (size_t i = 0; i < n; i++) TP_TRY(tp_jvalue_from_json(j, tp_json_at(json, i), source, &items[i]));
    TP_TRY(tp_jlist_new(j, TP_J_LIST, items, n, out));
    out->list->source = source;
    return TP_OK;
}

static tp_status dict_from_json(tp_jinja *j, const tp_json *json, uint32_t source, tp_jvalue *out)
{
    size_t n = tp_json_count(json);
    TP_TRY(tp_jdict_new(j, TP_J_DICT, n, out));
    for (size_t i = 0; i < n; i++) { /* keys of JSON objects are distinct: no need to look them up */
        tp_span key = tp_json_key_at(json, i);
        tp_jpair *pair = &out->dict->pairs[i];
        TP_TRY(tp_jsourced(j, key.data, key.len, source, &pair->key));
        TP_TRY(tp_jvalue_from_json(j, tp_json_at(json, i), source, &pair->value));
    }
    out->dict->n = n;
    out->dict->source = source;
    return TP_OK;
}

static tp_status number_from_json(tp_jinja *j, const tp_json *json, tp_jvalue *out)
{
    tp_span text = tp_json_number_text(json);
    bool is_float = memchr(text.data, '.', text.len) || memchr(text.data, 'e', text.len) || memchr(text.data, 'E', text.len);
    tp_jint i = 0;
    double d = 0;
    if (is_float ? !tp_jparse_float(text, &d) : !tp_jparse_int(text, 10, &i))
        return tp_jinja_fail(j, TP_TEMPLATE_OVERFLOW, "a number in the variables is too large");
    *out = is_float ? tp_jfloat(d) : tp_jinteger(i);
    return TP_OK;
}

tp_status tp_jvalue_from_json(tp_jinja *j, const tp_json *json, uint32_t source, tp_jvalue *out)
{
    tp_status st = TP_OK;
    TP_TRY(tp_jinja_enter(j));
    switch (tp_json_type_of(json)) {
    case TP_JSON_NULL: *out = tp_jnone(); break;
    case TP_JSON_BOOL: *out = tp_jbool(tp_json_bool(json, false)); break;
    case TP_JSON_NUMBER: st = number_from_json(j, json, out); break;
    case TP_JSON_STRING: st = tp_jsourced(j, tp_json_string(json).data, tp_json_string(json).len, source, out); break;
    case TP_JSON_ARRAY: st = list_from_json(j, json, source, out); break;
    case TP_JSON_OBJECT: st = dict_from_json(j, json, source, out); break;
    }
    tp_jinja_leave(j);
    return st;
}

/* Content is a string, a list of parts whose "text" counts, or (a tool's result) anything, which counts as a whole. */
static tp_status content_from_json(tp_jinja *j, const tp_json *json, uint32_t source, tp_jvalue *out)
{
    if (tp_json_type_of(json) != TP_JSON_ARRAY) return tp_jvalue_from_json(j, json, source, out);
    TP_TRY(list_from_json(j, json, 0, out));
    for (size_t i = 0; i < out->list->n; i++) {
        tp_jvalue *part = &out->list->items[i];
        if (tp_jis_string(part)) TP_TRY(tp_jsourced(j, part->text, part->len, source, part));
        for (size_t k = 0; part->type == TP_J_DICT && k < part->dict->n; k++) {
            tp_jpair *pair = &part->dict->pairs[k];
            if (tp_jis_string(&pair->value) && tp_span_is(tp_jspan(&pair->key), "text"))
                TP_TRY(tp_jsourced(j, pair->value.text, pair->value.len, source, &pair->value));
        }
    }
    return TP_OK;
}

tp_status tp_jmember_from_json(tp_jinja *j, size_t message, tp_span name, const tp_json *json, tp_jvalue *out)
{
    if (message > (TP_J_GENERATION - 4) / 4) return tp_jinja_fail(j, TP_TEMPLATE_LIMIT, "too many messages");
    uint32_t source = (uint32_t)message * 4;
    if (tp_span_is(name, "content")) return content_from_json(j, json, source + TP_FIELD_CONTENT, out);
    if (tp_span_is(name, "reasoning_content") || tp_span_is(name, "thinking") || tp_span_is(name, "reasoning"))
        return tp_jvalue_from_json(j, json, source + TP_FIELD_REASONING, out);
    return tp_jvalue_from_json(j, json, tp_span_is(name, "tool_calls") ? source + TP_FIELD_TOOL_CALLS : 0, out);
}

tp_status tp_jmessages_from_json(tp_jinja *j, const tp_json *json, tp_jvalue *out)
{
    if (tp_json_type_of(json) != TP_JSON_ARRAY) return tp_jvalue_from_json(j, json, 0, out);
    size_t n = tp_json_count(json);
    tp_jvalue *items = tp_jinja_alloc(j, n, sizeof *items);
    if (items == NULL) return j->status;
    for (size_t i = 0; i < n; i++) {
        const tp_json *message = tp_json_at(json, i);
        TP_TRY(tp_jvalue_from_json(j, message, 0, &items[i]));
        for (size_t k = 0; items[i].type == TP_J_DICT && k < items[i].dict->n; k++) {
            tp_jpair *pair = &items[i].dict->pairs[k];
            TP_TRY(tp_jmember_from_json(j, i, tp_jspan(&pair->key), tp_json_at(message, k), &pair->value));
        }
    }
    return tp_jlist_new(j, TP_J_LIST, items, n, out);
}

/* ---- questions ---- */

const char *tp_jtype_name(const tp_jvalue *v)
{
    static const char *const names[TP_J_TYPE_COUNT] = {
        [TP_J_MISSING] = "Undefined", [TP_J_UNDEFINED] = "Undefined", [TP_J_NONE] = "NoneType", [TP_J_BOOL] = "bool",
        [TP_J_INT] = "int", [TP_J_FLOAT] = "float", [TP_J_STRING] = "str", [TP_J_BYTES] = "bytes", [TP_J_LIST] = "list",
        [TP_J_TUPLE] = "tuple", [TP_J_DICT] = "dict", [TP_J_RANGE] = "range", [TP_J_VIEW] = "dict view",
        [TP_J_ITERATOR] = "generator", [TP_J_NAMESPACE] = "Namespace", [TP_J_MACRO] = "Macro", [TP_J_LOOP] = "LoopContext",
        [TP_J_CYCLER] = "Cycler", [TP_J_JOINER] = "Joiner", [TP_J_FUNCTION] = "function", [TP_J_METHOD] = "builtin_function_or_method"};
    if (v->type == TP_J_VIEW) return v->flags == TP_J_KEYS ? "dict_keys" : v->flags == TP_J_VALUES ? "dict_values" : "dict_items";
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

bool tp_jhashable(const tp_jvalue *v) { return hashable(v, 0); }

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
        return tp_jinja_fail(j, TP_TEMPLATE_SECURITY, "access to attribute '%.*s' of '%s' object is unsafe", n, v->text, tp_jtype_name(&owner));
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
        *equal = a->len == b->len && (a->len == 0 || (a->range->start == b->range->start && (a->len == 1 || a->range->step == b->range->step)));
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
        return TP_OK;
    }
    if (a->type == b->type && tp_jis_list(a)) return compare_lists(j, op, a->list, b->list, order);
    return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'%s' not supported between instances of '%s' and '%s'", op, tp_jtype_name(a), tp_jtype_name(b));
}

tp_status tp_jcontains(tp_jinja *j, const tp_jvalue *container, const tp_jvalue *item, bool *found)
{
    *found = false;
    if (container->type == TP_J_STRING) {
        if (!tp_jis_string(item))
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'in <string>' requires string as left operand, not %s", tp_jtype_name(item));
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
    if (!tp_jiterable(container)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "argument of type '%s' is not iterable", tp_jtype_name(container));
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
        *items = v->iter->items + v->iter->at;
        *n = v->iter->n - v->iter->at;
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
    for (size_t i = 0; i < *n && v->type == TP_J_RANGE; i++) (*items)[i] = tp_jinteger(v->range->start + (tp_jint)i * v->range->step);
    for (size_t i = 0; i < *n && v->type == TP_J_BYTES; i++) (*items)[i] = tp_jinteger((unsigned char)v->text[i]);
    return v->type == TP_J_RANGE || v->type == TP_J_BYTES ? TP_OK : dict_items(j, v, *items);
}

/* Merges the sorted halves [low, mid) and [mid, high) of order, an array of positions, into `to`. */
static tp_status merge(tp_jinja *j, const tp_jvalue *keys, const size_t *order, size_t low, size_t mid, size_t high, bool reverse, size_t *to)
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

/* ---- arguments ---- */

/* The i-th of the blank-separated names; {NULL, 0} behind the last. */
static tp_span name_at(const char *names, size_t i)
{
    while (*names != '\0') {
        size_t n = strcspn(names, " ");
        if (n == 1 && *names == '/') {
            /* a divider, not a name */
        } else if (i-- == 0) {
            return (tp_span){names, n};
        }
        names += n;
        while (*names == ' ') names++;
    }
    return (tp_span){NULL, 0};
}

tp_status tp_jbind(tp_jinja *j, const char *what, const tp_jargs *args, const char *names, size_t required, tp_jvalue *out)
{
    size_t n_names = 0, i;
    const char *divider = strchr(names, '/'); /* names before it are positional only */
    while (name_at(names, n_names).data != NULL) n_names++;
    for (i = 0; i < n_names; i++) out[i] = i < args->n ? args->items[i] : tp_jvalue_of(TP_J_MISSING);
    if (args->n > n_names)
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%s takes at most %zu arguments, %zu were given", what, n_names, args->n);
    for (size_t k = 0; k < args->n_keywords; k++) {
        tp_span keyword = args->keywords[k].name;
        for (i = 0; i < n_names; i++)
            if (tp_span_equal(name_at(names, i), keyword) && (divider == NULL || name_at(names, i).data > divider)) break;
        if (i == n_names || out[i].type != TP_J_MISSING)
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%s: unexpected keyword argument '%.*s'", what, (int)keyword.len, keyword.data);
        out[i] = args->keywords[k].value;
    }
    for (i = 0; i < required; i++) {
        tp_span name = name_at(names, i);
        if (out[i].type == TP_J_MISSING)
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%s: missing argument '%.*s'", what, (int)name.len, name.data);
    }
    return TP_OK;
}
