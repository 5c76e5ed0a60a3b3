/* tapeft inspect PATH: a safetensors or GGUF file, an adapter, a checkpoint or a model folder; or in what two of them differ.
 */
#include <string.h>

#include "base/file.h"
#include "base/gguf.h"
#include "base/json.h"
#include "base/map.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "cli/command.h"
#include "cli/inspect.h"
#include "trainers/checkpoint.h"

/* ---- one row for every tensor ---- */

struct listing {
    tp_ctx *ctx;
    tp_buf *out;
    bool json, tensors;
    size_t n;
    uint64_t bytes;
    tp_inspection *found; /* gets the places of tensors; NULL: nobody asks */
};

static tp_status keep_place(struct listing *l, const char *path, uint64_t offset, uint64_t bytes, tp_dtype dtype)
{
    tp_inspection *f = l->found;
    if (f == NULL) return TP_OK;
    TP_TRY(tp_grow(l->ctx, &f->places, &f->capacity, f->n + 1, sizeof *f->places));
    char *own = tp_strdup(l->ctx, path);
    if (own == NULL) return TP_NOMEM;
    f->places[f->n++] = (tp_tensor_place){own, offset, bytes, dtype};
    return TP_OK;
}

static void add_tensor(struct listing *l, const char *name, const char *type, int rank, const int64_t *shape, uint64_t bytes)
{
    if (l->json) {
        tp_buf_text(l->out, l->n > 0 ? ", {\"name\": " : "{\"name\": ");
        tp_json_write_string(l->out, name, strlen(name));
        tp_buf_printf(l->out, ", \"dtype\": \"%s\", \"shape\": [", type);
    } else if (l->tensors) {
        tp_buf_printf(l->out, "  %-8s ", type);
    }
    for (int i = 0; i < rank && (l->json || l->tensors); i++)
        tp_buf_printf(l->out, "%s%lld", i > 0 ? (l->json ? ", " : "x") : "", (long long)shape[i]);
    if (l->json)
        tp_buf_text(l->out, "]}");
    else if (l->tensors)
        tp_buf_printf(l->out, "  %s\n", name);
    l->n++;
    l->bytes += bytes;
}

static void put_pair(struct listing *l, size_t i, const char *key, const char *value)
{
    if (!l->json) {
        tp_buf_printf(l->out, "  %s: %s\n", key, value);
        return;
    }
    if (i > 0) tp_buf_text(l->out, ", ");
    tp_json_write_string(l->out, key, strlen(key));
    tp_buf_text(l->out, ": ");
    tp_json_write_string(l->out, value, strlen(value));
}

static tp_status add_tensors(struct listing *l, const tp_safetensors *file)
{
    for (size_t i = 0; i < tp_safetensors_count(file); i++) {
        const tp_entry *e = tp_safetensors_at(file, i);
        add_tensor(l, e->name, tp_dtype_name(e->dtype), e->rank, e->shape, e->bytes);
        bool converts = e->dtype == TP_F16 || e->dtype == TP_BF16 || e->dtype == TP_F32 || e->dtype == TP_F64;
        TP_TRY(keep_place(l, tp_safetensors_path(file), e->offset, e->bytes, converts ? e->dtype : TP_DTYPE_COUNT));
    }
    return TP_OK;
}

static tp_status inspect_safetensors(tp_ctx *ctx, const char *path, struct listing *l)
{
    tp_safetensors *file;
    TP_TRY(tp_safetensors_open(ctx, path, &file));
    tp_buf_text(l->out, l->json ? "\"format\": \"safetensors\", \"metadata\": {" : "safetensors\n");
    for (size_t i = 0; i < tp_safetensors_metadata_count(file); i++) {
        const char *key, *value;
        tp_safetensors_metadata_at(file, i, &key, &value);
        put_pair(l, i, key, value);
    }
    if (l->json) tp_buf_text(l->out, "}, \"tensors\": [");
    tp_status status = add_tensors(l, file);
    if (l->json) tp_buf_char(l->out, ']');
    tp_safetensors_close(file);
    return status;
}

