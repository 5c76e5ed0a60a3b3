/* Values of the template language and the state of one render (internal to the interpreter and chat.c).
 *
 * Values are small structs passed by copy; what they point to lives in the render's arena and is released in one piece at
 * the end. Everything but namespaces, iterators, loops, cyclers and joiners is immutable, so strings and lists share memory
 * freely: a slice is a view.
 *
 * A string points into a buffer, and its map (or NULL) says which bytes of that buffer stem from which source. The map is
 * in absolute addresses, so that slices share it unchanged; only building a new string makes a new one. */
#ifndef TP_DATA_TEMPLATE_VALUE_H
#define TP_DATA_TEMPLATE_VALUE_H

#include "base/arena.h"
#include "data/template.h"

typedef struct tp_jinja tp_jinja;
typedef struct tp_jvalue tp_jvalue;
typedef struct tp_jnode tp_jnode;
__extension__ typedef __int128 tp_jint;

typedef enum tp_jtype {
    TP_J_MISSING, /* no value at all: an argument not given, a name not set */
    TP_J_UNDEFINED,
    TP_J_NONE,
    TP_J_BOOL,
    TP_J_INT,
    TP_J_FLOAT,
    TP_J_STRING,
    TP_J_BYTES,
    TP_J_LIST,
    TP_J_TUPLE,
    TP_J_DICT,
    TP_J_RANGE,
    TP_J_VIEW,     /* of a dict: keys, values or items */
    TP_J_ITERATOR, /* can be walked once */
    TP_J_NAMESPACE,
    TP_J_MACRO,
    TP_J_LOOP,
    TP_J_CYCLER,
    TP_J_JOINER,
    TP_J_FUNCTION,
    TP_J_METHOD,
    TP_J_TYPE_COUNT
} tp_jtype;

/* Flags of a value, by type. */
enum { TP_J_MARKUP = 1 };                                 /* string: already escaped */
enum { TP_J_UNSAFE = 1, TP_J_HINT = 2, TP_J_MEMBER = 4 }; /* undefined: why */
enum { TP_J_KEYS = 0, TP_J_VALUES = 1, TP_J_ITEMS = 2 };  /* view */
enum { TP_J_GROUP = 1 };                                  /* tuple of groupby: .grouper and .list */

/* ---- provenance ---- */
/* A source is a field of a message (message * 4 + field) or a generation block; 0 is none. */
#define TP_J_GENERATION 0x80000000u
typedef struct tp_jrun {
    const char *begin, *end;
    uint32_t source;
} tp_jrun;
typedef struct tp_jmap {
    size_t n;
    tp_jrun runs[];
} tp_jmap;

/* ---- values ---- */
typedef struct tp_jlist {
    size_t n;
    tp_jvalue *items;
    uint32_t source; /* the whole list stems from it, or 0 */
} tp_jlist;
typedef struct tp_jpair tp_jpair;
typedef struct tp_jdict {
    size_t n, capacity;
    tp_jpair *pairs; /* in order of insertion; looked up by walking, which is charged as steps */
    uint32_t source;
} tp_jdict;
typedef struct tp_jrange {
    tp_jint start, stop, step;
} tp_jrange;
typedef struct tp_jiter {
    tp_jvalue *items;
    size_t n, at;
} tp_jiter;
typedef struct tp_jbuiltin tp_jbuiltin;
typedef struct tp_jmethod tp_jmethod;
typedef struct tp_jmacro tp_jmacro;
typedef struct tp_jloop tp_jloop;
typedef struct tp_jscope tp_jscope;
typedef struct tp_jcycler {
    tp_jvalue *items;
    size_t n, at;
} tp_jcycler;
typedef struct tp_jjoiner {
    const tp_jvalue *separator;
    bool used;
} tp_jjoiner;

