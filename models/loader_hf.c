/* Hugging Face folders: config.json beside model.safetensors, or beside shards and their index.
 *
 * Files are opened beneath the folder only. Names may lack the prefix of the live model ("model.", "transformer."). */
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "models/source.h"

#define INDEX_BYTES ((size_t)64 << 20)
#define INDEX_NAME  "model.safetensors.index.json"
#define SINGLE_NAME "model.safetensors"

/* ---- the tensor directory ---- */

static tp_status list_shard(tp_ctx *ctx, tp_model_store *store, const tp_safetensors *shard)
{
    for (size_t i = 0; i < tp_safetensors_count(shard); i++) {
        const tp_entry *entry = tp_safetensors_at(shard, i);
        bool twice;
        TP_TRY(tp_map_put(ctx, store->names, tp_span_of(entry->name), (int64_t)store->n_listed, &twice));
        if (twice)
            return tp_fail(ctx, TP_FORMAT, "%s: %s: this tensor stands in another shard too", tp_safetensors_path(shard),
                           entry->name);
        store->listed[store->n_listed++] = (struct tp_listed){shard, entry, false};
    }
    return TP_OK;
}

static tp_status list_shards(tp_ctx *ctx, tp_model_store *store)
{
    size_t total = 0;
    for (size_t i = 0; i < store->n_shards; i++) total += tp_safetensors_count(store->shards[i]);
    store->names = tp_map_new(ctx, true);
    store->listed = tp_alloc(ctx, total, sizeof *store->listed);
    if (store->names == NULL || store->listed == NULL) return TP_NOMEM;
    TP_TRY(tp_map_reserve(ctx, store->names, total));
    for (size_t i = 0; i < store->n_shards; i++) TP_TRY(list_shard(ctx, store, store->shards[i]));
    return TP_OK;
}

static struct tp_listed *lookup(const tp_model_store *store, const char *name)
{
    int64_t i;
    return tp_map_get(store->names, tp_span_of(name), &i) ? &store->listed[i] : NULL;
}

/* ---- files ---- */

static tp_status open_shard(tp_ctx *ctx, const char *folder, const char *name, tp_model_store *store)
{
    char *path;
    TP_TRY(tp_path_beneath(ctx, folder, name, &path));
    tp_status status = tp_safetensors_open(ctx, path, &store->shards[store->n_shards]);
    if (status == TP_OK) store->n_shards++;
    tp_free(path);
    return status;
}

/* An index under reading. */
struct index {
    tp_ctx *ctx;
    const char *folder;
    const tp_json_doc *doc;
    const tp_json *weights; /* weight_map */
    tp_map *files;          /* file name -> shard number, in order of first mention */
};

static tp_status index_error(const struct index *x, const tp_json *value, const char *format, ...) TP_PRINTF(3, 4);
static tp_status index_error(const struct index *x, const tp_json *value, const char *format, ...)
{
    char where[512], text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return tp_fail(x->ctx, TP_FORMAT, "%s: %s", tp_json_where(x->doc, value, where, sizeof where), text);
}

static tp_status collect_files(struct index *x)
{
    for (size_t i = 0; i < tp_json_count(x->weights); i++) {
        const tp_json *value = tp_json_at(x->weights, i);
        tp_span name = tp_json_string(value);
        int64_t known;
        if (tp_json_type_of(value) != TP_JSON_STRING || name.len == 0 || memchr(name.data, '\0', name.len) != NULL)
            return index_error(x, value, "weight_map: expected the name of a file");
        if (!tp_map_get(x->files, name, &known))
            TP_TRY(tp_map_put(x->ctx, x->files, name, (int64_t)tp_map_count(x->files), NULL));
    }
    return TP_OK;
}

static tp_status open_files(struct index *x, tp_model_store *store)
{
    size_t n = tp_map_count(x->files);
    store->shards = tp_alloc(x->ctx, n, sizeof(tp_safetensors *));
    if (store->shards == NULL) return TP_NOMEM;
    for (size_t i = 0; i < n; i++) {
        tp_span name;
        int64_t number;
        tp_map_at(x->files, i, &name, &number);
        char *file = tp_strndup(x->ctx, name.data, name.len);
        if (file == NULL) return TP_NOMEM;
        tp_status status = open_shard(x->ctx, x->folder, file, store);
        tp_free(file);
        if (status != TP_OK) return tp_fail_in(x->ctx, "%s", INDEX_NAME);
    }
    return TP_OK;
}