static void put_gguf_value(const tp_gguf *file, const tp_gguf_value *v, tp_buf *out, uint64_t most)
{
    bool array = v->type == TP_GGUF_ARRAY;
    tp_gguf_type type = array ? v->element : v->type;
    uint64_t shown = v->count < most ? v->count : most;
    if (array) tp_buf_char(out, '[');
    for (uint64_t i = 0; i < shown; i++) {
        if (i > 0) tp_buf_text(out, ", ");
        if (type == TP_GGUF_STRING) {
            tp_span text = tp_gguf_string_at(file, v, i);
            tp_json_write_string(out, text.data, text.len);
        } else if (type == TP_GGUF_F32 || type == TP_GGUF_F64) {
            tp_json_write_f64(out, tp_gguf_f64_at(v, i), type == TP_GGUF_F32 ? 9 : 17);
        } else if (type == TP_GGUF_BOOL) {
            tp_buf_text(out, tp_gguf_i64_at(v, i) != 0 ? "true" : "false");
        } else if (type == TP_GGUF_U64) {
            tp_buf_printf(out, "%llu", (unsigned long long)tp_gguf_i64_at(v, i));
        } else {
            tp_buf_printf(out, "%lld", (long long)tp_gguf_i64_at(v, i));
        }
    }
    if (array) tp_buf_char(out, ']');
}

/* TP_DTYPE_COUNT for types in blocks. */
static tp_dtype dtype_of(uint32_t type)
{
    return type == TP_GGML_F32 ? TP_F32 : type == TP_GGML_F16 ? TP_F16 : type == TP_GGML_BF16 ? TP_BF16 : TP_DTYPE_COUNT;
}

static tp_status inspect_gguf(tp_ctx *ctx, const char *path, struct listing *l)
{
    tp_gguf *file;
    TP_TRY(tp_gguf_open(ctx, path, &file));
    if (l->json)
        tp_buf_printf(l->out, "\"format\": \"gguf\", \"version\": %u, \"metadata\": {", (unsigned)tp_gguf_version(file));
    else
        tp_buf_printf(l->out, "GGUF version %u\n", (unsigned)tp_gguf_version(file));
    for (size_t i = 0; i < tp_gguf_value_count(file); i++) {
        const tp_gguf_value *v = tp_gguf_value_at(file, i);
        if (l->json) {
            if (i > 0) tp_buf_text(l->out, ", ");
            tp_json_write_string(l->out, v->key, strlen(v->key));
            tp_buf_text(l->out, ": ");
            put_gguf_value(file, v, l->out, UINT64_MAX);
        } else {
            tp_buf_printf(l->out, "  %s: ", v->key);
            put_gguf_value(file, v, l->out, 4);
            if (v->type == TP_GGUF_ARRAY && v->count > 4)
                tp_buf_printf(l->out, " ... %llu in all", (unsigned long long)v->count);
            tp_buf_char(l->out, '\n');
        }
    }
    if (l->json) tp_buf_text(l->out, "}, \"tensors\": [");
    tp_status status = TP_OK;
    for (size_t i = 0; status == TP_OK && i < tp_gguf_tensor_count(file); i++) {
        const tp_gguf_tensor *t = tp_gguf_tensor_at(file, i);
        add_tensor(l, t->name, tp_ggml_type_name(t->type), t->rank, t->shape, t->bytes);
        status = keep_place(l, path, t->offset, t->bytes, dtype_of(t->type));
    }
    if (l->json) tp_buf_char(l->out, ']');
    tp_gguf_close(file);
    return status;
}

/* ---- folders ---- */

/* A JSON file of the folder as it is, under a key. */
static tp_status put_json_file(tp_ctx *ctx, const char *folder, const char *name, const char *key, struct listing *l)
{
    char *path = tp_path_join(ctx, folder, name);
    tp_json_doc *doc = NULL;
    tp_status status = path == NULL ? TP_NOMEM : tp_json_read(ctx, path, (size_t)16 << 20, &doc);
    if (status == TP_OK && l->json) {
        tp_buf_printf(l->out, "\"%s\": ", key);
        tp_json_write(l->out, tp_json_root(doc), 0);
        tp_buf_text(l->out, ", ");
    }
    for (size_t i = 0; status == TP_OK && !l->json && i < tp_json_count(tp_json_root(doc)); i++) {
        tp_span name_span = tp_json_key_at(tp_json_root(doc), i);
        if (tp_json_type_of(tp_json_at(tp_json_root(doc), i)) == TP_JSON_NULL) continue;
        tp_buf_printf(l->out, "  %.*s: ", (int)name_span.len, name_span.data);
        tp_json_write(l->out, tp_json_at(tp_json_root(doc), i), 0);
        tp_buf_char(l->out, '\n');
    }
    tp_json_free(doc);
    tp_free(path);
    return status;
}

/* False, with the failure recorded, if there is no memory to look. */
static bool folder_has(tp_ctx *ctx, const char *folder, const char *name)
{
    char *path = tp_path_join(ctx, folder, name);
    bool there = path != NULL && tp_path_exists(path);
    tp_free(path);
    return there;
}

