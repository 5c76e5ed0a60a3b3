/* Values as text: str(), repr(), json.dumps, HTML escapes, printf and format() (internal to the interpreter). */
#ifndef TP_DATA_TEMPLATE_TEXT_H
#define TP_DATA_TEMPLATE_TEXT_H

#include "data/template_value.h"

#define TP_J_NUMBER_BYTES 64 /* room for any integer or float as text */

/* Writes the number and returns its length. Floats read as Python's repr: the fewest digits that read back. */
size_t tp_jint_text(tp_jint i, char out[TP_J_NUMBER_BYTES]);
size_t tp_jfloat_text(double d, char out[TP_J_NUMBER_BYTES]);

tp_status tp_jwrite_str(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v) TP_MUST_CHECK;
tp_status tp_jwrite_repr(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v) TP_MUST_CHECK;
/* str(v) as a value; a string is returned as it is, marked safe or not. */
tp_status tp_jstr(tp_jinja *j, const tp_jvalue *v, tp_jvalue *out) TP_MUST_CHECK;

/* Text with & < > " ' replaced, marked safe; a string that is marked already is returned as it is. */
tp_status tp_jescape(tp_jinja *j, const tp_jvalue *v, tp_jvalue *out) TP_MUST_CHECK;

typedef struct tp_jjson_style {
    bool ensure_ascii, sort_keys, indented;
    tp_span indent;       /* one level of it */
    tp_span comma, colon; /* separators */
} tp_jjson_style;
tp_status tp_jwrite_json(tp_jinja *j, tp_jsink *sink, const tp_jvalue *v, const tp_jjson_style *style) TP_MUST_CHECK;

/* text % values and text.format(...). */
tp_status tp_jpercent(tp_jinja *j, const tp_jvalue *text, const tp_jvalue *values, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jformat(tp_jinja *j, const tp_jvalue *text, const tp_jargs *args, tp_jvalue *out) TP_MUST_CHECK;
/* strftime in the C locale. */
tp_status tp_jstrftime(tp_jinja *j, tp_span format, const tp_template_time *time, tp_jvalue *out) TP_MUST_CHECK;

/* ---- arithmetic ---- */
/* a op b for + - * / // % **, op being a token kind. */
tp_status tp_jarithmetic(tp_jinja *j, int op, const tp_jvalue *a, const tp_jvalue *b, tp_jvalue *out) TP_MUST_CHECK;
tp_status tp_jnegate(tp_jinja *j, const tp_jvalue *a, bool minus, tp_jvalue *out) TP_MUST_CHECK;
/* Adds two strings, escaping the unsafe one if the other is marked safe. */
tp_status tp_jconcat(tp_jinja *j, const tp_jvalue *a, const tp_jvalue *b, tp_jvalue *out) TP_MUST_CHECK;
/* round(number, digits): half to even, as Python does it; without digits (NULL) an integer. */
tp_status tp_jround(tp_jinja *j, const tp_jvalue *number, const tp_jint *digits, tp_jvalue *out) TP_MUST_CHECK;

#endif
