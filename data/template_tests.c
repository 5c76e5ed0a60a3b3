/* Tests: what stands behind `is`. The value is the first operand; the answer is always a bool. */
#include "data/template_object.h"
#include "data/template_text.h"

/* A test without arguments whose answer is `condition` over the value v. */
#define SIMPLE_TEST(name, condition)                                                                                           \
    static tp_status name(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)                               \
    {                                                                                                                          \
        TP_TRY(tp_jbind(j, "a test", args, "", 0, NULL));                                                                      \
        *out = tp_jbool(condition);                                                                                            \
        return TP_OK;                                                                                                          \
    }

static bool has_items(const tp_jvalue *v) /* len() and [] both work */
{
    return tp_jis_string(v) || tp_jis_list(v) || v->type == TP_J_DICT || v->type == TP_J_RANGE || v->type == TP_J_BYTES ||
           v->type == TP_J_UNDEFINED;
}

SIMPLE_TEST(is_defined, v->type != TP_J_UNDEFINED)
SIMPLE_TEST(is_undefined, v->type == TP_J_UNDEFINED)
SIMPLE_TEST(is_none, v->type == TP_J_NONE)
SIMPLE_TEST(is_boolean, v->type == TP_J_BOOL)
SIMPLE_TEST(is_true, v->type == TP_J_BOOL && v->truth)
SIMPLE_TEST(is_false, v->type == TP_J_BOOL && !v->truth)
SIMPLE_TEST(is_integer, v->type == TP_J_INT)
SIMPLE_TEST(is_float, v->type == TP_J_FLOAT)
SIMPLE_TEST(is_number, tp_jis_number(v))
SIMPLE_TEST(is_string, tp_jis_string(v))
SIMPLE_TEST(is_mapping, v->type == TP_J_DICT)
SIMPLE_TEST(is_sequence, has_items(v))
SIMPLE_TEST(is_iterable, tp_jiterable(v))
SIMPLE_TEST(is_callable, tp_jcallable(v))
SIMPLE_TEST(is_escaped, tp_jis_string(v) && (v->flags & TP_J_MARKUP) != 0)

static tp_status remainder_is_zero(tp_jinja *j, const tp_jvalue *v, const tp_jvalue *divisor, tp_jint rest, tp_jvalue *out)
{
    tp_jvalue remainder, wanted = tp_jinteger(rest);
    bool equal;
    TP_TRY(tp_jarithmetic(j, TP_T_MOD, v, divisor, &remainder));
    TP_TRY(tp_jequal(j, &remainder, &wanted, &equal));
    *out = tp_jbool(equal);
    return TP_OK;
}

static tp_status is_odd(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue two = tp_jinteger(2);
    TP_TRY(tp_jbind(j, "odd", args, "", 0, NULL));
    return remainder_is_zero(j, v, &two, 1, out);
}

static tp_status is_even(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue two = tp_jinteger(2);
    TP_TRY(tp_jbind(j, "even", args, "", 0, NULL));
    return remainder_is_zero(j, v, &two, 0, out);
}

static tp_status is_divisible_by(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue divisor;
    TP_TRY(tp_jbind(j, "divisibleby", args, "num", 1, &divisor));
    return remainder_is_zero(j, v, &divisor, 0, out);
}

static tp_status case_is(tp_jinja *j, const tp_jvalue *v, const char *method, tp_jvalue *out)
{
    tp_jvalue text;
    const tp_jargs none = {0};
    TP_TRY(tp_jstr(j, v, &text));
    return tp_jfind_string_method(tp_span_of(method))->call(j, &text, &none, out);
}

static tp_status is_lower(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "lower", args, "", 0, NULL));
    return case_is(j, v, "islower", out);
}

static tp_status is_upper(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "upper", args, "", 0, NULL));
    return case_is(j, v, "isupper", out);
}

static tp_status is_filter(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "filter", args, "", 0, NULL));
    if (!tp_jhashable(v)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unhashable type: '%s'", tp_jtype_name(v));
    *out = tp_jbool(tp_jis_string(v) && tp_jfind_filter(tp_jspan(v)) != NULL);
    return TP_OK;
}

