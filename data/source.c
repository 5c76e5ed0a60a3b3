/* Where a tokenizer comes from. */
#include "data/source.h"

#include "base/file.h"
#include "base/mem.h"

static bool has_file(tp_ctx *ctx, const char *folder, const char *name)
{
    char *path = tp_path_join(ctx, folder, name);
    bool has = path != NULL && tp_path_exists(path);
    tp_free(path);
    return has;
}

static tp_status open_folder(tp_ctx *ctx, const char *path, tp_tokenizer **tokenizer)
{
    bool adapter = has_file(ctx, path, "adapter_config.json") && !has_file(ctx, path, "tokenizer.json");
    TP_TRY(ctx->status);
    if (adapter) return tp_fail(ctx, TP_INVALID, "%s: this is an adapter; name the folder of its base model", path);
    return tp_tokenizer_open(ctx, path, tokenizer);
}

tp_status tp_tokenizer_for(tp_ctx *ctx, const char *path, tp_tokenizer **tokenizer)
{
    if (tp_ends_with(path, ".safetensors") || tp_ends_with(path, "/config.json"))
        return tp_fail(ctx, TP_INVALID, "%s: expected the model's folder or a .gguf file, got a file of the folder", path);
    if (tp_ends_with(path, ".yaml") || tp_ends_with(path, ".yml"))
        return tp_fail(ctx, TP_INVALID, "%s: expected the model's folder or a .gguf file, got a recipe", path);
    if (!tp_ends_with(path, ".gguf")) return open_folder(ctx, path, tokenizer);
    tp_gguf *file;
    TP_TRY(tp_gguf_open(ctx, path, &file));
    tp_status status = tp_tokenizer_from_gguf(ctx, file, tokenizer);
    tp_gguf_close(file);
    return status;
}
