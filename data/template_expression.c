/* The expression half of the parser: recursive descent, one function per level of precedence.
 *
 *     inline if  <  or  <  and  <  not  <  comparisons, in  <  + -  <  ~  <  * / // %  <  **  <  unary, postfix, | and is
 *
 * Operators of one level group from left to right, ** included. */
#include "data/template_parser.h"

typedef struct node_list {
    tp_jnode **items;
    size_t n, capacity;
} node_list;

static tp_status push(tp_jparser *p, node_list *list, tp_jnode *node)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity == 0 ? 4 : 2 * list->capacity;
        tp_jnode **items = tp_jparse_alloc(p, capacity, sizeof *items);
        if (items == NULL) return TP_NOMEM;
        if (list->n > 0) memcpy(items, list->items, list->n * sizeof *items);
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->n++] = node;
    return TP_OK;
}

/* Keeps the height of the tree below its limit: evaluation recurses along it. */
static tp_status above(tp_jparser *p, tp_jnode *node, const tp_jnode *child)
{
    if (child == NULL || child->height < node->height) return TP_OK;
    if (child->height >= TP_J_MAX_HEIGHT) return tp_jparse_fail(p, "an expression with fewer than 1000 operators in a row");
    node->height = (uint16_t)(child->height + 1);
    return TP_OK;
}

static tp_status above_all(tp_jparser *p, tp_jnode *node, const node_list *list)
{
    for (size_t i = 0; i < list->n; i++) TP_TRY(above(p, node, list->items[i]));
    node->items = list->items;
    node->n_items = (uint32_t)list->n;
    return TP_OK;
}

/* *node becomes a new node over itself and `right`. */
static tp_status wrap(tp_jparser *p, tp_jnode_kind kind, tp_jnode **node, tp_jnode *right)
{
    tp_jnode *new_node;
    TP_TRY(tp_jparse_node(p, kind, &new_node));
    new_node->a = *node;
    new_node->b = right;
    TP_TRY(above(p, new_node, *node));
    TP_TRY(above(p, new_node, right));
    *node = new_node;
    return TP_OK;
}

static tp_status nest(tp_jparser *p)
{
    if (p->parens >= TP_J_MAX_PARENS) return tp_jparse_fail(p, "at most 256 nested parentheses");
    p->parens++;
    return TP_OK;
}

/* ---- calls ---- */

static tp_status keyword_argument(tp_jparser *p, node_list *values, tp_span **names)
{
    tp_span name = p->at->text;
    p->at += 2;
    tp_jnode *value;
    TP_TRY(tp_jparse_expression(p, &value));
    size_t n = values->n, capacity = values->capacity;
    if (n >= TP_J_MAX_KEYWORDS) return tp_jparse_fail(p, "at most 1024 keywords in a call");
    for (size_t i = 0; i < n; i++)
        if (tp_span_equal((*names)[i], name)) return tp_jparse_fail(p, "each keyword once in a call");
    TP_TRY(push(p, values, value));
    if (values->capacity != capacity) {
        tp_span *grown = tp_jparse_alloc(p, values->capacity, sizeof *grown);
        if (grown == NULL) return TP_NOMEM;
        if (n > 0) memcpy(grown, *names, n * sizeof *grown);
        *names = grown;
    }
    (*names)[n] = name;
    return TP_OK;
}

static tp_status one_argument(tp_jparser *p, node_list *items, node_list *values, tp_jcall_args *call)
{
    const char *order = "positional arguments, then *list, keywords and **dict";
    tp_jnode *node;
    if (p->at->kind == TP_T_MUL) {
        if (call->more != NULL || call->more_keywords != NULL) return tp_jparse_fail(p, order);
        p->at++;
        return tp_jparse_expression(p, &call->more);
    }
    if (p->at->kind == TP_T_POW) {
        if (call->more_keywords != NULL) return tp_jparse_fail(p, order);
        p->at++;
        return tp_jparse_expression(p, &call->more_keywords);
    }
    if (p->at->kind == TP_T_NAME && p->at[1].kind == TP_T_ASSIGN) {
        if (call->more_keywords != NULL) return tp_jparse_fail(p, order);
        return keyword_argument(p, values, &call->names);
    }
    if (call->more != NULL || call->more_keywords != NULL || values->n > 0) return tp_jparse_fail(p, order);
    TP_TRY(tp_jparse_expression(p, &node));
    return push(p, items, node);
}

