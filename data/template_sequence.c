/* Filters over sequences: map, select, sort, join and their like.
 *
 * Where Jinja returns a generator, an iterator is returned that has its items already: it can be walked once, has no length and
 * cannot be indexed, as there. */
#include "data/template_object.h"
#include "data/template_text.h"

/* Calls "filter, arg, arg, ..." or "test, arg, ..." of map and select on one item. */
typedef struct callback {
    const tp_jbuiltin *def; /* NULL: the value itself */
    tp_jargs args;
    tp_jvalue path; /* followed first; MISSING: the item itself */
} callback;

static tp_status call_back(tp_jinja *j, const callback *c, const tp_jvalue *item, tp_jvalue *out)
{
    tp_jvalue value;
    TP_TRY(tp_jinja_charge(j, 1));
    TP_TRY(tp_jgetpath(j, item, &c->path, &value));
    if (c->def == NULL) {
        *out = value;
        return TP_OK;
    }
    TP_TRY(tp_jinja_enter(j)); /* map('map', 'map', ...) calls itself */
    tp_status st = c->def->call(j, &value, &c->args, out);
    tp_jinja_leave(j);
    return st;
}

static tp_status need_name(tp_jinja *j, const tp_jargs *args, size_t at, bool filter, callback *c)
{
    const tp_jvalue *name = &args->items[at];
    TP_TRY(tp_jarg_string(j, filter ? "map" : "select", name));
    c->def = filter ? tp_jfind_filter(tp_jspan(name)) : tp_jfind_test(tp_jspan(name));
    if (c->def == NULL)
        return tp_jinja_fail(j, TP_TEMPLATE_RUNTIME, "no %s named '%.*s'", filter ? "filter" : "test", (int)name->len,
                             name->text);
    c->args = (tp_jargs){args->items + at + 1, args->n - at - 1, args->keywords, args->n_keywords};
    return TP_OK;
}

/* map(attribute='a.b', default=x) */
static tp_status map_attribute(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *items;
    tp_jvector mapped = {0};
    size_t n;
    TP_TRY(tp_jbind(j, "map", args, "attribute default", 1, bound));
    TP_TRY(tp_jitems(j, self, &items, &n));
    for (size_t i = 0; i < n; i++) {
        tp_jvalue value;
        TP_TRY(tp_jinja_charge(j, 1));
        TP_TRY(tp_jgetpath(j, &items[i], &bound[0], &value));
        if (value.type == TP_J_UNDEFINED && tp_jgiven(&bound[1])) value = bound[1];
        TP_TRY(tp_jpush(j, &mapped, &value));
    }
    return tp_jiter_new(j, mapped.items, mapped.n, out);
}

static tp_status filter_map(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    callback c = {.path = tp_jvalue_of(TP_J_MISSING)};
    tp_jvector mapped = {0};
    tp_jvalue *items;
    size_t n;
    if (!tp_jtruth(self)) return tp_jiter_new(j, NULL, 0, out);
    if (args->n == 0 && args->n_keywords > 0) return map_attribute(j, self, args, out);
    if (args->n == 0) return tp_jinja_fail(j, TP_TEMPLATE_ARGUMENT, "map requires a filter argument");
    TP_TRY(need_name(j, args, 0, true, &c));
    TP_TRY(tp_jitems(j, self, &items, &n));
    for (size_t i = 0; i < n; i++) {
        tp_jvalue value;
        TP_TRY(call_back(j, &c, &items[i], &value));
        TP_TRY(tp_jpush(j, &mapped, &value));
    }
    return tp_jiter_new(j, mapped.items, mapped.n, out);
}

static tp_status select_items(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool keep, bool attribute,
                              tp_jvalue *out)
{
    callback c = {.path = tp_jvalue_of(TP_J_MISSING)};
    tp_jvector kept = {0};
    tp_jvalue *items;
    size_t n, at = attribute ? 1 : 0;
    if (!tp_jtruth(self)) return tp_jiter_new(j, NULL, 0, out);
    if (args->n < at) return tp_jinja_fail(j, TP_TEMPLATE_ARGUMENT, "missing parameter for attribute name");
    if (attribute) c.path = args->items[0];
    if (args->n > at) TP_TRY(need_name(j, args, at, false, &c));
    TP_TRY(tp_jitems(j, self, &items, &n));
    for (size_t i = 0; i < n; i++) {
        tp_jvalue answer;
        TP_TRY(call_back(j, &c, &items[i], &answer));
        if (tp_jtruth(&answer) == keep) TP_TRY(tp_jpush(j, &kept, &items[i]));
    }
    return tp_jiter_new(j, kept.items, kept.n, out);
}
static tp_status filter_select(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return select_items(j, self, args, true, false, out);
}
static tp_status filter_reject(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return select_items(j, self, args, false, false, out);
}
static tp_status filter_selectattr(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return select_items(j, self, args, true, true, out);
}
static tp_status filter_rejectattr(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return select_items(j, self, args, false, true, out);
}

