/* The statement half of the parser, and tp_template_compile.
 *
 * A body is a list of statements up to one of its end tags. Nesting is bounded, and names of variables become numbers, so
 * that a render looks them up without comparing text. */
#include "data/template_parser.h"

#include <stdio.h>

#include "base/map.h"
#include "base/mem.h"

/* ---- tools of both halves ---- */

/* How the current token reads in a message. */
static const char *token_text(const tp_jparser *p, char out[64])
{
    const tp_jtoken *t = p->at;
    int n = t->text.len > 40 ? 40 : (int)t->text.len;
    if (t->kind == TP_T_END) return "the end of the template";
    if (t->kind == TP_T_DATA) return "text";
    if (t->kind == TP_T_STRING) {
        snprintf(out, 64, "the string \"%.*s\"", n, t->text.data);
        return out;
    }
    if (t->kind == TP_T_BLOCK_END) return "'%}'";
    if (t->kind == TP_T_VARIABLE_END) return "'}}'";
    snprintf(out, 64, "'%.*s'", n, t->text.data);
    return out;
}

tp_status tp_jparse_fail(const tp_jparser *p, const char *expected)
{
    char text[64];
    return tp_fail(p->ctx, TP_FORMAT, "%s:%u: found %s, expected %s", p->tmpl->name.data, p->at->line, token_text(p, text),
                   expected);
}

tp_status tp_jparse_expect(tp_jparser *p, tp_jtoken_kind kind, const char *expected)
{
    if (p->at->kind != kind) return tp_jparse_fail(p, expected);
    p->at++;
    return TP_OK;
}

bool tp_jparse_skip_name(tp_jparser *p, const char *name)
{
    if (!tp_jparse_at_name(p, name)) return false;
    p->at++;
    return true;
}

void *tp_jparse_alloc(tp_jparser *p, size_t count, size_t size)
{
    return tp_arena_alloc(p->ctx, &p->tmpl->arena, count, size);
}

tp_status tp_jparse_node(tp_jparser *p, tp_jnode_kind kind, tp_jnode **node)
{
    *node = tp_jparse_alloc(p, 1, sizeof **node);
    if (*node == NULL) return TP_NOMEM;
    (*node)->kind = (uint8_t)kind;
    (*node)->line = p->at->line;
    return TP_OK;
}

static tp_status grow_names(tp_jparser *p)
{
    tp_template *t = p->tmpl;
    size_t n = t->n_names, capacity = n == 0 ? 32 : 2 * n;
    tp_span *names = tp_jparse_alloc(p, capacity, sizeof *names);
    bool *is_own = tp_jparse_alloc(p, capacity, sizeof *is_own), *is_read = tp_jparse_alloc(p, capacity, sizeof *is_read);
    if (names == NULL || is_own == NULL || is_read == NULL) return TP_NOMEM;
    if (n > 0) {
        memcpy(names, t->names, n * sizeof *names);
        memcpy(is_own, t->is_own, n * sizeof *is_own);
        memcpy(is_read, p->is_read, n * sizeof *is_read);
    }
    t->names = names;
    t->is_own = is_own;
    p->is_read = is_read;
    p->capacity_names = capacity;
    return TP_OK;
}

/* Notes that the variables of a target are set here. */
static void note_set(tp_jparser *p, const tp_jnode *target)
{
    if (p->frames > 0) return;
    for (size_t i = 0; target->kind == TP_N_TUPLE && i < target->n_items; i++)
        if (target->items[i]->kind == TP_N_NAME) note_set(p, target->items[i]);
    if (target->kind != TP_N_NAME || p->is_read[target->name]) return;
    if (p->branches > 0)
        p->is_read[target->name] = true;
    else
        p->tmpl->is_own[target->name] = true;
}

