/* Execution of statements, loops and macros, and the render itself.
 *
 * A statement writes to j->out. Where its text is wanted as a value (macros, set blocks, filter blocks) another sink takes the
 * place of j->out for a while; what is known of the text's origin moves along. */
#include "base/mem.h"
#include "data/template_eval.h"
#include "data/template_text.h"

struct tp_jmacro {
    const tp_jnode *node;
    tp_jscope *scope; /* where it was defined */
    tp_span name;     /* "caller" for the body of a call block */
};

struct tp_jloop {
    const tp_jnode *node;
    tp_jscope *outer;
    tp_jvalue *items; /* still to be visited from `at` on; the filter, if any, is asked when an item is reached */
    size_t n, at;
    bool filtered;                                  /* the rest has passed the filter already */
    tp_jvalue before, current, after, last_changed; /* MISSING if there is none */
    size_t index0, depth0;
};

static tp_status exec_body(tp_jinja *j, const tp_jnode *body);

/* ---- output ---- */

static tp_status output(tp_jinja *j, const tp_jvalue *value)
{
    if (!j->autoescape) return tp_jwrite_str(j, j->out, value);
    tp_jvalue escaped;
    TP_TRY(tp_jescape(j, value, &escaped));
    return tp_jsink_string(j, j->out, &escaped);
}

/* Runs a body inside a new scope; its text becomes *text if that is not NULL. */
static tp_status exec_inside(tp_jinja *j, const tp_jnode *body, tp_jscope *parent, tp_jvalue *text)
{
    tp_jsink sink = {0}, *out = j->out;
    tp_jscope *scope = j->scope;
    tp_status st = tp_jscope_new(j, parent, &j->scope);
    if (text != NULL) j->out = &sink;
    if (st == TP_OK) st = exec_body(j, body);
    j->out = out;
    j->scope = scope;
    if (st != TP_OK || text == NULL) return st;
    TP_TRY(tp_jsink_value(j, &sink, text));
    text->flags = j->autoescape ? TP_J_MARKUP : 0;
    return TP_OK;
}

/* ---- loops ---- */

static tp_status passes_filter(tp_jinja *j, const tp_jloop *loop, const tp_jvalue *item, bool *passes)
{
    tp_jvalue answer;
    tp_jscope *scope = j->scope;
    TP_TRY(tp_jscope_new(j, loop->outer, &j->scope));
    TP_TRY(tp_jassign_target(j, loop->node->a, item));
    TP_TRY(tp_jeval(j, loop->node->c, &answer));
    j->scope = scope;
    *passes = tp_jtruth(&answer);
    return TP_OK;
}

/* The next item, MISSING at the end. */
static tp_status pull(tp_jinja *j, tp_jloop *loop, tp_jvalue *item)
{
    *item = loop->after;
    loop->after.type = TP_J_MISSING;
    while (item->type == TP_J_MISSING && loop->at < loop->n) {
        bool passes = true;
        TP_TRY(tp_jinja_charge(j, 1));
        *item = loop->items[loop->at++];
        if (loop->node->c != NULL && !loop->filtered) TP_TRY(passes_filter(j, loop, item, &passes));
        if (!passes) item->type = TP_J_MISSING;
    }
    return TP_OK;
}

static tp_status peek(tp_jinja *j, tp_jloop *loop)
{
    return loop->after.type == TP_J_MISSING ? pull(j, loop, &loop->after) : TP_OK;
}

/* Items of the whole loop; a filter has to be asked about all that is left. */
static tp_status loop_length(tp_jinja *j, tp_jloop *loop, size_t *length)
{
    if (loop->node->c != NULL && !loop->filtered) {
        tp_jvector rest = {0};
        tp_jvalue item;
        for (;;) {
            TP_TRY(pull(j, loop, &item));
            if (item.type == TP_J_MISSING) break;
            TP_TRY(tp_jpush(j, &rest, &item));
        }
        loop->items = rest.items;
        loop->n = rest.n;
        loop->at = 0;
        loop->filtered = true;
    }
    *length = loop->index0 + 1 + (loop->after.type != TP_J_MISSING) + loop->n - loop->at;
    return TP_OK;
}