/* The index and the shards have to tell the same. */
static tp_status check_weight_map(const struct index *x, const tp_model_store *store)
{
    for (size_t i = 0; i < tp_json_count(x->weights); i++) {
        tp_span name = tp_json_key_at(x->weights, i), file = tp_json_string(tp_json_at(x->weights, i));
        int64_t listed, shard;
        if (!tp_map_get(store->names, name, &listed))
            return index_error(x, tp_json_at(x->weights, i), "%.*s is not in %.*s", (int)name.len, name.data, (int)file.len,
                               file.data);
        if (!tp_map_get(x->files, file, &shard) || store->listed[listed].shard != store->shards[shard])
            return index_error(x, tp_json_at(x->weights, i), "%.*s is not in %.*s but in %s", (int)name.len, name.data,
                               (int)file.len, file.data, tp_safetensors_path(store->listed[listed].shard));
    }
    return TP_OK;
}

static tp_status read_index(struct index *x, tp_model_store *store)
{
    x->weights = tp_json_get(tp_json_root(x->doc), "weight_map");
    if (tp_json_type_of(x->weights) != TP_JSON_OBJECT || tp_json_count(x->weights) == 0)
        return index_error(x, x->weights != NULL ? x->weights : tp_json_root(x->doc),
                           "weight_map: expected an object with tensor names and files");
    x->files = tp_map_new(x->ctx, true);
    if (x->files == NULL) return TP_NOMEM;
    TP_TRY(collect_files(x));
    TP_TRY(open_files(x, store));
    TP_TRY(list_shards(x->ctx, store));
    return check_weight_map(x, store);
}

static tp_status open_sharded(tp_ctx *ctx, const char *folder, tp_model_store *store)
{
    char *path;
    tp_json_doc *doc = NULL;
    TP_TRY(tp_path_beneath(ctx, folder, INDEX_NAME, &path));
    tp_status status = tp_json_read(ctx, path, INDEX_BYTES, &doc);
    if (status == TP_OK) {
        struct index x = {.ctx = ctx, .folder = folder, .doc = doc};
        status = read_index(&x, store);
        tp_map_free(x.files);
    }
    tp_json_free(doc);
    tp_free(path);
    return status;
}

static bool has(tp_ctx *ctx, const char *folder, const char *name, tp_status *status)
{
    char *path = *status == TP_OK ? tp_path_join(ctx, folder, name) : NULL;
    if (path == NULL && *status == TP_OK) *status = TP_NOMEM;
    bool exists = path != NULL && tp_path_exists(path);
    tp_free(path);
    return exists;
}

static tp_status open_weights(tp_ctx *ctx, const char *folder, tp_model_store *store)
{
    tp_status status = TP_OK;
    bool single = has(ctx, folder, SINGLE_NAME, &status), sharded = has(ctx, folder, INDEX_NAME, &status);
    bool pickle = has(ctx, folder, "pytorch_model.bin", &status) || has(ctx, folder, "pytorch_model.bin.index.json", &status);
    if (status != TP_OK) return status;
    if (!single && sharded) return open_sharded(ctx, folder, store);
    if (!single && pickle)
        return tp_fail(
            ctx, TP_UNSUPPORTED,
            "%s: only pickle weights (pytorch_model.bin), which are programs and never read; convert them in Python: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
            folder);
    if (!single) return tp_fail(ctx, TP_IO_READ, "%s: has neither %s nor %s", folder, SINGLE_NAME, INDEX_NAME);
    store->shards = tp_alloc(ctx, 1, sizeof(tp_safetensors *));
    if (store->shards == NULL) return TP_NOMEM;
    TP_TRY(open_shard(ctx, folder, SINGLE_NAME, store));
    return list_shards(ctx, store);
}

static tp_status open_config(tp_ctx *ctx, const char *folder, tp_model_config *config)
{
    tp_status status = TP_OK;
    char *path;
    if (!has(ctx, folder, "config.json", &status) && has(ctx, folder, "adapter_config.json", &status))
        return tp_fail(ctx, TP_INVALID, "%s: this is an adapter; name the folder of its base model", folder);
    if (status != TP_OK) return status;
    TP_TRY(tp_path_beneath(ctx, folder, "config.json", &path));
    status = tp_config_read(ctx, path, config);
    tp_free(path);
    return status;
}

/* ---- tied embeddings ---- */

static const char *prefix_of(const tp_model_config *config)
{
    return config->family == TP_FAMILY_GPT2 ? "transformer." : "model.";
}

static struct tp_listed *find_part(const tp_model_store *store, const tp_model_config *config, const char *name)
{
    struct tp_listed *found = lookup(store, name);
    if (found == NULL && tp_starts_with(name, prefix_of(config))) found = lookup(store, name + strlen(prefix_of(config)));
    return found;
}

