/* The run context: first error wins, messages are safe to print. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/text.h"

static const struct {
    const char *name;
    int exit_code;
} statuses[TP_STATUS_COUNT] = {
    [TP_OK] = {"ok", 0},
    [TP_INVALID] = {"invalid", 2},
    [TP_FORMAT] = {"format", 3},
    [TP_SHAPE] = {"shape", 3},
    [TP_UNSUPPORTED] = {"unsupported", 3},
    [TP_IO_READ] = {"io_read", 3},
    [TP_IO_WRITE] = {"io_write", 4},
    [TP_NOMEM] = {"nomem", 4},
    [TP_DEVICE] = {"device", 4},
    [TP_NUMERIC] = {"numeric", 5},
    [TP_CHECKPOINT] = {"checkpoint", 6},
    [TP_INTERNAL] = {"internal", 70},
    [TP_PREEMPTED] = {"preempted", 75},
};

const char *tp_status_name(tp_status status)
{
    return (unsigned)status < TP_STATUS_COUNT ? statuses[status].name : "unknown";
}

int tp_status_exit_code(tp_status status)
{
    return (unsigned)status < TP_STATUS_COUNT ? statuses[status].exit_code : 70;
}

void tp_ctx_init(tp_ctx *ctx)
{
    memset(ctx, 0, sizeof *ctx);
    ctx->seed = 42;
}

void tp_ctx_clear(tp_ctx *ctx)
{
    ctx->status = TP_OK;
    ctx->message[0] = '\0';
}

/* Copies raw to out[0..size), escaping control characters and malformed UTF-8; cuts at the end. */
static void copy_escaped(char *out, size_t size, const char *raw)
{
    size_t n = strlen(raw), used = 0;
    for (size_t i = 0; i < n;) {
        uint32_t codepoint = 0;
        int length = tp_utf8_decode(raw + i, n - i, &codepoint);
        bool control =
            codepoint < 0x20 || (codepoint >= 0x7f && codepoint < 0xa0) || codepoint == 0x2028 || codepoint == 0x2029;
        char piece[16];
        int piece_length;
        if (length > 0 && !control) {
            memcpy(piece, raw + i, (size_t)length);
            piece_length = length;
        } else if (length > 0 && codepoint == '\n') {
            piece_length = snprintf(piece, sizeof piece, "\\n");
        } else if (length > 0 && codepoint == '\t') {
            piece_length = snprintf(piece, sizeof piece, "\\t");
        } else if (length > 1) {
            piece_length = snprintf(piece, sizeof piece, "\\u%04x", (unsigned)codepoint);
        } else {
            piece_length = snprintf(piece, sizeof piece, "\\x%02x", (unsigned)(unsigned char)raw[i]);
        }
        if (used + (size_t)piece_length >= size) break;
        memcpy(out + used, piece, (size_t)piece_length);
        used += (size_t)piece_length;
        i += length > 0 ? (size_t)length : 1;
    }
    out[used] = '\0';
}

tp_status tp_fail(tp_ctx *ctx, tp_status status, const char *format, ...)
{
    if (ctx == NULL || ctx->status != TP_OK) return status;
    char raw[TP_MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    ctx->status = status;
    copy_escaped(ctx->message, sizeof ctx->message, raw);
    return status;
}

tp_status tp_fail_in(tp_ctx *ctx, const char *format, ...)
{
    if (ctx == NULL || ctx->status == TP_OK) return TP_INTERNAL;
    char raw[TP_MESSAGE_BYTES], context[TP_MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    copy_escaped(context, sizeof context, raw);
    size_t n = strlen(context);
    if (n + 3 < sizeof context) {
        size_t room = sizeof context - n - 3, rest = strlen(ctx->message);
        if (rest > room) rest = room;
        memcpy(context + n, ": ", 2);
        memcpy(context + n + 2, ctx->message, rest);
        context[n + 2 + rest] = '\0';
        memcpy(ctx->message, context, n + 3 + rest);
    }
    return ctx->status;
}