static tp_status loop_cycle(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    if (args->n == 0) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "no items for cycling given");
    *out = args->items[self->loop->index0 % args->n];
    return TP_OK;
}

static tp_status loop_changed(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue now;
    tp_jvector items = {0};
    bool same = false;
    for (size_t i = 0; i < args->n; i++) TP_TRY(tp_jpush(j, &items, &args->items[i]));
    TP_TRY(tp_jlist_new(j, TP_J_TUPLE, items.items, items.n, &now));
    TP_TRY(tp_jequal(j, &self->loop->last_changed, &now, &same));
    self->loop->last_changed = now;
    *out = tp_jbool(!same);
    return TP_OK;
}

tp_status tp_jloop_getattr(tp_jinja *j, const tp_jvalue *v, tp_span name, tp_jvalue *out, bool *found)
{
    static const tp_jbuiltin methods[] = {{"cycle", loop_cycle}, {"changed", loop_changed}, {NULL, NULL}};
    tp_jloop *loop = v->loop;
    size_t length = 0;
    *found = true;
    const tp_jbuiltin *def = tp_jfind_builtin(methods, name);
    if (def != NULL) {
        tp_jmethod *method = tp_jinja_alloc(j, 1, sizeof *method);
        if (method == NULL) return j->status;
        *method = (tp_jmethod){def, *v};
        *out = tp_jvalue_of(TP_J_METHOD);
        out->method = method;
        return TP_OK;
    }
    bool counts = tp_span_is(name, "length") || tp_span_is(name, "revindex") || tp_span_is(name, "revindex0");
    bool peeks = tp_span_is(name, "last") || tp_span_is(name, "nextitem");
    if (counts) TP_TRY(loop_length(j, loop, &length));
    if (peeks) TP_TRY(peek(j, loop));
    if (tp_span_is(name, "index"))
        *out = tp_jinteger((tp_jint)loop->index0 + 1);
    else if (tp_span_is(name, "index0"))
        *out = tp_jinteger((tp_jint)loop->index0);
    else if (tp_span_is(name, "first"))
        *out = tp_jbool(loop->index0 == 0);
    else if (tp_span_is(name, "last"))
        *out = tp_jbool(loop->after.type == TP_J_MISSING);
    else if (tp_span_is(name, "length"))
        *out = tp_jinteger((tp_jint)length);
    else if (tp_span_is(name, "revindex"))
        *out = tp_jinteger((tp_jint)(length - loop->index0));
    else if (tp_span_is(name, "revindex0"))
        *out = tp_jinteger((tp_jint)(length - loop->index0) - 1);
    else if (tp_span_is(name, "previtem"))
        *out = loop->index0 > 0 ? loop->before : tp_jundefined("there is no previous item");
    else if (tp_span_is(name, "nextitem"))
        *out = loop->after.type != TP_J_MISSING ? loop->after : tp_jundefined("there is no next item");
    else if (tp_span_is(name, "depth"))
        *out = tp_jinteger((tp_jint)loop->depth0 + 1);
    else if (tp_span_is(name, "depth0"))
        *out = tp_jinteger((tp_jint)loop->depth0);
    else
        *found = false;
    return TP_OK;
}

/* One turn, in its scope. *whole: the body ran to its end. */
static tp_status exec_turn(tp_jinja *j, tp_jloop *loop, bool *whole)
{
    tp_jvalue self = tp_jvalue_of(TP_J_LOOP);
    self.loop = loop;
    TP_TRY(tp_jassign(j, j->tmpl->loop, &self));
    TP_TRY(tp_jassign_target(j, loop->node->a, &loop->current));
    TP_TRY(exec_body(j, loop->node->body));
    *whole = j->flow == TP_J_GO_ON;
    return TP_OK;
}