/* The arguments between parentheses, attached to `node`. */
static tp_status arguments(tp_jparser *p, tp_jnode *node)
{
    tp_jcall_args *call = tp_jparse_alloc(p, 1, sizeof *call);
    if (call == NULL) return TP_NOMEM;
    *call = (tp_jcall_args){0};
    node_list items = {0}, values = {0};
    TP_TRY(nest(p));
    TP_TRY(tp_jparse_expect(p, TP_T_LPAREN, "'('"));
    for (bool first = true; p->at->kind != TP_T_RPAREN; first = false) {
        if (!first) {
            TP_TRY(tp_jparse_expect(p, TP_T_COMMA, "',' or ')'"));
            if (p->at->kind == TP_T_RPAREN) break;
        }
        TP_TRY(one_argument(p, &items, &values, call));
    }
    TP_TRY(tp_jparse_expect(p, TP_T_RPAREN, "')'"));
    p->parens--;
    for (size_t i = 0; i < items.n; i++) TP_TRY(above(p, node, items.items[i]));
    for (size_t i = 0; i < values.n; i++) TP_TRY(above(p, node, values.items[i]));
    TP_TRY(above(p, node, call->more));
    TP_TRY(above(p, node, call->more_keywords));
    call->items = items.items;
    call->n = items.n;
    call->values = values.items;
    call->n_keywords = values.n;
    node->call = call;
    return TP_OK;
}

/* ---- primaries ---- */

static tp_status constant(tp_jparser *p, tp_jvalue value, tp_jnode **node)
{
    tp_jvalue *kept = tp_jparse_alloc(p, 1, sizeof *kept);
    if (kept == NULL) return TP_NOMEM;
    *kept = value;
    TP_TRY(tp_jparse_node(p, TP_N_CONST, node));
    (*node)->value = kept;
    return TP_OK;
}

static tp_status string_literal(tp_jparser *p, tp_jnode **node)
{
    size_t n = 0;
    const tp_jtoken *first = p->at;
    while (p->at->kind == TP_T_STRING) n += p->at++->text.len;
    if (p->at == first + 1) return constant(p, tp_jtext(first->text.data, n), node);
    char *text = tp_jparse_alloc(p, n + 1, 1);
    if (text == NULL) return TP_NOMEM;
    size_t at = 0;
    for (const tp_jtoken *t = first; t < p->at; t++) {
        memcpy(text + at, t->text.data, t->text.len);
        at += t->text.len;
    }
    return constant(p, tp_jtext(text, n), node);
}

static tp_status number_literal(tp_jparser *p, tp_jnode **node)
{
    tp_jint i;
    double d;
    const tp_jtoken *t = p->at;
    if (t->kind == TP_T_INTEGER && !tp_jparse_int(t->text, 0, &i)) return tp_jparse_fail(p, "an integer below 2^127");
    if (t->kind == TP_T_FLOAT && !tp_jparse_float(t->text, &d)) return tp_jparse_fail(p, "a number");
    p->at++;
    return constant(p, t->kind == TP_T_INTEGER ? tp_jinteger(i) : tp_jfloat(d), node);
}

static tp_status name_or_word(tp_jparser *p, tp_jnode **node)
{
    tp_span text = p->at->text;
    p->at++;
    if (tp_span_is(text, "true") || tp_span_is(text, "True")) return constant(p, tp_jbool(true), node);
    if (tp_span_is(text, "false") || tp_span_is(text, "False")) return constant(p, tp_jbool(false), node);
    if (tp_span_is(text, "none") || tp_span_is(text, "None")) return constant(p, tp_jnone(), node);
    TP_TRY(tp_jparse_node(p, TP_N_NAME, node));
    TP_TRY(tp_jparse_name(p, text, &(*node)->name));
    tp_jparse_read(p, (*node)->name);
    if (tp_span_is(text, "caller")) p->uses |= TP_N_USES_CALLER;
    if (tp_span_is(text, "kwargs")) p->uses |= TP_N_USES_KWARGS;
    if (tp_span_is(text, "varargs")) p->uses |= TP_N_USES_VARARGS;
    return TP_OK;
}

