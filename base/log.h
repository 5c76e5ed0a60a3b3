/* Log lines: four levels, one sink. Whoever runs the library decides where lines go; the library only sends them. */
#ifndef TP_BASE_LOG_H
#define TP_BASE_LOG_H

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tp_log_level { TP_LOG_DEBUG, TP_LOG_INFO, TP_LOG_WARN, TP_LOG_ERROR } tp_log_level;

/* text is one line of UTF-8 without control characters and without a newline; it lives until the sink returns. Threads
 * with contexts that share a log may call at the same time. */
typedef void (*tp_log_sink)(tp_log_level level, const char *text, void *user);

/* Filled in by its owner and put into tp_ctx.log. */
typedef struct tp_log {
    tp_log_level level; /* lines below are dropped */
    tp_log_sink sink;   /* NULL: all are dropped */
    void *user;
} tp_log;

TP_API const char *tp_log_level_name(tp_log_level level); /* "debug", "info", "warn", "error" */
/* Longer lines than TP_MESSAGE_BYTES are cut. log may be NULL. */
TP_API void tp_log_write(const tp_log *log, tp_log_level level, const char *format, ...) TP_PRINTF(3, 4);
/* An info line, or a warning, to the context's log if it has one. */
TP_API void tp_note(const tp_ctx *ctx, const char *format, ...) TP_PRINTF(2, 3);
TP_API void tp_warn(const tp_ctx *ctx, const char *format, ...) TP_PRINTF(2, 3);

#ifdef __cplusplus
}
#endif
#endif
