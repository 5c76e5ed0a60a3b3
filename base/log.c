/* Log lines to one sink. */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

const char *tp_log_level_name(tp_log_level level)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    return (unsigned)level < sizeof names / sizeof names[0] ? names[level] : "unknown";
}

TP_PRINTF(3, 0) static void write_line(const tp_log *log, tp_log_level level, const char *format, va_list args)
{
    if (log == NULL || log->sink == NULL || level < log->level) return;
    char raw[TP_MESSAGE_BYTES];
    tp_ctx line; /* names from files may be in the arguments: escaped by the same rules as error messages */
    vsnprintf(raw, sizeof raw, format, args);
    tp_ctx_init(&line);
    (void)tp_fail(&line, TP_INTERNAL, "%s", raw);
    log->sink(level, line.message, log->user);
}

void tp_log_write(const tp_log *log, tp_log_level level, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    write_line(log, level, format, args);
    va_end(args);
}

void tp_note(const tp_ctx *ctx, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (ctx != NULL) write_line(ctx->log, TP_LOG_INFO, format, args);
    va_end(args);
}

void tp_warn(const tp_ctx *ctx, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (ctx != NULL) write_line(ctx->log, TP_LOG_WARN, format, args);
    va_end(args);
}
