/* Flags after parsing, and the few things that several commands do with them. */
#include <errno.h>
#include <string.h>

#include "backend/backend.h"
#include "cli/command.h"

bool tp_args_has(const tp_args *args, const char *flag)
{
    for (size_t i = 0; i < args->n_given; i++)
        if (strcmp(args->given[i].flag->name, flag) == 0) return true;
    return false;
}

const char *tp_args_value_at(const tp_args *args, const char *flag, size_t i)
{
    for (size_t g = 0; g < args->n_given; g++)
        if (strcmp(args->given[g].flag->name, flag) == 0 && i-- == 0) return args->given[g].value;
    return NULL;
}

const char *tp_args_value(const tp_args *args, const char *flag)
{
    const char *value = NULL;
    for (size_t g = 0; g < args->n_given; g++)
        if (strcmp(args->given[g].flag->name, flag) == 0) value = args->given[g].value;
    return value;
}

tp_status tp_args_i64(tp_ctx *ctx, const tp_args *args, const char *flag, int64_t min, int64_t max, int64_t *out)
{
    const char *text = tp_args_value(args, flag);
    int64_t value;
    if (text == NULL) return TP_OK;
    if (!tp_parse_i64(text, &value) || value < min || value > max)
        return tp_fail(ctx, TP_INVALID, "--%s: expected an integer from %lld to %lld, got \"%s\"", flag, (long long)min,
                       (long long)max, text);
    *out = value;
    return TP_OK;
}

tp_status tp_args_f64(tp_ctx *ctx, const tp_args *args, const char *flag, double min, double max, double *out)
{
    const char *text = tp_args_value(args, flag);
    double value;
    if (text == NULL) return TP_OK;
    if (!tp_parse_f64(text, &value) || !(value >= min && value <= max))
        return tp_fail(ctx, TP_INVALID, "--%s: expected a number from %g to %g, got \"%s\"", flag, min, max, text);
    *out = value;
    return TP_OK;
}

/* "dry" is left out: results of a device that computes nothing would look like results. */
tp_status tp_cli_check_device(tp_ctx *ctx, const char *name)
{
    if (strcmp(name, "auto") == 0 || strcmp(name, "cpu") == 0 || tp_starts_with(name, "cuda")) return TP_OK;
    return tp_fail(ctx, TP_INVALID, "--device: expected auto, cpu, cuda or cuda:N, got \"%s\"", name);
}

tp_status tp_cli_open_device(tp_ctx *ctx, const char *name, int64_t threads)
{
    struct tp_log *log = ctx->log;
    TP_TRY(tp_cli_check_device(ctx, name));
    ctx->log = NULL;
    tp_status status = tp_device_open(ctx, name, (int)threads, &ctx->device);
    ctx->log = log;
    return status;
}

tp_status tp_cli_device(tp_ctx *ctx, const tp_args *args)
{
    const char *name = tp_args_value(args, "device");
    int64_t threads = 0;
    TP_TRY(tp_args_i64(ctx, args, "threads", 0, 4096, &threads));
    return tp_cli_open_device(ctx, name != NULL ? name : "auto", threads);
}

tp_status tp_cli_precision(tp_ctx *ctx, const tp_args *args, tp_dtype *precision)
{
    const char *text = tp_args_value(args, "precision");
    if (tp_device_precision(ctx, text != NULL ? text : "auto", precision) == TP_OK) return TP_OK;
    return tp_fail_in(ctx, "--precision");
}

tp_status tp_cli_print(tp_ctx *ctx, const char *text, size_t n)
{
    if (fwrite(text, 1, n, stdout) == n) return TP_OK;
    return tp_fail(ctx, TP_IO_WRITE, "stdout: %s", strerror(errno));
}

void tp_cli_show_text(tp_buf *out, const char *text, size_t n)
{
    uint32_t codepoint;
    for (size_t i = 0, step; i < n; i += step) {
        int length = tp_utf8_decode(text + i, n - i, &codepoint);
        step = length > 0 ? (size_t)length : 1;
        bool control = length <= 0 || codepoint == 0x7F || (codepoint < 0x20 && codepoint != '\n' && codepoint != '\t') ||
                       (codepoint >= 0x80 && codepoint < 0xA0);
        if (control)
            tp_buf_printf(out, "\\x%02x", length > 0 ? (unsigned)codepoint : (unsigned char)text[i]);
        else
            tp_buf_append(out, text + i, step);
    }
}