tp_status tp_jparse_name(tp_jparser *p, tp_span name, uint32_t *number)
{
    tp_template *t = p->tmpl;
    int64_t known;
    if (tp_map_get(p->names, name, &known)) {
        *number = (uint32_t)known;
        return TP_OK;
    }
    if (t->n_names == p->capacity_names) TP_TRY(grow_names(p));
    TP_TRY(tp_map_put(p->ctx, p->names, name, (int64_t)t->n_names, NULL));
    *number = (uint32_t)t->n_names;
    t->names[t->n_names++] = name;
    return TP_OK;
}

/* ---- bodies ---- */

/* Puts a statement behind the last one of a list. */
static void append(tp_jnode ***tail, tp_jnode *node)
{
    **tail = node;
    *tail = &node->next;
}

static bool at_one_of(const tp_jparser *p, const char *const *ends)
{
    for (; ends != NULL && *ends != NULL; ends++)
        if (tp_jparse_at_name(p, *ends)) return true;
    return false;
}

static tp_status statement(tp_jparser *p, tp_jnode **node);

/* Statements until "{% end", whose name becomes the current token; without ends, until the template is over. */
static tp_status body_until(tp_jparser *p, const char *const *ends, tp_jnode **body)
{
    tp_jnode **tail = body, *node = NULL;
    *body = NULL;
    for (;;) {
        switch (p->at->kind) {
        case TP_T_DATA:
            TP_TRY(tp_jparse_node(p, TP_N_DATA, &node));
            node->text = p->at->text;
            p->at++;
            break;
        case TP_T_VARIABLE_BEGIN:
            TP_TRY(tp_jparse_node(p, TP_N_OUTPUT, &node));
            p->at++;
            TP_TRY(tp_jparse_tuple(p, TP_J_TUPLE_FULL, &node->a));
            TP_TRY(tp_jparse_expect(p, TP_T_VARIABLE_END, "'}}'"));
            break;
        case TP_T_BLOCK_BEGIN:
            p->at++;
            if (at_one_of(p, ends)) return TP_OK;
            TP_TRY(statement(p, &node));
            TP_TRY(tp_jparse_expect(p, TP_T_BLOCK_END, "'%}'"));
            break;
        default: {
            char expected[64];
            if (ends == NULL) return TP_OK;
            snprintf(expected, sizeof expected, "{%% %s %%}", ends[0]);
            return tp_jparse_fail(p, expected);
        }
        }
        append(&tail, node);
    }
}

/* A body behind the head of a statement, whose "%}" comes first (after an optional colon). */
static tp_status body_after_head(tp_jparser *p, const char *const *ends, tp_jnode **body)
{
    tp_jparse_skip(p, TP_T_COLON);
    TP_TRY(tp_jparse_expect(p, TP_T_BLOCK_END, "'%}'"));
    if (p->statements >= TP_J_MAX_STATEMENTS) return tp_jparse_fail(p, "at most 128 nested statements");
    p->statements++;
    TP_TRY(body_until(p, ends, body));
    p->statements--;
    return TP_OK;
}

/* The same up to a single end tag, which is consumed. Variables set in it stay inside; filters in it are checked at once. */
static tp_status block(tp_jparser *p, const char *end, tp_jnode **body)
{
    const char *const ends[] = {end, NULL};
    bool soft = p->soft;
    p->soft = false;
    p->frames++;
    TP_TRY(body_after_head(p, ends, body));
    p->frames--;
    p->soft = soft;
    p->at++;
    return TP_OK;
}

/* A body that becomes a function of its own: loops around it cannot be left from inside. */
static tp_status closure(tp_jparser *p, const char *end, tp_jnode *node)
{
    int loops = p->loops;
    uint8_t uses = p->uses;
    p->loops = 0;
    p->uses = 0;
    TP_TRY(block(p, end, &node->body));
    node->flags = p->uses;
    p->uses |= uses;
    p->loops = loops;
    p->captures = true;
    return TP_OK;
}

/* ---- targets ---- */