/* As in Jinja, `else` runs when no turn reached the end of the body, not only when there was none. */
static tp_status run_loop(tp_jinja *j, tp_jloop *loop)
{
    bool any_whole = false, whole;
    TP_TRY(tp_jscope_new(j, loop->outer, &j->scope));
    for (;;) {
        tp_jvalue item;
        TP_TRY(pull(j, loop, &item));
        if (item.type == TP_J_MISSING) break;
        loop->before = loop->current;
        loop->index0 += loop->current.type != TP_J_MISSING;
        loop->current = item;
        if ((loop->node->flags & TP_N_CAPTURES) != 0)
            TP_TRY(tp_jscope_new(j, loop->outer, &j->scope));
        else
            j->scope->n = 0;
        TP_TRY(exec_turn(j, loop, &whole));
        any_whole = any_whole || whole;
        bool leave = j->flow == TP_J_BREAK;
        j->flow = TP_J_GO_ON;
        if (leave) break;
    }
    if (any_whole || loop->node->otherwise == NULL) return TP_OK;
    return exec_inside(j, loop->node->otherwise, loop->outer, NULL);
}

static tp_status start_loop(tp_jinja *j, const tp_jnode *node, tp_jscope *outer, const tp_jvalue *iterable, size_t depth0)
{
    tp_jscope *scope = j->scope;
    tp_jloop *loop = tp_jinja_alloc(j, 1, sizeof *loop);
    if (loop == NULL) return j->status;
    *loop = (tp_jloop){.node = node, .outer = outer, .depth0 = depth0};
    TP_TRY(tp_jitems(j, iterable, &loop->items, &loop->n));
    tp_status st = run_loop(j, loop);
    j->scope = scope;
    return st;
}

static tp_status exec_for(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue iterable;
    TP_TRY(tp_jeval(j, node->b, &iterable));
    return start_loop(j, node, j->scope, &iterable, 0);
}

tp_status tp_jcall_loop(tp_jinja *j, tp_jloop *loop, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue iterable;
    tp_jsink sink = {0}, *outer = j->out;
    TP_TRY(tp_jbind(j, "loop", args, "iterable", 1, &iterable));
    if ((loop->node->flags & TP_N_RECURSIVE) == 0)
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "the loop must have the 'recursive' marker to be called recursively");
    TP_TRY(tp_jinja_enter(j));
    j->out = &sink;
    tp_status st = start_loop(j, loop->node, loop->outer, &iterable, loop->depth0 + 1);
    j->out = outer;
    tp_jinja_leave(j);
    return st == TP_OK ? tp_jsink_value(j, &sink, out) : st;
}

/* ---- macros ---- */

static tp_status make_macro(tp_jinja *j, const tp_jnode *node, tp_span name, tp_jvalue *out)
{
    tp_jmacro *macro = tp_jinja_alloc(j, 1, sizeof *macro);
    if (macro == NULL) return j->status;
    *macro = (tp_jmacro){node, j->scope, name};
    *out = tp_jvalue_of(TP_J_MACRO);
    out->macro = macro;
    return TP_OK;
}

tp_status tp_jwrite_macro(tp_jinja *j, tp_jsink *sink, const tp_jmacro *macro)
{
    if (macro->node->kind != TP_N_MACRO) return tp_jsink_text(j, sink, "<Macro anonymous>");
    TP_TRY(tp_jsink_text(j, sink, "<Macro '"));
    TP_TRY(tp_jsink_bytes(j, sink, macro->name.data, macro->name.len));
    return tp_jsink_text(j, sink, "'>");
}

tp_status tp_jmacro_getattr(tp_jinja *j, const tp_jmacro *macro, tp_span name, tp_jvalue *out, bool *found)
{
    const tp_jparams *params = macro->node->params;
    uint8_t uses = macro->node->flags;
    *found = true;
    if (tp_span_is(name, "name")) {
        *out = tp_jtext(macro->name.data, macro->name.len);
    } else if (tp_span_is(name, "arguments")) {
        tp_jvector names = {0};
        for (size_t i = 0; params != NULL && i < params->n; i++) {
            tp_span text = j->tmpl->names[params->names[i]];
            tp_jvalue value = tp_jtext(text.data, text.len);
            TP_TRY(tp_jpush(j, &names, &value));
        }
        return tp_jlist_new(j, TP_J_TUPLE, names.items, names.n, out);
    } else if (tp_span_is(name, "catch_kwargs")) {
        *out = tp_jbool((uses & TP_N_USES_KWARGS) != 0);
    } else if (tp_span_is(name, "catch_varargs")) {
        *out = tp_jbool((uses & TP_N_USES_VARARGS) != 0);
    } else if (tp_span_is(name, "caller")) {
        *out = tp_jbool((uses & TP_N_USES_CALLER) != 0);
    } else {
        *found = false;
    }
    return TP_OK;
}