/* [a, b] and {k: v}; a comma may stand behind the last. */
static tp_status display(tp_jparser *p, bool dict, tp_jnode **node)
{
    tp_jtoken_kind close = dict ? TP_T_RBRACE : TP_T_RBRACKET;
    node_list items = {0};
    tp_jnode *item;
    TP_TRY(nest(p));
    TP_TRY(tp_jparse_node(p, dict ? TP_N_DICT : TP_N_LIST, node));
    p->at++;
    while (p->at->kind != close) {
        if (items.n > 0) TP_TRY(tp_jparse_expect(p, TP_T_COMMA, dict ? "',' or '}'" : "',' or ']'"));
        if (p->at->kind == close) break;
        TP_TRY(tp_jparse_expression(p, &item));
        TP_TRY(push(p, &items, item));
        if (!dict) continue;
        TP_TRY(tp_jparse_expect(p, TP_T_COLON, "':' behind a key"));
        TP_TRY(tp_jparse_expression(p, &item));
        TP_TRY(push(p, &items, item));
    }
    p->at++;
    p->parens--;
    return above_all(p, *node, &items);
}

static tp_status primary(tp_jparser *p, tp_jnode **node)
{
    switch (p->at->kind) {
    case TP_T_NAME: return name_or_word(p, node);
    case TP_T_STRING: return string_literal(p, node);
    case TP_T_INTEGER:
    case TP_T_FLOAT: return number_literal(p, node);
    case TP_T_LBRACKET: return display(p, false, node);
    case TP_T_LBRACE: return display(p, true, node);
    case TP_T_LPAREN:
        TP_TRY(nest(p));
        p->at++;
        TP_TRY(tp_jparse_tuple(p, TP_J_TUPLE_PARENS, node));
        p->parens--;
        return tp_jparse_expect(p, TP_T_RPAREN, "')'");
    default: return tp_jparse_fail(p, "an expression");
    }
}

/* ---- postfix: .name [index] (call) | filter, is test ---- */

static bool ends_slice_part(const tp_jparser *p)
{
    return p->at->kind == TP_T_COLON || p->at->kind == TP_T_RBRACKET || p->at->kind == TP_T_COMMA;
}

/* One of the parts between brackets: an expression or first:last:step. */
static tp_status subscript_part(tp_jparser *p, tp_jnode **node)
{
    tp_jnode *parts[3] = {NULL, NULL, NULL};
    if (p->at->kind != TP_T_COLON) {
        TP_TRY(tp_jparse_expression(p, &parts[0]));
        if (p->at->kind != TP_T_COLON) {
            *node = parts[0];
            return TP_OK;
        }
    }
    p->at++;
    if (!ends_slice_part(p)) TP_TRY(tp_jparse_expression(p, &parts[1]));
    if (tp_jparse_skip(p, TP_T_COLON) && !ends_slice_part(p)) TP_TRY(tp_jparse_expression(p, &parts[2]));
    TP_TRY(tp_jparse_node(p, TP_N_SLICE, node));
    (*node)->a = parts[0];
    (*node)->b = parts[1];
    (*node)->c = parts[2];
    for (int i = 0; i < 3; i++) TP_TRY(above(p, *node, parts[i]));
    return TP_OK;
}

