/* Evaluation of expressions.
 *
 * tp_jeval recurses along the syntax tree, one counted level per node. The cases are functions of their own that are not
 * inlined: the frame that all levels share stays small, and with it the stack. */
#include "data/template_eval.h"

#include "data/template_text.h"

#define NOT_INLINED __attribute__((noinline))

/* ---- variables ---- */

tp_status tp_jscope_new(tp_jinja *j, tp_jscope *parent, tp_jscope **scope)
{
    *scope = tp_jinja_alloc(j, 1, sizeof **scope);
    if (*scope == NULL) return j->status;
    **scope = (tp_jscope){.parent = parent};
    return TP_OK;
}

static NOT_INLINED tp_status lookup(tp_jinja *j, uint32_t name, tp_jvalue *out)
{
    size_t seen = 0;
    for (const tp_jscope *s = j->scope; s != NULL; s = s->parent) {
        for (size_t i = 0; i < s->n; i++) {
            if (s->entries[i].name != name) continue;
            *out = s->entries[i].value;
            return tp_jinja_charge(j, seen / 16);
        }
        seen += s->n + 1;
    }
    *out = j->globals[name];
    if (out->type == TP_J_MISSING) {
        tp_span text = j->tmpl->names[name];
        *out = (tp_jvalue){.type = TP_J_UNDEFINED, .len = text.len, .text = text.data};
    }
    return tp_jinja_charge(j, seen / 16);
}

tp_status tp_jassign(tp_jinja *j, uint32_t name, const tp_jvalue *value)
{
    tp_jscope *s = j->scope;
    if (s == NULL) {
        j->globals[name] = *value;
        return TP_OK;
    }
    for (size_t i = 0; i < s->n; i++) {
        if (s->entries[i].name != name) continue;
        s->entries[i].value = *value;
        return TP_OK;
    }
    if (s->n == s->capacity) {
        size_t capacity = s->capacity == 0 ? 4 : 2 * s->capacity;
        void *entries = tp_jinja_alloc(j, capacity, sizeof *s->entries);
        if (entries == NULL) return j->status;
        if (s->n > 0) memcpy(entries, s->entries, s->n * sizeof *s->entries);
        s->entries = entries;
        s->capacity = capacity;
    }
    s->entries[s->n].name = name;
    s->entries[s->n++].value = *value;
    return tp_jinja_charge(j, s->n / 16);
}

static tp_status assign_member(tp_jinja *j, const tp_jnode *target, const tp_jvalue *value)
{
    tp_jvalue object, key = tp_jtext(target->text.data, target->text.len);
    TP_TRY(lookup(j, target->name, &object));
    if (object.type != TP_J_NAMESPACE)
        return tp_jinja_fail(j, TP_TEMPLATE_RUNTIME, "cannot assign attribute on non-namespace object");
    if (key.text[0] == '_')
        return tp_jinja_fail(j, TP_TEMPLATE_SECURITY, "a namespace cannot hold '%.*s'", (int)key.len, key.text);
    return tp_jdict_set(j, object.dict, &key, value);
}

static tp_status unpack(tp_jinja *j, const tp_jnode *target, const tp_jvalue *value)
{
    tp_jvalue *items;
    size_t n;
    TP_TRY(tp_jitems(j, value, &items, &n));
    if (n > target->n_items)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "too many values to unpack (expected %u)", target->n_items);
    if (n < target->n_items)
        return tp_jinja_fail(j, TP_TEMPLATE_VALUE, "not enough values to unpack (expected %u, got %zu)", target->n_items, n);
    TP_TRY(tp_jinja_enter(j));
    for (size_t i = 0; i < n; i++) TP_TRY(tp_jassign_target(j, target->items[i], &items[i]));
    tp_jinja_leave(j);
    return TP_OK;
}

tp_status tp_jassign_target(tp_jinja *j, const tp_jnode *target, const tp_jvalue *value)
{
    if (target->kind == TP_N_NAME) return tp_jassign(j, target->name, value);
    return target->kind == TP_N_MEMBER ? assign_member(j, target, value) : unpack(j, target, value);
}