static tp_status inspect_file_in(tp_ctx *ctx, const char *folder, const char *name, struct listing *l)
{
    char *path = tp_path_join(ctx, folder, name);
    tp_status status = path != NULL ? inspect_safetensors(ctx, path, l) : TP_NOMEM;
    tp_free(path);
    return status;
}

/* ---- a model in several files ---- */

static tp_status add_shard(tp_ctx *ctx, const char *folder, tp_span name, struct listing *l)
{
    char *path = NULL, *file = tp_strndup(ctx, name.data, name.len);
    tp_safetensors *shard;
    tp_status status = file != NULL ? tp_path_beneath(ctx, folder, file, &path) : TP_NOMEM;
    if (status == TP_OK) status = tp_safetensors_open(ctx, path, &shard);
    if (status == TP_OK) {
        status = add_tensors(l, shard);
        tp_safetensors_close(shard);
    }
    tp_free(path);
    tp_free(file);
    return status;
}

/* Every file that the index names, once. */
static tp_status add_shards(tp_ctx *ctx, const char *folder, const tp_json_doc *index, tp_map *seen, struct listing *l)
{
    const tp_json *weights = tp_json_get(tp_json_root(index), "weight_map");
    char where[512];
    if (tp_json_type_of(weights) != TP_JSON_OBJECT)
        return tp_fail(ctx, TP_FORMAT, "%s: weight_map: expected an object with tensor names and files",
                       tp_json_where(index, weights != NULL ? weights : tp_json_root(index), where, sizeof where));
    for (size_t i = 0; i < tp_json_count(weights); i++) {
        tp_span name = tp_json_string(tp_json_at(weights, i));
        int64_t known;
        if (name.len == 0)
            return tp_fail(ctx, TP_FORMAT, "%s: weight_map: expected the name of a file",
                           tp_json_where(index, tp_json_at(weights, i), where, sizeof where));
        if (tp_map_get(seen, name, &known)) continue;
        TP_TRY(tp_map_put(ctx, seen, name, 1, NULL));
        TP_TRY(add_shard(ctx, folder, name, l));
    }
    return TP_OK;
}

static tp_status inspect_shards(tp_ctx *ctx, const char *folder, struct listing *l)
{
    char *path = tp_path_join(ctx, folder, "model.safetensors.index.json");
    tp_json_doc *index = NULL;
    tp_map *seen = tp_map_new(ctx, true);
    tp_status status = path != NULL && seen != NULL ? tp_json_read(ctx, path, (size_t)64 << 20, &index) : TP_NOMEM;
    if (status == TP_OK) {
        const tp_json *metadata = tp_json_get(tp_json_root(index), "metadata");
        if (l->json) tp_buf_text(l->out, "\"format\": \"safetensors\", \"metadata\": ");
        if (l->json && metadata != NULL) tp_json_write(l->out, metadata, 0);
        if (l->json) tp_buf_text(l->out, metadata != NULL ? ", \"tensors\": [" : "{}, \"tensors\": [");
        status = add_shards(ctx, folder, index, seen, l);
        if (l->json)
            tp_buf_char(l->out, ']');
        else
            tp_buf_printf(l->out, "safetensors in %zu files\n", tp_map_count(seen));
    }
    tp_map_free(seen);
    tp_json_free(index);
    tp_free(path);
    return status;
}

/* ---- the whole ---- */

static tp_status no_kind(tp_ctx *ctx, const char *folder)
{
    bool run = folder_has(ctx, folder, "metrics.jsonl");
    return tp_fail(ctx, TP_IO_READ, "%s: no model, adapter or checkpoint: no config.json, adapter_config.json or state.json%s",
                   folder, run ? " (of a run, inspect adapter/ or a ckpt-...)" : "");
}