static tp_status subscript(tp_jparser *p, tp_jnode **node)
{
    node_list parts = {0};
    tp_jnode *part;
    TP_TRY(nest(p));
    p->at++;
    while (p->at->kind != TP_T_RBRACKET) {
        if (parts.n > 0) TP_TRY(tp_jparse_expect(p, TP_T_COMMA, "']'"));
        TP_TRY(subscript_part(p, &part));
        TP_TRY(push(p, &parts, part));
    }
    TP_TRY(tp_jparse_expect(p, TP_T_RBRACKET, "']'"));
    p->parens--;
    if (parts.n != 1) {
        TP_TRY(tp_jparse_node(p, TP_N_TUPLE, &part));
        TP_TRY(above_all(p, part, &parts));
    }
    return wrap(p, TP_N_GETITEM, node, part);
}

static tp_status member(tp_jparser *p, tp_jnode **node)
{
    p->at++;
    if (p->at->kind == TP_T_INTEGER) {
        tp_jnode *index;
        TP_TRY(number_literal(p, &index));
        return wrap(p, TP_N_GETITEM, node, index);
    }
    if (p->at->kind != TP_T_NAME) return tp_jparse_fail(p, "a name or number behind '.'");
    TP_TRY(wrap(p, TP_N_GETATTR, node, NULL));
    (*node)->text = p->at->text;
    p->at++;
    return TP_OK;
}

static tp_status call(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(wrap(p, TP_N_CALL, node, NULL));
    return arguments(p, *node);
}

static tp_status postfix(tp_jparser *p, tp_jnode **node)
{
    for (;;) {
        if (p->at->kind == TP_T_DOT)
            TP_TRY(member(p, node));
        else if (p->at->kind == TP_T_LBRACKET)
            TP_TRY(subscript(p, node));
        else if (p->at->kind == TP_T_LPAREN)
            TP_TRY(call(p, node));
        else
            return TP_OK;
    }
}

/* The possibly dotted name of a filter or test. */
static tp_status dotted_name(tp_jparser *p, tp_span *name)
{
    if (p->at->kind != TP_T_NAME) return tp_jparse_fail(p, "a name");
    *name = p->at++->text;
    while (tp_jparse_skip(p, TP_T_DOT)) {
        if (p->at->kind != TP_T_NAME) return tp_jparse_fail(p, "a name behind '.'");
        tp_span last = p->at++->text;
        name->len = (size_t)(last.data + last.len - name->data);
    }
    return TP_OK;
}

/* Remembers the first unknown name: it is an error of the template unless a condition guards it. */
static void check_known(tp_jparser *p, const tp_jnode *node)
{
    if (node->builtin == NULL && !p->soft && p->unknown == NULL) p->unknown = node;
}

tp_status tp_jparse_filters(tp_jparser *p, bool inline_start, tp_jnode **node)
{
    while (inline_start || tp_jparse_skip(p, TP_T_PIPE)) {
        inline_start = false;
        TP_TRY(wrap(p, TP_N_FILTER, node, NULL));
        TP_TRY(dotted_name(p, &(*node)->text));
        (*node)->builtin = tp_jfind_filter((*node)->text);
        check_known(p, *node);
        if (p->at->kind == TP_T_LPAREN) TP_TRY(arguments(p, *node));
    }
    return TP_OK;
}

/* A test may take one argument without parentheses: x is divisibleby 3. */
static bool begins_test_argument(const tp_jparser *p)
{
    switch (p->at->kind) {
    case TP_T_NAME: return !tp_jparse_at_name(p, "else") && !tp_jparse_at_name(p, "or") && !tp_jparse_at_name(p, "and");
    case TP_T_STRING:
    case TP_T_INTEGER:
    case TP_T_FLOAT:
    case TP_T_LBRACKET:
    case TP_T_LBRACE: return true;
    default: return false;
    }
}

static tp_status bare_test_argument(tp_jparser *p, tp_jnode *test)
{
    if (tp_jparse_at_name(p, "is")) return tp_jparse_fail(p, "one test (they do not chain)");
    tp_jcall_args *args = tp_jparse_alloc(p, 1, sizeof *args);
    node_list items = {0};
    tp_jnode *argument;
    if (args == NULL) return TP_NOMEM;
    TP_TRY(primary(p, &argument));
    TP_TRY(postfix(p, &argument));
    TP_TRY(push(p, &items, argument));
    TP_TRY(above(p, test, argument));
    *args = (tp_jcall_args){.items = items.items, .n = 1};
    test->call = args;
    return TP_OK;
}

