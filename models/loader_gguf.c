/* GGUF files: metadata and tensors in one. What is stored transformed stays so where a matrix can say it (rope_pairs). */
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "models/source.h"

static tp_format_id format_of(uint32_t type)
{
    switch (type) {
    case TP_GGML_F32: return TP_FORMAT_F32;
    case TP_GGML_BF16: return TP_FORMAT_BF16;
    case TP_GGML_F16: return TP_FORMAT_F16;
    case TP_GGML_Q8_0: return TP_FORMAT_Q8_0;
    case TP_GGML_Q4_0: return TP_FORMAT_Q4_0;
    case TP_GGML_Q4_1: return TP_FORMAT_Q4_1;
    default: return TP_FORMAT_COUNT;
    }
}

static tp_status open_file(tp_ctx *ctx, const char *path, tp_model_store *store, tp_model_config *config)
{
    TP_TRY(tp_gguf_open(ctx, path, &store->gguf));
    return tp_config_from_gguf(ctx, store->gguf, config);
}

static tp_stored stored_of(const tp_gguf *gguf, const tp_gguf_tensor *t)
{
    const char *type = tp_ggml_type_name(t->type);
    tp_stored s = {.name = t->name,
                   .file = tp_gguf_file(gguf),
                   .offset = t->offset,
                   .bytes = t->bytes,
                   .type = type != NULL ? type : "unknown",
                   .format = format_of(t->type),
                   .rank = t->rank};
    memcpy(s.shape, t->shape, sizeof t->shape);
    return s;
}

/* Names that the network took, or that need no note. */
static tp_status note_unused(tp_ctx *ctx, const tp_gguf *gguf, const tp_stored *stored, size_t n)
{
    tp_map *used = tp_map_new(ctx, true);
    if (used == NULL) return TP_NOMEM;
    tp_status status = tp_map_put(ctx, used, tp_span_of("rope_freqs.weight"), 1, NULL);
    for (size_t i = 0; i < n && status == TP_OK; i++)
        if (stored[i].name != NULL) status = tp_map_put(ctx, used, tp_span_of(stored[i].name), 1, NULL);
    const char *first = NULL;
    size_t unused = 0;
    for (size_t i = 0; i < tp_gguf_tensor_count(gguf) && status == TP_OK; i++) {
        const char *name = tp_gguf_tensor_at(gguf, i)->name;
        int64_t value;
        if (tp_map_get(used, tp_span_of(name), &value)) continue;
        if (unused++ == 0) first = name;
    }
    if (unused > 0)
        tp_note(ctx, "%zu tensor%s not part of the network: ignored, the first is %s", unused, unused == 1 ? " is" : "s are",
                first);
    tp_map_free(used);
    return status;
}

static tp_status locate(tp_ctx *ctx, tp_model_store *store, const tp_model_config *config, const tp_part *parts, size_t n,
                        tp_stored *stored)
{
    (void)config;
    for (size_t i = 0; i < n; i++) {
        const tp_gguf_tensor *t = tp_gguf_tensor_find(store->gguf, parts[i].gguf);
        if (t != NULL) stored[i] = stored_of(store->gguf, t);
    }
    return note_unused(ctx, store->gguf, stored, n);
}

const tp_source tp_source_gguf = {open_file, locate};
