/* Evaluation, shared by expressions (template_eval.c) and statements (template_exec.c). */
#ifndef TP_DATA_TEMPLATE_EVAL_H
#define TP_DATA_TEMPLATE_EVAL_H

#include "data/template_object.h"

/* Variables of one block of the template; looked up outwards, set innermost. The outermost are j->globals. */
struct tp_jscope {
    tp_jscope *parent;
    struct {
        uint32_t name;
        tp_jvalue value;
    } * entries;
    size_t n, capacity;
};

/* A scope inside the current one, which the caller makes current and leaves by restoring j->scope. */
tp_status tp_jscope_new(tp_jinja *j, tp_jscope *parent, tp_jscope **scope) TP_MUST_CHECK;
tp_status tp_jassign(tp_jinja *j, uint32_t name, const tp_jvalue *value) TP_MUST_CHECK;
/* Assigns to a name, a tuple of targets or a member of a namespace. */
tp_status tp_jassign_target(tp_jinja *j, const tp_jnode *target, const tp_jvalue *value) TP_MUST_CHECK;

tp_status tp_jeval(tp_jinja *j, const tp_jnode *node, tp_jvalue *out) TP_MUST_CHECK;
/* A call with `caller`, if it is not NULL, as one more keyword. */
tp_status tp_jeval_call(tp_jinja *j, const tp_jnode *node, const tp_jvalue *caller, tp_jvalue *out) TP_MUST_CHECK;
/* A chain of filters over a block's text. */
tp_status tp_jeval_filters(tp_jinja *j, const tp_jnode *node, const tp_jvalue *text, tp_jvalue *out) TP_MUST_CHECK;

#endif
