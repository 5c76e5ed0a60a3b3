/* Typed access to the members of a JSON object: one message format for every file that holds settings. */
#include <math.h>
#include <stdio.h>

#include "base/json_node.h"

#define WHERE_BYTES 1024
#define SHOWN_BYTES 48

/* The value as a message shows it: strings and numbers as they are, cut at a character; containers by name. */
static const char *shown(const tp_json *value, char out[SHOWN_BYTES + 8])
{
    tp_json_type type = tp_json_type_of(value);
    const char *quote = type == TP_JSON_STRING ? "\"" : "";
    tp_span text = type == TP_JSON_STRING ? tp_json_string(value) : tp_json_number_text(value);
    if (type == TP_JSON_BOOL) return tp_json_bool(value, false) ? "true" : "false";
    if (type != TP_JSON_STRING && type != TP_JSON_NUMBER) return tp_json_type_name(type);
    size_t n = text.len;
    if (n > SHOWN_BYTES) {
        n = SHOWN_BYTES;
        while (n > 0 && ((unsigned char)text.data[n] & 0xc0) == 0x80) n--;
    }
    snprintf(out, SHOWN_BYTES + 8, "%s%.*s%s%s", quote, (int)n, text.data, n < text.len ? "..." : "", quote);
    return out;
}

/* The member, or NULL if it is absent or null; *status says whether that is a failure. */
static const tp_json *find(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                           const char *wanted, tp_status *status)
{
    char where[WHERE_BYTES], text[SHOWN_BYTES + 8];
    *status = TP_OK;
    tp_json_type type = tp_json_type_of(object);
    if (type != TP_JSON_OBJECT && (type != TP_JSON_NULL || required)) {
        *status = tp_fail(ctx, TP_FORMAT, "%s: expected an object with %s, got %s",
                          tp_json_where(doc, object, where, sizeof where), key, shown(object, text));
        return NULL;
    }
    const tp_json *value = tp_json_get(object, key);
    if (value != NULL && value->type != TP_JSON_NULL) return value;
    if (required) {
        *status = tp_fail(ctx, TP_FORMAT, "%s: %s: expected %s, got %s",
                          tp_json_where(doc, value != NULL ? value : object, where, sizeof where), key, wanted,
                          value != NULL ? "null" : "nothing");
    }
    return NULL;
}

static tp_status refuse(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *value, const char *key, const char *wanted)
{
    char where[WHERE_BYTES], text[SHOWN_BYTES + 8];
    return tp_fail(ctx, TP_FORMAT, "%s: %s: expected %s, got %s", tp_json_where(doc, value, where, sizeof where), key, wanted,
                   shown(value, text));
}

tp_status tp_json_need_i64(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                           int64_t min, int64_t max, int64_t *out)
{
    char wanted[96];
    tp_status status;
    int64_t number;
    snprintf(wanted, sizeof wanted, "an integer from %lld to %lld", (long long)min, (long long)max);
    const tp_json *value = find(ctx, doc, object, key, required, wanted, &status);
    if (value == NULL) return status;
    if (!tp_json_i64(value, &number) || number < min || number > max) return refuse(ctx, doc, value, key, wanted);
    *out = number;
    return TP_OK;
}

tp_status tp_json_need_f64(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                           double min, double max, double *out)
{
    char wanted[96];
    tp_status status;
    double number;
    if (isfinite(min) && isfinite(max))
        snprintf(wanted, sizeof wanted, "a number from %g to %g", min, max);
    else if (isfinite(min))
        snprintf(wanted, sizeof wanted, "a number of at least %g", min);
    else
        snprintf(wanted, sizeof wanted, "a number");
    const tp_json *value = find(ctx, doc, object, key, required, wanted, &status);
    if (value == NULL) return status;
    if (!tp_json_f64(value, &number) || !(number >= min && number <= max)) return refuse(ctx, doc, value, key, wanted);
    *out = number;
    return TP_OK;
}

tp_status tp_json_need_bool(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                            bool *out)
{
    tp_status status;
    const tp_json *value = find(ctx, doc, object, key, required, "true or false", &status);
    if (value == NULL) return status;
    if (value->type != TP_JSON_BOOL) return refuse(ctx, doc, value, key, "true or false");
    *out = value->flag;
    return TP_OK;
}

tp_status tp_json_need_string(tp_ctx *ctx, const tp_json_doc *doc, const tp_json *object, const char *key, bool required,
                              tp_span *out)
{
    tp_status status;
    const tp_json *value = find(ctx, doc, object, key, required, "a string", &status);
    if (value == NULL) return status;
    if (value->type != TP_JSON_STRING) return refuse(ctx, doc, value, key, "a string");
    *out = tp_json_string(value);
    return TP_OK;
}