struct tp_jvalue {
    uint8_t type;
    uint8_t flags;
    uint8_t owner; /* undefined member: type of the object that lacks it */
    size_t len;    /* string, bytes, undefined name: bytes; range: items */
    union {
        bool truth;
        tp_jint integer;
        double real;
        struct {
            const char *text;
            const tp_jmap *map;
        };
        tp_jlist *list;
        tp_jdict *dict; /* dict, view, namespace */
        const tp_jrange *range;
        tp_jiter *iter;
        const tp_jmacro *macro;
        tp_jloop *loop;
        tp_jcycler *cycler;
        tp_jjoiner *joiner;
        const tp_jbuiltin *function;
        const tp_jmethod *method;
    };
};
struct tp_jpair {
    tp_jvalue key, value;
};

typedef struct tp_jkeyword {
    tp_span name;
    tp_jvalue value;
} tp_jkeyword;
typedef struct tp_jargs {
    const tp_jvalue *items;
    size_t n;
    const tp_jkeyword *keywords;
    size_t n_keywords;
} tp_jargs;

/* Filters (self: the piped value), tests (the answer is a bool), methods and global functions (self: NULL). */
typedef tp_status tp_jcall(tp_jinja *j, const tp_jvalue *self, const tp_jargs *args, tp_jvalue *out);
struct tp_jbuiltin {
    const char *name;
    tp_jcall *call;
};
struct tp_jmethod {
    const tp_jbuiltin *def;
    tp_jvalue self;
};

/* ---- sinks: strings being written ---- */
typedef struct tp_jmark {
    size_t begin, end;
    uint32_t source;
} tp_jmark;
typedef struct tp_jsink {
    char *data;
    size_t len, capacity;
    tp_jmark *marks;
    size_t n_marks, capacity_marks;
    int muted; /* > 0: marks are not taken over, the surrounding value sets one for all */
} tp_jsink;

/* ---- state of a render ---- */
enum { TP_J_GO_ON, TP_J_BREAK, TP_J_CONTINUE };

struct tp_jinja {
    tp_ctx *ctx;
    const tp_template *tmpl;
    const tp_template_time *now;
    tp_arena arena;
    size_t memory_left; /* bytes that the arena may still give */
    size_t max_output;
    int64_t steps; /* left */
    int depth;     /* of evaluation, values included */
    uint32_t line;
    tp_status status; /* first failure */
    tp_template_error error;
    tp_jvalue raised;
    tp_jvalue *globals; /* by name number */
    tp_jscope *scope;   /* innermost; NULL: globals */
    tp_jsink *out;
    int flow;
    bool autoescape;
    uint32_t n_generation;
};

/* Deepest evaluation: the frames of this many levels stay below 4 MiB even with sanitizers. */
#define TP_J_DEPTH 3000

/* Records a failure at the current line; returns its status. */
tp_status tp_jinja_fail(tp_jinja *j, tp_template_error error, const char *format, ...) TP_PRINTF(3, 4);
/* Memory for `count` objects, or NULL with the failure recorded in j->status. */
void *tp_jinja_alloc(tp_jinja *j, size_t count, size_t size);
/* Uses up steps. */
tp_status tp_jinja_charge(tp_jinja *j, size_t steps) TP_MUST_CHECK;
/* Steps for looking at or copying n bytes. */
static inline tp_status tp_jinja_charge_bytes(tp_jinja *j, size_t n)
{
    return tp_jinja_charge(j, n / 64);
}
/* One level deeper; pair with tp_jinja_leave unless it failed. */
tp_status tp_jinja_enter(tp_jinja *j) TP_MUST_CHECK;
static inline void tp_jinja_leave(tp_jinja *j)
{
    j->depth--;
}

tp_status tp_jsink_bytes(tp_jinja *j, tp_jsink *sink, const char *bytes, size_t n) TP_MUST_CHECK;
tp_status tp_jsink_text(tp_jinja *j, tp_jsink *sink, const char *text) TP_MUST_CHECK;
/* Appends a string together with what is known of its origin. */
tp_status tp_jsink_string(tp_jinja *j, tp_jsink *sink, const tp_jvalue *string) TP_MUST_CHECK;
/* Appends bytes that stand for what is at `offset` of `string`: a case mapping, an escape. */
tp_status tp_jsink_for(tp_jinja *j, tp_jsink *sink, const char *bytes, size_t n, const tp_jvalue *string,
                       size_t offset) TP_MUST_CHECK;