/* ---- keys: what sort, unique, min, max, groupby and sum compare ---- */

static tp_status lowered(tp_jinja *j, const tp_jvalue *v, bool case_sensitive, tp_jvalue *out)
{
    *out = *v;
    if (case_sensitive || !tp_jis_string(v)) return TP_OK;
    return tp_jstring_case(j, v, tp_jmethod_lower, out);
}

static tp_status key_of(tp_jinja *j, const tp_jvalue *item, const tp_jvalue *path, bool case_sensitive, tp_jvalue *out)
{
    tp_jvalue value;
    TP_TRY(tp_jgetpath(j, item, path, &value));
    return lowered(j, &value, case_sensitive, out);
}

/* sort takes several paths, separated by commas, whose values are compared one after the other. They are compared as a list
 * even if there is one: lists pass over items that are equal, undefined ones among them, which have no order. */
static tp_status sort_key(tp_jinja *j, const tp_jvalue *item, const tp_jvalue *paths, bool case_sensitive, tp_jvalue *out)
{
    tp_jvector keys = {0};
    tp_jvalue only;
    if (!tp_jis_string(paths)) {
        TP_TRY(key_of(j, item, paths, case_sensitive, &only));
        TP_TRY(tp_jpush(j, &keys, &only));
    }
    for (size_t at = 0; tp_jis_string(paths) && at <= paths->len;) {
        const char *comma = memchr(paths->text + at, ',', paths->len - at);
        size_t end = comma != NULL ? (size_t)(comma - paths->text) : paths->len;
        tp_jvalue path = tp_jslice(paths, at, end - at), key;
        TP_TRY(key_of(j, item, &path, case_sensitive, &key));
        TP_TRY(tp_jpush(j, &keys, &key));
        at = end + 1;
    }
    return tp_jlist_new(j, TP_J_LIST, keys.items, keys.n, out);
}

/* A copy of the items, which a filter may move. */
static tp_status items_copy(tp_jinja *j, const tp_jvalue *v, tp_jvalue **copy, size_t *n)
{
    tp_jvalue *items;
    TP_TRY(tp_jitems(j, v, &items, n));
    *copy = tp_jinja_alloc(j, *n, sizeof **copy);
    if (*copy == NULL) return j->status;
    if (*n > 0) memcpy(*copy, items, *n * sizeof **copy);
    return TP_OK;
}

typedef tp_status key_function(tp_jinja *j, const tp_jvalue *item, const tp_jvalue *path, bool case_sensitive, tp_jvalue *out);

static tp_status sorted_by(tp_jinja *j, const tp_jvalue *v, key_function *key, const tp_jvalue *path, bool case_sensitive,
                           bool reverse, tp_jvalue **items, size_t *n)
{
    TP_TRY(items_copy(j, v, items, n));
    tp_jvalue *keys = tp_jinja_alloc(j, *n, sizeof *keys);
    if (keys == NULL) return j->status;
    for (size_t i = 0; i < *n; i++) TP_TRY(key(j, &(*items)[i], path, case_sensitive, &keys[i]));
    return tp_jsort(j, keys, *items, *n, reverse);
}

static tp_status filter_sort(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3], *items;
    size_t n;
    TP_TRY(tp_jbind(j, "sort", args, "reverse case_sensitive attribute", 0, bound));
    TP_TRY(sorted_by(j, self, sort_key, &bound[2], tp_jtruth(&bound[1]), tp_jtruth(&bound[0]), &items, &n));
    return tp_jlist_new(j, TP_J_LIST, items, n, out);
}

