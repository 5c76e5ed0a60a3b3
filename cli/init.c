/* tapeft init CONFIG: a model folder with random weights of that shape. */
#include <string.h>

#include "cli/command.h"
#include "models/init.h"

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    const char *out = tp_args_value(args, "out"), *dtype_name = tp_args_value(args, "dtype");
    tp_dtype dtype = TP_BF16;
    int64_t seed = 42;
    if (out == NULL) return tp_fail(ctx, TP_INVALID, "init: --out DIR is needed");
    TP_TRY(tp_args_i64(ctx, args, "seed", 0, INT64_MAX, &seed));
    if (dtype_name != NULL) {
        if (strcmp(dtype_name, "fp32") == 0)
            dtype = TP_F32;
        else if (strcmp(dtype_name, "fp16") == 0)
            dtype = TP_F16;
        else if (strcmp(dtype_name, "bf16") != 0)
            return tp_fail(ctx, TP_INVALID, "--dtype: expected bf16, fp16 or fp32, got \"%s\"", dtype_name);
    }
    return tp_model_init(ctx, args->positional[0], out, (uint64_t)seed, dtype);
}

static const tp_flag flags[] = {
    {"out", "DIR", false, false, "the folder to write; must not exist"},
    {"seed", "N", false, false, "of the generator (default 42)"},
    {"dtype", "T", false, false, "bf16, fp16 or fp32 (default bf16)"},
    TP_FLAG_END,
};

const tp_command tp_command_init = {
    "init", "CONFIG --out DIR [--seed N] [--dtype T]", "write a model folder with random weights of any shape", flags, 1, 1,
    run};
