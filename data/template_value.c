/* Values: limits, sinks, construction, conversion from JSON, and the arguments of calls. What operators ask of values is in
 * template_compare.c. */
#include "data/template_value.h"

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

tp_status tp_jsink_text(tp_jinja *j, tp_jsink *sink, const char *text)
{
    return tp_jsink_bytes(j, sink, text, strlen(text));
}

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
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%s: unexpected keyword argument '%.*s'", what, (int)keyword.len,
                                 keyword.data);
        out[i] = args->keywords[k].value;
    }
    for (i = 0; i < required; i++) {
        tp_span name = name_at(names, i);
        if (out[i].type == TP_J_MISSING)
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "%s: missing argument '%.*s'", what, (int)name.len, name.data);
    }
    return TP_OK;
}
