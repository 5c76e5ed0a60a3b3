/* Where a tokenizer comes from. */
#include "data/source.h"

tp_status tp_tokenizer_for(tp_ctx *ctx, const char *path, tp_tokenizer **tokenizer)
{
    if (tp_ends_with(path, ".safetensors") || tp_ends_with(path, "/config.json"))
        return tp_fail(ctx, TP_INVALID, "%s: expected the model's folder or a .gguf file, got a file of the folder", path);
    if (!tp_ends_with(path, ".gguf")) return tp_tokenizer_open(ctx, path, tokenizer);
    tp_gguf *file;
    TP_TRY(tp_gguf_open(ctx, path, &file));
    tp_status status = tp_tokenizer_from_gguf(ctx, file, tokenizer);
    tp_gguf_close(file);
    return status;
}