static tp_status inspect_folder(tp_ctx *ctx, const char *folder, struct listing *l)
{
    bool checkpoint = folder_has(ctx, folder, "state.json"), adapter = folder_has(ctx, folder, "adapter_config.json");
    bool model = folder_has(ctx, folder, "config.json");
    if (ctx->status != TP_OK) return ctx->status;
    if (!checkpoint && !adapter && !model) return no_kind(ctx, folder);
    tp_buf_text(l->out, l->json ? "\"kind\": " : "");
    tp_buf_printf(l->out, l->json ? "\"%s\", " : "%s\n", checkpoint ? "checkpoint" : adapter ? "adapter" : "model");
    if (checkpoint) {
        tp_run_state state;
        TP_TRY(tp_publish_verify(ctx, folder, NULL));
        TP_TRY(tp_checkpoint_read_state(ctx, folder, &state));
        TP_TRY(put_json_file(ctx, folder, "state.json", "state", l));
    }
    if (adapter) {
        tp_adapter_config config;
        TP_TRY(tp_adapter_config_read(ctx, folder, &config)); /* the same checks as on loading */
        tp_adapter_config_free(&config);
        TP_TRY(put_json_file(ctx, folder, "adapter_config.json", "config", l));
        if (!l->json)
            tp_buf_text(l->out, "  accepted by: tapeft, PEFT\n");
        else
            tp_buf_text(l->out, "\"accepted_by\": [\"tapeft\", \"peft\"], ");
        return inspect_file_in(ctx, folder, "adapter_model.safetensors", l);
    }
    TP_TRY(put_json_file(ctx, folder, "config.json", "config", l));
    bool single = folder_has(ctx, folder, "model.safetensors");
    if (ctx->status != TP_OK) return ctx->status;
    return single ? inspect_file_in(ctx, folder, "model.safetensors", l) : inspect_shards(ctx, folder, l);
}

static bool is_gguf(const char *path)
{
    char magic[4] = "";
    FILE *file = tp_ends_with(path, ".gguf") ? NULL : fopen(path, "rb");
    if (file == NULL) return tp_ends_with(path, ".gguf");
    bool yes = fread(magic, 1, 4, file) == 4 && memcmp(magic, "GGUF", 4) == 0;
    fclose(file);
    return yes;
}

/* Names and metadata come from strangers: on a terminal their control characters are shown, not obeyed. */
static tp_status print(tp_ctx *ctx, const struct listing *l)
{
    tp_buf shown;
    if (l->json) return tp_cli_print(ctx, l->out->data, l->out->len);
    tp_buf_init(&shown, 0);
    tp_cli_show_text(&shown, l->out->data, l->out->len);
    tp_status status = tp_buf_status(ctx, &shown, "result");
    if (status == TP_OK) status = tp_cli_print(ctx, shown.data, shown.len);
    tp_buf_free(&shown);
    return status;
}

static tp_status inspect(const char *path, struct listing *l)
{
    if (tp_path_is_folder(path)) return inspect_folder(l->ctx, path, l);
    return is_gguf(path) ? inspect_gguf(l->ctx, path, l) : inspect_safetensors(l->ctx, path, l);
}

tp_status tp_cli_inspect(tp_ctx *ctx, const char *path, tp_inspection *found)
{
    *found = (tp_inspection){0};
    tp_buf_init(&found->json, 0);
    struct listing l = {.ctx = ctx, .out = &found->json, .json = true, .found = found};
    tp_buf_char(&found->json, '{');
    TP_TRY(inspect(path, &l));
    tp_buf_char(&found->json, '}');
    return tp_buf_status(ctx, &found->json, path);
}

void tp_cli_inspection_free(tp_inspection *found)
{
    for (size_t i = 0; i < found->n; i++) tp_free(found->places[i].path);
    tp_free(found->places);
    tp_buf_free(&found->json);
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    const char *path = args->positional[0], *other = tp_args_value(args, "diff");
    bool json = tp_args_has(args, "json"), tensors = tp_args_has(args, "tensors");
    if (other != NULL) return tp_cli_diff(ctx, path, other, json, tensors);
    tp_buf out;
    tp_buf_init(&out, 0);
    struct listing l = {.ctx = ctx, .out = &out, .json = json, .tensors = tensors};
    if (l.json) tp_buf_char(&out, '{');
    tp_status status = inspect(path, &l);
    char bytes[32];
    if (l.json)
        tp_buf_text(&out, "}\n");
    else
        tp_buf_printf(&out, "%zu tensors, %s%s\n", l.n, tp_format_bytes(l.bytes, bytes),
                      l.tensors ? "" : " (--tensors lists them)");
    if (status == TP_OK) status = tp_buf_status(ctx, &out, path);
    if (status == TP_OK) status = print(ctx, &l);
    tp_buf_free(&out);
    return status;
}

static const tp_flag flags[] = {
    {"tensors", NULL, false, false, "list every tensor"},
    {"diff", "OTHER", false, false, "in what it differs from OTHER: settings, tensors, values"},
    TP_FLAG_JSON,
    TP_FLAG_END,
};

const tp_command tp_command_inspect = {"inspect",
                                       "PATH [--tensors] [--diff OTHER] [--json]",
                                       "what is in a safetensors or GGUF file, adapter, checkpoint or model",
                                       flags,
                                       1,
                                       1,
                                       run};