/* Takes the keyword `name` out of the list, MISSING if it is not there. */
static tp_jvalue take_keyword(tp_jkeyword *keywords, size_t *n, tp_span name)
{
    for (size_t i = 0; i < *n; i++) {
        if (!tp_span_equal(keywords[i].name, name)) continue;
        tp_jvalue value = keywords[i].value;
        memmove(&keywords[i], &keywords[i + 1], (--*n - i) * sizeof *keywords);
        return value;
    }
    return tp_jvalue_of(TP_J_MISSING);
}

/* Sets the parameters in the macro's scope: arguments first, then defaults, which may refer to parameters before them. */
static tp_status bind_params(tp_jinja *j, const tp_jmacro *macro, const tp_jargs *args, tp_jkeyword *keywords,
                             size_t *n_keywords)
{
    const tp_jparams *params = macro->node->params;
    for (size_t i = 0; params != NULL && i < params->n; i++) {
        tp_jvalue value = i < args->n ? args->items[i] : take_keyword(keywords, n_keywords, j->tmpl->names[params->names[i]]);
        if (value.type == TP_J_MISSING && params->defaults[i] != NULL) TP_TRY(tp_jeval(j, params->defaults[i], &value));
        if (value.type == TP_J_MISSING) value = tp_jundefined("a parameter was not provided");
        TP_TRY(tp_jassign(j, params->names[i], &value));
    }
    return TP_OK;
}

/* What goes beyond the parameters: caller, kwargs and varargs, as far as the body mentions them. */
static tp_status bind_rest(tp_jinja *j, const tp_jmacro *macro, const tp_jargs *args, tp_jkeyword *keywords, size_t n_keywords)
{
    const tp_jparams *params = macro->node->params;
    size_t n_params = params != NULL ? params->n : 0;
    bool has_caller_param = false;
    for (size_t i = 0; i < n_params; i++) has_caller_param = has_caller_param || params->names[i] == j->tmpl->caller;
    uint8_t uses = macro->node->flags;
    if ((uses & TP_N_USES_CALLER) != 0 && !has_caller_param) {
        tp_jvalue caller = take_keyword(keywords, &n_keywords, tp_span_of("caller"));
        if (!tp_jgiven(&caller)) caller = tp_jundefined("No caller defined");
        TP_TRY(tp_jassign(j, j->tmpl->caller, &caller));
    }
    if ((uses & TP_N_USES_KWARGS) != 0) {
        tp_jvalue kwargs;
        const tp_jargs rest = {NULL, 0, keywords, n_keywords};
        TP_TRY(tp_jfind_global(tp_span_of("dict"))->call(j, NULL, &rest, &kwargs));
        TP_TRY(tp_jassign(j, j->tmpl->kwargs, &kwargs));
    } else if (n_keywords > 0) {
        return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "macro '%.*s' takes no keyword argument '%.*s'", (int)macro->name.len,
                             macro->name.data, (int)keywords[0].name.len, keywords[0].name.data);
    }
    if ((uses & TP_N_USES_VARARGS) != 0) {
        tp_jvector items = {0};
        tp_jvalue varargs;
        for (size_t i = n_params; i < args->n; i++) TP_TRY(tp_jpush(j, &items, &args->items[i]));
        TP_TRY(tp_jlist_new(j, TP_J_TUPLE, items.items, items.n, &varargs));
        return tp_jassign(j, j->tmpl->varargs, &varargs);
    }
    if (args->n <= n_params) return TP_OK;
    return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "macro '%.*s' takes not more than %zu argument(s)", (int)macro->name.len,
                         macro->name.data, n_params);
}