/* ---- literals ---- */

static NOT_INLINED tp_status eval_list(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue *items = tp_jinja_alloc(j, node->n_items, sizeof *items);
    if (items == NULL) return j->status;
    for (size_t i = 0; i < node->n_items; i++) TP_TRY(tp_jeval(j, node->items[i], &items[i]));
    return tp_jlist_new(j, node->kind == TP_N_LIST ? TP_J_LIST : TP_J_TUPLE, items, node->n_items, out);
}

static NOT_INLINED tp_status eval_dict(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    TP_TRY(tp_jdict_new(j, TP_J_DICT, node->n_items / 2, out));
    for (size_t i = 0; i < node->n_items; i += 2) {
        tp_jvalue key, value;
        TP_TRY(tp_jeval(j, node->items[i], &key));
        TP_TRY(tp_jeval(j, node->items[i + 1], &value));
        TP_TRY(tp_jdict_set(j, out->dict, &key, &value));
    }
    return TP_OK;
}

static NOT_INLINED tp_status eval_concat(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue *items = tp_jinja_alloc(j, node->n_items, sizeof *items), empty = tp_jliteral("");
    bool markup = false;
    if (items == NULL) return j->status;
    for (size_t i = 0; i < node->n_items; i++) {
        tp_jvalue value;
        TP_TRY(tp_jeval(j, node->items[i], &value));
        TP_TRY(tp_jstr(j, &value, &items[i]));
        markup = markup || (items[i].flags & TP_J_MARKUP) != 0;
    }
    markup = markup && j->autoescape;
    for (size_t i = 0; markup && i < node->n_items; i++) TP_TRY(tp_jescape(j, &items[i], &items[i]));
    TP_TRY(tp_jstring_join(j, &empty, items, node->n_items, out));
    out->flags = markup ? TP_J_MARKUP : 0;
    return TP_OK;
}

/* ---- items ---- */

static tp_status eval_or_none(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    *out = tp_jnone();
    return node != NULL ? tp_jeval(j, node, out) : TP_OK;
}

static NOT_INLINED tp_status eval_getitem(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue object, key[3];
    TP_TRY(tp_jeval(j, node->a, &object));
    if (node->b->kind != TP_N_SLICE) {
        TP_TRY(tp_jeval(j, node->b, &key[0]));
        j->line = node->line;
        return tp_jgetitem(j, &object, &key[0], out);
    }
    TP_TRY(eval_or_none(j, node->b->a, &key[0]));
    TP_TRY(eval_or_none(j, node->b->b, &key[1]));
    TP_TRY(eval_or_none(j, node->b->c, &key[2]));
    j->line = node->line;
    return tp_jgetslice(j, &object, &key[0], &key[1], &key[2], out);
}

static NOT_INLINED tp_status eval_getattr(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue object;
    TP_TRY(tp_jeval(j, node->a, &object));
    j->line = node->line;
    return tp_jgetattr(j, &object, node->text, out);
}

/* ---- calls ---- */

static tp_status eval_keywords(tp_jinja *j, const tp_jcall_args *call, const tp_jvalue *caller, tp_jargs *args)
{
    tp_jvalue more = {0};
    if (call->more_keywords != NULL) {
        TP_TRY(tp_jeval(j, call->more_keywords, &more));
        if (more.type != TP_J_DICT)
            return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "the argument after ** must be a mapping, not %s", tp_jtype_name(&more));
    }
    size_t n_more = call->more_keywords != NULL ? more.dict->n : 0, n = 0;
    if (call->n_keywords + n_more == 0 && caller == NULL) return TP_OK;
    tp_jkeyword *keywords = tp_jinja_alloc(j, call->n_keywords + n_more + 1, sizeof *keywords);
    if (keywords == NULL) return j->status;
    for (; n < call->n_keywords; n++) {
        keywords[n].name = call->names[n];
        TP_TRY(tp_jeval(j, call->values[n], &keywords[n].value));
    }
    for (size_t i = 0; i < n_more; i++) {
        const tp_jpair *pair = &more.dict->pairs[i];
        if (!tp_jis_string(&pair->key)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "keywords must be strings");
        keywords[n++] = (tp_jkeyword){tp_jspan(&pair->key), pair->value};
    }
    if (caller != NULL) keywords[n++] = (tp_jkeyword){tp_span_of("caller"), *caller};
    args->keywords = keywords;
    args->n_keywords = n;
    return TP_OK;
}