static tp_status target_name(tp_jparser *p, bool members, tp_jnode **node)
{
    static const char *const reserved[] = {"true", "false", "none", "True", "False", "None", NULL};
    if (p->at->kind != TP_T_NAME || at_one_of(p, reserved)) return tp_jparse_fail(p, "the name of a variable");
    tp_span name = p->at->text;
    TP_TRY(tp_jparse_node(p, TP_N_NAME, node));
    p->at++;
    TP_TRY(tp_jparse_name(p, name, &(*node)->name));
    if (members && tp_jparse_skip(p, TP_T_DOT)) {
        if (p->at->kind != TP_T_NAME) return tp_jparse_fail(p, "a name behind '.'");
        (*node)->kind = TP_N_MEMBER;
        (*node)->text = p->at++->text;
    }
    return TP_OK;
}

static tp_status target_item(tp_jparser *p, bool members, tp_jnode **node)
{
    if (p->at->kind != TP_T_LPAREN) return target_name(p, members, node);
    if (p->parens >= TP_J_MAX_PARENS) return tp_jparse_fail(p, "at most 256 nested parentheses");
    p->parens++;
    p->at++;
    TP_TRY(tp_jparse_target(p, members, node));
    p->parens--;
    return tp_jparse_expect(p, TP_T_RPAREN, "')'");
}

tp_status tp_jparse_target(tp_jparser *p, bool members, tp_jnode **node)
{
    tp_jnode *items[64];
    size_t n = 0;
    bool is_tuple = false;
    do {
        is_tuple = is_tuple || n > 0;
        if (n > 0 && (p->at->kind != TP_T_NAME && p->at->kind != TP_T_LPAREN)) break;
        if (n > 0 && tp_jparse_at_name(p, "in")) break;
        if (n == sizeof items / sizeof items[0]) return tp_jparse_fail(p, "at most 64 variables");
        TP_TRY(target_item(p, members, &items[n]));
        n++;
    } while (tp_jparse_skip(p, TP_T_COMMA));
    if (!is_tuple) {
        *node = items[0];
        return TP_OK;
    }
    TP_TRY(tp_jparse_node(p, TP_N_TUPLE, node));
    (*node)->items = tp_jparse_alloc(p, n, sizeof items[0]);
    if ((*node)->items == NULL) return TP_NOMEM;
    memcpy((*node)->items, items, n * sizeof items[0]);
    (*node)->n_items = (uint32_t)n;
    return TP_OK;
}

/* ---- statements ---- */

static tp_status parse_if(tp_jparser *p, tp_jnode *node)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    bool soft = p->soft;
    p->soft = true;
    for (;;) {
        TP_TRY(tp_jparse_tuple(p, TP_J_TUPLE_NO_COND, &node->a));
        p->branches++;
        TP_TRY(body_after_head(p, ends, &node->body));
        p->branches--;
        if (!tp_jparse_skip_name(p, "elif")) break;
        TP_TRY(tp_jparse_node(p, TP_N_IF, &node->otherwise));
        node = node->otherwise;
    }
    if (tp_jparse_skip_name(p, "else")) {
        static const char *const endif[] = {"endif", NULL};
        p->branches++;
        TP_TRY(body_after_head(p, endif, &node->otherwise));
        p->branches--;
    }
    p->at++;
    p->soft = soft;
    return TP_OK;
}