static tp_status bind_and_run(tp_jinja *j, const tp_jmacro *macro, const tp_jargs *args)
{
    size_t n = args->n_keywords;
    tp_jkeyword *keywords = tp_jinja_alloc(j, n + 1, sizeof *keywords);
    if (keywords == NULL) return j->status;
    if (n > 0) memcpy(keywords, args->keywords, n * sizeof *keywords);
    TP_TRY(tp_jscope_new(j, macro->scope, &j->scope));
    TP_TRY(bind_params(j, macro, args, keywords, &n));
    TP_TRY(bind_rest(j, macro, args, keywords, n));
    return exec_body(j, macro->node->body);
}

tp_status tp_jcall_macro(tp_jinja *j, const tp_jmacro *macro, const tp_jargs *args, tp_jvalue *out)
{
    tp_jsink sink = {0}, *outer = j->out;
    tp_jscope *scope = j->scope;
    TP_TRY(tp_jinja_enter(j));
    j->out = &sink;
    tp_status st = bind_and_run(j, macro, args);
    j->out = outer;
    j->scope = scope;
    tp_jinja_leave(j);
    if (st != TP_OK) return st;
    TP_TRY(tp_jsink_value(j, &sink, out));
    out->flags = j->autoescape ? TP_J_MARKUP : 0;
    return TP_OK;
}

/* ---- statements ---- */

static tp_status exec_output(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue value;
    TP_TRY(tp_jeval(j, node->a, &value));
    return output(j, &value);
}

static tp_status exec_if(tp_jinja *j, const tp_jnode *node)
{
    for (;;) {
        tp_jvalue condition;
        TP_TRY(tp_jeval(j, node->a, &condition));
        if (tp_jtruth(&condition)) return exec_body(j, node->body);
        const tp_jnode *otherwise = node->otherwise;
        if (otherwise == NULL) return TP_OK;
        if (otherwise->kind != TP_N_IF || otherwise->next != NULL) return exec_body(j, otherwise);
        node = otherwise; /* elif */
        j->line = node->line;
        TP_TRY(tp_jinja_charge(j, 1));
    }
}

static tp_status exec_set(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue value;
    TP_TRY(tp_jeval(j, node->b, &value));
    return tp_jassign_target(j, node->a, &value);
}

static tp_status exec_set_block(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue text, value;
    TP_TRY(exec_inside(j, node->body, j->scope, &text));
    if (j->flow != TP_J_GO_ON) return TP_OK;
    TP_TRY(tp_jeval_filters(j, node->b, &text, &value));
    return tp_jassign_target(j, node->a, &value);
}

static tp_status exec_filter_block(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue text, value;
    TP_TRY(exec_inside(j, node->body, j->scope, &text));
    if (j->flow != TP_J_GO_ON) return TP_OK;
    TP_TRY(tp_jeval_filters(j, node->b, &text, &value));
    return output(j, &value);
}

static tp_status exec_macro(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue macro;
    TP_TRY(make_macro(j, node, j->tmpl->names[node->name], &macro));
    return tp_jassign(j, node->name, &macro);
}

static tp_status exec_call_block(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue caller, text;
    TP_TRY(make_macro(j, node, tp_span_of("caller"), &caller));
    TP_TRY(tp_jeval_call(j, node->a, &caller, &text));
    return output(j, &text);
}

/* The values see the variables outside, the body those that they are assigned to. */
static tp_status exec_with(tp_jinja *j, const tp_jnode *node)
{
    tp_jscope *outer = j->scope, *inner;
    TP_TRY(tp_jscope_new(j, outer, &inner));
    for (size_t i = 0; i < node->n_items; i += 2) {
        tp_jvalue value;
        TP_TRY(tp_jeval(j, node->items[i + 1], &value));
        j->scope = inner;
        TP_TRY(tp_jassign_target(j, node->items[i], &value));
        j->scope = outer;
    }
    j->scope = inner;
    tp_status st = exec_body(j, node->body);
    j->scope = outer;
    return st;
}

static tp_status exec_autoescape(tp_jinja *j, const tp_jnode *node)
{
    tp_jvalue on;
    bool before = j->autoescape;
    TP_TRY(tp_jeval(j, node->a, &on));
    j->autoescape = tp_jtruth(&on);
    tp_status st = exec_inside(j, node->body, j->scope, NULL);
    j->autoescape = before;
    return st;
}

