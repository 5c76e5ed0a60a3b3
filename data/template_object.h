/* Attributes, items, calls and the tables of names (internal to the interpreter). */
#ifndef TP_DATA_TEMPLATE_OBJECT_H
#define TP_DATA_TEMPLATE_OBJECT_H

#include "data/template_parser.h"

/* object.name: methods and attributes first, then items; object[key]: the other way round. What is not there is undefined;
 * only asking an undefined value is an error. */
tp_status tp_jgetattr(tp_jinja *j, const tp_jvalue *object, tp_span name, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jgetitem(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *key, tp_jvalue *out) TP_MUST_CHECK;
/* object[start:stop:step]; NONE where a part is left out. A type error for what cannot be sliced. */
tp_status tp_jgetslice(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *start, const tp_jvalue *stop,
                       const tp_jvalue *step, tp_jvalue *out) TP_MUST_CHECK;
/* Follows "a.b.0" from an object, as the attribute argument of filters does. An integer path is one item; NONE is the object.
 */
tp_status tp_jgetpath(tp_jinja *j, const tp_jvalue *object, const tp_jvalue *path, tp_jvalue *out) TP_MUST_CHECK;

tp_status tp_jcall_value(tp_jinja *j, const tp_jvalue *callee, const tp_jargs *args, tp_jvalue *out) TP_MUST_CHECK;
/* In template_exec.c: a macro's text; the attributes of a loop (*found is false if it has no such one); loop(iterable). */
tp_status tp_jcall_macro(tp_jinja *j, const tp_jmacro *macro, const tp_jargs *args, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jloop_getattr(tp_jinja *j, const tp_jvalue *loop, tp_span name, tp_jvalue *out, bool *found) TP_MUST_CHECK;
tp_status tp_jwrite_macro(tp_jinja *j, tp_jsink *sink, const tp_jmacro *macro) TP_MUST_CHECK;
tp_status tp_jmacro_getattr(tp_jinja *j, const tp_jmacro *macro, tp_span name, tp_jvalue *out, bool *found) TP_MUST_CHECK;
tp_status tp_jcall_loop(tp_jinja *j, tp_jloop *loop, const tp_jargs *args, tp_jvalue *out) TP_MUST_CHECK;

/* A method of str; NULL if there is none of this name. */
const tp_jbuiltin *tp_jfind_string_method(tp_span name);
/* Looks a name up in a table that ends in {NULL, NULL}. */
const tp_jbuiltin *tp_jfind_builtin(const tp_jbuiltin *table, tp_span name);
/* Methods that several tables share. */
tp_status tp_jstring_trim(tp_jinja *j, const tp_jvalue *s, const tp_jvalue *chars, bool left, bool right,
                          tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jstring_replace(tp_jinja *j, const tp_jvalue *s, const tp_jvalue *old, const tp_jvalue *new_text, tp_jint count,
                             tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jstring_case(tp_jinja *j, const tp_jvalue *s, tp_jcall *method, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jstring_join(tp_jinja *j, const tp_jvalue *separator, const tp_jvalue *items, size_t n,
                          tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jstring_lines(tp_jinja *j, const tp_jvalue *s, bool keep_ends, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jstring_reverse(tp_jinja *j, const tp_jvalue *s, tp_jvalue *out) TP_MUST_CHECK;
tp_jcall tp_jmethod_upper, tp_jmethod_lower, tp_jmethod_title, tp_jmethod_capitalize, tp_jmethod_center, tp_jmethod_rsplit;
/* Methods that find and test, in template_search.c. */
extern const tp_jbuiltin tp_jstring_questions[];
/* Where `sep` stands last in s[0..n), or NULL. It compares at every place, which is charged beforehand for a text of n bytes
 * and a separator of m. */
const char *tp_jfind_last(const char *s, size_t n, const tp_jvalue *sep);
tp_status tp_jcharge_backwards(tp_jinja *j, size_t n, size_t m) TP_MUST_CHECK;

/* Filters over sequences, in template_sequence.c; the rest of them is in template_filters.c. */
extern const tp_jbuiltin tp_jsequence_filters[];

/* Optional arguments: what is given, or what is there otherwise. */
static inline bool tp_jgiven(const tp_jvalue *v)
{
    return v->type != TP_J_MISSING && v->type != TP_J_NONE;
}
/* An argument that must be an integer; `otherwise` if it is missing. */
tp_status tp_jarg_int(tp_jinja *j, const tp_jvalue *v, tp_jint otherwise, tp_jint *out) TP_MUST_CHECK;
/* An argument that must be a string. */
tp_status tp_jarg_string(tp_jinja *j, const char *what, const tp_jvalue *v) TP_MUST_CHECK;

#endif