static tp_status parse_for(tp_jparser *p, tp_jnode *node)
{
    static const char *const ends[] = {"else", "endfor", NULL};
    bool soft = p->soft, captures = p->captures;
    TP_TRY(tp_jparse_target(p, false, &node->a));
    if (node->a->kind == TP_N_NAME && node->a->name == p->tmpl->loop) return tp_jparse_fail(p, "a variable other than 'loop'");
    if (!tp_jparse_skip_name(p, "in")) return tp_jparse_fail(p, "'in'");
    TP_TRY(tp_jparse_tuple(p, TP_J_TUPLE_NO_COND, &node->b));
    p->soft = false;
    p->frames++;
    if (tp_jparse_skip_name(p, "if")) TP_TRY(tp_jparse_expression(p, &node->c));
    if (tp_jparse_skip_name(p, "recursive")) node->flags |= TP_N_RECURSIVE;
    p->captures = false;
    p->loops++;
    TP_TRY(body_after_head(p, ends, &node->body));
    p->loops--;
    p->frames--;
    if (p->captures || (node->flags & TP_N_RECURSIVE) != 0) node->flags |= TP_N_CAPTURES;
    if (tp_jparse_skip_name(p, "else"))
        TP_TRY(block(p, "endfor", &node->otherwise));
    else
        p->at++;
    p->captures = captures || p->captures;
    p->soft = soft;
    return TP_OK;
}

static tp_status parse_set(tp_jparser *p, tp_jnode *node)
{
    TP_TRY(tp_jparse_target(p, true, &node->a));
    if (tp_jparse_skip(p, TP_T_ASSIGN)) {
        TP_TRY(tp_jparse_tuple(p, TP_J_TUPLE_FULL, &node->b));
    } else {
        node->kind = TP_N_SET_BLOCK;
        p->frames++;
        TP_TRY(tp_jparse_filters(p, false, &node->b));
        p->frames--;
        TP_TRY(block(p, "endset", &node->body));
    }
    note_set(p, node->a);
    return TP_OK;
}

static tp_status parse_params(tp_jparser *p, tp_jnode *node)
{
    enum { MAX_PARAMS = 64 };
    uint32_t names[MAX_PARAMS];
    tp_jnode *defaults[MAX_PARAMS];
    size_t n = 0;
    TP_TRY(tp_jparse_expect(p, TP_T_LPAREN, "'('"));
    p->frames++;
    while (p->at->kind != TP_T_RPAREN) {
        tp_jnode *target;
        if (n > 0) TP_TRY(tp_jparse_expect(p, TP_T_COMMA, "',' or ')'"));
        if (n == MAX_PARAMS) return tp_jparse_fail(p, "at most 64 parameters");
        TP_TRY(target_name(p, false, &target));
        names[n] = target->name;
        defaults[n] = NULL;
        if (tp_jparse_skip(p, TP_T_ASSIGN))
            TP_TRY(tp_jparse_expression(p, &defaults[n]));
        else if (n > 0 && defaults[n - 1] != NULL)
            return tp_jparse_fail(p, "a default value, as the parameter before has one");
        if (target->name == p->tmpl->caller && defaults[n] == NULL)
            return tp_jparse_fail(p, "a default value for the parameter 'caller'");
        n++;
    }
    p->frames--;
    p->at++;
    tp_jparams *params = tp_jparse_alloc(p, 1, sizeof *params);
    if (params == NULL) return TP_NOMEM;
    params->n = n;
    params->names = tp_jparse_alloc(p, n, sizeof names[0]);
    params->defaults = tp_jparse_alloc(p, n, sizeof defaults[0]);
    if (params->names == NULL || params->defaults == NULL) return TP_NOMEM;
    memcpy(params->names, names, n * sizeof names[0]);
    memcpy(params->defaults, defaults, n * sizeof defaults[0]);
    node->params = params;
    return TP_OK;
}

static tp_status parse_macro(tp_jparser *p, tp_jnode *node)
{
    tp_jnode *name;
    TP_TRY(target_name(p, false, &name));
    node->name = name->name;
    note_set(p, name);
    TP_TRY(parse_params(p, node));
    return closure(p, "endmacro", node);
}

static tp_status parse_call(tp_jparser *p, tp_jnode *node)
{
    if (p->at->kind == TP_T_LPAREN) TP_TRY(parse_params(p, node));
    TP_TRY(tp_jparse_expression(p, &node->a));
    if (node->a->kind != TP_N_CALL) return tp_jparse_fail(p, "a call");
    return closure(p, "endcall", node);
}