static tp_status exec_generation(tp_jinja *j, const tp_jnode *node)
{
    size_t begin = j->out->len;
    TP_TRY(exec_inside(j, node->body, j->scope, NULL));
    return tp_jsink_mark(j, j->out, begin, TP_J_GENERATION + j->n_generation++ % TP_J_GENERATION);
}

static tp_status exec_statement(tp_jinja *j, const tp_jnode *node)
{
    switch (node->kind) {
    case TP_N_DATA: return tp_jsink_bytes(j, j->out, node->text.data, node->text.len);
    case TP_N_OUTPUT: return exec_output(j, node);
    case TP_N_IF: return exec_if(j, node);
    case TP_N_FOR: return exec_for(j, node);
    case TP_N_SET: return exec_set(j, node);
    case TP_N_SET_BLOCK: return exec_set_block(j, node);
    case TP_N_MACRO: return exec_macro(j, node);
    case TP_N_CALL_BLOCK: return exec_call_block(j, node);
    case TP_N_FILTER_BLOCK: return exec_filter_block(j, node);
    case TP_N_WITH: return exec_with(j, node);
    case TP_N_AUTOESCAPE: return exec_autoescape(j, node);
    case TP_N_BLOCK: return exec_inside(j, node->body, NULL, NULL); /* sees what is set outside of all blocks */
    case TP_N_GENERATION: return exec_generation(j, node);
    case TP_N_BREAK: j->flow = TP_J_BREAK; return TP_OK;
    case TP_N_CONTINUE: j->flow = TP_J_CONTINUE; return TP_OK;
    default: return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "there is nothing to load other templates from");
    }
}

static tp_status exec_body(tp_jinja *j, const tp_jnode *body)
{
    TP_TRY(tp_jinja_enter(j));
    for (; body != NULL && j->flow == TP_J_GO_ON; body = body->next) {
        j->line = body->line;
        TP_TRY(tp_jinja_charge(j, 1));
        TP_TRY(exec_statement(j, body));
    }
    tp_jinja_leave(j);
    return TP_OK;
}

/* ---- the render ---- */

tp_status tp_jinja_begin(tp_ctx *ctx, const tp_template *tmpl, const tp_template_options *options, tp_jinja *j)
{
    static const tp_template_options defaults = {0};
    if (options == NULL) options = &defaults;
    *j = (tp_jinja){.ctx = ctx, .tmpl = tmpl, .now = options->now};
    j->steps = options->max_steps > 0 ? options->max_steps : TP_TEMPLATE_STEPS;
    j->max_output = options->max_output > 0 ? options->max_output : TP_TEMPLATE_OUTPUT;
    j->memory_left = options->max_memory > 0 ? options->max_memory : TP_TEMPLATE_MEMORY;
    j->line = 1;
    tp_arena_init(&j->arena, 1 << 15);
    j->globals = tp_jinja_alloc(j, tmpl->n_names, sizeof *j->globals);
    if (j->globals == NULL) return j->status;
    for (size_t i = 0; i < tmpl->n_names; i++) {
        const tp_jbuiltin *function = tp_jfind_global(tmpl->names[i]);
        if (function == NULL || tmpl->is_own[i]) continue;
        j->globals[i] = tp_jvalue_of(TP_J_FUNCTION);
        j->globals[i].function = function;
    }
    return TP_OK;
}

void tp_jinja_set(tp_jinja *j, tp_span name, const tp_jvalue *value)
{
    for (size_t i = 0; i < j->tmpl->n_names; i++)
        if (tp_span_equal(j->tmpl->names[i], name) && !j->tmpl->is_own[i]) j->globals[i] = *value;
}

/* The marks of one kind as an array of their own. */
static tp_status keep_marks(tp_jinja *j, const tp_jsink *sink, tp_template_output *out)
{
    out->spans = tp_alloc(j->ctx, sink->n_marks, sizeof *out->spans);
    out->generation = tp_alloc(j->ctx, sink->n_marks, sizeof *out->generation);
    if (out->spans == NULL || out->generation == NULL) return TP_NOMEM;
    for (size_t i = 0; i < sink->n_marks; i++) {
        const tp_jmark *m = &sink->marks[i];
        if (m->source >= TP_J_GENERATION) {
            out->generation[out->n_generation++] = (tp_template_range){m->begin, m->end};
            continue;
        }
        tp_template_span span = {m->source / 4, (tp_template_field)(m->source % 4), m->begin, m->end};
        tp_template_span *last = out->n_spans > 0 ? &out->spans[out->n_spans - 1] : NULL;
        if (last != NULL && last->end == span.begin && last->message == span.message && last->field == span.field)
            last->end = span.end;
        else
            out->spans[out->n_spans++] = span;
    }
    return TP_OK;
}