static tp_status filter_dictsort(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3], view = *self, *items, path = tp_jinteger(0);
    size_t n;
    TP_TRY(tp_jbind(j, "dictsort", args, "case_sensitive by reverse", 0, bound));
    if (self->type == TP_J_UNDEFINED) return tp_jfail_undefined(j, self);
    if (self->type != TP_J_DICT)
        return tp_jinja_fail(j, TP_TEMPLATE_ATTRIBUTE, "dictsort: a mapping is needed, not %s", tp_jtype_name(self));
    if (bound[1].type != TP_J_MISSING) {
        bool by_value = tp_jis_string(&bound[1]) && tp_span_is(tp_jspan(&bound[1]), "value");
        if (!by_value && !(tp_jis_string(&bound[1]) && tp_span_is(tp_jspan(&bound[1]), "key")))
            return tp_jinja_fail(j, TP_TEMPLATE_ARGUMENT, "you can only sort by either \"key\" or \"value\"");
        path.integer = by_value;
    }
    view.type = TP_J_VIEW;
    view.flags = TP_J_ITEMS;
    TP_TRY(sorted_by(j, &view, key_of, &path, tp_jtruth(&bound[0]), tp_jtruth(&bound[2]), &items, &n));
    return tp_jlist_new(j, TP_J_LIST, items, n, out);
}

static tp_status filter_unique(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *items, seen;
    tp_jvector kept = {0};
    size_t n;
    TP_TRY(tp_jbind(j, "unique", args, "case_sensitive attribute", 0, bound));
    TP_TRY(tp_jitems(j, self, &items, &n));
    TP_TRY(tp_jdict_new(j, TP_J_DICT, 0, &seen));
    for (size_t i = 0; i < n; i++) {
        tp_jvalue key;
        size_t before = seen.dict->n;
        TP_TRY(key_of(j, &items[i], &bound[1], tp_jtruth(&bound[0]), &key));
        TP_TRY(tp_jdict_set(j, seen.dict, &key, &key));
        if (seen.dict->n > before) TP_TRY(tp_jpush(j, &kept, &items[i]));
    }
    return tp_jiter_new(j, kept.items, kept.n, out);
}

static tp_status extreme(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, bool largest, tp_jvalue *out)
{
    tp_jvalue bound[2], *items, best, key;
    size_t n;
    TP_TRY(tp_jbind(j, "min", args, "case_sensitive attribute", 0, bound));
    TP_TRY(tp_jitems(j, self, &items, &n));
    *out = tp_jundefined("No aggregated item, sequence was empty.");
    for (size_t i = 0; i < n; i++) {
        int order = 0;
        TP_TRY(key_of(j, &items[i], &bound[1], tp_jtruth(&bound[0]), &key));
        if (i > 0) TP_TRY(largest ? tp_jcompare(j, ">", &key, &best, &order) : tp_jcompare(j, "<", &key, &best, &order));
        if (i > 0 && order != (largest ? 1 : -1)) continue;
        best = key;
        *out = items[i];
    }
    return TP_OK;
}
static tp_status filter_min(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return extreme(j, self, args, false, out);
}
static tp_status filter_max(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    return extreme(j, self, args, true, out);
}

static tp_status filter_sum(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *items;
    size_t n;
    TP_TRY(tp_jbind(j, "sum", args, "attribute start", 0, bound));
    TP_TRY(tp_jitems(j, self, &items, &n));
    *out = bound[1].type == TP_J_MISSING ? tp_jinteger(0) : bound[1];
    if (tp_jis_string(out)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "sum() can't sum strings");
    for (size_t i = 0; i < n; i++) {
        tp_jvalue value, total = *out;
        TP_TRY(tp_jgetpath(j, &items[i], &bound[0], &value));
        TP_TRY(tp_jarithmetic(j, TP_T_ADD, &total, &value, out));
    }
    return TP_OK;
}