static tp_status parse_with(tp_jparser *p, tp_jnode *node)
{
    tp_jnode *items[128];
    size_t n = 0;
    while (p->at->kind != TP_T_BLOCK_END) {
        if (n > 0) TP_TRY(tp_jparse_expect(p, TP_T_COMMA, "',' or '%}'"));
        if (n == sizeof items / sizeof items[0]) return tp_jparse_fail(p, "at most 64 variables");
        TP_TRY(target_item(p, false, &items[n]));
        TP_TRY(tp_jparse_expect(p, TP_T_ASSIGN, "'='"));
        TP_TRY(tp_jparse_expression(p, &items[n + 1]));
        n += 2;
    }
    node->items = tp_jparse_alloc(p, n, sizeof items[0]);
    if (node->items == NULL) return TP_NOMEM;
    memcpy(node->items, items, n * sizeof items[0]);
    node->n_items = (uint32_t)n;
    return block(p, "endwith", &node->body);
}

static tp_status parse_filter_block(tp_jparser *p, tp_jnode *node)
{
    TP_TRY(tp_jparse_filters(p, true, &node->b));
    return block(p, "endfilter", &node->body);
}

static tp_status parse_autoescape(tp_jparser *p, tp_jnode *node)
{
    TP_TRY(tp_jparse_expression(p, &node->a));
    return block(p, "endautoescape", &node->body);
}

static tp_status parse_block(tp_jparser *p, tp_jnode *node)
{
    if (p->at->kind != TP_T_NAME) return tp_jparse_fail(p, "the name of the block");
    tp_span name = p->at++->text;
    tp_jparse_skip_name(p, "scoped");
    TP_TRY(closure(p, "endblock", node));
    if (p->at->kind == TP_T_NAME && tp_span_equal(p->at->text, name)) p->at++;
    return TP_OK;
}

static tp_status parse_generation(tp_jparser *p, tp_jnode *node)
{
    p->tmpl->has_generation = true;
    return closure(p, "endgeneration", node);
}

static tp_status parse_loop_control(tp_jparser *p, tp_jnode *node)
{
    (void)node;
    return p->loops > 0 ? TP_OK : tp_jparse_fail(p, "break and continue only inside a loop of the same function");
}

/* include, import, from, extends: their operands are of no interest, since nothing can be loaded. */
static tp_status parse_load(tp_jparser *p, tp_jnode *node)
{
    TP_TRY(tp_jparse_expression(p, &node->a));
    while (p->at->kind != TP_T_BLOCK_END && p->at->kind != TP_T_END) p->at++;
    return TP_OK;
}

static const struct {
    const char *name;
    tp_jnode_kind kind;
    tp_status (*parse)(tp_jparser *p, tp_jnode *node);
} statements[] = {
    {"if", TP_N_IF, parse_if},
    {"for", TP_N_FOR, parse_for},
    {"set", TP_N_SET, parse_set},
    {"macro", TP_N_MACRO, parse_macro},
    {"call", TP_N_CALL_BLOCK, parse_call},
    {"filter", TP_N_FILTER_BLOCK, parse_filter_block},
    {"with", TP_N_WITH, parse_with},
    {"autoescape", TP_N_AUTOESCAPE, parse_autoescape},
    {"block", TP_N_BLOCK, parse_block},
    {"generation", TP_N_GENERATION, parse_generation},
    {"break", TP_N_BREAK, parse_loop_control},
    {"continue", TP_N_CONTINUE, parse_loop_control},
    {"include", TP_N_LOAD, parse_load},
    {"import", TP_N_LOAD, parse_load},
    {"from", TP_N_LOAD, parse_load},
    {"extends", TP_N_LOAD, parse_load},
};

