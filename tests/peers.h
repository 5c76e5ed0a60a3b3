/* Tables in tests/peers/: what torch, transformers and PEFT compute (scripts/make_peer_tables.py). Included after
 * tests/support.h. */
#ifndef TP_TESTS_PEERS_H
#define TP_TESTS_PEERS_H

#include "base/json.h"

/* The document of one table; tp_json_free. */
static inline tp_json_doc *peer_table(tp_ctx *ctx, const char *name)
{
    char path[256];
    tp_json_doc *doc = NULL;
    snprintf(path, sizeof path, "tests/peers/%s.json", name);
    assert_ok(ctx, tp_json_read(ctx, path, (size_t)64 << 20, &doc));
    return doc;
}

static inline double peer_number(const tp_json *object, const char *key)
{
    double number;
    if (!tp_json_f64(tp_json_get(object, key), &number)) fail_msg("the table has no number %s", key);
    return number;
}

static inline double peer_item(const tp_json *array, size_t i)
{
    double number;
    if (!tp_json_f64(tp_json_at(array, i), &number)) fail_msg("the table has no number at %zu", i);
    return number;
}

static inline bool peer_is(const tp_json *object, const char *key, const char *text)
{
    return tp_span_is(tp_json_string(tp_json_get(object, key)), text);
}

#endif
