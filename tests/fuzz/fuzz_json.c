/* JSON: whatever parses can be walked, written in every layout, and read back to the same text. */
#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

/* Looks every member up by its key, and reads every number; without recursion, by the order of the written text's containers.
 */
static void touch(const tp_json *value)
{
    const tp_json *open[TP_JSON_DEPTH + 1];
    size_t next[TP_JSON_DEPTH + 1], depth = 0;
    open[0] = value;
    next[0] = 0;
    for (;;) {
        const tp_json *now = open[depth];
        if (next[depth] == tp_json_count(now)) {
            if (depth == 0) return;
            depth--;
            continue;
        }
        size_t i = next[depth]++;
        const tp_json *child = tp_json_at(now, i);
        int64_t integer;
        double real;
        if (tp_json_type_of(now) == TP_JSON_OBJECT) assert(tp_json_get_span(now, tp_json_key_at(now, i)) == child);
        if (tp_json_i64(child, &integer)) assert(tp_json_f64(child, &real));
        assert(tp_utf8_valid_prefix(tp_json_string(child).data, tp_json_string(child).len) == tp_json_string(child).len);
        open[++depth] = child;
        next[depth] = 0;
    }
}

static void check_round_trip(const tp_json_doc *doc, int indent)
{
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_buf first, second;
    tp_json_doc *again;
    tp_buf_init(&first, 0);
    tp_buf_init(&second, 0);
    tp_json_write(&first, tp_json_root(doc), indent);
    if (first.failed || tp_json_parse(&ctx, first.data, first.len, NULL, &again) != TP_OK) abort();
    tp_json_write(&second, tp_json_root(again), indent);
    if (first.len != second.len || memcmp(first.data, second.data, first.len) != 0) abort();
    tp_json_free(again);
    tp_buf_free(&first);
    tp_buf_free(&second);
}

static tp_status see_member(void *user, tp_ctx *ctx, const tp_json_doc *doc, const tp_json *key, const tp_json *value)
{
    (void)user, (void)ctx, (void)doc;
    if (tp_json_type_of(key) != TP_JSON_STRING) abort();
    touch(value);
    return TP_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const char *text = (const char *)data;
    tp_ctx ctx;
    tp_json_doc *strict = NULL, *loose = NULL;
    tp_ctx_init(&ctx);
    tp_status status = tp_json_parse(&ctx, text, n, &(tp_json_options){.name = "f", .strict_surrogates = true}, &strict);
    if (status == TP_OK)
        touch(tp_json_root(strict));
    else if (ctx.message[0] == '\0')
        abort();
    tp_json_free(strict);
    tp_ctx_clear(&ctx);
    tp_status loosely = tp_json_parse(&ctx, text, n, &(tp_json_options){.name = "f", .allow_duplicates = true}, &loose);
    if (status == TP_OK && loosely != TP_OK) abort(); /* it accepts more, never less */
    if (loosely == TP_OK) {
        touch(tp_json_root(loose));
        for (int indent = -1; indent <= 1; indent++) check_round_trip(loose, indent);
    }
    bool object = loosely == TP_OK && tp_json_type_of(tp_json_root(loose)) == TP_JSON_OBJECT;
    tp_json_free(loose);
    tp_ctx_clear(&ctx);
    status = tp_json_each(&ctx, text, n, &(tp_json_options){.allow_duplicates = true}, see_member, NULL);
    if ((status == TP_OK) != object) abort();
    return 0;
}