static tp_status statement(tp_jparser *p, tp_jnode **node)
{
    for (size_t i = 0; i < sizeof statements / sizeof statements[0]; i++) {
        if (!tp_jparse_at_name(p, statements[i].name)) continue;
        TP_TRY(tp_jparse_node(p, statements[i].kind, node));
        p->at++;
        return statements[i].parse(p, *node);
    }
    return tp_jparse_fail(p, "a statement (if, for, set, macro, ...) or the end of the enclosing one");
}

static tp_status parse_all(tp_jparser *p)
{
    tp_template *t = p->tmpl;
    TP_TRY(tp_jparse_name(p, tp_span_of("loop"), &t->loop));
    TP_TRY(tp_jparse_name(p, tp_span_of("caller"), &t->caller));
    TP_TRY(tp_jparse_name(p, tp_span_of("kwargs"), &t->kwargs));
    TP_TRY(tp_jparse_name(p, tp_span_of("varargs"), &t->varargs));
    TP_TRY(body_until(p, NULL, &t->body));
    const tp_jnode *u = p->unknown;
    if (u == NULL) return TP_OK;
    return tp_fail(p->ctx, TP_FORMAT, "%s:%u: there is no %s named '%.*s'", t->name.data, u->line,
                   u->kind == TP_N_FILTER ? "filter" : "test", (int)u->text.len, u->text.data);
}

tp_status tp_jparse_template(tp_ctx *ctx, tp_template *tmpl, const tp_jtoken *tokens)
{
    tp_jparser p = {.ctx = ctx, .tmpl = tmpl, .at = tokens};
    p.names = tp_map_new(ctx, true);
    if (p.names == NULL) return TP_NOMEM;
    tp_status st = parse_all(&p);
    tp_map_free(p.names);
    return st;
}

/* ---- the public side ---- */

static tp_status compile(tp_ctx *ctx, const char *name, const char *text, size_t n, tp_template *t)
{
    char *kept_name = tp_arena_strndup(ctx, &t->arena, name, strlen(name));
    char *source = tp_arena_strndup(ctx, &t->arena, text, n), *work = tp_arena_strndup(ctx, &t->arena, text, n);
    if (kept_name == NULL || source == NULL || work == NULL) return TP_NOMEM;
    t->name = tp_span_of(kept_name);
    t->source = (tp_span){source, n};
    tp_jtoken *tokens;
    TP_TRY(tp_jlex(ctx, &t->arena, kept_name, work, n, &tokens));
    tp_status st = tp_jparse_template(ctx, t, tokens);
    tp_free(tokens);
    return st;
}

tp_status tp_template_compile(tp_ctx *ctx, const char *name, const char *text, size_t n, tp_template **tmpl)
{
    *tmpl = NULL;
    if (n > TP_J_MAX_SOURCE)
        return tp_fail(ctx, TP_FORMAT, "%s: the template has %zu bytes, the limit is %zu", name, n, TP_J_MAX_SOURCE);
    size_t valid = tp_utf8_valid_prefix(text, n);
    if (valid < n) return tp_fail(ctx, TP_FORMAT, "%s: the template is not UTF-8 at byte %zu", name, valid);
    tp_template *t = tp_alloc(ctx, 1, sizeof *t);
    if (t == NULL) return TP_NOMEM;
    tp_arena_init(&t->arena, 1 << 14);
    tp_status st = compile(ctx, name, text, n, t);
    if (st != TP_OK) {
        tp_template_free(t);
        return st;
    }
    *tmpl = t;
    return TP_OK;
}

void tp_template_free(tp_template *tmpl)
{
    if (tmpl == NULL) return;
    tp_arena_free(&tmpl->arena);
    tp_free(tmpl);
}

tp_span tp_template_source(const tp_template *tmpl)
{
    return tmpl->source;
}
bool tp_template_has_generation(const tp_template *tmpl)
{
    return tmpl->has_generation;
}