static tp_status filter_groupby(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[3], *items, key, next;
    tp_jvector groups = {0};
    size_t n;
    TP_TRY(tp_jbind(j, "groupby", args, "attribute default case_sensitive", 1, bound));
    bool exact = tp_jtruth(&bound[2]);
    TP_TRY(sorted_by(j, self, key_of, &bound[0], exact, false, &items, &n));
    for (size_t i = 0; i < n;) {
        size_t end = i + 1;
        bool equal = true;
        TP_TRY(key_of(j, &items[i], &bound[0], exact, &key));
        for (; end < n; end++) {
            TP_TRY(key_of(j, &items[end], &bound[0], exact, &next));
            TP_TRY(tp_jequal(j, &key, &next, &equal));
            if (!equal) break;
        }
        tp_jvalue group, list;
        TP_TRY(tp_jgetpath(j, &items[i], &bound[0], &key));
        if (key.type == TP_J_UNDEFINED && tp_jgiven(&bound[1])) key = bound[1];
        TP_TRY(tp_jlist_new(j, TP_J_LIST, items + i, end - i, &list));
        TP_TRY(tp_jtuple2(j, &key, &list, &group));
        group.flags = TP_J_GROUP;
        TP_TRY(tp_jpush(j, &groups, &group));
        i = end;
    }
    return tp_jlist_new(j, TP_J_LIST, groups.items, groups.n, out);
}

/* ---- ends, order, pieces ---- */

static tp_status filter_first(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue *items;
    size_t n;
    TP_TRY(tp_jbind(j, "first", args, "", 0, NULL));
    if (self->type == TP_J_ITERATOR) { /* takes one and leaves the rest */
        tp_jiter *iter = self->iter;
        *out = iter->at < iter->n ? iter->items[iter->at++] : tp_jundefined("No first item, sequence was empty.");
        return TP_OK;
    }
    TP_TRY(tp_jitems(j, self, &items, &n));
    *out = n > 0 ? items[0] : tp_jundefined("No first item, sequence was empty.");
    return TP_OK;
}

static tp_status need_reversible(tp_jinja *j, const tp_jvalue *v)
{
    if (v->type == TP_J_ITERATOR || v->type == TP_J_LOOP || !tp_jiterable(v))
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "'%s' object is not reversible", tp_jtype_name(v));
    return TP_OK;
}

static tp_status filter_last(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue *items;
    size_t n;
    TP_TRY(tp_jbind(j, "last", args, "", 0, NULL));
    TP_TRY(need_reversible(j, self));
    TP_TRY(tp_jitems(j, self, &items, &n));
    *out = n > 0 ? items[n - 1] : tp_jundefined("No last item, sequence was empty.");
    if (n > 0 && self->type == TP_J_STRING) out->flags = self->flags;
    return TP_OK;
}

static tp_status filter_reverse(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue *items;
    size_t n;
    TP_TRY(tp_jbind(j, "reverse", args, "", 0, NULL));
    if (tp_jis_string(self)) return tp_jstring_reverse(j, self, out);
    if (!tp_jiterable(self)) return tp_jinja_fail(j, TP_TEMPLATE_ARGUMENT, "argument must be iterable");
    TP_TRY(items_copy(j, self, &items, &n));
    for (size_t i = 0; i < n / 2; i++) {
        tp_jvalue swap = items[i];
        items[i] = items[n - 1 - i];
        items[n - 1 - i] = swap;
    }
    if (self->type == TP_J_ITERATOR) return tp_jlist_new(j, TP_J_LIST, items, n, out);
    return tp_jiter_new(j, items, n, out);
}

static tp_status filter_list(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue *items;
    size_t n;
    TP_TRY(tp_jbind(j, "list", args, "", 0, NULL));
    TP_TRY(tp_jitems(j, self, &items, &n));
    return tp_jlist_new(j, TP_J_LIST, items, n, out);
}

static tp_status filter_items(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue view = *self, *items;
    size_t n;
    TP_TRY(tp_jbind(j, "items", args, "", 0, NULL));
    if (self->type == TP_J_UNDEFINED) return tp_jiter_new(j, NULL, 0, out);
    if (self->type != TP_J_DICT) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "can only get item pairs from a mapping");
    view.type = TP_J_VIEW;
    view.flags = TP_J_ITEMS;
    TP_TRY(tp_jitems(j, &view, &items, &n));
    return tp_jiter_new(j, items, n, out);
}

static tp_status filter_length(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    size_t n;
    TP_TRY(tp_jbind(j, "length", args, "", 0, NULL));
    if (self->type == TP_J_LOOP) {
        bool found;
        return tp_jloop_getattr(j, self, tp_span_of("length"), out, &found);
    }
    TP_TRY(tp_jlength(j, self, &n));
    *out = tp_jinteger((tp_jint)n);
    return TP_OK;
}