static tp_status eval_positional(tp_jinja *j, const tp_jcall_args *call, tp_jargs *args)
{
    tp_jvalue more, *extra = NULL;
    size_t n_extra = 0;
    if (call->n == 0 && call->more == NULL) return TP_OK;
    tp_jvalue *items = tp_jinja_alloc(j, call->n, sizeof *items);
    if (items == NULL) return j->status;
    for (size_t i = 0; i < call->n; i++) TP_TRY(tp_jeval(j, call->items[i], &items[i]));
    if (call->more != NULL) {
        TP_TRY(tp_jeval(j, call->more, &more));
        TP_TRY(tp_jitems(j, &more, &extra, &n_extra));
        tp_jvalue *all = tp_jinja_alloc(j, call->n + n_extra, sizeof *all);
        if (all == NULL) return j->status;
        if (call->n > 0) memcpy(all, items, call->n * sizeof *all);
        if (n_extra > 0) memcpy(all + call->n, extra, n_extra * sizeof *all);
        items = all;
    }
    args->items = items;
    args->n = call->n + n_extra;
    return TP_OK;
}

static tp_status eval_args(tp_jinja *j, const tp_jcall_args *call, const tp_jvalue *caller, tp_jargs *args)
{
    static const tp_jcall_args nothing = {0};
    if (call == NULL) call = &nothing;
    *args = (tp_jargs){0};
    TP_TRY(eval_positional(j, call, args));
    return eval_keywords(j, call, caller, args);
}

NOT_INLINED tp_status tp_jeval_call(tp_jinja *j, const tp_jnode *node, const tp_jvalue *caller, tp_jvalue *out)
{
    tp_jvalue callee;
    tp_jargs args;
    TP_TRY(tp_jeval(j, node->a, &callee));
    TP_TRY(eval_args(j, node->call, caller, &args));
    j->line = node->line;
    return tp_jcall_value(j, &callee, &args, out);
}

static NOT_INLINED tp_status call_builtin(tp_jinja *j, const tp_jnode *node, const tp_jvalue *value, tp_jvalue *out)
{
    tp_jargs args;
    if (node->builtin == NULL)
        return tp_jinja_fail(j, TP_TEMPLATE_RUNTIME, "no %s named '%.*s' found", node->kind == TP_N_FILTER ? "filter" : "test",
                             (int)node->text.len, node->text.data);
    TP_TRY(eval_args(j, node->call, NULL, &args));
    j->line = node->line;
    return node->builtin->call(j, value, &args, out);
}

static NOT_INLINED tp_status eval_builtin(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue value;
    TP_TRY(tp_jeval(j, node->a, &value));
    return call_builtin(j, node, &value, out);
}

tp_status tp_jeval_filters(tp_jinja *j, const tp_jnode *node, const tp_jvalue *text, tp_jvalue *out)
{
    tp_jvalue value = *text;
    if (node == NULL) {
        *out = *text;
        return TP_OK;
    }
    TP_TRY(tp_jinja_enter(j));
    TP_TRY(tp_jeval_filters(j, node->a, text, &value));
    TP_TRY(call_builtin(j, node, &value, out));
    tp_jinja_leave(j);
    return TP_OK;
}

/* ---- operators ---- */