static tp_status test(tp_jparser *p, tp_jnode **node)
{
    p->at++;
    bool negated = tp_jparse_skip_name(p, "not");
    TP_TRY(wrap(p, TP_N_TEST, node, NULL));
    TP_TRY(dotted_name(p, &(*node)->text));
    (*node)->builtin = tp_jfind_test((*node)->text);
    check_known(p, *node);
    if (p->at->kind == TP_T_LPAREN)
        TP_TRY(arguments(p, *node));
    else if (begins_test_argument(p))
        TP_TRY(bare_test_argument(p, *node));
    return negated ? wrap(p, TP_N_NOT, node, NULL) : TP_OK;
}

static tp_status unary(tp_jparser *p, bool with_filters, tp_jnode **node)
{
    if (p->at->kind == TP_T_SUB || p->at->kind == TP_T_ADD) {
        tp_jnode_kind kind = p->at->kind == TP_T_SUB ? TP_N_NEG : TP_N_POS;
        TP_TRY(nest(p));
        p->at++;
        TP_TRY(unary(p, false, node));
        p->parens--;
        TP_TRY(wrap(p, kind, node, NULL));
    } else {
        TP_TRY(primary(p, node));
    }
    TP_TRY(postfix(p, node));
    while (with_filters) {
        if (p->at->kind == TP_T_PIPE)
            TP_TRY(tp_jparse_filters(p, false, node));
        else if (tp_jparse_at_name(p, "is"))
            TP_TRY(test(p, node));
        else if (p->at->kind == TP_T_LPAREN)
            TP_TRY(call(p, node));
        else
            break;
    }
    return TP_OK;
}

/* ---- binary operators ---- */

static tp_status power(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(unary(p, true, node));
    while (p->at->kind == TP_T_POW) {
        tp_jnode *right;
        p->at++;
        TP_TRY(unary(p, true, &right));
        TP_TRY(wrap(p, TP_N_BINARY, node, right));
        (*node)->op = TP_T_POW;
    }
    return TP_OK;
}

static tp_status product(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(power(p, node));
    while (p->at->kind == TP_T_MUL || p->at->kind == TP_T_DIV || p->at->kind == TP_T_FLOORDIV || p->at->kind == TP_T_MOD) {
        tp_jtoken_kind op = p->at->kind;
        tp_jnode *right;
        p->at++;
        TP_TRY(power(p, &right));
        TP_TRY(wrap(p, TP_N_BINARY, node, right));
        (*node)->op = (uint8_t)op;
    }
    return TP_OK;
}

static tp_status concatenation(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(product(p, node));
    if (p->at->kind != TP_T_TILDE) return TP_OK;
    node_list items = {0};
    TP_TRY(push(p, &items, *node));
    while (tp_jparse_skip(p, TP_T_TILDE)) {
        TP_TRY(product(p, node));
        TP_TRY(push(p, &items, *node));
    }
    TP_TRY(tp_jparse_node(p, TP_N_CONCAT, node));
    return above_all(p, *node, &items);
}

static tp_status sum(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(concatenation(p, node));
    while (p->at->kind == TP_T_ADD || p->at->kind == TP_T_SUB) {
        tp_jtoken_kind op = p->at->kind;
        tp_jnode *right;
        p->at++;
        TP_TRY(concatenation(p, &right));
        TP_TRY(wrap(p, TP_N_BINARY, node, right));
        (*node)->op = (uint8_t)op;
    }
    return TP_OK;
}

/* The comparison operator here, consumed, or 0. */
static uint8_t comparison_operator(tp_jparser *p)
{
    if (p->at->kind >= TP_T_EQ && p->at->kind <= TP_T_LE) return (uint8_t)p->at++->kind;
    if (tp_jparse_skip_name(p, "in")) return TP_N_OP_IN;
    if (!tp_jparse_at_name(p, "not") || p->at[1].kind != TP_T_NAME || !tp_span_is(p->at[1].text, "in")) return 0;
    p->at += 2;
    return TP_N_OP_NOT_IN;
}