static tp_status filter_join(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *items, *texts, separator = tp_jliteral("");
    bool any_markup = false;
    size_t n;
    TP_TRY(tp_jbind(j, "join", args, "d attribute", 0, bound));
    if (bound[0].type != TP_J_MISSING) TP_TRY(tp_jstr(j, &bound[0], &separator));
    TP_TRY(tp_jitems(j, self, &items, &n));
    texts = tp_jinja_alloc(j, n, sizeof *texts);
    if (texts == NULL) return j->status;
    for (size_t i = 0; i < n; i++) {
        tp_jvalue value;
        TP_TRY(tp_jgetpath(j, &items[i], &bound[1], &value));
        TP_TRY(tp_jstr(j, &value, &texts[i]));
        any_markup = any_markup || (texts[i].flags & TP_J_MARKUP) != 0;
    }
    bool escape = j->autoescape && (any_markup || (separator.flags & TP_J_MARKUP) != 0);
    if (escape) TP_TRY(tp_jescape(j, &separator, &separator));
    for (size_t i = 0; escape && i < n; i++) TP_TRY(tp_jescape(j, &texts[i], &texts[i]));
    TP_TRY(tp_jstring_join(j, &separator, texts, n, out));
    out->flags = escape ? TP_J_MARKUP : 0;
    return TP_OK;
}

static tp_status filter_batch(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *items, row;
    tp_jvector rows = {0};
    tp_jint width;
    size_t n;
    TP_TRY(tp_jbind(j, "batch", args, "linecount fill_with", 1, bound));
    TP_TRY(tp_jarg_int(j, &bound[0], 0, &width));
    if (width < 1 || width > 100000)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "batch: the line count must lie between 1 and 100000");
    TP_TRY(tp_jitems(j, self, &items, &n));
    for (size_t i = 0; i < n; i += (size_t)width) {
        tp_jvector cells = {0};
        for (size_t k = i; k < i + (size_t)width; k++) {
            if (k < n)
                TP_TRY(tp_jpush(j, &cells, &items[k]));
            else if (tp_jgiven(&bound[1]))
                TP_TRY(tp_jpush(j, &cells, &bound[1]));
        }
        TP_TRY(tp_jlist_new(j, TP_J_LIST, cells.items, cells.n, &row));
        TP_TRY(tp_jpush(j, &rows, &row));
    }
    return tp_jiter_new(j, rows.items, rows.n, out);
}

static tp_status filter_slice(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue bound[2], *items, row;
    tp_jvector rows = {0};
    tp_jint slices;
    size_t n, at = 0;
    TP_TRY(tp_jbind(j, "slice", args, "slices fill_with", 1, bound));
    TP_TRY(tp_jarg_int(j, &bound[0], 0, &slices));
    if (slices < 1 || slices > 100000)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "slice: the number of slices must lie between 1 and 100000");
    TP_TRY(tp_jitems(j, self, &items, &n));
    size_t each = n / (size_t)slices, longer = n % (size_t)slices;
    for (size_t i = 0; i < (size_t)slices; i++) {
        size_t count = each + (i < longer);
        tp_jvector cells = {0};
        for (size_t k = 0; k < count; k++) TP_TRY(tp_jpush(j, &cells, &items[at + k]));
        if (i >= longer && tp_jgiven(&bound[1])) TP_TRY(tp_jpush(j, &cells, &bound[1]));
        TP_TRY(tp_jlist_new(j, TP_J_LIST, cells.items, cells.n, &row));
        TP_TRY(tp_jpush(j, &rows, &row));
        at += count;
    }
    return tp_jiter_new(j, rows.items, rows.n, out);
}

const tp_jbuiltin tp_jsequence_filters[] = {
    {"batch", filter_batch},
    {"count", filter_length},
    {"dictsort", filter_dictsort},
    {"first", filter_first},
    {"groupby", filter_groupby},
    {"items", filter_items},
    {"join", filter_join},
    {"last", filter_last},
    {"length", filter_length},
    {"list", filter_list},
    {"map", filter_map},
    {"max", filter_max},
    {"min", filter_min},
    {"reject", filter_reject},
    {"rejectattr", filter_rejectattr},
    {"reverse", filter_reverse},
    {"select", filter_select},
    {"selectattr", filter_selectattr},
    {"slice", filter_slice},
    {"sort", filter_sort},
    {"sum", filter_sum},
    {"unique", filter_unique},
    {NULL, NULL},
};