static tp_status is_test(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    TP_TRY(tp_jbind(j, "test", args, "", 0, NULL));
    if (!tp_jhashable(v)) return tp_jinja_fail(j, TP_TEMPLATE_TYPE, "unhashable type: '%s'", tp_jtype_name(v));
    *out = tp_jbool(tp_jis_string(v) && tp_jfind_test(tp_jspan(v)) != NULL);
    return TP_OK;
}

static tp_status is_same_as(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue other;
    bool equal;
    TP_TRY(tp_jbind(j, "sameas", args, "other", 1, &other));
    TP_TRY(tp_jequal(j, v, &other, &equal)); /* immutable values that are equal count as the same */
    *out = tp_jbool(equal && v->type == other.type);
    return TP_OK;
}

static tp_status is_in(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    tp_jvalue container;
    bool found;
    TP_TRY(tp_jbind(j, "in", args, "seq", 1, &container));
    TP_TRY(tp_jcontains(j, &container, v, &found));
    *out = tp_jbool(found);
    return TP_OK;
}

static tp_status equality(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, bool wanted, tp_jvalue *out)
{
    tp_jvalue other;
    bool equal;
    TP_TRY(tp_jbind(j, "eq", args, "other", 1, &other));
    TP_TRY(tp_jequal(j, v, &other, &equal));
    *out = tp_jbool(equal == wanted);
    return TP_OK;
}

static tp_status is_equal(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    return equality(j, v, args, true, out);
}
static tp_status is_not_equal(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)
{
    return equality(j, v, args, false, out);
}

static tp_status order_of(tp_jinja *j, const char *op, const tp_jvalue *v, const tp_jargs *args, int *order)
{
    tp_jvalue other;
    TP_TRY(tp_jbind(j, op, args, "other", 1, &other));
    return tp_jcompare(j, op, v, &other, order);
}

#define ORDER_TEST(name, op, condition)                                                                                        \
    static tp_status name(tp_jinja *j, const tp_jvalue *v, const tp_jargs *args, tp_jvalue *out)                               \
    {                                                                                                                          \
        int order;                                                                                                             \
        TP_TRY(order_of(j, op, v, args, &order));                                                                              \
        *out = tp_jbool(condition);                                                                                            \
        return TP_OK;                                                                                                          \
    }
ORDER_TEST(is_less, "<", order == -1)
ORDER_TEST(is_less_or_equal, "<=", order == -1 || order == 0)
ORDER_TEST(is_greater, ">", order == 1)
ORDER_TEST(is_greater_or_equal, ">=", order == 1 || order == 0)

const tp_jbuiltin *tp_jfind_test(tp_span name)
{
    static const tp_jbuiltin tests[] = {
        {"!=", is_not_equal},
        {"<", is_less},
        {"<=", is_less_or_equal},
        {"==", is_equal},
        {">", is_greater},
        {">=", is_greater_or_equal},
        {"boolean", is_boolean},
        {"callable", is_callable},
        {"defined", is_defined},
        {"divisibleby", is_divisible_by},
        {"eq", is_equal},
        {"equalto", is_equal},
        {"escaped", is_escaped},
        {"even", is_even},
        {"false", is_false},
        {"filter", is_filter},
        {"float", is_float},
        {"ge", is_greater_or_equal},
        {"greaterthan", is_greater},
        {"gt", is_greater},
        {"in", is_in},
        {"integer", is_integer},
        {"iterable", is_iterable},
        {"le", is_less_or_equal},
        {"lessthan", is_less},
        {"lower", is_lower},
        {"lt", is_less},
        {"mapping", is_mapping},
        {"ne", is_not_equal},
        {"none", is_none},
        {"number", is_number},
        {"odd", is_odd},
        {"sameas", is_same_as},
        {"sequence", is_sequence},
        {"string", is_string},
        {"test", is_test},
        {"true", is_true},
        {"undefined", is_undefined},
        {"upper", is_upper},
        {NULL, NULL},
    };
    return tp_jfind_builtin(tests, name);
}
