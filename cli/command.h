/* Commands of the `tapeft` program: one file each, a table of flags, one function. */
#ifndef TP_CLI_COMMAND_H
#define TP_CLI_COMMAND_H

#include <stdio.h>

#include "base/status.h"
#include "base/dtype.h"
#include "base/text.h"

typedef struct tp_flag {
    const char *name;    /* "max-tokens", without the dashes */
    const char *value;   /* name of its value in the help ("N", "FILE"), or NULL for a switch */
    bool optional_value; /* --resume or --resume=CKPT */
    bool repeatable;
    const char *help;
} tp_flag;

#define TP_MAX_FLAG_VALUES 64

typedef struct tp_args {
    const struct tp_command *command;
    const char **positional; /* borrowed from argv */
    size_t n_positional;
    struct {
        const tp_flag *flag;
        const char *value; /* NULL: a switch, or an optional value left out */
    } given[TP_MAX_FLAG_VALUES];
    size_t n_given;
} tp_args;

typedef struct tp_command {
    const char *name;
    const char *usage; /* "MODEL [--adapter DIR] ..." */
    const char *summary;
    const tp_flag *flags; /* ends with a NULL name; may be NULL */
    size_t min_positional, max_positional;
    tp_status (*run)(tp_ctx *ctx, const tp_args *args);
} tp_command;

extern const tp_command tp_command_train, tp_command_generate, tp_command_eval, tp_command_logits, tp_command_tokenize,
    tp_command_init, tp_command_inspect, tp_command_plan, tp_command_preview, tp_command_doctor, tp_command_tune;

/* ---- flags ---- */
bool tp_args_has(const tp_args *args, const char *flag);
/* Last value given, or NULL. */
const char *tp_args_value(const tp_args *args, const char *flag);
/* Value number i of a repeatable flag, or NULL past the end. */
const char *tp_args_value_at(const tp_args *args, const char *flag, size_t i);
/* Typed values: *out stays as it is if the flag was not given; INVALID with the range otherwise. */
tp_status tp_args_i64(tp_ctx *ctx, const tp_args *args, const char *flag, int64_t min, int64_t max, int64_t *out) TP_MUST_CHECK;
tp_status tp_args_f64(tp_ctx *ctx, const tp_args *args, const char *flag, double min, double max, double *out) TP_MUST_CHECK;

/* ---- shared flags and what they do ---- */
#define TP_FLAG_JSON                                                                                                           \
    {                                                                                                                          \
        "json", NULL, false, false, "print JSON"                                                                               \
    }
#define TP_FLAG_DEVICE                                                                                                         \
    {                                                                                                                          \
        "device", "NAME", false, false, "auto, cpu, cuda or cuda:N (default auto)"                                             \
    }
#define TP_FLAG_THREADS                                                                                                        \
    {                                                                                                                          \
        "threads", "N", false, false, "CPU threads (default: all cores)"                                                       \
    }
#define TP_FLAG_PRECISION                                                                                                      \
    {                                                                                                                          \
        "precision", "P", false, false, "auto, fp32, tf32, bf16 or, on a GPU, fp16 (default auto)"                             \
    }
#define TP_FLAG_FORCE                                                                                                          \
    {                                                                                                                          \
        "force", NULL, false, false, "apply an adapter made for another base"                                                  \
    }
#define TP_FLAG_END                                                                                                            \
    {                                                                                                                          \
        NULL, NULL, false, false, NULL                                                                                         \
    }

/* INVALID unless `name` is a device that commands may be told to use. */
tp_status tp_cli_check_device(tp_ctx *ctx, const char *name) TP_MUST_CHECK;
/* Opens a device into ctx->device, without the note that says why "auto" is the CPU: only `train`, whose runs are long, and
 * `doctor` tell. threads 0: all cores. */
tp_status tp_cli_open_device(tp_ctx *ctx, const char *name, int64_t threads) TP_MUST_CHECK;
/* The same for the one that --device and --threads name. */
tp_status tp_cli_device(tp_ctx *ctx, const tp_args *args) TP_MUST_CHECK;
/* --precision, or what auto means on ctx->device. */
tp_status tp_cli_precision(tp_ctx *ctx, const tp_args *args, tp_dtype *precision) TP_MUST_CHECK;
/* Text from data for a terminal: control characters but newline and tab are shown, not obeyed. */
void tp_cli_show_text(tp_buf *out, const char *text, size_t n);
/* Writes to stdout and reports what the stream says: IO_WRITE if the reader is gone or the disk is full. */
tp_status tp_cli_print(tp_ctx *ctx, const char *text, size_t n) TP_MUST_CHECK;

#endif