/* Says that everything from byte `begin` on stems from `source` (0: nothing is said). */
tp_status tp_jsink_mark(tp_jinja *j, tp_jsink *sink, size_t begin, uint32_t source) TP_MUST_CHECK;
/* The sink's content as a string. */
tp_status tp_jsink_value(tp_jinja *j, const tp_jsink *sink, tp_jvalue *out) TP_MUST_CHECK;

/* ---- making values ---- */
static inline tp_jvalue tp_jvalue_of(tp_jtype type)
{
    tp_jvalue v = {.type = (uint8_t)type};
    return v;
}
static inline tp_jvalue tp_jnone(void)
{
    return tp_jvalue_of(TP_J_NONE);
}
static inline tp_jvalue tp_jbool(bool truth)
{
    return (tp_jvalue){.type = TP_J_BOOL, .truth = truth};
}
static inline tp_jvalue tp_jinteger(tp_jint i)
{
    return (tp_jvalue){.type = TP_J_INT, .integer = i};
}
static inline tp_jvalue tp_jfloat(double d)
{
    return (tp_jvalue){.type = TP_J_FLOAT, .real = d};
}
static inline tp_jvalue tp_jtext(const char *text, size_t n)
{
    return (tp_jvalue){.type = TP_J_STRING, .len = n, .text = text};
}
/* Bytes [from, from + n) of a string: same buffer, same map, same flags. */
static inline tp_jvalue tp_jslice(const tp_jvalue *s, size_t from, size_t n)
{
    tp_jvalue v = *s;
    v.text += from;
    v.len = n;
    return v;
}
static inline tp_span tp_jspan(const tp_jvalue *s)
{
    return (tp_span){s->text, s->len};
}
/* A copy of bytes as a string; of a C string that lives long enough, without copying. */
tp_status tp_jstring_copy(tp_jinja *j, const char *bytes, size_t n, tp_jvalue *out) TP_MUST_CHECK;
static inline tp_jvalue tp_jliteral(const char *text)
{
    return tp_jtext(text, strlen(text));
}
/* Undefined with a message of its own. */
static inline tp_jvalue tp_jundefined(const char *hint)
{
    return (tp_jvalue){.type = TP_J_UNDEFINED, .flags = TP_J_HINT, .len = strlen(hint), .text = hint};
}
/* A list or tuple over `items`, which it shares. */
tp_status tp_jlist_new(tp_jinja *j, tp_jtype type, tp_jvalue *items, size_t n, tp_jvalue *out) TP_MUST_CHECK;
/* A tuple of two. */
tp_status tp_jtuple2(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jiter_new(tp_jinja *j, tp_jvalue *items, size_t n, tp_jvalue *out) TP_MUST_CHECK;
/* An empty dict or namespace with room for n members. */
tp_status tp_jdict_new(tp_jinja *j, tp_jtype type, size_t n, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jdict_set(tp_jinja *j, tp_jdict *dict, const tp_jvalue *key, const tp_jvalue *value) TP_MUST_CHECK;
/* *found is NULL if the key is absent. Unhashable keys are simply absent. */
tp_status tp_jdict_get(tp_jinja *j, const tp_jdict *dict, const tp_jvalue *key, tp_jvalue **found) TP_MUST_CHECK;
/* Converts a JSON value; every string in it, and every container, stems from `source` (0: untracked). */
tp_status tp_jvalue_from_json(tp_jinja *j, const tp_json *json, uint32_t source, tp_jvalue *out) TP_MUST_CHECK;
/* Converts the list of messages, following content, reasoning and tool calls of each. */
tp_status tp_jmessages_from_json(tp_jinja *j, const tp_json *json, tp_jvalue *out) TP_MUST_CHECK;
/* One member of message number `message`, followed as its name asks for. */
tp_status tp_jmember_from_json(tp_jinja *j, size_t message, tp_span name, const tp_json *json, tp_jvalue *out) TP_MUST_CHECK;
/* A string that stems from `source`; the bytes are borrowed. */
tp_status tp_jsourced(tp_jinja *j, const char *text, size_t n, uint32_t source, tp_jvalue *out) TP_MUST_CHECK;

/* A list that grows; its items end up in a list value or an iterator. */
typedef struct tp_jvector {
    tp_jvalue *items;
    size_t n, capacity;
} tp_jvector;
tp_status tp_jpush(tp_jinja *j, tp_jvector *vector, const tp_jvalue *value) TP_MUST_CHECK;

/* ---- asking values ---- */
const char *tp_jtype_name(const tp_jvalue *v); /* "int", "NoneType", ... */
static inline bool tp_jis_string(const tp_jvalue *v)
{
    return v->type == TP_J_STRING;
}
static inline bool tp_jis_int(const tp_jvalue *v)
{
    return v->type == TP_J_INT || v->type == TP_J_BOOL;
}
static inline bool tp_jis_number(const tp_jvalue *v)
{
    return tp_jis_int(v) || v->type == TP_J_FLOAT;
}
static inline bool tp_jis_list(const tp_jvalue *v)
{
    return v->type == TP_J_LIST || v->type == TP_J_TUPLE;
}
static inline tp_jint tp_jint_of(const tp_jvalue *v)
{
    return v->type == TP_J_BOOL ? (tp_jint)v->truth : v->integer;
}
static inline double tp_jdouble_of(const tp_jvalue *v)
{
    return v->type == TP_J_FLOAT ? v->real : (double)tp_jint_of(v);
}
bool tp_jtruth(const tp_jvalue *v);
bool tp_jhashable(const tp_jvalue *v);
bool tp_jiterable(const tp_jvalue *v);
bool tp_jcallable(const tp_jvalue *v);
tp_status tp_jequal(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, bool *equal) TP_MUST_CHECK;
/* *order < 0, 0, > 0; a type error if the two cannot be ordered (`op` is for the message). NaN gives 2. */
tp_status tp_jcompare(tp_jinja *j, const char *op, const tp_jvalue *a, const tp_jvalue *b, int *order) TP_MUST_CHECK;
tp_status tp_jcontains(tp_jinja *j, const tp_jvalue *container, const tp_jvalue *item, bool *found) TP_MUST_CHECK;
/* len(v), a type error if it has none. */
tp_status tp_jlength(tp_jinja *j, const tp_jvalue *v, size_t *n) TP_MUST_CHECK;
/* The items of anything iterable as an array; an iterator is used up by it. */
tp_status tp_jitems(tp_jinja *j, const tp_jvalue *v, tp_jvalue **items, size_t *n) TP_MUST_CHECK;
/* The failure for doing something with an undefined value. */
tp_status tp_jfail_undefined(tp_jinja *j, const tp_jvalue *v) TP_MUST_CHECK;
/* Fills out[i] with the argument for the i-th name of `names` ("sep maxsplit"), or MISSING. Names behind a "/" are
 * positional only. Fewer than `required` or more arguments than names are type errors. */
tp_status tp_jbind(tp_jinja *j, const char *what, const tp_jargs *args, const char *names, size_t required,
                   tp_jvalue *out) TP_MUST_CHECK;
/* Bytes of the first n characters of s (all of them if it has fewer), and the number of characters. */
size_t tp_jchars_bytes(const char *s, size_t len, size_t n);
size_t tp_jchars(const char *s, size_t len);

/* Sorts by keys[i] (stable), moving items along. */
tp_status tp_jsort(tp_jinja *j, tp_jvalue *keys, tp_jvalue *items, size_t n, bool reverse) TP_MUST_CHECK;

/* ---- rendering from inside the library: begin, set variables, run, end ---- */
tp_status tp_jinja_begin(tp_ctx *ctx, const tp_template *tmpl, const tp_template_options *options, tp_jinja *j) TP_MUST_CHECK;
void tp_jinja_set(tp_jinja *j, tp_span name, const tp_jvalue *value);
tp_status tp_jinja_run(tp_jinja *j, tp_template_output *out) TP_MUST_CHECK;
/* Keeps the failure, if there is one, in *out, and releases everything. */
void tp_jinja_end(tp_jinja *j, tp_template_output *out);

#endif