static tp_status same_bytes(tp_ctx *ctx, const struct tp_listed *a, const struct tp_listed *b, bool *same)
{
    enum { STEP = 1 << 20 };
    *same = a->entry->dtype == b->entry->dtype && a->entry->bytes == b->entry->bytes;
    if (!*same) return TP_OK;
    char *buffer = tp_alloc_raw(ctx, 2, STEP);
    if (buffer == NULL) return TP_NOMEM;
    tp_status status = TP_OK;
    for (uint64_t at = 0; status == TP_OK && *same && at < a->entry->bytes; at += STEP) {
        size_t n = (size_t)(a->entry->bytes - at < STEP ? a->entry->bytes - at : STEP);
        status = tp_file_pread(ctx, tp_safetensors_file(a->shard), a->entry->offset + at, buffer, n);
        if (status == TP_OK)
            status = tp_file_pread(ctx, tp_safetensors_file(b->shard), b->entry->offset + at, buffer + STEP, n);
        *same = status == TP_OK && memcmp(buffer, buffer + STEP, n) == 0;
    }
    tp_free(buffer);
    return status;
}

/* A tied configuration beside a head of its own: the head counts, unless it is a copy. */
static tp_status resolve_tie(tp_ctx *ctx, const tp_model_store *store, tp_model_config *config)
{
    if (!config->tied) return TP_OK;
    const char *name = config->family == TP_FAMILY_GPT2 ? "transformer.wte.weight" : "model.embed_tokens.weight";
    struct tp_listed *embedding = find_part(store, config, name), *head = lookup(store, "lm_head.weight");
    if (embedding == NULL || head == NULL) return TP_OK;
    bool same = true;
    if (ctx->device->backend->computes) TP_TRY(same_bytes(ctx, embedding, head, &same));
    config->tied = same;
    head->used = true;
    if (!same) tp_note(ctx, "config.json ties the embeddings, but lm_head.weight is another matrix: it is used");
    return TP_OK;
}

static tp_status open_folder(tp_ctx *ctx, const char *path, tp_model_store *store, tp_model_config *config)
{
    TP_TRY(open_config(ctx, path, config));
    tp_status status = open_weights(ctx, path, store);
    if (status == TP_OK) status = resolve_tie(ctx, store, config);
    if (status != TP_OK) tp_config_free(config);
    return status;
}

/* ---- parts ---- */

static tp_format_id format_of(tp_dtype dtype)
{
    return dtype == TP_F32    ? TP_FORMAT_F32
           : dtype == TP_BF16 ? TP_FORMAT_BF16
           : dtype == TP_F16  ? TP_FORMAT_F16
                              : TP_FORMAT_COUNT;
}

static tp_stored stored_of(const struct tp_listed *listed, bool transposed)
{
    const tp_entry *e = listed->entry;
    tp_stored s = {.name = e->name,
                   .file = tp_safetensors_file(listed->shard),
                   .offset = e->offset,
                   .bytes = e->bytes,
                   .type = tp_dtype_name(e->dtype),
                   .format = format_of(e->dtype),
                   .rank = e->rank,
                   .transposed = transposed};
    memcpy(s.shape, e->shape, sizeof s.shape);
    return s;
}

/* Buffers that older files carry along: causal masks and rotary tables. */
static bool is_buffer(const char *name)
{
    return tp_ends_with(name, ".attn.bias") || tp_ends_with(name, ".attn.masked_bias") ||
           tp_ends_with(name, ".rotary_emb.inv_freq");
}

static void note_unused(const tp_ctx *ctx, const tp_model_store *store)
{
    const char *first = NULL;
    size_t n = 0;
    for (size_t i = 0; i < store->n_listed; i++) {
        if (store->listed[i].used || is_buffer(store->listed[i].entry->name)) continue;
        if (n++ == 0) first = store->listed[i].entry->name;
    }
    if (n > 0)
        tp_note(ctx, "%zu tensor%s not part of the network: ignored, the first is %s", n, n == 1 ? " is" : "s are", first);
}

static tp_status locate(tp_ctx *ctx, tp_model_store *store, const tp_model_config *config, const tp_part *parts, size_t n,
                        tp_stored *stored)
{
    for (size_t i = 0; i < n; i++) {
        struct tp_listed *found = find_part(store, config, parts[i].name);
        bool embedding = parts[i].layer < 0 && parts[i].at == offsetof(tp_model, embedding);
        if (found == NULL && embedding && config->tied) found = lookup(store, "lm_head.weight");
        if (found == NULL) continue;
        found->used = true;
        stored[i] = stored_of(found, parts[i].conv1d && parts[i].role == TP_PART_WEIGHT);
    }
    note_unused(ctx, store);
    return TP_OK;
}

const tp_source tp_source_hf = {open_folder, locate};