static tp_status comparison(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(sum(p, node));
    uint8_t op = comparison_operator(p);
    if (op == 0) return TP_OK;
    node_list items = {0};
    uint8_t *ops = NULL;
    TP_TRY(wrap(p, TP_N_COMPARE, node, NULL));
    for (; op != 0; op = comparison_operator(p)) {
        size_t capacity = items.capacity;
        tp_jnode *right;
        TP_TRY(sum(p, &right));
        TP_TRY(push(p, &items, right));
        if (items.capacity != capacity) {
            uint8_t *grown = tp_jparse_alloc(p, items.capacity, 1);
            if (grown == NULL) return TP_NOMEM;
            if (ops != NULL) memcpy(grown, ops, items.n - 1);
            ops = grown;
        }
        ops[items.n - 1] = op;
    }
    (*node)->ops = ops;
    return above_all(p, *node, &items);
}

static tp_status negation(tp_jparser *p, tp_jnode **node)
{
    int negations = 0;
    while (tp_jparse_skip_name(p, "not")) negations++;
    TP_TRY(comparison(p, node));
    for (; negations > 0; negations--) TP_TRY(wrap(p, TP_N_NOT, node, NULL));
    return TP_OK;
}

static tp_status conjunction(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(negation(p, node));
    while (tp_jparse_skip_name(p, "and")) {
        tp_jnode *right;
        TP_TRY(negation(p, &right));
        TP_TRY(wrap(p, TP_N_AND, node, right));
    }
    return TP_OK;
}

static tp_status disjunction(tp_jparser *p, tp_jnode **node)
{
    TP_TRY(conjunction(p, node));
    while (tp_jparse_skip_name(p, "or")) {
        tp_jnode *right;
        TP_TRY(conjunction(p, &right));
        TP_TRY(wrap(p, TP_N_OR, node, right));
    }
    return TP_OK;
}

/* a if b else c. All three parts count as conditional, the first one in hindsight. */
tp_status tp_jparse_expression(tp_jparser *p, tp_jnode **node)
{
    bool soft = p->soft;
    const tp_jnode *unknown = p->unknown;
    TP_TRY(disjunction(p, node));
    while (tp_jparse_skip_name(p, "if")) {
        tp_jnode *condition, *otherwise = NULL;
        p->unknown = unknown;
        p->soft = true;
        TP_TRY(disjunction(p, &condition));
        if (tp_jparse_skip_name(p, "else")) {
            TP_TRY(nest(p));
            TP_TRY(tp_jparse_expression(p, &otherwise));
            p->parens--;
        }
        TP_TRY(wrap(p, TP_N_COND, node, condition));
        TP_TRY(above(p, *node, otherwise));
        (*node)->c = otherwise;
        p->soft = soft;
    }
    return TP_OK;
}

tp_status tp_jparse_tuple(tp_jparser *p, tp_jtuple_mode mode, tp_jnode **node)
{
    node_list items = {0};
    bool is_tuple = false;
    for (;;) {
        tp_jtoken_kind kind = p->at->kind;
        bool ends = kind == TP_T_VARIABLE_END || kind == TP_T_BLOCK_END || kind == TP_T_RPAREN;
        if (ends || (mode == TP_J_TUPLE_NO_COND && tp_jparse_at_name(p, "recursive"))) break;
        tp_jnode *item;
        TP_TRY(mode == TP_J_TUPLE_NO_COND ? disjunction(p, &item) : tp_jparse_expression(p, &item));
        TP_TRY(push(p, &items, item));
        if (!tp_jparse_skip(p, TP_T_COMMA)) break;
        is_tuple = true;
    }
    if (!is_tuple && items.n == 1) {
        *node = items.items[0];
        return TP_OK;
    }
    if (!is_tuple && mode != TP_J_TUPLE_PARENS) return tp_jparse_fail(p, "an expression");
    TP_TRY(tp_jparse_node(p, TP_N_TUPLE, node));
    return above_all(p, *node, &items);
}