static tp_status compare(tp_jinja *j, uint8_t op, const tp_jvalue *a, const tp_jvalue *b, bool *result)
{
    int order = 0;
    switch (op) {
    case TP_T_EQ: return tp_jequal(j, a, b, result);
    case TP_T_NE: TP_TRY(tp_jequal(j, a, b, result)); break;
    case TP_N_OP_IN: return tp_jcontains(j, b, a, result);
    case TP_N_OP_NOT_IN: TP_TRY(tp_jcontains(j, b, a, result)); break;
    case TP_T_LT:
        TP_TRY(tp_jcompare(j, "<", a, b, &order));
        *result = order == -1;
        return TP_OK;
    case TP_T_LE:
        TP_TRY(tp_jcompare(j, "<=", a, b, &order));
        *result = order == -1 || order == 0;
        return TP_OK;
    case TP_T_GT:
        TP_TRY(tp_jcompare(j, ">", a, b, &order));
        *result = order == 1;
        return TP_OK;
    default:
        TP_TRY(tp_jcompare(j, ">=", a, b, &order));
        *result = order == 1 || order == 0;
        return TP_OK;
    }
    *result = !*result;
    return TP_OK;
}

static NOT_INLINED tp_status eval_compare(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue left, right;
    bool result = true;
    TP_TRY(tp_jeval(j, node->a, &left));
    for (size_t i = 0; result && i < node->n_items; i++) {
        TP_TRY(tp_jeval(j, node->items[i], &right));
        j->line = node->line;
        TP_TRY(compare(j, node->ops[i], &left, &right, &result));
        left = right;
    }
    *out = tp_jbool(result);
    return TP_OK;
}

static NOT_INLINED tp_status eval_binary(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue left, right;
    TP_TRY(tp_jeval(j, node->a, &left));
    TP_TRY(tp_jeval(j, node->b, &right));
    j->line = node->line;
    return tp_jarithmetic(j, node->op, &left, &right, out);
}

static NOT_INLINED tp_status eval_unary(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue value;
    TP_TRY(tp_jeval(j, node->a, &value));
    if (node->kind != TP_N_NOT) return tp_jnegate(j, &value, node->kind == TP_N_NEG, out);
    *out = tp_jbool(!tp_jtruth(&value));
    return TP_OK;
}

static NOT_INLINED tp_status eval_condition(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    tp_jvalue condition;
    TP_TRY(tp_jeval(j, node->b, &condition));
    if (tp_jtruth(&condition)) return tp_jeval(j, node->a, out);
    if (node->c != NULL) return tp_jeval(j, node->c, out);
    *out = tp_jundefined("the inline if-expression evaluated to false and no else section was defined");
    return TP_OK;
}

static tp_status eval_node(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    switch (node->kind) {
    case TP_N_CONST: *out = *node->value; return TP_OK;
    case TP_N_NAME: return lookup(j, node->name, out);
    case TP_N_TUPLE:
    case TP_N_LIST: return eval_list(j, node, out);
    case TP_N_DICT: return eval_dict(j, node, out);
    case TP_N_GETATTR: return eval_getattr(j, node, out);
    case TP_N_GETITEM: return eval_getitem(j, node, out);
    case TP_N_CALL: return tp_jeval_call(j, node, NULL, out);
    case TP_N_FILTER:
    case TP_N_TEST: return eval_builtin(j, node, out);
    case TP_N_NOT:
    case TP_N_NEG:
    case TP_N_POS: return eval_unary(j, node, out);
    case TP_N_BINARY: return eval_binary(j, node, out);
    case TP_N_CONCAT: return eval_concat(j, node, out);
    case TP_N_COMPARE: return eval_compare(j, node, out);
    case TP_N_AND:
    case TP_N_OR:
        TP_TRY(tp_jeval(j, node->a, out));
        return tp_jtruth(out) == (node->kind == TP_N_AND) ? tp_jeval(j, node->b, out) : TP_OK;
    case TP_N_COND: return eval_condition(j, node, out);
    default: return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unhashable type: 'slice'"); /* a slice among several subscripts */
    }
}

tp_status tp_jeval(tp_jinja *j, const tp_jnode *node, tp_jvalue *out)
{
    TP_TRY(tp_jinja_charge(j, 1));
    TP_TRY(tp_jinja_enter(j));
    tp_status st = eval_node(j, node, out);
    tp_jinja_leave(j);
    return st;
}
