/* The syntax tree of a template (internal to the interpreter). Built once, never changed by a render. */
#ifndef TP_DATA_TEMPLATE_PARSER_H
#define TP_DATA_TEMPLATE_PARSER_H

#include "data/template_lexer.h"

#define TP_J_MAX_SOURCE     ((size_t)1 << 20)
#define TP_J_MAX_STATEMENTS 128  /* nested */
#define TP_J_MAX_PARENS     256  /* nested parentheses, unary operators, inline ifs */
#define TP_J_MAX_KEYWORDS   1024 /* in a call: each is compared with those before */
#define TP_J_MAX_HEIGHT     1000 /* of one expression's tree: a + b + c + ... leans left */

typedef enum tp_jnode_kind {
    /* expressions */
    TP_N_CONST,   /* value */
    TP_N_NAME,    /* name */
    TP_N_TUPLE,   /* items */
    TP_N_LIST,    /* items */
    TP_N_DICT,    /* items: key, value, key, value */
    TP_N_GETATTR, /* a, text */
    TP_N_GETITEM, /* a, b */
    TP_N_SLICE,   /* a : b : c, each may be NULL; only inside GETITEM */
    TP_N_CALL,    /* a, call */
    TP_N_FILTER,  /* a (NULL: the captured text of a block), builtin, text, call */
    TP_N_TEST,    /* a, builtin, text, call */
    TP_N_NOT,
    TP_N_NEG,
    TP_N_POS,     /* a */
    TP_N_BINARY,  /* op: a token kind; a, b */
    TP_N_CONCAT,  /* items */
    TP_N_COMPARE, /* a, items, ops: one per item */
    TP_N_AND,
    TP_N_OR,     /* a, b */
    TP_N_COND,   /* a if b else c; c may be NULL */
    TP_N_MEMBER, /* name . text: only as a target of set */
    /* statements */
    TP_N_DATA,         /* text */
    TP_N_OUTPUT,       /* a */
    TP_N_IF,           /* a, body, otherwise (elif: an IF in otherwise) */
    TP_N_FOR,          /* a: target, b: iterable, c: filter or NULL, body, otherwise, flags */
    TP_N_SET,          /* a: target, b: value */
    TP_N_SET_BLOCK,    /* a: target, b: filter chain or NULL, body */
    TP_N_MACRO,        /* name, params, body, flags */
    TP_N_CALL_BLOCK,   /* a: the call, params, body, flags */
    TP_N_FILTER_BLOCK, /* b: filter chain, body */
    TP_N_WITH,         /* items: target, value, ...; body */
    TP_N_AUTOESCAPE,   /* a, body */
    TP_N_BLOCK,        /* body */
    TP_N_GENERATION,   /* body */
    TP_N_BREAK,
    TP_N_CONTINUE,
    TP_N_LOAD /* include, import, extends: there is nothing to load from */
} tp_jnode_kind;

/* Flags: FOR */
enum { TP_N_RECURSIVE = 1, TP_N_CAPTURES = 2 /* the body makes closures, so that each turn needs a scope of its own */ };
/* Flags: MACRO and CALL_BLOCK, what the body mentions */
enum { TP_N_USES_CALLER = 1, TP_N_USES_KWARGS = 2, TP_N_USES_VARARGS = 4 };

/* How `not in` is told from `in` among the ops of a comparison, beside the token kinds EQ ... LE. */
enum { TP_N_OP_IN = 100, TP_N_OP_NOT_IN };

typedef struct tp_jcall_args {
    tp_jnode **items;
    size_t n;
    tp_span *names; /* of the keywords */
    tp_jnode **values;
    size_t n_keywords;
    tp_jnode *more, *more_keywords; /* *args, **kwargs; NULL if absent */
} tp_jcall_args;

typedef struct tp_jparams {
    uint32_t *names;
    tp_jnode **defaults; /* NULL where there is none */
    size_t n;
} tp_jparams;

struct tp_jnode {
    uint8_t kind, op, flags;
    uint16_t height;
    uint32_t line, name, n_items;
    tp_span text;
    tp_jnode *a, *b, *c;
    tp_jnode **items;
    uint8_t *ops;
    tp_jnode *body, *otherwise, *next; /* statements: lists through next */
    const tp_jvalue *value;
    const tp_jbuiltin *builtin;
    const tp_jcall_args *call;
    const tp_jparams *params;
};

