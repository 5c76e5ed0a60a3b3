/* GGUF: what is accepted lies inside the file, and every value and byte of it can be read; the configuration and the tokenizer
 * in it are read or refused with a message. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/gguf.h"
#include "data/tokenizer.h"
#include "models/config.h"

static uint64_t touch_value(const tp_gguf *file, const tp_gguf_value *v)
{
    uint64_t sum = strlen(v->key);
    if (sum == 0 || tp_gguf_find(file, v->key) != v) abort();
    const uint8_t *raw = v->data;
    for (uint64_t k = 0; k < v->bytes; k++) sum += raw[k];
    for (uint64_t i = 0; i <= v->count; i++) { /* one past the end, too */
        tp_span s = tp_gguf_string_at(file, v, i);
        for (size_t k = 0; k < s.len; k++) sum += (uint8_t)s.data[k];
        sum += (uint64_t)tp_gguf_i64_at(v, i);
        sum += tp_gguf_f64_at(v, i) > 0;
    }
    return sum;
}

static void check_file(tp_ctx *ctx, const tp_gguf *file, const uint8_t *data, size_t n)
{
    uint64_t sum = 0, end = 0;
    int64_t integer;
    double real;
    bool flag;
    tp_span text;
    for (size_t i = 0; i < tp_gguf_value_count(file); i++) {
        const tp_gguf_value *v = tp_gguf_value_at(file, i);
        sum += touch_value(file, v);
        int got = tp_gguf_need_i64(ctx, file, v->key, true, INT64_MIN, INT64_MAX, &integer) == TP_OK;
        tp_ctx_clear(ctx);
        got += tp_gguf_need_f64(ctx, file, v->key, true, &real) == TP_OK;
        tp_ctx_clear(ctx);
        got += tp_gguf_need_bool(ctx, file, v->key, true, &flag) == TP_OK;
        tp_ctx_clear(ctx);
        got += tp_gguf_need_string(ctx, file, v->key, true, &text) == TP_OK;
        tp_ctx_clear(ctx);
        if (got > 1) abort(); /* a value has one type */
    }
    for (size_t i = 0; i < tp_gguf_tensor_count(file); i++) {
        const tp_gguf_tensor *t = tp_gguf_tensor_at(file, i);
        if (tp_gguf_tensor_find(file, t->name) != t || t->rank < 0 || t->rank > 4) abort();
        if (t->offset < end || t->bytes > n || t->offset > n - t->bytes) abort();
        end = t->offset + t->bytes;
        const uint8_t *bytes = tp_gguf_data(file, t);
        if (bytes != data + t->offset) abort();
        for (uint64_t k = 0; k < t->bytes; k++) sum += bytes[k];
    }
    __asm__ volatile("" : : "r"(sum)); /* the reads above must not be optimised away */
}

static void read_model(tp_ctx *ctx, const tp_gguf *file)
{
    tp_model_config config;
    tp_tokenizer *tokenizer = NULL;
    tp_tokens tokens = {0};
    tp_status status = tp_config_from_gguf(ctx, file, &config);
    if (status == TP_OK)
        tp_config_free(&config);
    else if (tp_status_exit_code(status) != 3 || ctx->message[0] == '\0')
        abort();
    tp_ctx_clear(ctx);
    status = tp_tokenizer_from_gguf(ctx, file, &tokenizer);
    if (status != TP_OK && (tp_status_exit_code(status) != 3 || ctx->message[0] == '\0')) abort();
    tp_ctx_clear(ctx);
    if (status != TP_OK) return;
    status = tp_tokenizer_encode(ctx, tokenizer, tp_span_of("the cat <s> 12"), TP_ENCODE_PLAIN, &tokens);
    for (size_t i = 0; status == TP_OK && i < tokens.count; i++)
        if (tokens.items[i].id < 0 || (size_t)tokens.items[i].id >= tp_tokenizer_size(tokenizer)) abort();
    tp_tokens_free(&tokens);
    tp_tokenizer_free(tokenizer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tp_ctx ctx;
    tp_gguf *file;
    tp_ctx_init(&ctx);
    tp_status status = tp_gguf_parse(&ctx, "f", data, n, &file);
    if (status == TP_OK) {
        check_file(&ctx, file, data, n);
        read_model(&ctx, file);
    } else if ((status != TP_FORMAT && status != TP_UNSUPPORTED) || ctx.message[0] == '\0') {
        abort();
    }
    tp_gguf_close(file);
    return 0;
}