tp_status tp_jinja_run(tp_jinja *j, tp_template_output *out)
{
    tp_jsink sink = {0};
    j->out = &sink;
    tp_status st = exec_body(j, j->tmpl->body);
    j->out = NULL;
    if (st != TP_OK) return st;
    tp_buf_append(&out->text, sink.data, sink.len);
    TP_TRY(tp_buf_status(j->ctx, &out->text, j->tmpl->name.data));
    return keep_marks(j, &sink, out);
}

void tp_jinja_end(tp_jinja *j, tp_template_output *out)
{
    out->error = j->error;
    if (j->error == TP_TEMPLATE_RAISED) {
        out->raised = tp_strndup(NULL, j->raised.text, j->raised.len);
        out->raised_len = out->raised != NULL ? j->raised.len : 0;
    }
    tp_arena_free(&j->arena);
}

void tp_template_output_free(tp_template_output *out)
{
    tp_buf_free(&out->text);
    tp_free(out->spans);
    tp_free(out->generation);
    tp_free(out->raised);
    *out = (tp_template_output){0};
}

static tp_status set_variables(tp_jinja *j, const tp_template_variable *variables, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const tp_template_variable *v = &variables[i];
        tp_jvalue value;
        if (v->json == NULL)
            value = tp_jliteral(v->text);
        else if (strcmp(v->name, "messages") == 0)
            TP_TRY(tp_jmessages_from_json(j, v->json, &value));
        else
            TP_TRY(tp_jvalue_from_json(j, v->json, 0, &value));
        tp_jinja_set(j, tp_span_of(v->name), &value);
    }
    return TP_OK;
}

tp_status tp_template_render(tp_ctx *ctx, const tp_template *tmpl, const tp_template_options *options,
                             const tp_template_variable *variables, size_t n_variables, tp_template_output *out)
{
    tp_jinja j;
    *out = (tp_template_output){0};
    tp_buf_init(&out->text, 0);
    tp_status st = tp_jinja_begin(ctx, tmpl, options, &j);
    if (st == TP_OK) st = set_variables(&j, variables, n_variables);
    if (st == TP_OK) st = tp_jinja_run(&j, out);
    if (st != TP_OK) tp_buf_free(&out->text);
    tp_jinja_end(&j, out);
    return st;
}

const char *tp_template_error_name(tp_template_error error)
{
    static const char *const names[TP_TEMPLATE_ERROR_COUNT] = {[TP_TEMPLATE_NO_ERROR] = "no error",
                                                               [TP_TEMPLATE_RAISED] = "TemplateError",
                                                               [TP_TEMPLATE_UNDEFINED] = "UndefinedError",
                                                               [TP_TEMPLATE_TYPE] = "TypeError",
                                                               [TP_TEMPLATE_VALUE] = "ValueError",
                                                               [TP_TEMPLATE_ZERO_DIVISION] = "ZeroDivisionError",
                                                               [TP_TEMPLATE_OVERFLOW] = "OverflowError",
                                                               [TP_TEMPLATE_LOOKUP] = "LookupError",
                                                               [TP_TEMPLATE_ATTRIBUTE] = "AttributeError",
                                                               [TP_TEMPLATE_SECURITY] = "SecurityError",
                                                               [TP_TEMPLATE_RECURSION] = "RecursionError",
                                                               [TP_TEMPLATE_RUNTIME] = "TemplateRuntimeError",
                                                               [TP_TEMPLATE_ARGUMENT] = "FilterArgumentError",
                                                               [TP_TEMPLATE_LIMIT] = "limit reached"};
    return error < TP_TEMPLATE_ERROR_COUNT ? names[error] : "unknown error";
}