struct tp_template {
    tp_arena arena; /* everything below */
    tp_span name, source;
    tp_jnode *body;
    tp_span *names; /* of variables, by number */
    bool *is_own;   /* by number: variables that the template sets before it reads them outside of inner blocks. As in Jinja,
                       what the caller passes under such a name is never seen. */
    size_t n_names;
    uint32_t loop, caller, kwargs, varargs; /* numbers of special names */
    bool has_generation;
};

typedef struct tp_jparser {
    tp_ctx *ctx;
    tp_template *tmpl;
    const tp_jtoken *at;
    struct tp_map *names;
    size_t capacity_names;
    int parens, statements, loops;
    bool soft;               /* under a condition: an unknown filter is an error only when it is reached */
    uint8_t uses;            /* caller, kwargs, varargs seen in the macro at hand */
    bool captures;           /* a macro or call block seen in the loop at hand */
    int frames, branches;    /* blocks with variables of their own, and ifs, around the current place */
    bool *is_read;           /* by number: names read, or set under a condition, outside of all frames */
    const tp_jnode *unknown; /* first filter or test without a meaning that no condition guards */
} tp_jparser;

tp_status tp_jparse_template(tp_ctx *ctx, tp_template *tmpl, const tp_jtoken *tokens) TP_MUST_CHECK;

/* ---- shared by the two halves of the parser ---- */
tp_status tp_jparse_fail(const tp_jparser *p, const char *expected);
tp_status tp_jparse_expect(tp_jparser *p, tp_jtoken_kind kind, const char *expected) TP_MUST_CHECK;
static inline bool tp_jparse_skip(tp_jparser *p, tp_jtoken_kind kind)
{
    if (p->at->kind != kind) return false;
    p->at++;
    return true;
}
static inline bool tp_jparse_at_name(const tp_jparser *p, const char *name)
{
    return p->at->kind == TP_T_NAME && tp_span_is(p->at->text, name);
}
bool tp_jparse_skip_name(tp_jparser *p, const char *name);
void *tp_jparse_alloc(tp_jparser *p, size_t count, size_t size);
tp_status tp_jparse_node(tp_jparser *p, tp_jnode_kind kind, tp_jnode **node) TP_MUST_CHECK;
tp_status tp_jparse_name(tp_jparser *p, tp_span name, uint32_t *number) TP_MUST_CHECK;
/* Notes that the variable is read here. */
static inline void tp_jparse_read(tp_jparser *p, uint32_t number)
{
    if (p->frames == 0) p->is_read[number] = true;
}

typedef enum tp_jtuple_mode {
    TP_J_TUPLE_FULL,    /* a, b if c else d */
    TP_J_TUPLE_NO_COND, /* without inline if: heads of for and if */
    TP_J_TUPLE_PARENS   /* between parentheses, where () is a tuple too */
} tp_jtuple_mode;
/* One expression, or a tuple of several. */
tp_status tp_jparse_tuple(tp_jparser *p, tp_jtuple_mode mode, tp_jnode **node) TP_MUST_CHECK;
tp_status tp_jparse_expression(tp_jparser *p, tp_jnode **node) TP_MUST_CHECK;
/* Target of an assignment: names, tuples of names, and a.b where `members`. */
tp_status tp_jparse_target(tp_jparser *p, bool members, tp_jnode **node) TP_MUST_CHECK;
/* "| filter | filter" on top of `node` (NULL: a block's text). With `inline_start` the first bar is left out. */
tp_status tp_jparse_filters(tp_jparser *p, bool inline_start, tp_jnode **node) TP_MUST_CHECK;

/* ---- the tables of names ---- */
const tp_jbuiltin *tp_jfind_filter(tp_span name);
const tp_jbuiltin *tp_jfind_test(tp_span name);
const tp_jbuiltin *tp_jfind_global(tp_span name);

/* Parses what Python's int() and float() read; false if they would not. */
bool tp_jparse_int(tp_span text, int base, tp_jint *out);
bool tp_jparse_float(tp_span text, double *out);

#endif
